"""torch.compile: one wrapper, and a trial of the compiler before a run depends on it."""

import logging
import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from zangchat.runtime import collectives

BACKEND = "inductor"

logger = logging.getLogger(__name__)


@lru_cache
def compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    """The function specialised for its first shape; if others come, once more for all of them."""
    return torch.compile(function, backend=backend)


def working_backend(requested: bool | None, device: torch.device) -> Any:
    """The backend for torch.compile, or None: as `requested`, by default on CUDA only, and with a
    warning if a small compilation fails. All ranks call this and get the same answer."""
    if not (device.type == "cuda" if requested is None else requested):
        return None
    failures = [why for why in collectives.gather(compile_failure(device)) if why]
    if not failures:
        return BACKEND
    if collectives.world()[0] == 0:
        causes = "no C compiler, no Python.h (package python3-dev), no Triton, or a GPU too old"
        logger.warning(f"not compiling, which is slower: {failures[0]}; usual causes: {causes}")
    return None


def compile_failure(device: torch.device) -> str | None:
    """None if a function can be compiled and run on the device, else the reason."""
    # new code each time: that of an earlier run is cached, and proves nothing about today
    never_seen = 1 + (time.time_ns() ^ os.getpid()) % 2**40 / 2**40

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * never_seen).sin().sum(dim=-1)

    try:
        x = torch.ones(64, 64, device=device)
        result = torch.compile(function, backend=BACKEND)(x)
        error = float((result - function(x)).abs().max())
    except Exception as problem:  # any part of the toolchain may be missing or broken
        cause = getattr(problem, "inner_exception", problem)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
    return None if error < 1e-3 else f"a compiled function is off by {error:.2g}"

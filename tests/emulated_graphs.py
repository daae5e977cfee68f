"""CUDA graphs emulated on a CPU: a captured pass is replayed operation by operation, in the memory
of its capture, without running its Python code again.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zangchat.engine import runner
from zangchat.engine.cuda import DecodeGraphs


class EmulatedGraph(TorchDispatchMode):
    """Records the operations of a pass; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, out in self.calls:
            for old, new in zip(
                tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True
            ):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    """A stream or an event: work on a CPU is done when the call returns."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None: ...


class Captures:
    """The captures of an emulation."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.number = self.running = self.most_at_once = 0
        self.modes: set[str] = set()

    @contextlib.contextmanager
    def graph(self, graph: EmulatedGraph, pool: Any, stream: Stream, mode: str) -> Iterator[None]:
        self.number += 1
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        self.modes.add(mode)
        time.sleep(self.pause)
        with graph:
            yield
        self.running -= 1


@contextlib.contextmanager
def emulated_graphs(pause: float = 0.0) -> Iterator[Captures]:
    """Every Runner decodes by emulated graphs. `pause`: seconds of a capture."""
    captures, made = Captures(pause), runner.Runner.__init__

    def with_graphs(self: Any, model: Any) -> None:
        made(self, model)
        self.graphs = DecodeGraphs(model, self.cache)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.Runner, "__init__", with_graphs)
        patch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "graph", captures.graph)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        yield captures

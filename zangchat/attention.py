"""One attention interface, several backends.

`sdpa` (torch's scaled_dot_product_attention) runs everywhere and is the default. `flex` (torch's flex_attention) and `flash`
(flash-attn 4 or 3, where installed) compute the same function for the plain causal case; anything with a mask goes through sdpa.
A backend is a value: `choose_backend` picks one by running a small problem through it and comparing with sdpa, because that an
import works proves nothing about the kernel, the driver or the GPU.

Shapes: B batch, H query heads, G key/value heads (G divides H), T new tokens, S tokens attended to, D head dimension.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("sdpa", "flex", "flash")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, S, D) -> (B, H, T, D); query head h reads key/value head h // (H/G).

    `mask` is boolean, broadcastable to (B, H, T, S), True where attention is allowed. Without a mask attention is causal and the
    T queries are the last T of the S positions.
    """
    T, S = q.size(-2), k.size(-2)
    if T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    if mask is None and T == S and T > 1:
        return _causal_kernel(backend)(q, k, v)
    if mask is None and T > 1:  # a chunk after stored tokens: is_causal of SDPA would align the triangle at the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


class WithinDocuments:
    """Attention that stays within each document of a row, for gpt.GPT in the place of a cache. A document begins with the token `start`.

    Positions go on through the row: rotary attention sees their differences alone.
    """

    def __init__(self, idx: Tensor, start: int) -> None:
        document = (idx == start).cumsum(dim=1)  # (B, T)
        self.mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        self.positions, self.longest = torch.zeros_like(idx[:, 0]), 0

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return k, v, self.mask

    def advance(self, num_tokens: int) -> None:
        """Nothing is stored."""


def choose_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int, preferred: str | None = None) -> tuple[str, str]:
    """(backend, reason): the fastest backend that is proven to work here, and one sentence for the log.

    `preferred` names the backend to try; by default `flash` is tried on CUDA in 16-bit types, and everything else uses sdpa.
    Raises ValueError for an unknown name.
    """
    device = torch.device(device)
    if preferred is not None and preferred not in BACKENDS:
        raise ValueError(f"unknown attention backend {preferred!r}; there are {', '.join(BACKENDS)}")
    if preferred is None:
        if device.type != "cuda":
            return "sdpa", f"sdpa: the one kernel for {device.type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return "sdpa", f"sdpa: flash-attn has no kernel for {dtype}"
        preferred = "flash"
    if preferred == "sdpa":
        return "sdpa", "sdpa: as asked"
    failure = _smoke(preferred, device, dtype, head_dim)
    if failure is None:
        return preferred, f"{preferred}: forward and backward agree with sdpa in a trial run"
    return "sdpa", f"sdpa: {preferred} is not usable here ({failure})"


def _smoke(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if the backend's output and gradients agree with sdpa's on a small problem, else what went wrong."""
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = ((1, 2, 128, head_dim), (1, 1, 128, head_dim), (1, 1, 128, head_dim))
    inputs = [torch.randn(s, generator=generator, device=device, dtype=torch.float32).to(dtype) for s in shapes]
    results = []
    try:
        for name in (backend, "sdpa"):
            q, k, v = (t.clone().requires_grad_() for t in inputs)
            out = attend(q, k, v, backend=name)
            results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    except Exception as error:  # any failure of a third-party kernel means the same: do not use it; the reason is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    # float32 kernels may sum in another order or use TF32; 16-bit ones round at 2^-8 (bf16) several times
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    return None if worst <= tolerance else f"it differs from sdpa by {worst:.2g}"


@cache
def _causal_kernel(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The causal self-attention function (T == S) of one backend. Raises ImportError where a package is missing."""
    if backend == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    if backend == "flex":
        return _flex_kernel()
    if backend == "flash":
        return _flash_kernel()
    raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")


def _flex_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    flex: Any = import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)  # uncompiled it materialises the whole score matrix
    block_mask = lru_cache(maxsize=8)(
        lambda T, device: flex.create_block_mask(lambda b, h, i, j: i >= j, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = compiled if q.device.type == "cuda" else flex.flex_attention
        return function(q, k, v, block_mask=block_mask(q.size(-2), q.device), enable_gqa=q.size(1) != k.size(1))

    return run


def _flash_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flash-attn 4 (package flash-attn-4) or 3 (flash_attn_interface), whichever is installed; both want (B, T, H, D)."""
    errors = []
    for module in ("flash_attn.cute", "flash_attn_interface"):
        try:
            function = import_module(module).flash_attn_func
            break
        except (ImportError, AttributeError) as error:
            errors.append(str(error))
    else:
        raise ImportError("no flash-attn 4 or 3: " + "; ".join(errors))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run

"""One attention interface, several backends.

`sdpa` (torch's scaled_dot_product_attention, whatever kernel it takes by itself) runs everywhere and is the default. `cudnn` (cuDNN's
kernel behind it), `flex` (torch's flex_attention), `flash` (flash-attn 4 or 3, where installed) and `blocks` (products of bf16 matrices,
for CPUs) compute the same function for the plain causal case; anything with a mask goes through sdpa. A backend is a value: for training on
a GPU `choose_backend` lets them race, and only those take part whose output and gradients agree with sdpa's, because that an import works
proves nothing about the kernel, the driver or the GPU.

Shapes: B batch, H query heads, G key/value heads (G divides H), T new tokens, S tokens attended to, D head dimension.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zangchat.runtime.devices import device_synchronize

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> output
BACKENDS = ("sdpa", "cudnn", "flex", "flash", "blocks")
BLOCK = 128  # queries that `blocks` takes at a time: few enough for the caches, enough for full-rate products
TRIAL_TOKENS = 2048  # context of the timed trial
TRIAL_HEADS = 64  # heads times rows of it: enough to fill a GPU
TRIALS = 5  # of which the median counts


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "sdpa") -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, S, D) -> (B, H, T, D); query head h reads key/value head h // (H/G).

    `mask` is boolean, broadcastable to (B, H, T, S), True where attention is allowed. Without a mask attention is causal and the
    T queries are the last T of the S positions. Keys and values of another dtype than q decide in which one it is computed.
    """
    if q.dtype != k.dtype:
        return attend(q.to(k.dtype), k, v, mask, backend).to(q.dtype)
    T, S = q.size(-2), k.size(-2)
    if T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    if mask is None and T == S and T > 1:
        return _causal_kernel(backend)(q, k, v)
    if mask is None and T > 1:  # a chunk after stored tokens: is_causal of SDPA would align the triangle at the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))


class WithinDocuments:
    """Attention that stays within each document of a row: a gpt.AttentionContext.

    A document begins with the token `start`. Positions continue through the row: rotary attention
    only depends on their differences.
    """

    def __init__(self, idx: Tensor, start: int) -> None:
        document = (idx == start).cumsum(dim=1)  # (B, T)
        self.mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        self.positions, self.longest = torch.zeros_like(idx[:, 0]), 0

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return k, v, self.mask

    def advance(self, num_tokens: int) -> None:
        """Does nothing: no token is stored."""


def candidates(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that may be the fastest one there. Deterministic runs do without a race, whose winner may be another one tomorrow,
    and so do CPUs: in bf16 torch's own kernel takes three times as long as `blocks`, in fp32 little longer and keeps less."""
    if torch.device(device).type == "cpu":
        return ("blocks",) if dtype == torch.bfloat16 else ("sdpa",)
    if torch.device(device).type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return ("sdpa",)
    return ("flash", "cudnn", "flex", "sdpa") if dtype in (torch.bfloat16, torch.float16) else ("flex", "sdpa")


def choose_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int, backends: Sequence[str] | None = None) -> tuple[str, str]:
    """(backend, reason): which of `backends` (default: `candidates`) is right and fastest here, and one sentence for the log.

    Each is tried on a small problem, and timed on a larger one if its output and gradients agree with sdpa's. With one that works
    nothing is timed; with none sdpa is taken. Raises ValueError for an unknown name.
    """
    device = torch.device(device)
    backends = candidates(device, dtype) if backends is None else backends
    if unknown := set(backends) - set(BACKENDS):
        raise ValueError(f"unknown attention backend {sorted(unknown)[0]!r}; there are {', '.join(BACKENDS)}")
    failures = {name: _smoke(name, device, dtype, head_dim) for name in backends if name != "sdpa"}
    usable = [name for name in backends if failures.get(name) is None] or ["sdpa"]
    seconds = {name: _seconds(name, device, dtype, head_dim) for name in usable} if len(usable) > 1 else dict.fromkeys(usable, 0.0)
    best = min(usable, key=lambda name: seconds[name])
    reasons = [f"{name} is not usable here ({why})" for name, why in failures.items() if why is not None]
    if len(usable) > 1:
        reasons = [f"forward and backward in {_times(seconds)}", *reasons]
    return best, f"{best}: {'; '.join(reasons) or f'nothing else is tried on {device.type} in {dtype}'}"


def _times(seconds: dict[str, float]) -> str:
    return ", ".join(f"{1000 * value:.2f} ms ({name})" for name, value in sorted(seconds.items(), key=lambda item: item[1]))


def _forward_backward(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k, v."""
    out = attend(q, k, v, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def _smoke(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if the backend's output and gradients agree with sdpa's on a small problem, else what went wrong."""
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = ((1, 2, 128, head_dim), (1, 1, 128, head_dim), (1, 1, 128, head_dim))
    inputs = [torch.randn(s, generator=generator, device=device).to(dtype).requires_grad_() for s in shapes]
    try:
        results = [_forward_backward(name, *inputs) for name in (backend, "sdpa")]
    except Exception as error:  # any failure of a third-party kernel means the same: do not use it; the reason is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    # float32 kernels may sum in another order or use TF32; 16-bit ones round at 2^-8 (bf16) several times
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    return None if worst <= tolerance else f"it differs from sdpa by {worst:.2g}"


def _seconds(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Median time of a forward and backward pass at a realistic size, after one that compiles."""
    shape = (8, TRIAL_HEADS // 8, TRIAL_TOKENS, head_dim)
    inputs = [torch.ones(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    times = []
    for _ in range(1 + TRIALS):
        device_synchronize(device)
        start = time.perf_counter()
        _forward_backward(backend, *inputs)
        device_synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


_kernels: dict[str, Kernel] = {}  # not functools.cache, which torch.compile does not see: it would build them anew


def _causal_kernel(backend: str) -> Kernel:
    """The causal self-attention function (T == S) of one backend. Raises ImportError where a package is missing."""
    if backend not in _kernels:
        _kernels[backend] = _build_kernel(backend)
    return _kernels[backend]


def _build_kernel(backend: str) -> Kernel:
    if backend == "sdpa":
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    if backend == "cudnn":
        return _cudnn_kernel()
    if backend == "flex":
        return _flex_kernel()
    if backend == "flash":
        return _flash_kernel()
    if backend == "blocks":
        return _CausalBlocks.apply
    raise ValueError(f"unknown attention backend {backend!r}; there are {', '.join(BACKENDS)}")


def _cudnn_kernel() -> Kernel:
    """cuDNN's kernel alone: sdpa raises where it does not support the problem."""
    choice: Any = import_module("torch.nn.attention")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with choice.sdpa_kernel(choice.SDPBackend.CUDNN_ATTENTION):
            return _causal_kernel("sdpa")(q, k, v)

    return run


def _flex_kernel() -> Kernel:
    flex: Any = import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)  # uncompiled it materialises the whole score matrix
    block_mask = lru_cache(maxsize=8)(
        lambda T, device: flex.create_block_mask(lambda b, h, i, j: i >= j, B=None, H=None, Q_LEN=T, KV_LEN=T, device=device)
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = compiled if q.device.type == "cuda" else flex.flex_attention
        return function(q, k, v, block_mask=block_mask(q.size(-2), q.device), enable_gqa=q.size(1) != k.size(1))

    return run


def _flash_kernel() -> Kernel:
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


class _CausalBlocks(torch.autograd.Function):
    """Some queries at a time against the keys up to them, in the dtype of q; probabilities are kept for the backward pass.

    Heads that share keys are stacked: N = B*G problems of r = H/G heads each.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, D), G = q.shape, k.size(1)
        q, k, v = q.reshape(B * G, H // G, T, D), k.reshape(B * G, T, D), v.reshape(B * G, T, D)
        out = q.new_empty(B, T, H, D).transpose(1, 2)  # in memory as the next layer wants it
        later = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
        kept = []
        for start, end in _blocks(T):
            size = end - start
            queries = q[:, :, start:end].flatten(1, 2)  # (N, r * size, D)
            scores = torch.baddbmm(q.new_empty(()), queries, k[:, :end].mT, beta=0, alpha=D**-0.5)
            scores.unflatten(1, (-1, size))[..., start:].add_(later[:size, :size])
            p = scores.softmax(-1)
            out[:, :, start:end] = (p @ v[:, :end]).view(B, H, size, D)
            kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, *kept = ctx.saved_tensors
        B, G = grad.size(0), q.size(0) // grad.size(0)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scale = q.size(-1) ** -0.5
        for (start, end), p in zip(_blocks(q.size(2)), kept, strict=True):
            queries = q[:, :, start:end].flatten(1, 2)
            dout = grad[:, :, start:end].reshape(queries.shape)
            dp = dout @ v[:, :end].mT
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # p * (dp - sum(p * dp))
            dq[:, :, start:end] = (dscores @ k[:, :end]).unflatten(1, (-1, end - start))
            dk[:, :end] += dscores.mT @ queries
            dv[:, :end] += p.mT @ dout
        return dq.view(grad.shape), dk.unflatten(0, (B, G)), dv.unflatten(0, (B, G))


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]

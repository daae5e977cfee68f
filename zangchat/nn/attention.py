"""One attention interface, several backends.

`sdpa` (torch's scaled_dot_product_attention with the kernel it chooses) runs everywhere and is the
default. `cudnn` (its cuDNN kernel), `flex` (torch's flex_attention), `flash` (flash-attn 4 or 3, if
installed) and `blocks` (products of bf16 matrices, for CPUs) compute the same function for plain
causal attention; with a mask sdpa is used. A backend is a value: to train on a GPU,
`choose_backend` times those whose output and gradients agree with sdpa's, because a successful
import proves nothing about the kernel, the driver or the GPU.

Shapes: B batch, H query heads, G key/value heads (G divides H), T new tokens, S tokens attended to,
D head dimension.
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
BLOCK = 128  # queries at a time in `blocks`: they fit the caches, and products run at full rate
TRIAL_TOKENS = 2048  # context of the timed trial
TRIAL_HEADS = 64  # times rows: enough to fill a GPU
TRIALS = 5  # for a median


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "sdpa"
) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, S, D) -> (B, H, T, D).

    Query head h reads key/value head h // (H/G). `mask` is broadcastable to (B, H, T, S): boolean,
    True to attend, or to be added. Without one attention is causal and the T queries are the last T
    of the S positions. The computation runs in the dtype of the keys and values.
    """
    if q.dtype != k.dtype:
        return attend(q.to(k.dtype), k, v, mask, backend).to(q.dtype)
    T, S = q.size(-2), k.size(-2)
    if T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    if mask is None and T == S and T > 1:
        return _causal_kernel(backend)(q, k, v)
    if mask is None and T > 1:  # is_causal of SDPA would align the triangle at the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1)
    )


class WithinDocuments:
    """Attention that stays within each document of a row: a gpt.AttentionContext.

    A document begins with the token `start`. Positions continue through the row: rotary attention
    only depends on their differences.
    """

    def __init__(self, idx: Tensor, start: int) -> None:
        document = (idx == start).cumsum(dim=1)  # (B, T)
        self.mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        self.positions, self.longest = torch.zeros_like(idx[:, 0]), 0

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # noqa: ARG002
        return k, v, self.mask

    def advance(self, num_tokens: int) -> None:
        """Does nothing: no token is stored."""


def candidates(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that may be the fastest.

    One for deterministic runs, as the fastest may change from run to run. One for CPUs: in bf16
    torch's kernel takes three times as long as `blocks`, in fp32 little longer, with less memory.
    """
    if torch.device(device).type == "cpu":
        return ("blocks",) if dtype == torch.bfloat16 else ("sdpa",)
    if torch.device(device).type != "cuda" or torch.are_deterministic_algorithms_enabled():
        return ("sdpa",)
    return (
        ("flash", "cudnn", "flex", "sdpa")
        if dtype in (torch.bfloat16, torch.float16)
        else ("flex", "sdpa")
    )


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    backends: Sequence[str] | None = None,
) -> tuple[str, str]:
    """(the fastest correct one of `backends`, default `candidates`; the reason, for the log).

    Those whose output and gradients agree with sdpa's on a small problem are timed on a larger one.
    If only one works, nothing is timed; if none, it is sdpa. Raises ValueError for an unknown name.
    """
    device = torch.device(device)
    backends = candidates(device, dtype) if backends is None else backends
    if unknown := set(backends) - set(_BUILDERS):
        raise ValueError(
            f"unknown attention backend {sorted(unknown)[0]!r}; there are {', '.join(_BUILDERS)}"
        )
    failures = {name: _smoke(name, device, dtype, head_dim) for name in backends if name != "sdpa"}
    usable = [name for name in backends if failures.get(name) is None] or ["sdpa"]
    reasons = [f"{name} is not usable here ({why})" for name, why in failures.items() if why]
    best = usable[0]
    if len(usable) > 1:
        seconds = {name: _seconds(name, device, dtype, head_dim) for name in usable}
        ranking = sorted(usable, key=lambda name: seconds[name])
        best = ranking[0]
        times = ", ".join(f"{1000 * seconds[name]:.2f} ms ({name})" for name in ranking)
        reasons = [f"forward and backward in {times}", *reasons]
    reason = "; ".join(reasons) or f"nothing else is tried on {device.type} in {dtype}"
    return best, f"{best}: {reason}"


def _forward_backward(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k, v."""
    out = attend(q, k, v, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def _smoke(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if output and gradients agree with sdpa's on a small problem, else the problem."""
    generator = torch.Generator(device=device).manual_seed(0)
    shapes = ((1, 2, 128, head_dim), (1, 1, 128, head_dim), (1, 1, 128, head_dim))
    draws = (torch.randn(s, generator=generator, device=device) for s in shapes)
    inputs = [draw.to(dtype).requires_grad_() for draw in draws]
    try:
        results = [_forward_backward(name, *inputs) for name in (backend, "sdpa")]
    except Exception as error:  # any failure of a third-party kernel: do not use it, and say why
        message = str(error) or "no message"
        return f"{type(error).__name__}: {message.splitlines()[0]}"
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    # fp32 kernels may sum in another order or use TF32; 16-bit ones round at 2^-8 several times
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    return None if worst <= tolerance else f"it differs from sdpa by {worst:.2g}"


def _seconds(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Median time of a forward and backward pass at a realistic size, without compilation."""
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


_kernels: dict[str, Kernel] = {}  # not functools.cache: torch.compile does not see it


def _causal_kernel(backend: str) -> Kernel:
    """The causal self-attention (T == S) of a backend. Raises ImportError if a package is
    missing.
    """
    if backend not in _kernels:
        if backend not in _BUILDERS:
            raise ValueError(
                f"unknown attention backend {backend!r}; there are {', '.join(_BUILDERS)}"
            )
        _kernels[backend] = _BUILDERS[backend]()
    return _kernels[backend]


def _sdpa_kernel() -> Kernel:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1)
    )


def _cudnn_kernel() -> Kernel:
    """cuDNN's kernel only: sdpa raises if it does not support the problem."""
    choice: Any = import_module("torch.nn.attention")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with choice.sdpa_kernel(choice.SDPBackend.CUDNN_ATTENTION):
            return _causal_kernel("sdpa")(q, k, v)

    return run


def _flex_kernel() -> Kernel:
    flex: Any = import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)  # eager makes all scores at once

    @lru_cache(maxsize=8)
    def causal(T: int, device: torch.device) -> Any:
        return flex.create_block_mask(lambda _b, _h, i, j: i >= j, None, None, T, T, device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = compiled if q.device.type == "cuda" else flex.flex_attention
        mask = causal(q.size(-2), q.device)
        return function(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))

    return run


def _flash_kernel() -> Kernel:
    """The installed one of flash-attn 4 (package flash-attn-4) and 3; both take (B, T, H, D)."""
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
    """BLOCK queries at a time against the keys up to them, in the dtype of q.

    The backward pass reuses the probabilities. Heads that share keys are stacked: N = B*G problems
    of r = H/G heads each.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, H, T, D), G = q.shape, k.size(1)
        q, k, v = q.reshape(B * G, H // G, T, D), k.reshape(B * G, T, D), v.reshape(B * G, T, D)
        out = q.new_empty(B, T, H, D).transpose(1, 2)  # the memory layout of the next layer
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
            # the derivative of softmax: p * (dp - sum(p * dp))
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
            dq[:, :, start:end] = (dscores @ k[:, :end]).unflatten(1, (-1, end - start))
            dk[:, :end] += dscores.mT @ queries
            dv[:, :end] += p.mT @ dout
        return dq.view(grad.shape), dk.unflatten(0, (B, G)), dv.unflatten(0, (B, G))


def _blocks(T: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


_BUILDERS: dict[str, Callable[[], Kernel]] = {
    "sdpa": _sdpa_kernel,
    "cudnn": _cudnn_kernel,
    "flex": _flex_kernel,
    "flash": _flash_kernel,
    "blocks": lambda: _CausalBlocks.apply,
}

"""One attention interface, several backends.

`sdpa` (torch's scaled_dot_product_attention with the kernel it chooses) runs everywhere and is the
default. For plain causal attention there are also single kernels of torch's: `flash`, `FA3` and
`FA4` (the same operation by flash-attn 3 or 4, if installed) and `cudnn`; and `blocks` (products of
bf16 matrices, for CPUs). A backend is a value: to train on a GPU, `choose_backend` times those
whose output and gradients agree with sdpa's, because a successful import proves nothing about the
kernel, the driver or the GPU.

Shapes: B batch, H query heads, G key/value heads (G divides H), T new tokens, S tokens attended to,
D head dimension.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from zangchat.runtime import collectives
from zangchat.runtime.devices import device_synchronize

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> output
Attended = tuple[Tensor, Tensor, Tensor | None]  # keys, values (B, G, S, D), mask
BLOCK = 128  # queries at a time in `blocks`: they fit the caches, and products run at full rate
TRIAL_TOKENS = 2048  # context of the timed trial
TRIAL_HEADS = 64  # times rows: enough to fill a GPU
TRIALS = 5  # for a median
# cuDNN builds a plan for each (B, T, S), 23 to 37 ms on an H100: for training's one shape only
WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class AttentionContext(Protocol):
    """The tokens that new ones attend to besides those of their pass: a cache, a prefix, a mask."""

    positions: Tensor  # (B,) int64: the position of each row's first new token
    longest: int  # at least the largest of `positions`, known without asking the device

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> Attended:
        """The new tokens' k, v (B, G, T, D) -> keys and values (B, G, S, D) to attend to, and a
        mask (B, 1, T, S), None for plain causal attention. For a model with `key_offset` the keys
        come as they are and leave by `offset_keys`."""

    def advance(self, num_tokens: int) -> None:  # noqa: ARG002
        """T more tokens were read in every row; called once, after the last layer."""
        return  # nothing to do for a context that does not keep them


class WithinDocuments(AttentionContext):
    """Attention that stays within each document of a row; a document begins with the token `start`.

    Positions continue through the row: rotary attention only depends on their differences.
    """

    def __init__(self, idx: Tensor, start: int, key_offset: bool = False) -> None:
        self.first = (idx == start)[:, None, :, None] if key_offset else None  # (B, 1, T, 1)
        document = (idx == start).cumsum(dim=1)  # (B, T)
        self.mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        self.positions, self.longest = torch.zeros_like(idx[:, 0]), 0

    def update(self, layer_idx: int, k: Tensor, v: Tensor) -> Attended:  # noqa: ARG002
        if self.first is not None:
            k = torch.where(self.first, k, offset_keys(k))
        return k, v, self.mask


def keys_and_values(new: Tensor, B: int) -> tuple[Tensor, Tensor]:
    """Side by side, (B x T, 2 x G, D) -> views (B, G, T, D) of each."""
    k, v = new.view(B, -1, *new.shape[1:]).transpose(1, 2).chunk(2, dim=1)
    return k, v


def offset_keys(k: Tensor, before: Tensor | None = None) -> Tensor:
    """k (B, G, T, D) with the second half of its channels moved on by one token.

    `before` (B, G, 1, D/2) is the half of the token before these; without one the first token keeps
    its own. So one layer finds what followed a token that occurs again, for which two are needed
    otherwise (modded-nanogpt's partial key offset).
    """
    own, moved = k.chunk(2, dim=-1)
    first = moved[:, :, :1] if before is None else before
    return torch.cat([own, torch.cat([first, moved[:, :, :-1]], dim=2)], dim=-1)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, backend: str = "sdpa"
) -> Tensor:
    """Softmax attention of q (B, H, T, D) over k, v (B, G, S, D) -> (B, H, T, D).

    Query head h reads key/value head h // (H/G). `mask` is broadcastable to (B, H, T, S): boolean,
    True to attend, or to be added. Without one attention is causal and the T queries are the last T
    of the S positions. The computation runs in the dtype of the keys and values. With a mask, and
    for the changing shapes of passes without gradients on a GPU, the backend is sdpa.
    """
    if q.dtype != k.dtype:
        return attend(q.to(k.dtype), k, v, mask, backend).to(q.dtype)
    _check_known((backend,))
    T, S = q.size(-2), k.size(-2)
    if T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    if mask is None and T == S and T > 1:
        reads_only = q.is_cuda and not torch.is_grad_enabled()
        return _KERNELS["sdpa" if reads_only else backend](q, k, v)
    if mask is None and T > 1:  # is_causal of SDPA would align the triangle at the wrong corner
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return _sdpa(q, k, v, attn_mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, kernels: Any = WITHOUT_PLANS, **how: Any) -> Tensor:
    """torch's function by one of `kernels`; raises RuntimeError if none supports the problem."""
    groups, masked = q.size(1) // k.size(1), how.get("attn_mask") is not None
    if groups > 1 and q.is_cuda and (masked or q.dtype == torch.float32):  # only flash knows groups
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    elif groups > 1:  # as a value it would be symbolic while torch compiles for all sizes
        how["enable_gqa"] = True
    with sdpa_kernel(kernels) if q.is_cuda or kernels is not WITHOUT_PLANS else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, **how)


def _check_known(backends: Sequence[str]) -> None:
    if unknown := [name for name in backends if name not in _KERNELS]:
        known = ", ".join(_KERNELS)
        raise ValueError(f"unknown attention backend {unknown[0]!r}; there are {known}")


# ---- the choice ----------------------------------------------------------------------------------


def candidates(device: torch.device | str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that may be the fastest.

    One for deterministic runs, as the fastest may change from run to run. One for CPUs: in bf16
    torch's kernel takes three times as long as `blocks`, in fp32 little longer, with less memory.
    """
    kind = torch.device(device).type
    if kind == "cpu" and dtype == torch.bfloat16:
        return ("blocks",)
    in_16_bits = dtype in (torch.bfloat16, torch.float16)
    if kind != "cuda" or not in_16_bits or torch.are_deterministic_algorithms_enabled():
        return ("sdpa",)
    return ("FA4", "FA3", "flash", "cudnn", "sdpa")


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    backends: Sequence[str] | None = None,
) -> tuple[str, str]:
    """(the fastest correct one of `backends`, default `candidates`; the reason, for the log).

    Those whose output and gradients agree with sdpa's on a small problem are timed on a larger one.
    If only one works, nothing is timed; if none, it is sdpa. Rank 0 chooses for all ranks, which
    call this together. Raises ValueError for an unknown name.
    """
    device = torch.device(device)
    backends = candidates(device, dtype) if backends is None else backends
    _check_known(backends)
    is_first = collectives.world()[0] == 0
    own = _fastest(device, dtype, head_dim, backends) if is_first else ("", "")
    best, reason = collectives.from_rank_0(own)
    activate(best)
    return best, f"{best}: {reason}"


def _fastest(
    device: torch.device, dtype: torch.dtype, head_dim: int, backends: Sequence[str]
) -> tuple[str, str]:
    failures = {name: _smoke(name, device, dtype, head_dim) for name in backends if name != "sdpa"}
    usable = [name for name in backends if failures.get(name) is None] or ["sdpa"]
    reasons = [f"{name} is not usable here ({why})" for name, why in failures.items() if why]
    if len(usable) > 1:
        seconds = {name: _seconds(name, device, dtype, head_dim) for name in usable}
        usable.sort(key=lambda name: seconds[name])
        times = ", ".join(f"{1000 * seconds[name]:.2f} ms ({name})" for name in usable)
        reasons = [f"forward and backward in {times}", *reasons]
    nothing = f"nothing else is tried on {device.type} in {dtype}"
    return usable[0], "; ".join(reasons) or nothing


def activate(backend: str) -> None:
    """Make torch's only flash operation the backend's. Raises an error if it is missing."""
    wanted = backend if backend in ("FA3", "FA4") else None
    if wanted == getattr(torch_attention, "current_flash_attention_impl", lambda: None)():
        return
    restore = torch_attention.restore_flash_attention_impl  # not in torch 2.10: then FA4 would stay
    torch_attention.activate_flash_attention_impl(wanted) if wanted else restore()


def _trial_inputs(
    shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """Normal draws of q, k, v, each (B, heads, T, D) in the memory order of the model's."""
    generator = torch.Generator(device=device).manual_seed(0)
    draws = (
        torch.randn(B, T, heads, D, generator=generator, device=device) for B, heads, T, D in shapes
    )
    return [draw.to(dtype).transpose(1, 2).requires_grad_() for draw in draws]


def _forward_backward(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k, v."""
    activate(backend)
    out = attend(q, k, v, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))]


def _smoke(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if output and gradients agree with sdpa's on a small problem, else the problem."""
    try:
        inputs = _trial_inputs([(1, heads, 128, head_dim) for heads in (2, 1, 1)], device, dtype)
        results = [_forward_backward(name, *inputs) for name in (backend, "sdpa")]
    except Exception as error:  # any failure of a kernel: do not use it, and say why
        message = str(error) or "no message"
        return f"{type(error).__name__}: {message.splitlines()[0]}"
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))
    # fp32 kernels may sum in another order or use TF32; 16-bit ones round at 2^-8 several times
    tolerance = 5e-3 if dtype == torch.float32 else 5e-2
    return None if worst <= tolerance else f"it differs from sdpa by {worst:.2g}"


def _seconds(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Median time of a forward and backward pass at a realistic size, without compilation."""
    inputs = _trial_inputs([(8, TRIAL_HEADS // 8, TRIAL_TOKENS, head_dim)] * 3, device, dtype)
    times = []
    for _ in range(1 + TRIALS):
        device_synchronize(device)
        start = time.perf_counter()
        _forward_backward(backend, *inputs)
        device_synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class _CausalBlocks(torch.autograd.Function):
    """BLOCK queries at a time against the keys up to them, in the dtype of q; heads that share keys
    are stacked: N = B*G problems of r = H/G heads. The backward pass reuses the probabilities."""

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


_FLASH: Kernel = partial(_sdpa, kernels=SDPBackend.FLASH_ATTENTION, is_causal=True)
_KERNELS: dict[str, Kernel] = {  # causal self-attention (T == S)
    "sdpa": partial(_sdpa, is_causal=True),
    "flash": _FLASH,
    "FA3": _FLASH,
    "FA4": _FLASH,
    "cudnn": partial(_sdpa, kernels=SDPBackend.CUDNN_ATTENTION, is_causal=True),
    "blocks": lambda q, k, v: _CausalBlocks.apply(q, k, v),
}

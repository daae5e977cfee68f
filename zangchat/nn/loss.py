"""Softcap and cross-entropy over a large vocabulary, a chunk of tokens at a time.

loss_i = logsumexp(u_i) - u_i[target_i]  with  u = cap * tanh(z / cap),  z = x W^T.

The (tokens, vocabulary) matrix is the biggest tensor of a training step by far, so it never exists whole: each chunk of tokens gets
its logits, its loss and, in training, at once the gradient with respect to its logits, from which dx and dW follow. The products run
in the dtype of x; cap, exponentials, sums and dW are fp32. Between the products a chunk is read and written by passes in place, or,
compiled, read once for the loss and once for the gradient: on a GPU that is the difference between waiting for memory and for the
products. The slow twin is tests/reference/loss.py.

Shapes: N tokens, D width, V vocabulary (padding rows of W cut).
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

IGNORE = -1  # a target that carries no loss
MAX_CAP = 40.0  # exp(u - cap) >= exp(-2 cap) must stay a normal fp32 number


def softcapped_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    cap: float,
    reduction: str = "mean",
    weights: Tensor | None = None,
    chunk_tokens: int | None = None,
    cast: Tensor | None = None,
    compile_backend: Any = None,
) -> Tensor:
    """Cross-entropy of softcapped logits; fp32, differentiable in x and weight.

    x (N, D) in the compute dtype; weight (rows >= vocab_size, D), of which the first vocab_size rows are used; targets (N,) with -1
    for ignored; weights (N,), optional factors on each token's loss (not differentiated). `reduction` is "sum", "mean" (the
    sum divided by the number of targets that are not ignored; 0 where all are) or "none" ((N,), 0 where ignored). `cast` is the weight in
    the dtype of x, where the caller has it. `compile_backend`: what torch.compile is to fuse the passes between the products by.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    if not 0 < cap <= MAX_CAP:
        raise ValueError(f"the logit cap must lie in (0, {MAX_CAP:g}], not {cap}")
    supervised = targets != IGNORE
    count = supervised.sum().clamp(min=1)
    factors = supervised.float() if weights is None else supervised * weights.detach().float()
    if chunk_tokens is None:
        chunk_tokens = _default_chunk(vocab_size, x.device, compile_backend is not None)
    if reduction != "none" and x.device.type == "cpu":
        # most targets of a conversation are ignored: skip their products (on a GPU finding them would wait for the device)
        kept = _kept_tokens(supervised, min(chunk_tokens, 128))
        if kept.numel() < targets.numel():
            x, targets, factors = x[kept], targets[kept], factors[kept]
    # within the Function gradients look switched off, so whether they are wanted is found out here
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    mode = "none" if reduction == "none" else "sum with gradients" if wanted else "sum"
    w = (weight if cast is None else cast).detach().to(x.dtype)
    loss = _CrossEntropy.apply(x, weight, w, targets, factors, mode, (vocab_size, cap, chunk_tokens, compile_backend))
    return loss / count if reduction == "mean" else loss


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in fp32."""
    return cap * torch.tanh(logits.float() / cap)


def _kept_tokens(supervised: Tensor, multiple: int) -> Tensor:
    """Indices of the True ones in their order, then of as many others as make a multiple (or all there are).

    The others have a factor of 0 and change nothing. They are there because torch keeps the bf16 product that it generates for each
    shape: with a count of its own in every step a small model's process grew to several times its size.
    """
    count = -(-int(supervised.sum()) // multiple) * multiple
    return supervised.byte().argsort(descending=True, stable=True)[:count]


def _default_chunk(vocab_size: int, device: torch.device, compiled: bool) -> int:
    """Tokens per chunk: on a GPU large enough for full-rate GEMMs (2,048 at V = 65,536; compiled, with fewer bytes each, twice as many),
    on a CPU small enough for its caches."""
    elements = 2 ** (28 if compiled else 27) if device.type == "cuda" else 2**22
    return min(max(elements // vocab_size, 64), 8192)


class _CrossEntropy(torch.autograd.Function):
    """Sum over tokens, with gradients made in the forward pass; or per token, with gradients recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w: Tensor, targets: Tensor, factors: Tensor, mode: str, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.mode, ctx.settings, ctx.weight_dtype = mode, settings, weight.dtype
        grads = factors if mode == "sum with gradients" else None
        losses, *ctx.grads = _chunked(x, w, targets, grads, *settings)
        losses = losses * factors
        if mode != "none":
            return losses.sum()
        ctx.save_for_backward(x, w, targets, factors)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.mode != "none":
            dx, dweight = ctx.grads
            if dx is None:
                raise RuntimeError("the loss's gradients were already consumed by an earlier backward pass")
            ctx.grads = (None, None)  # scaled in place below, so usable once
            dx, dweight = dx.mul_(grad.to(dx.dtype)), dweight.mul_(grad)
        else:
            x, w, targets, factors = ctx.saved_tensors
            _, dx, dweight = _chunked(x, w, targets, factors * grad, *ctx.settings)
        return dx, dweight.to(ctx.weight_dtype), None, None, None, None, None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, grads: Tensor | None, vocab_size: int, cap: float, chunk: int, compile_backend: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-token losses (N,) and, given the loss gradient of each token, dx like x and dW like weight, but fp32."""
    w = weight[:vocab_size]
    targets = targets.clamp(min=0)  # ignored tokens: any valid index, their factor is 0
    losses = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    dx = None if grads is None else torch.empty_like(x)
    dweight = None if grads is None else torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    if compile_backend is None:
        between: _InPlace | _Fused = _InPlace(cap, min(chunk, x.size(0)), vocab_size, x.device)
    else:
        between = _Fused(cap, compile_backend)
    for start in range(0, x.size(0), chunk):
        rows = slice(start, start + chunk)
        losses[rows], dz = between(x[rows], w, targets[rows, None], None if grads is None else grads[rows, None])
        if dz is None or dx is None or dweight is None:
            continue
        torch.mm(dz, w, out=dx[rows])
        if x.dtype == torch.float32:
            dweight[:vocab_size].addmm_(dz.T, x[rows])
        else:
            dweight[:vocab_size] += dz.T @ x[rows]
        del dz  # a chunk's logits less while the next ones are made
    return losses, dx, dweight


# ---- between the products: from x (n, D) and W to losses (n,) and dz (n, V), z = x W^T ----------------------------------------------
#
# With s = sigmoid(2 z / cap) is u = cap * (2 s - 1): a sigmoid takes a CPU a seventh of a tanh's time. And u is bounded by cap, so cap
# can take the place of the row maximum in a stable logsumexp. targets and g, the gradient of each loss, are (n, 1).


class _InPlace:
    """Each line is a pass over the chunk's logits; on a CPU it costs about as much as a tenth of the products."""

    def __init__(self, cap: float, chunk: int, vocab_size: int, device: torch.device) -> None:
        self.cap, self.bound = cap, torch.full((), -2 * cap, device=device)
        self.buffers = [torch.empty(chunk, vocab_size, dtype=torch.float32, device=device) for _ in range(2)]

    def __call__(self, x: Tensor, w: Tensor, targets: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        cap = self.cap
        s, e = (buffer[: targets.size(0)] for buffer in self.buffers)
        if x.dtype == torch.float32:
            _product(x, w, 2 / cap, out=s)
        else:
            s.copy_(_product(x, w, 2 / cap))
        torch.add(self.bound, s.sigmoid_(), alpha=2 * cap, out=e).exp_()
        total = e.sum(-1, keepdim=True)
        losses = (total.log() + 2 * cap * (1 - s.gather(1, targets))).squeeze(1)
        if g is None:
            return losses, None
        g = 4 * g
        e.mul_(g / total).scatter_add_(1, targets, -g)  # 4 (softmax - onehot) * g
        return losses, e.mul_(s.addcmul_(s, s, value=-1)).to(x.dtype)  # du/dz = 1 - (2 s - 1)^2 = 4 (s - s^2)


class _Fused:
    """The same as two functions that torch.compile makes a kernel or two of: 6 bytes of traffic for a bf16 logit, not about 70."""

    def __init__(self, cap: float, backend: Any) -> None:
        self.cap, self.backend = cap, backend

    def __call__(self, x: Tensor, w: Tensor, targets: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor | None]:
        z = _product(x, w, 2 / self.cap)
        total, losses = _compiled(_totals_and_losses, self.backend)(z, targets, self.cap)
        return losses, None if g is None else _compiled(_logits_to_gradient, self.backend)(z, total, targets, g, self.cap)


def _totals_and_losses(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Sums of exponentials (n, 1) and losses (n,) from z = 2 x W^T / cap."""
    total = torch.exp(2 * cap * (z.float().sigmoid() - 1)).sum(-1, keepdim=True)
    return total, (total.log() + 2 * cap * (1 - z.gather(1, targets).float().sigmoid())).squeeze(1)


def _logits_to_gradient(z: Tensor, total: Tensor, targets: Tensor, g: Tensor, cap: float) -> Tensor:
    """dz in the place of z."""
    s = z.float().sigmoid()
    onehot = torch.arange(z.size(1), device=z.device) == targets
    return z.copy_((torch.exp(2 * cap * (s - 1)) / total - onehot.float()) * (4 * g) * (s - s * s))


@lru_cache
def _compiled(function: Callable[..., Any], backend: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend)


def _product(x: Tensor, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha * x W^T"""
    return torch.addmm(x.new_empty(()), x, w.T, beta=0, alpha=alpha, out=out)

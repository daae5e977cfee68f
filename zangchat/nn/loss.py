"""Softcap and cross-entropy over a large vocabulary, a chunk of tokens at a time.

loss_i = logsumexp(u_i) - u_i[target_i]  with  u = cap * tanh(z / cap),  z = x W^T.

The (tokens, vocabulary) matrix would be by far the biggest tensor of a training step, so it never
exists as a whole: a chunk of tokens gets its logits, its loss and, in training, at once the
gradient of its logits, from which dx and dW follow. The products run in the dtype of x; cap,
exponentials, sums and dW are fp32. Between the products a chunk is changed by passes in place, or,
compiled, read once for the loss and once for the gradient: on a GPU that decides between waiting
for memory and waiting for the products. The slow twin is tests/reference/loss.py.

Shapes: N tokens, D width, V vocabulary (padding rows of W cut).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from zangchat.runtime.compiler import compiled

IGNORE = -1  # a target that carries no loss
Settings = tuple[int, float, int, Any]  # vocabulary size, cap, tokens in a chunk, torch.compile's
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

    x (N, D) in the compute dtype; weight (rows >= vocab_size, D), cut to vocab_size rows; targets
    (N,), -1 for ignored; weights (N,), factors on each token's loss (not differentiated).
    `reduction`: "sum", "mean" (the sum over the number of targets that are not ignored; 0 if there
    are none) or "none" ((N,), 0 for ignored ones). `cast`: the weight in the dtype of x, if the
    caller has it. `compile_backend`: of torch.compile, to fuse the passes between the products.
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
        # skip the products of ignored targets, which are most of a conversation (on a GPU the host
        # would have to wait for their indices)
        kept = _kept_tokens(supervised, min(chunk_tokens, 128))
        if kept.numel() < targets.numel():
            x, targets, factors = x[kept], targets[kept], factors[kept]
    # here, since within the Function gradients are always disabled
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    mode = "none" if reduction == "none" else "sum with gradients" if needs_grad else "sum"
    w = (weight if cast is None else cast).detach().to(x.dtype)
    settings = (vocab_size, cap, chunk_tokens, compile_backend)
    loss = _CrossEntropy.apply(x, weight, w, targets, factors, mode, settings)
    return loss / count if reduction == "mean" else loss


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap), in fp32."""
    return cap * torch.tanh(logits.float() / cap)


def _kept_tokens(supervised: Tensor, multiple: int) -> Tensor:
    """Indices of the True ones in order, filled up with others to a multiple (or with all others).

    The others have a factor of 0. They limit the number of shapes: torch keeps the bf16 product
    that it generates for each, and a small model's process grew to several times its size.
    """
    count = -(-int(supervised.sum()) // multiple) * multiple
    return supervised.byte().argsort(descending=True, stable=True)[:count]


def _default_chunk(vocab_size: int, device: torch.device, compiled: bool) -> int:
    """On a GPU enough tokens for full-rate GEMMs, on a CPU few enough for its caches."""
    elements = 2 ** (28 if compiled else 27) if device.type == "cuda" else 2**22
    return min(max(elements // vocab_size, 64), 8192)


class _CrossEntropy(torch.autograd.Function):
    """The sum, with gradients from the forward pass; or per token, recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w: Tensor, targets: Tensor, factors: Tensor, *how: Any
    ) -> Tensor:
        mode, settings = ctx.mode, ctx.settings = how
        ctx.weight_dtype = weight.dtype
        grads = factors if mode == "sum with gradients" else None
        losses, *ctx.grads = _chunked(x, w, targets, grads, settings)
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
                raise RuntimeError("an earlier backward pass has consumed the loss's gradients")
            ctx.grads = (None, None)  # scaled in place below: usable once
            dx, dweight = dx.mul_(grad.to(dx.dtype)), dweight.mul_(grad)
        else:
            x, w, targets, factors = ctx.saved_tensors
            _, dx, dweight = _chunked(x, w, targets, factors * grad, ctx.settings)
        return dx, dweight.to(ctx.weight_dtype), None, None, None, None, None


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, grads: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses (N,) and, given the gradient of each, dx like x and dW like weight, but fp32."""
    vocab_size, cap, chunk, compile_backend = settings
    w = weight[:vocab_size]
    targets = targets.clamp(min=0)  # ignored tokens: any valid index, their factor is 0
    losses = x.new_empty(x.size(0), dtype=torch.float32)
    dx = dweight = None
    if grads is not None:
        dx, dweight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
    if compile_backend is None:
        size = (min(chunk, x.size(0)), vocab_size)
        between = partial(_in_place, cap, [losses.new_empty(size) for _ in range(2)])
    else:
        between = partial(_fused, cap, compile_backend)
    for start in range(0, x.size(0), chunk):
        rows = slice(start, start + chunk)
        g = None if grads is None else grads[rows, None]
        losses[rows], dz = between(x[rows], w, targets[rows, None], g)
        if dz is None or dx is None or dweight is None:
            continue
        torch.mm(dz, w, out=dx[rows])
        if x.dtype == torch.float32:
            dweight[:vocab_size].addmm_(dz.T, x[rows])
        else:
            dweight[:vocab_size] += dz.T @ x[rows]
        del dz  # a chunk's logits less while the next ones are made
    return losses, dx, dweight


# ---- between the products: from x (n, D) and W to losses (n,) and dz (n, V), z = x W^T -----------
#
# With s = sigmoid(2 z / cap), u = cap * (2 s - 1): a CPU computes a sigmoid in a seventh of a
# tanh's time. u is bounded by cap, so cap replaces the row maximum in a stable logsumexp. targets
# and g, the gradient of each loss, are (n, 1).


def _in_place(
    cap: float, buffers: list[Tensor], x: Tensor, w: Tensor, targets: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Each line is a pass over the chunk's logits; on a CPU the cost of a tenth of the products."""
    s, e = (buffer[: targets.size(0)] for buffer in buffers)
    if x.dtype == torch.float32:
        _product(x, w, 2 / cap, out=s)
    else:
        s.copy_(_product(x, w, 2 / cap))
    torch.add(s.new_full((), -2 * cap), s.sigmoid_(), alpha=2 * cap, out=e).exp_()
    total = e.sum(-1, keepdim=True)
    losses = (total.log() + 2 * cap * (1 - s.gather(1, targets))).squeeze(1)
    if g is None:
        return losses, None
    g = 4 * g
    e.mul_(g / total).scatter_add_(1, targets, -g)  # 4 (softmax - onehot) * g
    dz = e.mul_(s.addcmul_(s, s, value=-1))  # du/dz = 1 - (2 s - 1)^2 = 4 (s - s^2)
    return losses, dz.to(x.dtype)


def _fused(
    cap: float, backend: Any, x: Tensor, w: Tensor, targets: Tensor, g: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The same as two compiled functions: 6 bytes of traffic per bf16 logit, not about 70."""
    z = _product(x, w, 2 / cap)
    total, losses = compiled(_totals_and_losses, backend)(z, targets, cap)
    if g is None:
        return losses, None
    return losses, compiled(_logits_to_gradient, backend)(z, total, targets, g, cap)


def _totals_and_losses(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Sums of exponentials (n, 1) and losses (n,) from z = 2 x W^T / cap."""
    total = torch.exp(2 * cap * (z.float().sigmoid() - 1)).sum(-1, keepdim=True)
    at_target = z.gather(1, targets).float().sigmoid()
    return total, (total.log() + 2 * cap * (1 - at_target)).squeeze(1)


def _logits_to_gradient(z: Tensor, total: Tensor, targets: Tensor, g: Tensor, cap: float) -> Tensor:
    """dz in the place of z."""
    s = z.float().sigmoid()
    onehot = torch.arange(z.size(1), device=z.device) == targets
    softmax = torch.exp(2 * cap * (s - 1)) / total
    return z.copy_((softmax - onehot.float()) * (4 * g) * (s - s * s))


def _product(x: Tensor, w: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha * x W^T"""
    return torch.addmm(x.new_empty(()), x, w.T, beta=0, alpha=alpha, out=out)

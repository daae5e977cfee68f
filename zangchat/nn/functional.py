"""The three elementwise operations of a block, each with its backward pass written out.

Autograd would double the memory traffic: it differentiates every step of a formula, and on a CPU,
without fusion, each step is a pass over memory. torch.compile fuses these formulas like any others.
Without gradients the plain expressions run. The slow twins are torch's own operations
(tests/unit/test_functional.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x (..., D) / sqrt(mean(x^2) + eps), in the dtype of x; sums in fp32 (arXiv:1910.07467)."""
    if not (x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)):
        return F.rms_norm(x, (x.size(-1),), eps=eps)
    # on a CPU torch's own takes twice the time, five times in bf16, also in decoding
    if torch.is_grad_enabled() and x.requires_grad:
        return _RMSNorm.apply(x, eps)
    return x * _inverse_rms(x, eps)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (arXiv:2109.08668)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluSquared.apply(x)
    return F.relu(x).square()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on x (B, T, heads, D); cos, sin (..., T, 1, D/2).

    Channel i pairs with i + D/2, rotated by -theta as in nanochat. No gradient for cos and sin.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin)
    return _rotated(x, cos, sin)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., 1), computed in fp32 and rounded to the dtype of x"""
    size = x.size(-1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().add_(size * eps).rsqrt_().mul_(size**0.5).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        scale = _inverse_rms(x, eps)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        y, scale = ctx.saved_tensors  # dx = scale * (grad - y * mean(grad * y))
        along = torch.linalg.vecdot(grad, y).div_(y.size(-1)).unsqueeze(-1)
        return torch.addcmul(grad, y, along, value=-1).mul_(scale), None


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        h = F.relu(x)
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (h,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, h, value=2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None  # back by the same angle


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    # on a CPU head by head in memory: faster here, in the norm and in attention
    by_head = torch.contiguous_format
    out = x.transpose(1, 2).clone(memory_format=by_head).transpose(1, 2) if x.is_cpu else x.clone()
    out1, out2 = out.chunk(2, dim=-1)
    out1.mul_(cos).addcmul_(x2, sin)
    out2.mul_(cos).addcmul_(x1, sin, value=-1)
    return out

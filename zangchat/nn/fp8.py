"""fp8 products in the linear layers of a model, as a pass over an ordinary model.

Each operand has one scale, for its largest magnitude: activations and weights in e4m3, gradients in
e5m2. The three products of a layer (forward, both backward) run through torch._scaled_mm on GPUs of
compute capability 9.0 and later. Elsewhere the same rounded operands are multiplied in the dtype of
the activations: a slow emulation, to test the numerics. The products by _scaled_mm are untested on
a GPU so far.

Shapes: M tokens, K inputs, N outputs of one layer.
"""

from typing import Any

import torch
from torch import Tensor, nn

from zangchat.nn.linear import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (9, 0)  # of the GPUs that _scaled_mm is used on
MULTIPLE = 16  # _scaled_mm wants every dimension to be a multiple of this


def use_fp8(model: nn.Module, device: torch.device) -> str:
    """Convert the model if the device's fp8 products are correct. Returns a line for the log."""
    why = unusable(device)
    if why is not None:
        return f"fp8: not used ({why}); the products stay in --dtype"
    return f"fp8: the products of {convert_to_fp8(model)} layers"


def unusable(device: torch.device) -> str | None:
    """None if the device's product of small matrices equals the emulation's, else the problem."""
    if device.type != "cuda":
        return f"no GPU: {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has no fp8 products"
    generator = torch.Generator(device).manual_seed(0)
    draws = (torch.randn(32, 64, generator=generator, device=device) for _ in range(2))
    (a, scale_a), (b, scale_b) = (quantise(draw, E4M3) for draw in draws)
    try:
        got = scaled_product(a, b, scale_a, scale_b, torch.bfloat16).float()
    except RuntimeError as error:  # torch's build or the driver lacks the kernel
        return str(error).splitlines()[0]
    expected = (a.float() @ b.float().T) * (scale_a * scale_b)
    worst = float((got - expected).abs().max() / expected.abs().max())
    return None if worst < 0.02 else f"a small product is off by {worst:.2g}"


def convert_to_fp8(model: nn.Module, min_size: int = 2**20) -> int:
    """Replace Linear layers by fp8 ones with the same parameters, in place; returns their number.

    Names, checkpoints and optimizers do not change. Exceptions: layers of fewer than `min_size`
    weights, for which scaling costs more than it saves, of sizes that are not multiples of 16, and
    lm_head, whose product belongs to the loss.
    """
    converted = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not Linear or name == "lm_head" or child.weight.numel() < min_size:
                continue
            if any(size % MULTIPLE for size in child.weight.shape):
                continue
            with torch.device("meta"):
                replacement = Fp8Linear(child.weight.size(1), child.weight.size(0))
            replacement.weight = child.weight
            setattr(module, name, replacement)
            converted += 1
    return converted


class Fp8Linear(Linear):
    """x W^T in fp8 while gradients are recorded; evaluation and sampling do not use fp8."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.quantised: tuple[Tensor, Tensor, Tensor] | None = None  # between hold and release

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        if not torch.is_grad_enabled() or flat.size(0) % MULTIPLE:
            return super().forward(x)
        operands = self.quantised or quantised_weight(self.weight)
        return _Fp8Product.apply(flat, self.weight, *operands).view(*x.shape[:-1], -1)

    def hold(self, dtype: torch.dtype) -> None:
        if not torch.is_grad_enabled():
            return super().hold(dtype)
        self.quantised = quantised_weight(self.weight)

    def release(self) -> None:
        self.cast = self.quantised = None


def quantised_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) in e4m3, its transpose (K, N) for the gradient's product, both row-major; scale."""
    w8, scale = quantise(weight.detach(), E4M3)
    return w8, w8.T.contiguous(), scale


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x / scale rounded to the fp8 `dtype`, scale); the fp32 scale fits x's largest magnitude."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def scaled_product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """(M, N) in `dtype` from fp8 a (M, K) and b (N, K), both row-major: scale_a * scale_b * a b^T.

    `fast`: tensor cores keep the sums in their own registers, of fewer bits than fp32; enough for
    activations, too coarse for gradients.
    """
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= CAPABILITY:
        scales = {"scale_a": scale_a, "scale_b": scale_b}
        # b^T is column-major, as _scaled_mm requires
        return torch._scaled_mm(a, b.t(), **scales, out_dtype=dtype, use_fast_accum=fast)
    return ((a.to(dtype) @ b.to(dtype).T).float() * (scale_a * scale_b)).to(dtype)


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, w8: Tensor, w8_transposed: Tensor, w_scale: Tensor
    ) -> Tensor:
        x8, x_scale = quantise(x, E4M3)
        ctx.save_for_backward(x8, x_scale, w8_transposed, w_scale)
        ctx.weight_dtype = weight.dtype
        return scaled_product(x8, w8, x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x8, x_scale, w8_transposed, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(grad, E5M2)
        dx = scaled_product(g8, w8_transposed, g_scale, w_scale, grad.dtype)
        dweight = scaled_product(g8.T.contiguous(), x8.T.contiguous(), g_scale, x_scale, grad.dtype)
        return dx, dweight.to(ctx.weight_dtype), None, None, None

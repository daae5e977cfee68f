"""Values and gradients of each operation equal torch's own and its numerical differentiation."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zangchat.nn import functional

EPS = 1e-6


def plain_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def plain_relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def plain_rotate(x: Tensor) -> Tensor:
    cos, sin = angles(x)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of x (B, T, heads, D): (T, 1, D/2)."""
    frequencies = torch.linspace(0.1, 1.0, x.size(-1) // 2, dtype=torch.float64)
    angle = torch.arange(x.size(1))[:, None, None] * frequencies
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "norm": (lambda x: functional.rms_norm(x, EPS), plain_norm),
    "relu squared": (functional.relu_squared, plain_relu_squared),
    "rotate": (lambda x: functional.rotate(x, *angles(x)), plain_rotate),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("transposed", [False, True])
def test_values_and_gradients_equal_the_plain_formula(name: str, transposed: bool) -> None:
    ours, plain = PAIRS[name]
    base = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1))
    base[0, 0] = 0  # a row of zeros tests the norm's eps
    base[0, 1] *= 1e4
    upstream = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(2)).transpose(
        1, 2 if not transposed else 1
    )
    results = []
    for function in (ours, plain):
        leaf = base.clone().requires_grad_()
        y = function(leaf.transpose(1, 2) if transposed else leaf)
        y.backward(upstream.reshape(y.shape))
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["relu squared", "rotate"])
def test_gradients_equal_the_numerical_ones(name: str) -> None:
    x = torch.randn(
        2,
        3,
        4,
        6,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(3),
        requires_grad=True,
    )
    assert torch.autograd.gradcheck(PAIRS[name][0], (x,))


@pytest.mark.parametrize("name", PAIRS)
def test_without_gradients_the_values_are_the_same(name: str) -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(4))
    with_graph = PAIRS[name][0](x.clone().requires_grad_()).detach()
    torch.testing.assert_close(PAIRS[name][0](x), with_graph, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_in_bf16_the_error_is_a_rounding_error(name: str) -> None:
    x = torch.randn(2, 4, 50, 64, generator=torch.Generator().manual_seed(5))
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    results = []
    for function, dtype in zip(PAIRS[name], (torch.bfloat16, torch.float64), strict=True):
        leaf = x.bfloat16().to(dtype).requires_grad_()
        y = function(leaf)
        y.backward(upstream.bfloat16().to(dtype))
        assert y.dtype == dtype and leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    for actual, exact in zip(*results, strict=True):
        assert float((actual - exact).norm() / exact.norm()) < 2**-7

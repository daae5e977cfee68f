"""AdamW equals torch's and its formulas; parameters stored in 16 bits have fp32 masters."""

import pytest
import torch

from tests.reference import adamw as reference
from zangchat.adamw import AdamW

SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(30, 20), (7,), ()])
def test_equals_torch_and_the_formulas_over_50_steps(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizers = [AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)]
    twin = reference.AdamW(start, **SETTINGS)
    for _ in range(50):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        twin.step(ours.grad)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.detach().double(), twin.weight, atol=1e-5, rtol=0)


def test_learning_rates_may_change_between_steps() -> None:
    ours, theirs = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    a, b = AdamW([ours], **SETTINGS), torch.optim.AdamW([theirs], **SETTINGS)
    generator = torch.Generator().manual_seed(0)
    for step in range(10):
        ours.grad = torch.randn(4, 4, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_16_bit_parameter_accumulates_steps_below_its_resolution() -> None:
    p = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    twin = reference.AdamW(
        torch.ones(8, 8), lr=1e-4, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0
    )
    optimizer = AdamW([p], lr=1e-4, betas=(0.9, 0.99), eps=1e-10)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
        twin.step(torch.ones(8, 8))
    assert p.dtype == torch.bfloat16
    # one bf16 rounding, not one per step
    torch.testing.assert_close(p.detach().double(), twin.weight, atol=2**-8, rtol=0)
    assert p.max() < 1


def test_parameter_without_a_gradient_is_unchanged() -> None:
    p = torch.nn.Parameter(torch.ones(3, 3))
    AdamW([p], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.ones(3, 3))

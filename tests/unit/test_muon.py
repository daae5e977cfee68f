"""Muon: its coefficients, the orthogonalisation, and the whole update against the slow twin."""

from collections import Counter

import pytest
import torch

from tests.reference import muon as reference
from tests.simulated_gpu import DEVICE, simulated_gpu
from zangchat import muon
from zangchat.muon import POLAR_EXPRESS, Muon, orthogonalise


def test_coefficients_equal_the_paper() -> None:
    for ours, derived in zip(POLAR_EXPRESS, reference.polar_express_coefficients(), strict=True):
        assert ours == pytest.approx(tuple(derived), rel=1e-9)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (1, 48, 16)])
def test_orthogonalising_keeps_singular_vectors_and_equalizes_values(
    shape: tuple[int, int, int],
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.7 and values.max() < 1.3
    for matrix, got in zip(matrices, result, strict=True):
        expected = reference.orthogonalise(matrix, reference.polar_express_coefficients())
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=0)


def test_stacked_matrices_are_independent_and_zeros_stay_finite() -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1))
    stack[1] = 0
    together = orthogonalise(stack)
    assert not together[1].any() and torch.isfinite(together).all()
    for i in (0, 2):
        torch.testing.assert_close(
            orthogonalise(stack[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("shape", [(12, 12), (24, 8), (8, 24)])
def test_equals_the_twin_over_many_steps(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "beta2": 0.95}
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(3)]
    twins = [reference.Muon(w.detach(), **settings) for w in weights]
    optimizer = Muon(weights, **settings)
    for _ in range(25):
        for w, twin in zip(weights, twins, strict=True):
            w.grad = torch.randn(shape, generator=generator)
            twin.step(w.grad.double())
        optimizer.step()
    for w, twin in zip(weights, twins, strict=True):
        torch.testing.assert_close(w.detach().double(), twin.weight, atol=1e-3, rtol=0)


def test_single_and_stacked_updates_agree() -> None:
    def run(count: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(count)]
        weights = [torch.nn.Parameter(torch.randn(8, 16, generator=g)) for g in generators]
        optimizer = Muon([*weights, torch.nn.Parameter(torch.zeros(4, 4))], weight_decay=0.1)
        for _ in range(5):
            for w, g in zip(weights, generators, strict=True):
                w.grad = torch.randn(8, 16, generator=g)
            optimizer.step()
        return weights[0].detach()

    torch.testing.assert_close(run(1), run(4), atol=1e-6, rtol=0)


def test_weight_decay_applies_only_with_the_update_direction() -> None:
    def run(weight_decay: float) -> torch.Tensor:
        w = torch.nn.Parameter(torch.ones(8, 8))
        w.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        Muon([w], lr=0.1, weight_decay=weight_decay).step()
        return w.detach()

    plain, decayed = run(0.0), run(0.5)
    shrinking = plain < 1  # the weights are positive, so these updates move towards zero
    torch.testing.assert_close(decayed[shrinking], plain[shrinking] - 0.1 * 0.5)
    assert torch.equal(decayed[~shrinking], plain[~shrinking])


def test_16_bit_orthogonalisation_stays_close() -> None:
    matrices = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    a, b = orthogonalise(matrices, torch.bfloat16).float(), orthogonalise(matrices)
    assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_more_matrices_take_no_more_kernels() -> None:
    """Of one shape: each element-wise operation runs on their stack, or on all in one call."""

    def calls(count: int) -> Counter[str]:
        with simulated_gpu() as usage:
            weights = [torch.nn.Parameter(torch.zeros(8, 16, device=DEVICE)) for _ in range(count)]
            optimizer = Muon(weights, weight_decay=0.1)
            for _ in range(2):  # the first step makes the state
                usage.calls.clear()
                for w in weights:
                    w.grad = torch.zeros_like(w)
                made = Counter(usage.calls)
                optimizer.step()
            del usage.calls["device"]  # a question, not a kernel
            return usage.calls - made

    few, many = calls(2), calls(12)
    assert many == few


@pytest.mark.parametrize(
    ("capability", "dtype"), [((9, 0), torch.bfloat16), ((7, 5), torch.float32)]
)
def test_gpus_that_emulate_bf16_orthogonalise_in_fp32(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def record(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append(dtype)
        return matrices

    monkeypatch.setattr(muon, "orthogonalise", record)
    with simulated_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        w = torch.nn.Parameter(torch.zeros(8, 16, device=DEVICE))
        w.grad = torch.zeros_like(w)
        Muon([w]).step()
    assert seen == [dtype]

"""The chunked loss against its eager twin: values, gradients, chunking, ignored tokens, weights."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import loss as reference
from zangchat.nn import loss as loss_module
from zangchat.nn.loss import softcapped_cross_entropy

CAP = 15.0


def problem(
    N: int, D: int, V: int, rows: int, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(N, D, generator=generator) * scale).requires_grad_()
    weight = torch.randn(rows, D, generator=generator).requires_grad_()
    targets = torch.randint(-1, V, (N,), generator=generator)  # some ignored
    return x, weight, targets


def in_fp64(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 40),
    V=st.integers(1, 50),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 50),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_twin(
    N: int, V: int, padding: int, chunk: int, reduction: str, weighted: bool, fused: bool, seed: int
) -> None:
    x, weight, targets = problem(N, 8, V, V + padding, seed)
    # advantages may be negative
    weights = torch.randn(N, generator=torch.Generator().manual_seed(seed)) if weighted else None
    x64, weight64 = in_fp64(x, weight)
    expected = reference.softcapped_cross_entropy(
        x64, weight64, targets, V, CAP, reduction, weights
    )
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed + 1))
    expected.backward(upstream.double())
    with pytest.MonkeyPatch.context() as patch:
        # run the code without compiling it
        patch.setattr(loss_module, "compiled", lambda function, backend: function)
        backend = "any" if fused else None
        got = softcapped_cross_entropy(
            x,
            weight,
            targets,
            V,
            CAP,
            reduction,
            weights,
            chunk_tokens=chunk,
            compile_backend=backend,
        )
        got.backward(upstream)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in ((x, x64), (weight, weight64)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)
    assert not weight.grad[V:].any()  # padding rows of the vocabulary


def test_gradient_equals_finite_differences() -> None:
    x, weight, targets = problem(5, 4, 7, 7)
    softcapped_cross_entropy(x, weight, targets, 7, CAP, "sum").backward()
    x64, weight64 = in_fp64(x, weight)
    step = 1e-5
    with torch.no_grad():
        for tensor, grad in ((x64, x.grad), (weight64, weight.grad)):
            for i in range(tensor.numel()):
                values = []
                for sign in (1, -1):
                    tensor.view(-1)[i] += sign * step
                    values.append(
                        reference.softcapped_cross_entropy(
                            x64, weight64, targets, 7, CAP, "sum"
                        ).item()
                    )
                    tensor.view(-1)[i] -= sign * step
                assert grad.view(-1)[i].item() == pytest.approx(
                    (values[0] - values[1]) / (2 * step), abs=1e-4
                )


def test_logits_far_above_the_cap_stay_finite() -> None:
    x, weight, targets = problem(20, 8, 30, 30, scale=1e4)
    loss = softcapped_cross_entropy(x, weight, targets, 30, CAP)
    loss.backward()
    expected = reference.softcapped_cross_entropy(x.double(), weight.double(), targets, 30, CAP)
    torch.testing.assert_close(loss, expected.detach().float())
    assert torch.isfinite(x.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_without_supervised_tokens_has_zero_loss_and_gradient(reduction: str) -> None:
    x, weight, _ = problem(6, 4, 9, 9)
    loss = softcapped_cross_entropy(x, weight, torch.full((6,), -1), 9, CAP, reduction)
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()


COMPILED = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU by g++"),
)


@pytest.mark.parametrize("backend", [None, COMPILED])
def test_bfloat16_products_stay_close_and_sums_are_fp32(backend: str | None) -> None:
    x, weight, targets = problem(300, 32, 100, 128, scale=0.2)
    x64, weight64 = in_fp64(x, weight)
    expected = reference.softcapped_cross_entropy(x64, weight64, targets, 100, CAP)
    expected.backward()
    x16 = x.detach().bfloat16().requires_grad_()
    loss = softcapped_cross_entropy(
        x16, weight, targets, 100, CAP, chunk_tokens=64, compile_backend=backend
    )
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=0.01)
    assert x16.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    for ours, theirs in ((x16, x64), (weight, weight64)):
        assert (
            torch.cosine_similarity(ours.grad.double().flatten(), theirs.grad.flatten(), dim=0)
            > 0.999
        )


def test_result_does_not_depend_on_the_chunks() -> None:
    results = []
    for chunk in (1, 7, 64):
        x, weight, targets = problem(50, 8, 20, 20)
        loss = softcapped_cross_entropy(x, weight, targets, 20, CAP, "sum", chunk_tokens=chunk)
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=1e-5)


def test_tokens_without_a_loss_are_skipped_in_multiples(monkeypatch: pytest.MonkeyPatch) -> None:
    """This limits the shapes: torch keeps a generated bf16 product for every number of tokens."""
    sizes = []
    original = loss_module._chunked
    monkeypatch.setattr(
        loss_module, "_chunked", lambda *a: sizes.append(a[0].size(0)) or original(*a)
    )
    for supervised in (0, 1, 128, 129, 200, 299, 300):
        x, weight, targets = problem(300, 4, 9, 9)
        targets = targets.clamp(min=0)
        targets[torch.randperm(300)[supervised:]] = -1
        softcapped_cross_entropy(x, weight, targets, 9, CAP)
    assert sizes == [0, 128, 128, 256, 256, 300, 300]


def test_gradients_are_computed_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    original = loss_module._chunked
    monkeypatch.setattr(
        loss_module, "_chunked", lambda *a: computed.append(a[3] is not None) or original(*a)
    )
    x, weight, targets = problem(8, 4, 9, 9)
    with torch.no_grad():
        softcapped_cross_entropy(x, weight, targets, 9, CAP)
    softcapped_cross_entropy(x.detach(), weight.detach(), targets, 9, CAP)
    assert computed == [False, False]
    softcapped_cross_entropy(x, weight, targets, 9, CAP)
    assert computed == [False, False, True]


def test_second_backward_pass_is_refused() -> None:
    x, weight, targets = problem(8, 4, 9, 9)
    loss = softcapped_cross_entropy(x, weight, targets, 9, CAP, "sum")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="consumed"):
        loss.backward()


def test_misuse_is_named() -> None:
    x, weight, targets = problem(3, 4, 9, 9)
    with pytest.raises(ValueError, match="average"):
        softcapped_cross_entropy(x, weight, targets, 9, CAP, "average")
    with pytest.raises(ValueError, match="cap"):
        softcapped_cross_entropy(x, weight, targets, 9, 100.0)

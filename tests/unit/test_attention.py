"""Attention equals an explicit softmax over the visible positions; only correct backends run."""

import math
import re
import time

import pytest
import torch

from zangchat.nn import attention
from zangchat.nn.attention import attend, choose_backend


def explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~allowed, -math.inf)
    return scores.softmax(-1) @ v


def qkv(
    T: int, S: int, heads: tuple[int, int] = (4, 2), B: int = 2, D: int = 16
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, heads[0], T, D), (B, heads[1], S, D), (B, heads[1], S, D))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 7), (3, 7), (1, 1)])
def test_without_a_mask_the_queries_are_the_last_positions(
    T: int, S: int, heads: tuple[int, int]
) -> None:
    q, k, v = qkv(T, S, heads)
    allowed = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    torch.testing.assert_close(attend(q, k, v), explicit(q, k, v, allowed))


def test_mask_limits_the_positions_of_each_row() -> None:
    q, k, v = qkv(2, 6)
    mask = torch.rand(2, 1, 2, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    torch.testing.assert_close(attend(q, k, v, mask), explicit(q, k, v, mask))


def test_more_queries_than_positions_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 queries"):
        attend(*qkv(5, 4))


def test_gradients_reach_shared_key_value_heads() -> None:
    inputs = [t.requires_grad_() for t in qkv(5, 5)]
    allowed = torch.ones(5, 5, dtype=torch.bool).tril()
    got = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    expected = torch.autograd.grad(explicit(*inputs, allowed).square().sum(), inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # flex_attention advises compiling it
def test_flex_equals_explicit_attention() -> None:
    q, k, v = qkv(32, 32)
    torch.testing.assert_close(
        attend(q, k, v, backend="flex"), attend(q, k, v), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
# less than a block, more than one, a whole number of blocks
@pytest.mark.parametrize("T", [2, 5, 6, 20])
def test_blocks_equal_explicit_attention_with_gradients(
    T: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", 5)
    inputs = [t.requires_grad_() for t in qkv(T, T, heads)]
    upstream = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (
        lambda q, k, v: attend(q, k, v, backend="blocks"),
        lambda q, k, v: explicit(q, k, v, torch.ones(T, T).bool().tril()),
    ):
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
    torch.testing.assert_close(*results)


def test_blocks_of_bf16_are_as_exact_as_sdpa() -> None:
    inputs = [t.bfloat16().requires_grad_() for t in qkv(300, 300, D=32)]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def errors(tensors: list[torch.Tensor], backend: str) -> list[float]:
        results = [
            attention._forward_backward(name, *parts)
            for name, parts in ((backend, tensors), ("sdpa", exact))
        ]
        return [
            float((actual - right).norm() / right.norm())
            for actual, right in zip(*results, strict=True)
        ]

    for blocks, sdpa in zip(errors(inputs, "blocks"), errors(inputs, "sdpa"), strict=True):
        assert blocks < max(2 * sdpa, 0.01)


def test_cpu_skips_the_trial_and_gives_the_reason() -> None:
    name, reason = choose_backend("cpu", torch.float32, 64)
    assert name == "sdpa" and "cpu" in reason
    name, reason = choose_backend("cpu", torch.bfloat16, 64)
    assert name == "blocks" and "cpu" in reason


def test_failing_or_wrong_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(q, k, v):
        raise RuntimeError("no kernel image is available")

    original = attention._causal_kernel
    broken = {"flash": fails, "flex": lambda q, k, v: original("sdpa")(q, k, v) * 1.5}
    monkeypatch.setattr(
        attention, "_causal_kernel", lambda name: broken.get(name) or original(name)
    )
    name, reason = choose_backend("cpu", torch.float32, 16, ["flash", "flex"])
    assert (
        name == "sdpa"
        and "flash is not usable here (RuntimeError: no kernel image" in reason
        and "flex" in reason
        and "differs" in reason
    )
    # cuDNN has no kernel for a CPU: sdpa must refuse, not quietly take another one
    name, reason = choose_backend("cpu", torch.float32, 16, ["cudnn", "sdpa"])
    assert name == "sdpa" and "cudnn is not usable here" in reason


def test_fastest_correct_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TRIAL_TOKENS", 32)
    monkeypatch.setattr(attention, "TRIAL_HEADS", 8)
    original, sdpa = attention._causal_kernel, attention._causal_kernel("sdpa")

    def slow(q, k, v):
        time.sleep(0.2)
        return sdpa(q, k, v)

    monkeypatch.setattr(
        attention,
        "_causal_kernel",
        lambda name: {"flash": slow, "flex": sdpa}.get(name) or original(name),
    )
    name, reason = choose_backend("cpu", torch.float32, 16, ["flash", "flex"])
    assert name == "flex" and re.fullmatch(
        r"flex: forward and backward in [0-9.]+ ms \(flex\), [0-9.]+ ms \(flash\)", reason
    )


def test_candidates_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.candidates("cuda", torch.bfloat16) == ("flash", "cudnn", "flex", "sdpa")
    assert attention.candidates("cuda", torch.float32) == ("flex", "sdpa")
    assert attention.candidates("mps", torch.float32) == ("sdpa",)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert attention.candidates("cuda", torch.bfloat16) == ("sdpa",)


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ValueError, match="flash3"):
        choose_backend("cpu", torch.float32, 16, ["flash3"])
    with pytest.raises(ValueError, match="magic"):
        attend(*qkv(3, 3), backend="magic")

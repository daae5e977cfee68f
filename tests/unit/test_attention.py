"""Attention equals an explicit softmax over the visible positions; only correct backends run."""

import contextlib
import math
import re
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend

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


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "masked", "repeated"),
    [
        (torch.bfloat16, False, False),  # flash reads groups
        (torch.bfloat16, True, True),  # and no mask
        (torch.float32, False, True),
    ],
)
def test_groups_are_spelled_out_for_kernels_that_know_none(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool, repeated: bool
) -> None:
    """By the kernel that is left on CUDA, all scores would lie in memory."""
    asked: list[tuple[int, bool]] = []

    def sdpa(q, k, v, enable_gqa=False, **how):
        asked.append((k.size(1), enable_gqa))
        return torch.Tensor.as_subclass(q, torch.Tensor)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", sdpa)
    q, k, v = (torch.randn(1, heads, 4, 8).to(dtype).as_subclass(OnGPU) for heads in (4, 2, 2))
    mask = torch.ones(4, 4, dtype=torch.bool).tril() if masked else None
    attention.attend(q, k, v, mask)
    assert asked == [(4, False) if repeated else (2, True)]


def test_failing_or_wrong_backend_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(q, k, v):
        raise RuntimeError("no kernel image is available")

    sdpa = attention._KERNELS["sdpa"]
    monkeypatch.setitem(attention._KERNELS, "flash", fails)
    monkeypatch.setitem(attention._KERNELS, "blocks", lambda q, k, v: sdpa(q, k, v) * 1.5)
    name, reason = choose_backend("cpu", torch.float32, 16, ["flash", "blocks"])
    assert (
        name == "sdpa"
        and "flash is not usable here (RuntimeError: no kernel image" in reason
        and "blocks" in reason
        and "differs" in reason
    )
    # cuDNN has no kernel for a CPU: sdpa must refuse, not quietly take another one
    name, reason = choose_backend("cpu", torch.float32, 16, ["cudnn", "sdpa"])
    assert name == "sdpa" and "cudnn is not usable here" in reason


def test_fastest_correct_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "TRIAL_TOKENS", 32)
    monkeypatch.setattr(attention, "TRIAL_HEADS", 8)
    sdpa = attention._KERNELS["sdpa"]

    def slow(q, k, v):
        time.sleep(0.2)
        return sdpa(q, k, v)

    monkeypatch.setitem(attention._KERNELS, "flash", slow)
    monkeypatch.setitem(attention._KERNELS, "blocks", sdpa)
    name, reason = choose_backend("cpu", torch.float32, 16, ["flash", "blocks"])
    assert name == "blocks" and re.fullmatch(
        r"blocks: forward and backward in [0-9.]+ ms \(blocks\), [0-9.]+ ms \(flash\)", reason
    )


def test_the_trial_runs_on_inputs_like_those_of_a_model() -> None:
    """Normal draws, as the norms make them, in the memory order of the projections."""
    q, k, v = attention._trial_inputs([(2, 4, 64, 16)] * 3, torch.device("cpu"), torch.float32)
    for part in (q, k, v):
        assert part.shape == (2, 4, 64, 16) and part.transpose(1, 2).is_contiguous()
        assert abs(float(part.detach().std()) - 1) < 0.05
    assert not torch.equal(q, k) and not torch.equal(k, v)


def test_rank_0_chooses_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def races(*args):
        raise AssertionError("a second race")

    monkeypatch.setattr(attention.collectives, "world", lambda: (1, 2))
    monkeypatch.setattr(attention.collectives, "from_rank_0", lambda own: ("blocks", "it won"))
    monkeypatch.setattr(attention, "_fastest", races)
    assert choose_backend("cpu", torch.bfloat16, 64) == ("blocks", "blocks: it won")


def test_the_winner_is_the_one_that_torch_calls_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash-attn 3 and 4 take the place of one operation of torch's, for the whole process."""
    active: list[str | None] = [None]
    names = attention.torch_attention
    monkeypatch.setattr(names, "current_flash_attention_impl", lambda: active[-1], raising=False)
    monkeypatch.setattr(names, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(
        names, "restore_flash_attention_impl", lambda: active.append(None), raising=False
    )
    seconds = {"FA4": 3.0, "FA3": 1.0, "flash": 2.0, "sdpa": 4.0}
    ran = set()
    monkeypatch.setattr(attention, "_seconds", lambda name, *args: seconds[name])
    for name, kernel in list(attention._KERNELS.items()):
        recorded = partial(lambda kernel, name, *qkv: ran.add((name, active[-1])) or kernel(*qkv))
        monkeypatch.setitem(attention._KERNELS, name, partial(recorded, kernel, name))
    name, _ = choose_backend("cpu", torch.float32, 16, list(seconds))
    assert ran == {("FA4", "FA4"), ("FA3", "FA3"), ("flash", None), ("sdpa", None)}
    assert name == "FA3" and active[-1] == "FA3"
    assert choose_backend("cpu", torch.float32, 16)[0] == "sdpa" and active[-1] is None


def test_a_kernel_that_would_stay_for_good_is_not_activated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch 2.10 can activate flash-attn 4, and cannot take it back."""
    active: list[str | None] = [None]
    names = attention.torch_attention
    monkeypatch.setattr(names, "current_flash_attention_impl", lambda: active[-1], raising=False)
    monkeypatch.setattr(names, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.delattr(names, "restore_flash_attention_impl", raising=False)
    name, reason = choose_backend("cpu", torch.float32, 16, ["FA4", "sdpa"])
    assert name == "sdpa" and "FA4 is not usable here" in reason and active == [None]


def test_a_package_that_is_not_installed_is_named() -> None:
    name, reason = choose_backend("cpu", torch.float32, 16, ["FA4", "FA3", "sdpa"])
    assert name == "sdpa" and "FA4 is not usable here" in reason and "FA3 is not usable" in reason


def test_candidates_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = ("FA4", "FA3", "flash", "cudnn", "sdpa")
    assert attention.candidates("cuda", torch.bfloat16) == fast
    assert attention.candidates("cuda", torch.float32) == ("sdpa",)
    assert attention.candidates("mps", torch.float32) == ("sdpa",)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert attention.candidates("cuda", torch.bfloat16) == ("sdpa",)


# ---- kernels on a GPU ----------------------------------------------------------------------------


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernels that each call on a GPU (without values) leaves to torch's choice."""
    calls: list[Any] = []

    def recorded(kernels: Any) -> contextlib.AbstractContextManager[None]:
        calls.append(kernels)
        return contextlib.nullcontext()

    monkeypatch.setattr(attention, "sdpa_kernel", recorded)
    return calls


def on_gpu(*sizes: int) -> list[torch.Tensor]:
    return [torch.empty(2, 4, T, 16, device="cuda", dtype=torch.bfloat16) for T in sizes]


@pytest.mark.parametrize("backend", ["sdpa", "cudnn", "FA3"])
def test_passes_without_gradients_never_let_cudnn_plan_for_their_shapes(
    allowed: list[Any], backend: str
) -> None:
    with FakeTensorMode(), torch.no_grad():
        for T in (5, 64, 130):
            attend(*on_gpu(T, T, T), backend=backend)  # a prompt
            attend(*on_gpu(1, T, T), backend=backend)  # a token
            mask = torch.ones(2, 1, 3, T, device="cuda", dtype=torch.bool)
            attend(*on_gpu(3, T, T), mask, backend)  # a chunk
    assert allowed == [attention.WITHOUT_PLANS] * 9
    assert SDPBackend.CUDNN_ATTENTION not in attention.WITHOUT_PLANS


def test_training_takes_the_kernel_that_was_chosen_and_none_else(allowed: list[Any]) -> None:
    with FakeTensorMode():
        for backend in ("cudnn", "flash", "FA4", "sdpa"):
            attend(*(part.requires_grad_() for part in on_gpu(64, 64, 64)), backend=backend)
    flash = SDPBackend.FLASH_ATTENTION
    assert allowed == [SDPBackend.CUDNN_ATTENTION, flash, flash, attention.WITHOUT_PLANS]


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "flash", "FA3", "FA4", "blocks"])
def test_every_backend_stays_within_one_graph(backend: str, fullgraph: bool) -> None:
    """With fullgraph=True a break is an error, else torch counts it. cuDNN's, for which torch asks
    the GPU, is chosen in the same way as flash."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attend, backend="eager", fullgraph=fullgraph)
    inputs = [part.requires_grad_() for part in qkv(8, 8)]
    torch.testing.assert_close(compiled(*inputs, backend=backend), attend(*inputs, backend=backend))
    if backend == "sdpa":
        with FakeTensorMode():
            assert compiled(*on_gpu(8, 8, 8)).shape == (2, 4, 8, 16)  # numbers of heads are symbols
    assert not torch._dynamo.utils.counters["graph_break"]


def test_unknown_backends_are_named() -> None:
    with pytest.raises(ValueError, match="flash3"):
        choose_backend("cpu", torch.float32, 16, ["flash3"])
    with pytest.raises(ValueError, match="magic"):
        attend(*qkv(3, 3), backend="magic")

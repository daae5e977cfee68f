"""The native step against torch's way, for every dtype, and what it refuses."""

import mmap
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zangchat.config import GPTConfig
from zangchat.engine import native
from zangchat.engine.kv_cache import KVCache
from zangchat.engine.model import InferenceGPT, Int8Product, Product
from zangchat.gpt import GPT

V = 265  # not a multiple of eight


def test_an_older_build_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `git pull`: its step takes other arguments."""
    older = types.SimpleNamespace(Step=object, IS_FAST=True)
    current = types.SimpleNamespace(**vars(older), VERSION=native.VERSION)
    for crate in (older, None, current):
        monkeypatch.setattr(native, "ruststep", crate)
        assert native.is_available.__wrapped__() is (crate is current)
    assert caplog.text.count("run `bash dev/setup.sh`") == 1


def test_crate_and_caller_agree_on_the_version() -> None:
    source = Path(native.__file__).parents[2] / "ruststep" / "src" / "py.rs"
    assert f"const VERSION: u32 = {native.VERSION};" in source.read_text(encoding="utf-8")


def no_such_pages(*_: Any) -> None:
    raise OSError(22, "Invalid argument")


@pytest.mark.parametrize("missing", ["in the kernel", "on this system"])
def test_weights_lie_side_by_side_without_huge_pages(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "in the kernel":
        without = type("Memory", (mmap.mmap,), {"madvise": no_such_pages})
        monkeypatch.setattr(native.mmap, "mmap", without)
    else:
        monkeypatch.delattr(native.mmap, "MADV_HUGEPAGE", raising=False)
    tensors = [torch.randn(3, 5), torch.arange(7, dtype=torch.int8)]
    for copy, tensor in zip(native.side_by_side(tensors), tensors, strict=True):
        assert torch.equal(copy, tensor)


@pytest.fixture(
    params=[(4, 4, 16, False), (4, 2, 24, False), (3, 1, 8, False), (4, 2, 24, True)],
    ids=str,
    scope="module",
)
def model(request: pytest.FixtureRequest) -> GPT:
    """Loud random weights: every position and layer matters."""
    if not native.is_available():
        pytest.skip("the crate, as it is now, for x86 with AVX2, and ARM")
    heads, kv_heads, head_dim, modern = request.param
    sizes = {"n_head": heads, "n_kv_head": kv_heads, "n_embd": heads * head_dim}
    sizes |= {"key_offset": modern, "value_embeds": modern}
    made = GPT(GPTConfig(sequence_len=96, vocab_size=V, n_layer=2, logit_cap=7.0, **sizes))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.eval()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def by_torch(model: InferenceGPT) -> InferenceGPT:
    """The same without the native step; int8 as the numbers that it stands for."""
    model.native = None
    for product in (*(p for layer in model.layers for p in layer), model.head):
        if isinstance(product, Int8Product):
            product.weight = product.weight.float() * product.scales[:, None]
            product.__class__ = Product
    return model


def filled(config: GPTConfig, lengths: list[int], dtype: torch.dtype = torch.float32) -> KVCache:
    cache = KVCache(config, len(lengths), 96, dtype, "cpu")
    cache.storage.copy_(
        torch.randn(cache.storage.shape, generator=torch.Generator().manual_seed(2))
    )
    # a first token's half of a key would be one that is there already
    cache.lengths = [max(length, config.key_offset) for length in lengths]
    return cache


LENGTHS = [0, 1, 40, 7, 33, 64, 2, 90, 15, 16, 17]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize(
    ("dtype", "quantize", "stored", "tolerance"),
    [
        ("float32", "", "float32", 2e-5),
        ("float32", "int8", "float32", 2e-5),
        ("float32", "fp16", "float32", 2e-5),
        ("float32", "", "bfloat16", 0.2),
        ("bfloat16", "", "bfloat16", 0.2),
        ("bfloat16", "", "float32", 0.2),
        ("float16", "", "float32", 0.05),
    ],
)
@torch.inference_mode()
def test_logits_and_cache_are_those_of_torch(
    model: GPT,
    dtype: str,
    quantize: str,
    stored: str,
    tolerance: float,
    rows: int,
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    model.set_compute_dtype(getattr(torch, dtype))
    fast, slow = InferenceGPT(model, quantize), by_torch(InferenceGPT(model, quantize))
    assert fast.native is not None
    caches = [filled(model.config, LENGTHS[-rows:], getattr(torch, stored)) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    for _ in range(4):
        idx = torch.randint(0, V, (rows, 1), generator=generator)
        ours, theirs = (
            m(idx, kv_cache=cache.rows(range(rows)))
            for m, cache in zip((fast, slow), caches, strict=True)
        )
        assert ours.shape == (rows, 1, V) and ours.dtype == torch.float32
        assert float((ours - theirs).abs().max()) < tolerance
    assert caches[0].lengths == caches[1].lengths
    assert float((caches[0].storage - caches[1].storage).abs().max()) < 2 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_has_the_same_logits_in_any_company(model: GPT, dtype: torch.dtype) -> None:
    model.set_compute_dtype(dtype)
    fast = InferenceGPT(model)
    idx = torch.arange(len(LENGTHS))[:, None] * 7
    together = fast(idx, kv_cache=filled(model.config, LENGTHS, dtype).rows(range(len(LENGTHS))))
    for row in range(len(LENGTHS)):
        cache = filled(model.config, LENGTHS, dtype)
        alone = fast(idx[row : row + 1], kv_cache=cache.rows([row]))
        assert torch.equal(alone[0], together[row])


@torch.inference_mode()
def test_many_rows_go_to_torch_only_where_it_is_faster(
    model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    idx = torch.zeros(100, 1, dtype=torch.int64)
    rows = filled(model.config, [3] * 100).rows(range(100))
    for hardware, dtype, expected in [
        (True, torch.float32, True),
        (False, torch.bfloat16, True),
        (True, torch.bfloat16, False),
    ]:
        monkeypatch.setattr(native, "cpu_has_bf16", lambda hardware=hardware: hardware)
        model.set_compute_dtype(dtype)
        step = InferenceGPT(model).native
        assert step is not None and step.takes(idx, rows) is expected
        assert step.takes(idx[:64], filled(model.config, [3] * 64).rows(range(64)))


@torch.inference_mode()
def test_it_follows_the_weights(model: GPT) -> None:
    """RL decodes with the weights of the last step."""
    model.set_compute_dtype(torch.float32)
    fast = InferenceGPT(model)
    before = fast(torch.tensor([[5]]), kv_cache=filled(model.config, [9]).rows([0]))
    model.lm_head.weight.data.mul_(0.5)
    fast.refresh(model)
    after = fast(torch.tensor([[5]]), kv_cache=filled(model.config, [9]).rows([0]))
    model.lm_head.weight.data.mul_(2)
    assert not torch.allclose(before, after)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@torch.inference_mode()
def test_it_works_in_a_forked_child(model: GPT) -> None:
    """Which has none of the threads."""
    torch.set_num_threads(2)
    model.set_compute_dtype(torch.float32)
    fast = InferenceGPT(model)
    step = lambda: fast(torch.tensor([[5]]), kv_cache=filled(model.config, [9]).rows([0]))  # noqa: E731
    expected = step()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(step(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_does_not_fit_is_refused(model: GPT) -> None:
    model.set_compute_dtype(torch.float32)
    fast, cache = InferenceGPT(model), filled(model.config, [3, 3])
    assert fast.native is not None
    out = np.empty((1, V), np.float32)
    read_only = np.zeros(cache.storage.shape, np.int16)
    read_only.flags.writeable = False

    def step(**change: Any) -> None:
        given: dict[str, Any] = {"tokens": [1], "rows": [0], "lengths": [3], "threads": 1}
        given |= {"storage": cache.storage.numpy(), "out": out}
        fast.native.step(**(given | change))

    step()
    for change in (
        {"tokens": [10**6]},
        {"rows": [2]},
        {"lengths": [128]},
        {"threads": 0},
        {"tokens": [1, 1], "rows": [0, 0], "lengths": [3, 3], "out": np.empty((2, V), np.float32)},
        {"tokens": [1, 1]},
        {"out": np.empty((1, V - 1), np.float32)},
        {"storage": cache.storage[:1].numpy()},
        {"storage": cache.storage[:, :, :1].numpy()},  # not in a row
        {"storage": read_only},
    ):
        with pytest.raises(ValueError):
            step(**change)
    with pytest.raises((OverflowError, ValueError)):
        step(tokens=[-1])
    with pytest.raises(BufferError):
        step(out=np.empty((1, V), np.float64))

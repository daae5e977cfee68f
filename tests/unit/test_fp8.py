"""Emulated fp8 layers: the choice of layers; values and gradients stay close to the plain ones."""

import copy

import pytest
import torch

from zangchat.gpt import GPT, GPTConfig
from zangchat.nn import fp8
from zangchat.nn.fp8 import E4M3, E5M2, Fp8Linear, convert_to_fp8, quantise, scaled_product, use_fp8

CONFIG = GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)


def build() -> GPT:
    model = GPT(CONFIG)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(head_init_scale=0.1, generator=generator)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=p.size(1) ** -0.5, generator=generator)
    return model


def test_large_layers_are_converted_and_share_their_parameters() -> None:
    model = build()
    before = dict(model.named_parameters())
    assert convert_to_fp8(model, min_size=32 * 128) == 4  # the two MLP matrices of each block
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert isinstance(model.get_submodule("transformer.h.0.mlp.c_fc"), Fp8Linear)
    assert not isinstance(model.get_submodule("transformer.h.0.attn.c_q"), Fp8Linear)
    assert convert_to_fp8(model, min_size=1) == 8 and type(model.lm_head).__name__ == "Linear"


def test_quantising_fills_the_range_and_bounds_the_error() -> None:
    x = torch.randn(50, 50, generator=torch.Generator().manual_seed(0)) * 1e-3
    for dtype, bits in ((E4M3, 3), (E5M2, 2)):
        q, scale = quantise(x, dtype)
        assert q.float().abs().max() == torch.finfo(dtype).max
        back = q.float() * scale
        significant = x.abs() > x.abs().max() * 2**-6
        assert ((back - x).abs() / x.abs())[significant].max() <= 2 ** -(bits + 1) + 1e-6
    assert torch.isfinite(quantise(torch.zeros(4, 4), E4M3)[0].float()).all()


def test_product_is_that_of_the_rounded_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 32, generator=generator), torch.randn(48, 32, generator=generator)
    (a8, sa), (b8, sb) = quantise(a, E4M3), quantise(b, E4M3)
    expected = (a8.float() * sa) @ (b8.float() * sb).T
    torch.testing.assert_close(scaled_product(a8, b8, sa, sb, torch.float32), expected)


def test_training_in_fp8_follows_the_plain_model() -> None:
    plain = build()
    quantised = copy.deepcopy(plain)
    convert_to_fp8(quantised, min_size=1)
    idx = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1))
    losses = [model(idx, idx.roll(-1, 1)) for model in (plain, quantised)]
    assert (
        abs(losses[0].item() - losses[1].item()) < 0.05 * losses[0].item()
        and losses[0].item() != losses[1].item()
    )
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), quantised.parameters(), strict=True):
        assert torch.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.95, name
    with torch.no_grad():  # evaluation uses the ordinary products
        assert torch.equal(plain(idx), quantised(idx))


def test_without_fp8_products_the_model_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    assert (
        use_fp8(model, torch.device("cpu"))
        == "fp8: not used (no GPU: cpu); the products stay in --dtype"
    )
    assert not any(isinstance(module, Fp8Linear) for module in model.modules())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert "NVIDIA A100 has no fp8 products" in use_fp8(model, torch.device("cuda"))


def test_fp8_is_used_only_after_a_trial_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU replaces the GPU: the emulation passes the trial, a wrong or missing kernel fails."""

    class Pretended:
        type = "cuda"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "Generator", lambda device, plain=torch.Generator: plain())
    monkeypatch.setattr(
        torch, "randn", lambda *size, device, plain=torch.randn, **more: plain(*size, **more)
    )
    product = fp8.scaled_product
    assert fp8.unusable(Pretended()) is None
    monkeypatch.setattr(fp8, "scaled_product", lambda *args: product(*args) * 1.1)
    assert "off by 0.1" in fp8.unusable(Pretended())

    def missing(*args):
        raise RuntimeError("no kernel for this build\nmore")

    monkeypatch.setattr(fp8, "scaled_product", missing)
    assert fp8.unusable(Pretended()) == "no kernel for this build"

"""`--arch=modern`: every way to read it, and who refuses it."""

from pathlib import Path

import pytest
import torch

from tests.util import ByteTokenizer
from zangchat.config import ARCHITECTURES, GPTConfig
from zangchat.engine import Engine, Request
from zangchat.engine.scoring import score
from zangchat.errors import UserError
from zangchat.flops import count_params
from zangchat.gpt import GPT, ForwardOptions
from zangchat.hf.exporting import check_exportable
from zangchat.nn.attention import offset_keys
from zangchat.optim import build_optimizer

START = 3


@pytest.fixture(scope="module")
def model() -> GPT:
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 64}
    modern = ARCHITECTURES["modern"]
    made = GPT(GPTConfig(sequence_len=160, vocab_size=265, **sizes, **modern))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made.eval()


def prompt(number: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


@torch.inference_mode()
def by_hand(model: GPT, tokens: list[int], count: int) -> list[int]:
    """Greedy, the whole text anew for each token."""
    done = list(tokens)
    for _ in range(count):
        done.append(int(model(torch.tensor([done]))[0, -1].argmax()))
    return done[len(tokens) :]


def test_half_of_each_key_moves_on_and_the_first_keeps_its_own() -> None:
    k = torch.arange(6.0).view(1, 1, 3, 2)
    assert offset_keys(k).tolist() == [[[[0, 1], [2, 1], [4, 3]]]]
    assert offset_keys(k, torch.tensor([[[[9.0]]]])).tolist() == [[[[0, 9], [2, 1], [4, 3]]]]


@pytest.mark.parametrize("native", [True, False])
def test_the_engine_says_what_the_plain_forward_pass_says(model: GPT, native: bool) -> None:
    engine = Engine(model, ByteTokenizer())
    if not native:
        engine.model.native = None
    # rows join and leave, are moved, and the cache grows while the first one is the longest
    sizes = [(40, 60), (5, 2), (120, 20), (1, 20), (2, 9), (17, 30), (63, 5), (64, 6), (65, 7)]
    requests = [
        Request(prompt(i, length), max_tokens=new, temperature=0.0)
        for i, (length, new) in enumerate(sizes)
    ]
    with engine.running_batch(max_rows=3) as batch:
        done = [batch.submit(requests[0])]
        for _ in range(5):
            batch.step()
        done += map(batch.submit, requests[1:])
        while batch.busy:
            batch.step()
    for request, sequence in zip(requests, done, strict=True):
        assert sequence.tokens == by_hand(model, list(request.tokens), len(sequence.tokens))
    samples, _ = engine.generate_batch(prompt(7, 33), num_samples=3, max_tokens=9, temperature=0.0)
    assert len({tuple(sample) for sample in samples}) == 1  # copies of one prompt
    assert samples[0][33:] == by_hand(model, prompt(7, 33), 9)


@torch.inference_mode()
def test_scores_are_those_of_the_plain_forward_pass(model: GPT) -> None:
    prompts = [prompt(1, 9), prompt(1, 9), prompt(2, 30)]
    continuations = [prompt(3, 4), prompt(4, 1), prompt(5, 7)]
    for ours, start, end in zip(
        score(model, prompts, continuations), prompts, continuations, strict=True
    ):
        logits = model(torch.tensor([[*start, *end][:-1]]))[0, len(start) - 1 :]
        expected = logits.double().log_softmax(-1)[range(len(end)), end].sum()
        assert ours == pytest.approx(float(expected), abs=1e-4)


@torch.inference_mode()
def test_a_document_reads_nothing_of_the_one_before(model: GPT) -> None:
    parts = [[START, *prompt(1, 7)], [START, *prompt(2, 11)]]
    model.options = ForwardOptions(document_start=START)
    together = model(torch.tensor([sum(parts, [])]))[0]
    model.options = ForwardOptions()
    # only differences of positions count
    apart = torch.cat([model(torch.tensor([part]))[0] for part in parts])
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=1e-4)


def test_the_setting_is_saved_only_for_models_that_have_it(model: GPT) -> None:
    assert GPTConfig.from_dict(model.config.to_dict()) == model.config
    assert not {"key_offset", "value_embeds"} & set(GPTConfig().to_dict())
    with pytest.raises(ValueError, match="multiple of 4"):
        GPTConfig(n_embd=36, n_head=6, n_kv_head=6, key_offset=True)


@pytest.mark.parametrize("format", ["nanochat", "apertus", "mlx", "gguf", "ctranslate2"])
def test_no_export_carries_it(model: GPT, format: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"--format={format} has no place for key_offset, value_embeds"
    ):
        check_exportable(model, ByteTokenizer(), format)


def test_value_embeddings_are_counted_and_learn_at_half_the_rate_of_the_embedding(
    model: GPT,
) -> None:
    assert count_params(model.config)["total"] == sum(p.numel() for p in model.parameters())
    rates = {"embedding_lr": 0.3, "unembedding_lr": 0.1, "matrix_lr": 0.02}
    groups = build_optimizer(model, **rates).param_groups
    names = {p: name for name, p in model.named_parameters()}
    rate = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rate.keys() == set(names.values())
    assert rate["transformer.h.1.attn.value_embed.weight"] == 0.15  # of two layers the last
    assert "transformer.h.0.attn.value_embed.weight" not in rate
    model.set_compute_dtype(torch.bfloat16)
    stored = {name: p.dtype for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    model.set_compute_dtype(torch.float32)
    assert set(stored) == {"transformer.wte.weight", "transformer.h.1.attn.value_embed.weight"}

"""Bits per byte: tokens that count, and that the grouping into batches and the padding do not."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.util import ByteTokenizer, make_dataset
from zangchat.config import GPTConfig
from zangchat.dataloader import Batch, validation_batches
from zangchat.gpt import GPT, ForwardOptions
from zangchat.loss_eval import evaluate_bpb, evaluate_loss

VOCAB = 40


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(
        GPTConfig(sequence_len=8, vocab_size=VOCAB, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    )
    model.init_weights(head_init_scale=0.5, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCAB, (6, 9), generator=torch.Generator().manual_seed(2))
    targets = tokens[:, 1:].clone()
    targets[0, 3:] = -1
    return tokens[:, :-1], targets


def lengths() -> torch.Tensor:
    """1 to 4 bytes a token; the last 4 tokens are special."""
    token_bytes = torch.arange(VOCAB) % 4 + 1
    token_bytes[-4:] = 0
    return token_bytes


def batches(rows: tuple[torch.Tensor, torch.Tensor], size: int) -> list[Batch]:
    inputs, targets = rows
    return [
        Batch(inputs[i : i + size], targets[i : i + size], {}) for i in range(0, len(inputs), size)
    ]


def test_bpb_is_the_nats_of_counted_targets_in_bits_over_their_bytes(model, rows):
    inputs, targets = rows
    log_probs = torch.log_softmax(model(inputs).detach(), dim=-1)
    nats, num_bytes = 0.0, 0
    for row in range(inputs.size(0)):
        for t in range(inputs.size(1)):
            target = int(targets[row, t])
            if target >= 0 and lengths()[target] > 0:
                nats -= float(log_probs[row, t, target])
                num_bytes += int(lengths()[target])
    assert evaluate_bpb(model, batches(rows, 2), lengths()) == pytest.approx(
        nats / math.log(2) / num_bytes, rel=1e-6
    )


def test_the_batch_size_does_not_matter(model, rows):
    results = [evaluate_bpb(model, batches(rows, size), lengths()) for size in (1, 2, 6)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_rows_of_padding_do_not_matter(model, rows):
    padding = Batch(torch.zeros(2, 8, dtype=torch.int64), torch.full((2, 8), -1), {})
    assert evaluate_bpb(model, [*batches(rows, 6), padding], lengths()) == evaluate_bpb(
        model, batches(rows, 6), lengths()
    )


def test_text_without_a_byte_gives_infinity_not_a_crash(model, rows):
    assert evaluate_bpb(model, batches(rows, 6), torch.zeros(VOCAB, dtype=torch.int64)) == math.inf
    assert evaluate_bpb(model, [], lengths()) == math.inf


def test_the_mean_loss_weighs_tokens_not_batches(model, rows):
    inputs, targets = rows
    assert evaluate_loss(model, batches(rows, 4)) == pytest.approx(
        float(model(inputs, targets).detach()), rel=1e-6
    )
    assert math.isnan(evaluate_loss(model, []))


# ---- validation rows of about one length, through compiled blocks --------------------------------

T, TOKENIZER = 64, ByteTokenizer()


def byte_model(dtype: torch.dtype, **options: Any) -> GPT:
    sizes = {"vocab_size": TOKENIZER.get_vocab_size(), "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(sequence_len=T, n_layer=2, **sizes), dtype, ForwardOptions(**options))
    model.init_weights(0.1, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for block in model.transformer["h"]:
            for c_proj in (block.attn.c_proj, block.mlp.c_proj):
                c_proj.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
            block.mlp.c_fc.weight.mul_(2.5)  # as loud as the other matrices
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile_backend", [None, "eager"])
def test_packed_rows_have_the_bpb_of_single_rows_to_the_last_digit_shown(
    tmp_path: Path, dtype: torch.dtype, compile_backend: str | None
) -> None:
    texts = [("the cat sat on a mat. " * 9)[i % 7 : i % 7 + 1 + 37 * i % 60] for i in range(90)]
    dataset = make_dataset(tmp_path / "lengths", ["train"], texts)
    single = []
    for text in texts:
        ids = list(text.encode())[:T]
        filling = T - len(ids)
        inputs = [TOKENIZER.get_bos_token_id(), *ids[:-1], *[0] * filling]
        single.append(Batch(torch.tensor([inputs]), torch.tensor([ids + [-1] * filling]), {}))
    packed = list(validation_batches(dataset, TOKENIZER, T, rows_per_batch=4))
    assert sum(batch.inputs.numel() for batch in packed) < 0.8 * T * len(single)
    token_bytes = torch.from_numpy(TOKENIZER.token_bytes())
    expected = evaluate_bpb(byte_model(dtype), single, token_bytes)
    got = evaluate_bpb(byte_model(dtype, compile_backend=compile_backend), packed, token_bytes)
    assert f"{got:.4f}" == f"{expected:.4f}"
    if dtype == torch.float32:
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("evaluate", [evaluate_loss, evaluate_bpb])
def test_weights_are_cast_once_for_all_batches(evaluate: Any) -> None:
    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
            is_cast = function in (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
            if is_cast and args[0].shape == weight.shape and args[0].dtype == torch.float32:
                casts.append(args[0].dtype)
            return function(*args, **(kwargs or {}))

    model, casts = byte_model(torch.bfloat16), []
    weight = model.lm_head.weight
    inputs = torch.zeros(2, 8, dtype=torch.int64)
    more = [torch.from_numpy(TOKENIZER.token_bytes())] if evaluate is evaluate_bpb else []
    with Casts():
        evaluate(model, [Batch(inputs, inputs, {})] * 3, *more)
    assert casts == [torch.float32]

"""Bits per byte: what counts, and that the grouping into batches and the padding do not."""

import math

import pytest
import torch

from zangchat.config import GPTConfig
from zangchat.dataloader import Batch
from zangchat.gpt import GPT
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

"""Scores of continuations against the plain forward pass, in batches of any size."""

import math
import random
from typing import Any

import pytest
import torch

from tests.util import ByteTokenizer, lively_model
from zangchat.engine import Engine, score, scoring
from zangchat.engine.model import InferenceGPT
from zangchat.gpt import GPT

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return lively_model(
        TOKENIZER.get_vocab_size(), sequence_len=96, n_layer=2, n_embd=32, seed=4
    ).eval()


def slow_score(model: GPT, prompt: list[int], continuation: list[int], greedy: bool) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *continuation][:-1]]))[0, len(prompt) - 1 :]
    if greedy:
        return 0.0 if logits.argmax(dim=-1).tolist() == continuation else -math.inf
    return float(logits.double().log_softmax(-1)[range(len(continuation)), continuation].sum())


def rows(seed: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that often equal their neighbours, and continuations."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        before = prompts[-1] if prompts else [1]
        other = [rng.randrange(200) for _ in range(rng.choice([1, 7, 60]))]
        prompts.append(before if rng.random() < 0.6 else other)
    return prompts, [[rng.randrange(200) for _ in range(rng.choice([1, 1, 2, 9]))] for _ in prompts]


@pytest.mark.parametrize("kind", [lambda model: model, InferenceGPT], ids=["plain", "inference"])
@pytest.mark.parametrize("tokens", [1, 100, 1024])
def test_scores_are_those_of_the_plain_forward_pass(
    model: GPT, kind: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", {"cpu": tokens})
    for seed in range(4):
        prompts, continuations = rows(seed, 25)
        expected = [
            slow_score(model, *pair, False) for pair in zip(prompts, continuations, strict=True)
        ]
        assert score(kind(model), prompts, continuations) == pytest.approx(expected, abs=1e-3)


def test_greedy_scores_tell_whether_decoding_gives_the_continuation(model: GPT) -> None:
    prompts, _ = rows(1, 12)
    greedy = [
        Engine(model, TOKENIZER).generate_batch(p, temperature=0, max_tokens=4)[0][0][len(p) :]
        for p in prompts
    ]
    pairs = [(p, c) for p, c in zip(prompts, greedy, strict=True) if c]
    wrong = [(p, [*c[:-1], (c[-1] + 1) % 200]) for p, c in pairs]
    for some, value in ((pairs, 0.0), (wrong, -math.inf)):
        assert [slow_score(model, *pair, True) for pair in some] == [value] * len(some)
        ours = Engine(model, TOKENIZER).score(*zip(*some, strict=True), greedy=True)
        assert ours == [value] * len(some)
    assert len(pairs) > 6


def test_a_prompt_with_continuations_of_one_token_is_read_once(model: GPT) -> None:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].numel()))
    score(model, [[1, 2, 3]] * 4, [[5], [6], [7], [8]])
    hook.remove()
    assert seen == [3]


@pytest.mark.parametrize(("prompt", "continuation"), [([], [1]), ([1], [])])
def test_nothing_to_score_is_refused(
    model: GPT, prompt: list[int], continuation: list[int]
) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        score(model, [prompt], [continuation])
    with pytest.raises(ValueError, match="needs a continuation"):
        score(model, [[1], [2]], [[3]])


def test_no_rows_no_scores(model: GPT) -> None:
    assert score(model, [], []) == []

"""Scores of continuations against the plain forward pass, with any sharing of prompts and in batches of any size."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.util import ByteTokenizer, lively_model
from zangchat.engine import Engine, score, scoring
from zangchat.engine.model import InferenceGPT
from zangchat.engine.scoring import shared_prefixes
from zangchat.gpt import GPT

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model() -> GPT:
    return lively_model(TOKENIZER.get_vocab_size(), sequence_len=96, n_layer=2, n_embd=32, seed=4).eval()


def slow_score(model: GPT, prompt: list[int], continuation: list[int], greedy: bool) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *continuation][:-1]]))[0, len(prompt) - 1 :]
    if greedy:
        return 0.0 if logits.argmax(dim=-1).tolist() == continuation else -math.inf
    return float(logits.double().log_softmax(-1)[range(len(continuation)), continuation].sum())


def rows(seed: int, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that share nothing, a part or everything with their neighbours, and continuations."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for _ in range(count):
        before = prompts[-1] if prompts else [1]
        kept = rng.choice([0, len(before) // 2, len(before) - 1, len(before), len(before)])
        new = rng.choice([0, 0, 1, 7, 30]) if kept else rng.randint(1, 40)
        prompts.append([*before[:kept], *(rng.randrange(200) for _ in range(new))][:60])
    prompts = [prompt or [2] for prompt in prompts]
    return prompts, [[rng.randrange(200) for _ in range(rng.choice([1, 1, 2, 9]))] for _ in prompts]


@pytest.mark.parametrize("kind", [lambda model: model, InferenceGPT], ids=["plain", "inference"])
@pytest.mark.parametrize("tokens", [1, 100, 1024])
def test_scores_are_those_of_the_plain_forward_pass(model: GPT, kind: Any, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "TOKENS_PER_BATCH", {"cpu": tokens})
    for seed in range(4):
        prompts, continuations = rows(seed, 25)
        expected = [slow_score(model, *pair, False) for pair in zip(prompts, continuations, strict=True)]
        assert score(kind(model), prompts, continuations) == pytest.approx(expected, abs=1e-3)


def test_greedy_scores_tell_whether_decoding_gives_the_continuation(model: GPT) -> None:
    prompts, _ = rows(1, 12)
    greedy = [Engine(model, TOKENIZER).generate_batch(p, temperature=0, max_tokens=4)[0][0][len(p) :] for p in prompts]
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


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_shared_prefix_begins_all_its_prompts_and_saves_tokens(seed: int) -> None:
    prompts, _ = rows(seed, 12)
    prefixes = shared_prefixes(prompts)
    assert [row for prefix in prefixes for row in prefix.rows] == list(range(len(prompts)))
    for prefix in prefixes:
        members = [prompts[row] for row in prefix.rows]
        assert all(member[: len(prefix.tokens)] == prefix.tokens for member in members)
        read = len(prefix.tokens) + sum(len(member) - len(prefix.tokens) for member in members)
        assert len(members) == 1 or read < sum(map(len, members))


def test_prompts_that_share_little_are_read_apart() -> None:
    assert [(p.tokens, p.rows) for p in shared_prefixes([[9, 1, 2, 3], [9, 1, 2, 3], [9, 4, 5]])] == [
        ([9, 1, 2, 3], [0, 1]),
        ([9, 4, 5], [2]),
    ]
    # two rows would read two tokens again to save two
    assert len(shared_prefixes([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5]])) == 2
    assert [p.rows for p in shared_prefixes([[1, 2, 3, 4], [1, 2, 3, 5]])] == [[0, 1]]


@pytest.mark.parametrize(("prompt", "continuation"), [([], [1]), ([1], [])])
def test_nothing_to_score_is_refused(model: GPT, prompt: list[int], continuation: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        score(model, [prompt], [continuation])


def test_no_rows_no_scores(model: GPT) -> None:
    assert score(model, [], []) == []

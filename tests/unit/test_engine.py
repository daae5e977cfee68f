"""The engine against the plain forward pass, and against itself in other company."""

import json
import math
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dev import bench_infer
from tests.documents import ROOT
from tests.util import ByteTokenizer
from zangchat.config import GPTConfig
from zangchat.engine import Engine, KVCache, Request, RunningBatch, native
from zangchat.engine.model import InferenceGPT
from zangchat.engine.replies import ReplyDecoder, StopFinder, StreamDecoder, fit_conversation
from zangchat.engine.runner import PROMPT_MULTIPLE
from zangchat.engine.sampling import Sampler
from zangchat.gpt import GPT

TOKENIZER = ByteTokenizer()
VOCAB = TOKENIZER.get_vocab_size()
MARGIN = 1e-4  # logits closer than this may change places with the shape of the batch


def special(name: str) -> int:
    return TOKENIZER.encode_special(f"<|{name}|>")


STOPS = (special("assistant_end"), special("bos"))


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random and lively: every layer contributes, and stop tokens do turn up."""
    torch.manual_seed(1)
    model = GPT(
        GPTConfig(sequence_len=160, vocab_size=VOCAB, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
    )
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def engine(model: GPT) -> Engine:
    return Engine(model, TOKENIZER)


def prompt(number: int, length: int) -> list[int]:
    return torch.randint(
        0, 256, (length,), generator=torch.Generator().manual_seed(number)
    ).tolist()


# ---- greedy decoding is the plain forward pass ---------------------------------------------------


def close_calls(
    model: GPT, tokens: list[int], continuation: list[int], mask: list[int], stop_reason: str
) -> int:
    """Check each token the model chose against one full forward pass; returns how many were within
    MARGIN of the best, but not it.
    """
    if not continuation and stop_reason != "stop":
        return 0
    with torch.no_grad():
        logits = model(torch.tensor([tokens + continuation]))[0, len(tokens) - 1 :]
    close = 0
    for row, token, chosen in zip(logits, continuation, mask, strict=False):
        if chosen and int(row.argmax()) != token:
            assert float(row.max() - row[token]) < MARGIN
            close += 1
    if stop_reason == "stop":
        assert float(logits[-1].max() - logits[-1, list(STOPS)].max()) < MARGIN
    return close


@st.composite
def traffic(draw: Any) -> list[tuple[int, int, int, int | None]]:
    """(prompt number, prompt length, new tokens, step at which the user leaves) for each request,
    and when it joins.
    """
    request = st.tuples(
        st.integers(0, 9), st.integers(1, 90), st.integers(0, 70), st.none() | st.integers(0, 30)
    )
    return draw(st.lists(request, min_size=1, max_size=9))


@given(
    traffic(),
    st.integers(1, 5),
    st.integers(0, 7),
    st.sampled_from([5, 64, 4096]),
    st.booleans(),
    st.sampled_from([1, PROMPT_MULTIPLE]),
)
@settings(max_examples=30, deadline=None)
def test_greedy_tokens_equal_the_plain_forward_pass_in_any_company(
    model: GPT,
    plan: list[tuple[int, int, int, int | None]],
    max_rows: int,
    gap: int,
    prefill_tokens: int,
    ahead: bool,
    multiple: int,
) -> None:
    batch = RunningBatch(InferenceGPT(model), TOKENIZER, max_rows, prefill_tokens, ahead)
    batch.runner.prompt_multiple = multiple
    live, joined, step = [], 0, 0
    while joined < len(plan) or batch.busy:
        if joined < len(plan) and step >= joined * gap:
            number, length, max_tokens, leaves = plan[joined]
            live.append(
                (
                    batch.submit(Request(prompt(number, length), max_tokens, temperature=0)),
                    leaves,
                    step,
                )
            )
            joined += 1
            continue
        for generation, leaves, since in live:
            if leaves is not None and step - since == leaves:
                batch.cancel(generation)
        batch.step()
        assert batch.num_rows <= max_rows
        step += 1
    close = 0
    for (generation, leaves, _), (_, _, max_tokens, _) in zip(live, plan, strict=True):
        result = generation.result()
        assert len(result.tokens) <= max_tokens
        assert result.stop_reason in ("stop", "length") or leaves is not None
        close += close_calls(
            model, list(generation.request.tokens), result.tokens, result.mask, result.stop_reason
        )
    assert close <= 2


def test_cached_logits_equal_the_plain_forward_pass_at_every_position(model: GPT) -> None:
    tokens = torch.tensor([prompt(0, 100), prompt(1, 100)])
    with torch.no_grad():
        expected = model(tokens)
        cache = KVCache(model.config, 2, 100, torch.float32, "cpu")
        got = [model(tokens[:, :7], kv_cache=cache.rows(range(2)))]
        # a chunk behind stored tokens
        got.append(model(tokens[:, 7:30], kv_cache=cache.rows(range(2))))
        got += [model(tokens[:, i : i + 1], kv_cache=cache.rows(range(2))) for i in range(30, 100)]
    torch.testing.assert_close(torch.cat(got, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_step", [True, False])
@pytest.mark.parametrize("kind", [lambda model: model, InferenceGPT], ids=["plain", "inference"])
def test_a_16_bit_model_on_a_cpu_stores_16_bits_for_the_native_step_only(
    model: GPT, kind: Any, has_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_available", lambda: has_step)
    in_bf16 = GPT(model.config, torch.bfloat16)
    in_bf16.load_state_dict(model.state_dict())
    batch = RunningBatch(kind(in_bf16.eval()), TOKENIZER)
    expected_dtype = torch.bfloat16 if has_step else torch.float32
    assert batch.runner.cache.storage.dtype == expected_dtype
    generations = [
        batch.submit(Request(prompt(i, 20 + 7 * i), 12, temperature=0, logprobs=0))
        for i in range(3)
    ]
    while batch.busy:
        batch.step()
    for generation in generations:  # what the fp32 model thinks of the same tokens
        tokens = [*generation.request.tokens, *generation.tokens]
        logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
        start = len(generation.request.tokens) - 1
        expected = [logprobs[start + i, token].item() for i, token in enumerate(generation.tokens)]
        assert [lp.value for lp in generation.logprobs][: len(expected)] == pytest.approx(
            expected, abs=0.15
        )


def test_growing_the_cache_changes_no_logit(model: GPT) -> None:
    small, large = (
        KVCache(model.config, 1, 1, torch.float32, "cpu"),
        KVCache(model.config, 3, 160, torch.float32, "cpu"),
    )
    tokens = torch.tensor([prompt(0, 150)])
    with torch.no_grad():
        for i in range(150):
            small.reserve(1, i + 1)
            if i == 70:
                small.reserve(2, i + 1)  # more rows, too
            outputs = [
                model(tokens[:, i : i + 1], kv_cache=cache.rows(range(1)))
                for cache in (small, large)
            ]
            assert torch.equal(*outputs)
    assert small.capacity >= 150 and small.num_rows >= 2


def test_rows_of_different_lengths_are_extended_by_several_tokens_at_once(model: GPT) -> None:
    first, second = torch.tensor([prompt(0, 20)]), torch.tensor([prompt(1, 11)])
    chunk = torch.tensor([prompt(2, 5), prompt(3, 5)])
    cache = KVCache(model.config, 2, 64, torch.float32, "cpu")
    with torch.no_grad():
        model(first, kv_cache=cache.rows(range(1)))
        model(second, kv_cache=cache.rows([1]))
        got = model(chunk, kv_cache=cache.rows(range(2)))
        expected = [
            model(torch.cat([head, tail[None]], dim=1))[:, -5:]
            for head, tail in zip((first, second), chunk, strict=True)
        ]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)


def test_rows_change_places_all_at_once(model: GPT) -> None:
    cache = KVCache(model.config, 4, 64, torch.float32, "cpu")
    for row, length in enumerate((9, 4, 30, 2)):
        cache.lengths[row] = length
        cache.storage[:, :, row, :length] = row + 1
    cache.copy_rows({0: 1, 1: 2, 2: 0, 3: 2})
    assert cache.lengths == [4, 30, 9, 30]
    for row, (number, length) in enumerate(((2, 4), (3, 30), (1, 9), (3, 30))):
        assert (cache.storage[:, :, row, :length] == number).all()


def test_the_cache_refuses_rows_and_tokens_that_it_has_no_room_for(model: GPT) -> None:
    cache = KVCache(model.config, 1, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match="cache that has 1"):
        cache.rows(range(2))
    with pytest.raises(ValueError, match="no room"), torch.no_grad():
        model(torch.zeros(1, 65, dtype=torch.long), kv_cache=cache.rows(range(1)))


# ---- sampling ------------------------------------------------------------------------------------


def sample(logits: torch.Tensor, requests: list[Request], uniforms: list[float]) -> torch.Tensor:
    return Sampler(requests, logits.size(-1), "cpu", [request.tokens for request in requests])(
        logits, uniforms
    )


def requests_of(*settings: dict[str, Any]) -> list[Request]:
    return [Request([0], **setting) for setting in settings]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    n = 4000
    drawn = sample(
        logits.expand(n, -1),
        requests_of({"temperature": 0.7}) * n,
        [(i + 0.5) / n for i in range(n)],
    )
    shares = torch.bincount(drawn, minlength=4) / n
    torch.testing.assert_close(shares, (logits[0] / 0.7).softmax(-1), atol=1e-3, rtol=0)


def test_top_k_and_top_p_keep_the_likely_tokens_of_their_own_row() -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log().expand(400, -1)
    uniforms = [(i + 0.5) / 400 for i in range(400)]

    def seen(**setting: Any) -> set[int]:
        return set(sample(logits, requests_of(setting) * 400, uniforms).tolist())

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=0) == seen(top_k=99) == seen(top_p=1.0) == {0, 1, 2, 3}
    assert seen(top_k=1) == seen(temperature=0) == seen(top_p=0.01) == {0}
    assert seen(top_k=2) == seen(top_p=0.6) == {0, 2}
    assert seen(top_k=3) == seen(top_p=0.8) == {0, 2, 3}
    assert seen(top_k=2, top_p=0.99) == {0, 2}
    mixed = requests_of({"top_k": 2}, {"temperature": 0}, {"top_p": 0.6}, {})
    rows = [sample(logits[:4], mixed, [u] * 4).tolist() for u in uniforms]
    assert [set(column) for column in zip(*rows, strict=True)] == [
        {0, 2},
        {0},
        {0, 2},
        {0, 1, 2, 3},
    ]


def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest() -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log().expand(400, -1)
    uniforms = [(i + 0.5) / 400 for i in range(400)]
    for setting, kept in (
        ({"min_p": 0.4}, {0, 2}),
        ({"min_p": 0.25}, {0, 2, 3}),
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 1.0}, {0}),
    ):
        assert set(sample(logits, requests_of(setting) * 400, uniforms).tolist()) == kept
    assert set(
        sample(
            logits, requests_of({"min_p": 0.4, "top_k": 3, "top_p": 0.99}) * 400, uniforms
        ).tolist()
    ) == {0, 2}


def test_the_repetition_penalty_holds_for_what_stands_in_the_row(model: GPT) -> None:
    logits = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    sampler = Sampler(
        requests_of({"temperature": 0, "repetition_penalty": 1.5}, {"temperature": 0}),
        3,
        "cpu",
        [[0], [0]],
    )
    assert sampler(logits, [0, 0]).tolist() == [1, 0]
    sampler.mark_seen(torch.tensor([[1], [1]]))
    assert sampler(logits, [0, 0]).tolist() == [0, 0]  # 2 / 1.5 against 1.5 / 1.5 and -1
    (penalised,) = requests_of({"temperature": 0, "repetition_penalty": 2.0})
    negative = Sampler([penalised], 2, "cpu", [[0]])
    assert negative(torch.tensor([[-1.0, -1.5]]), [0]).tolist() == [1]  # -1 x 2 against -1.5
    # a whole generation against the definition, alone and in company
    mine = Request(prompt(4, 12), 30, temperature=0, repetition_penalty=1.3)
    for ahead in (False, True):
        batch = RunningBatch(model, TOKENIZER, prefill_tokens=8, ahead=ahead)
        others = [
            batch.submit(Request(prompt(i, 3 + 5 * i), 4 * i, temperature=0)) for i in range(1, 4)
        ]
        generation = batch.submit(mine)
        while batch.busy:
            batch.step()
        assert all(other.stop_reason for other in others)
        tokens = list(mine.tokens)
        for token in generation.tokens:
            with torch.no_grad():
                row = model(torch.tensor([tokens]))[0, -1]
            seen = torch.zeros(VOCAB, dtype=torch.bool)
            seen[tokens] = True
            row = torch.where(seen, torch.where(row > 0, row / 1.3, row * 1.3), row)
            assert float(row.max() - row[token]) < MARGIN
            tokens.append(token)
        assert len(generation.tokens) > 3


def drawn_by_definition(logits: torch.Tensor, request: Request, uniform: float) -> int:
    """The slow twin of Sampler for one row (V,): the likely tokens one by one, then the inverse of
    their distribution.
    """
    if request.temperature == 0:
        return int(logits.argmax())
    scores = (logits / request.temperature).double()
    order = scores.argsort(descending=True).tolist()[: request.top_k or None]
    weights = {token: math.exp(float(scores[token] - scores.max())) for token in order}
    total, reached, kept = sum(weights.values()), 0.0, []
    for token in order:
        if reached < (request.top_p or 1) * total:
            kept.append(token)
        reached += weights[token]
    kept = sorted(token for token in kept if weights[token] >= (request.min_p or 0))
    target = uniform * sum(weights[token] for token in kept)
    for token in kept:
        target -= weights[token]
        if target < 0:
            break
    return token


def test_draws_are_those_of_the_definition_alone_and_in_company() -> None:
    number = random.Random(7)
    generator = torch.Generator().manual_seed(7)
    for size in (3, 50, 1000):
        settings = [
            {
                "temperature": number.choice([0, 0.5, 1, 3]),
                "top_k": number.choice([None, 1, size // 2, size + 1]),
                "top_p": number.choice([None, 0.2, 0.9, 0.999]),
                "min_p": number.choice([None, None, 0.01]),
            }
            for _ in range(100)
        ]
        logits = torch.randn(len(settings), size, generator=generator) * 2
        requests, uniforms = requests_of(*settings), [number.random() for _ in settings]
        expected = [
            drawn_by_definition(*row) for row in zip(logits, requests, uniforms, strict=True)
        ]
        assert sample(logits, requests, uniforms).tolist() == expected
        for i, request in enumerate(requests):
            assert sample(logits[i : i + 1], [request], [uniforms[i]]).tolist() == [expected[i]]


def test_extreme_draws_and_temperatures_stay_within_the_vocabulary() -> None:
    logits = torch.tensor([[15.0, -15.0, 14.99]])
    for temperature in (1e-30, 1e-4, 1.0, 1e4):
        for u in (0.0, 1 - 2**-53):
            assert sample(logits, requests_of({"temperature": temperature}), [u]).item() in (
                0,
                1,
                2,
            )
    assert sample(logits, requests_of({"temperature": 1e-30}), [0.999]).item() == 0


def test_a_seed_gives_the_same_text_alone_and_in_a_crowd(engine: Engine) -> None:
    crowd = [
        Request(
            prompt(i, 5 + 7 * i),
            40,
            temperature=0.9,
            top_k=(None, 30)[i % 2],
            top_p=(None, 0.9)[i % 3 == 0],
            seed=i,
        )
        for i in range(8)
    ]
    together = engine.generate_many(crowd, max_rows=5)
    alone = [engine.generate_many([request])[0] for request in crowd]
    assert [r.tokens for r in together] == [r.tokens for r in alone]


def test_seeds_and_samples_differ_and_repeat(engine: Engine) -> None:
    def run(**kw: Any) -> list[list[int]]:
        return engine.generate_batch(prompt(3, 9), max_tokens=30, **kw)[0]

    four = run(num_samples=4, seed=7)
    assert four == run(num_samples=4, seed=7)
    assert len({tuple(sequence) for sequence in four}) == 4
    assert four[:2] == run(num_samples=2, seed=7)
    assert four[0] != run(seed=8)[0]
    assert run(num_samples=3, temperature=0) == run(temperature=0, seed=1) * 3


def test_padding_of_the_vocabulary_is_never_sampled(engine: Engine, model: GPT) -> None:
    assert model.lm_head.weight.shape[0] > VOCAB
    results = engine.generate_many(
        [Request(prompt(i, 4), 40, temperature=1e4, seed=i) for i in range(10)]
    )
    tokens = {token for result in results for token in result.tokens}
    assert max(tokens) < VOCAB and len(tokens) > 100


# ---- counts and limits ---------------------------------------------------------------------------


class ScriptedModel:
    """Stands in for GPT: after position p comes script[p + 1], whatever was read. Rows are told
    apart by their first token.
    """

    compute_dtype = torch.float32

    def __init__(self, *scripts: list[int], sequence_len: int = 256) -> None:
        self.scripts = {script[0]: script for script in scripts}
        self.config = GPTConfig(
            sequence_len=sequence_len, vocab_size=VOCAB, n_layer=1, n_head=1, n_kv_head=1, n_embd=2
        )
        self.read: list[list[int]] = []

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def __call__(
        self, idx: torch.Tensor, kv_cache: Any, logits_at: torch.Tensor | None = None
    ) -> torch.Tensor:
        B, T = idx.shape
        k = idx[:, None, :, None].float().expand(B, 1, T, 2)
        stored, _, _ = kv_cache.update(0, k, k)
        last = kv_cache.positions + (T - 1 if logits_at is None else logits_at)
        self.read += idx.tolist()
        kv_cache.advance(T)
        logits = torch.full((B, 1, VOCAB), -10.0)
        for row in range(B):
            script = self.scripts[int(stored[row, 0, 0, 0])]
            logits[row, 0, script[int(last[row]) + 1]] = 10.0
        return logits


def scripted(*scripts: list[int], **kw: Any) -> Engine:
    return Engine(ScriptedModel(*scripts, **kw), TOKENIZER)  # type: ignore[arg-type]


def script(text: str, reply: list[int | str]) -> tuple[list[int], list[int]]:
    """(prompt, prompt + reply), where the reply mixes text and special tokens."""
    tokens = TOKENIZER.encode(text)
    for piece in reply:
        tokens += [piece] if isinstance(piece, int) else TOKENIZER.encode(piece)
    return TOKENIZER.encode(text), tokens


@pytest.mark.parametrize("end", STOPS)
def test_a_reply_ends_before_the_token_that_ends_it(end: int) -> None:
    start, whole = script("q", ["hello", end, "never seen"])
    result = scripted(whole).generate_many([Request(start, temperature=0)])[0]
    assert (TOKENIZER.decode(result.tokens), result.mask, result.stop_reason) == (
        "hello",
        [1] * 5,
        "stop",
    )


def test_max_tokens_is_exact_and_the_context_is_a_limit(engine: Engine) -> None:
    start, whole = script("question", ["x" * 100])
    endless = scripted(whole, sequence_len=50)
    for max_tokens, expected in ((0, 0), (1, 1), (17, 17), (42, 42), (43, 42), (None, 42)):
        result = endless.generate_many([Request(start, max_tokens, temperature=0)])[0]
        assert (len(result.tokens), result.stop_reason) == (expected, "length")
    full = endless.generate_many([Request([113] * 50, temperature=0)])[0]
    assert (full.tokens, full.stop_reason) == ([], "length")
    assert list(endless.generate(start, max_tokens=0)) == []


def test_columns_have_an_entry_per_sample_and_minus_one_after_the_end(engine: Engine) -> None:
    columns = list(engine.generate(prompt(5, 6), num_samples=12, temperature=3.0, seed=3))
    assert all(len(tokens) == len(masks) == 12 for tokens, masks in columns)
    sequences, masks = engine.generate_batch(prompt(5, 6), num_samples=12, temperature=3.0, seed=3)
    assert len({len(sequence) for sequence in sequences}) > 1  # they end at different times
    for i, (sequence, mask) in enumerate(zip(sequences, masks, strict=True)):
        shown = [tokens[i] for tokens, _ in columns]
        length = len(sequence) - 6
        assert shown == sequence[6:] + [-1] * (len(columns) - length)
        assert len(mask) == len(sequence) and mask[:6] == [0] * 6
        assert not set(sequence[6:]) & set(STOPS)


def test_samples_of_one_prompt_share_its_prefill() -> None:
    start, whole = script("a long question", ["answer", STOPS[0]])
    engine = scripted(whole)
    results = engine.generate_many([Request(start, temperature=0)] * 5)
    assert [TOKENIZER.decode(result.tokens) for result in results] == ["answer"] * 5
    assert engine.model.read.count(start) == 1  # type: ignore[attr-defined]


def test_prompts_are_read_in_few_shapes_where_each_shape_costs_memory(model: GPT) -> None:
    """bf16 on a CPU: torch keeps a generated product for every number of positions it has seen."""
    in_bf16 = GPT(model.config, torch.bfloat16)
    in_bf16.load_state_dict(model.state_dict())
    widths: list[int] = []
    in_bf16.register_forward_pre_hook(lambda _, args: widths.append(args[0].size(1)))
    batch = RunningBatch(in_bf16.eval(), TOKENIZER, max_rows=1)
    for n in (1, 9, 30, 33, 47, 80, 155):
        batch.submit(Request(prompt(n, n), 1, temperature=0))
    while batch.busy:
        batch.step()
    assert widths == [16, 16, 32, 48, 48, 80, 160]


def test_more_requests_than_rows_come_back_in_order() -> None:
    pairs = [
        script(chr(65 + i) * (1 + i % 4), [chr(97 + i) * (1 + i * 3 % 7), STOPS[0]])
        for i in range(20)
    ]
    results = scripted(*(whole for _, whole in pairs)).generate_many(
        [Request(start, temperature=0) for start, _ in pairs], max_rows=3
    )
    assert [TOKENIZER.decode(r.tokens) for r in results] == [
        chr(97 + i) * (1 + i * 3 % 7) for i in range(20)
    ]


def test_no_requests_no_results(engine: Engine) -> None:
    assert engine.generate_many([]) == []


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"tokens": []}, "at least one token"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("a", "")}, "stop string"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": True}, "needs logprobs"),
        ({"tokens": [VOCAB]}, "outside of 0"),
        ({"tokens": [0] * 161}, "161 tokens, the model's context 160"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    engine: Engine, setting: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        engine.generate_many([Request(**{"tokens": [1], **setting})])


def test_a_request_that_was_cancelled_frees_its_row_at_once(model: GPT) -> None:
    batch = RunningBatch(model, TOKENIZER, max_rows=1)
    first, second, third = (batch.submit(Request(prompt(i, 4), 5, temperature=0)) for i in range(3))
    batch.step()
    batch.cancel(first)
    batch.cancel(first)  # again: nothing happens
    batch.cancel(third)  # while it waits
    assert (batch.live(), [g.stop_reason for g in (first, third)]) == (
        [second],
        ["cancelled", "cancelled"],
    )
    batch.step()
    assert batch.scheduler.running == [second] and len(first.tokens) == 1


# ---- the host one step behind the device ---------------------------------------------------------


@pytest.mark.parametrize("max_rows", [2, 5])
def test_running_ahead_of_the_host_changes_nothing(model: GPT, max_rows: int) -> None:
    requests = [
        Request(
            prompt(i % 5, 4 + 9 * (i % 5)),
            6 * i % 31,
            temperature=(0.0, 1.5)[i % 2],
            top_k=(None, 40)[i % 3 == 0],
            seed=i,
            logprobs=2,
        )
        for i in range(14)
    ]
    results = []
    for ahead in (False, True):
        batch = RunningBatch(model, TOKENIZER, max_rows, prefill_tokens=20, ahead=ahead)
        generations = [batch.submit(request) for request in requests]
        while batch.busy:
            batch.step()
        results.append([g.result() for g in generations])
    for one, other in zip(*results, strict=True):
        assert (one.tokens, one.mask, one.stop_reason, one.stop_token) == (
            other.tokens,
            other.mask,
            other.stop_reason,
            other.stop_token,
        )
        assert [lp.value for lp in one.logprobs] == pytest.approx(
            [lp.value for lp in other.logprobs], abs=1e-4
        )


def test_a_device_side_step_at_given_positions_equals_the_ordinary_one(model: GPT) -> None:
    """What a CUDA graph records: rows at their own positions, a length that is only an upper bound,
    idle rows beside them.
    """
    model, cache = InferenceGPT(model), KVCache(model.config, 4, 128, torch.float32, "cpu")
    with torch.inference_mode():
        for row, length in enumerate((20, 7, 33)):
            model(torch.tensor([prompt(row, length)]), kv_cache=cache.rows([row]))
        before = list(cache.lengths)
        idx = torch.tensor([[1], [2], [3], [0]])
        got = model(idx, kv_cache=cache.fixed_rows(torch.tensor(before), 100))
        assert cache.lengths == before
        expected = model(idx[:3], kv_cache=cache.rows(range(3)))
    torch.testing.assert_close(got[:3], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_cuda_graphs_and_running_ahead_agree_with_the_plain_model(model: GPT) -> None:
    device_model = GPT(model.config)
    device_model.load_state_dict(model.state_dict())
    device_model = device_model.to("cuda")
    requests = [Request(prompt(i, 4 + 9 * i), 40, temperature=0) for i in range(6)]
    for request, result in zip(
        requests, Engine(device_model, TOKENIZER).generate_many(requests, max_rows=3), strict=True
    ):
        assert (
            close_calls(model, list(request.tokens), result.tokens, result.mask, result.stop_reason)
            <= 2
        )


# ---- the model as the engine runs it -------------------------------------------------------------


def products(model: InferenceGPT) -> list[Any]:
    return [
        model.head,
        *(
            product
            for layer in model.layers
            for product in (layer.qkv, layer.out, layer.up, layer.down)
        ),
    ]


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 9), (3, 5), (8, 1), (4, 30)])
def test_the_inference_model_computes_the_same_function(model: GPT, rows: int, length: int) -> None:
    idx = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        torch.testing.assert_close(InferenceGPT(model)(idx), model(idx), atol=1e-4, rtol=1e-4)
        at = torch.arange(rows) % length
        torch.testing.assert_close(
            InferenceGPT(model)(idx, logits_at=at), model(idx, logits_at=at), atol=1e-4, rtol=1e-4
        )
    assert model.transformer["h"][0].attn.c_q.weight.requires_grad  # the original is as it was
    assert set(dict(model.named_parameters())) == set(dict(GPT(model.config).named_parameters()))


def test_the_inference_model_holds_its_weights_in_the_compute_dtype(model: GPT) -> None:
    masters = GPT(model.config, torch.bfloat16)
    masters.load_state_dict(model.state_dict())
    twin = InferenceGPT(masters)
    assert {product.weight.dtype for product in products(twin)} == {
        torch.bfloat16
    } and masters.lm_head.weight.dtype == torch.float32
    idx = torch.tensor([prompt(1, 20)])
    with torch.inference_mode():
        assert (twin(idx) - masters(idx)).abs().mean() < 0.1
    result = Engine(masters, TOKENIZER).generate_many([Request(prompt(1, 20), 10, temperature=0)])[
        0
    ]
    assert len(result.tokens) == 10 or result.stop_reason == "stop"


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="no FBGEMM on this processor"
)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (7, 1), (3, 30)])
def test_fp16_weights_are_rounded_and_nothing_else(model: GPT, rows: int, length: int) -> None:
    rounded = GPT(model.config)
    rounded.load_state_dict(
        {n: t if "wte" in n else t.half().float() for n, t in model.state_dict().items()}
    )
    idx = torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(rows))
    with torch.inference_mode():
        torch.testing.assert_close(
            InferenceGPT(model, "fp16")(idx), rounded(idx), atol=1e-3, rtol=1e-3
        )
    with pytest.raises(ValueError, match="fp16 weights are for fp32"):
        InferenceGPT(GPT(model.config, torch.bfloat16), "fp16")


def test_int8_weights_nearly_agree_with_the_weights_they_round(model: GPT) -> None:
    idx = torch.tensor([prompt(1, 60)])
    with torch.inference_mode():
        exact, rounded = model(idx), InferenceGPT(model, "int8")(idx)
        # few rows: the int8 kernel
        each = torch.cat([InferenceGPT(model, "int8")(idx[:, :n])[:, -1:] for n in (5, 20)], dim=1)
    distance = (exact.softmax(-1) - rounded.softmax(-1)).abs().sum(-1).mean() / 2
    assert distance < 0.1
    torch.testing.assert_close(each, rounded[:, [4, 19]], atol=0.6, rtol=0)  # it computes in bf16
    assert (each - exact[:, [4, 19]]).abs().mean() < 0.25
    assert {product.weight.dtype for product in products(InferenceGPT(model, "int8"))} == {
        torch.int8
    }
    with pytest.raises(ValueError, match="quantization"):
        InferenceGPT(model, "int3")


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefill_tokens", [7, 512])
def test_logprobs_are_those_of_the_plain_model(model: GPT, prefill_tokens: int) -> None:
    requests = [
        Request(
            prompt(1, 40), 12, temperature=1.0, top_k=5, seed=3, logprobs=3, prompt_logprobs=True
        ),
        Request(
            prompt(1, 40), 0, logprobs=1, prompt_logprobs=True
        ),  # the same prompt, nothing to generate
        Request(prompt(2, 25), 9, temperature=0, logprobs=0),
        Request(prompt(3, 160), 0, logprobs=0, prompt_logprobs=True),  # it fills the context
        Request([5], 1, temperature=0, logprobs=2, prompt_logprobs=True),
        Request(prompt(4, 33), 6, temperature=0),
    ]
    batch = RunningBatch(InferenceGPT(model), TOKENIZER, 3, prefill_tokens)
    generations = [batch.submit(request) for request in requests]
    while batch.busy:
        batch.step()
    for request, generation in zip(requests, generations, strict=True):
        result, n = generation.result(), request.logprobs or 0
        ended = [] if result.stop_token is None else [result.stop_token]
        assert len(result.prompt_logprobs) == (
            len(request.tokens) - 1 if request.prompt_logprobs else 0
        )
        assert len(result.logprobs) == (
            len(result.tokens) + len(ended) if request.logprobs is not None else 0
        )
        whole = [*request.tokens, *result.tokens, *ended]
        with torch.no_grad():
            expected = model(torch.tensor([whole[:-1] or [0]]))[0].log_softmax(-1)
        for offset, logprobs in (
            (0, result.prompt_logprobs),
            (len(request.tokens) - 1, result.logprobs),
        ):
            for i, logprob in enumerate(logprobs, offset):
                assert logprob.value == pytest.approx(float(expected[i, whole[i + 1]]), abs=2e-3)
                values, _ = expected[i].topk(n)
                assert [value for _, value in logprob.top] == pytest.approx(
                    values.tolist(), abs=2e-3
                )
                assert all(
                    value == pytest.approx(float(expected[i, token]), abs=2e-3)
                    for token, value in logprob.top
                )


# ---- stop strings --------------------------------------------------------------------------------


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_no_part_of_a_stop_string_is_ever_shown(pieces: list[str], stops: list[str]) -> None:
    finder, shown, fed = StopFinder(stops), "", ""
    for piece in pieces:
        if not finder.found:
            fed += piece
        shown += finder.feed(piece)
        ends = [fed.find(stop) for stop in stops if stop in fed]
        assert finder.found == bool(ends)
        if ends:
            assert shown == fed[: min(ends)]
        else:  # what is held back is the longest end that may become a stop string, no more
            held = fed[len(shown) :]
            assert fed.startswith(shown) and (
                not held or any(stop.startswith(held) for stop in stops)
            )
            assert not any(stop.startswith(fed[i:]) for stop in stops for i in range(len(shown)))
    shown += finder.flush()
    assert finder.found or shown == fed


def test_a_stop_string_ends_a_generation_across_token_borders_and_in_its_text_only() -> None:
    start, whole = script(
        "q", ["one ", CALL, "2-END", CALLED, "two -EN and -END three", STOPS[0], "#"]
    )
    for ahead in (False, True):
        batch = RunningBatch(scripted(whole).model, TOKENIZER, ahead=ahead)
        stopped, free = (
            batch.submit(Request(start, temperature=0, stop=stop)) for stop in (("-END", "xyz"), ())
        )
        events = []
        while batch.busy:
            events += batch.step()
        assert stopped.stop_reason == free.stop_reason == "stop"
        assert (
            TOKENIZER.decode(stopped.tokens).endswith("two -EN and -END")
            and stopped.stop_token is None
        )
        assert free.stop_token == STOPS[0]
        decoder = ReplyDecoder(TOKENIZER, ("-END", "xyz"))
        said = [
            decoder.feed(event.token)
            for event in events
            if event.sequence is stopped and event.token is not None
        ]
        assert decoder.stopped and decoder.text() == "one two -EN and "
        assert (
            "".join(text for pieces in said for kind, text in pieces if kind == "text")
            == decoder.text()
        )
        assert decoder.flush() == [] and decoder.feed(65) == []


def test_text_that_only_began_a_stop_string_is_shown_in_the_end() -> None:
    decoder = ReplyDecoder(TOKENIZER, ("abc",))
    for token in TOKENIZER.encode("xab"):
        decoder.feed(token)
    assert decoder.text() == "x" and decoder.flush() == [("text", "ab")] and decoder.text() == "xab"
    decoder.feed(CALL)  # a part's end is an end as well
    assert not decoder.stopped


# ---- tools ---------------------------------------------------------------------------------------

CALL, CALLED, OUT, DONE = (
    special(name) for name in ("python_start", "python_end", "output_start", "output_end")
)


def forced(text: str) -> list[int]:
    return [OUT, *TOKENIZER.encode(text), DONE]


def play(reply: list[int | str]) -> tuple[list[int], list[int]]:
    """The tokens and mask of a reply in which the model says what the script has, wherever it is
    not overruled.
    """
    start, whole = script("q", [*reply, STOPS[0]])
    result = scripted(whole).generate_many([Request(start, temperature=0)])[0]
    return result.tokens, result.mask


def test_a_call_gets_its_result() -> None:
    gap = "#" * len(forced("42"))  # what the model would have said where the result is put in
    tokens, mask = play(["so ", CALL, "6*7", CALLED, gap, " it is"])
    assert tokens == [
        *TOKENIZER.encode("so "),
        CALL,
        *TOKENIZER.encode("6*7"),
        CALLED,
        *forced("42"),
        *TOKENIZER.encode(" it is"),
    ]
    assert mask == [1] * 8 + [0] * 4 + [1] * 6


@pytest.mark.parametrize(
    "reply",
    [
        [CALL, "open('x')", CALLED, " no"],
        [CALL, CALLED, "empty"],
        [CALLED, "an end without a start"],
        [CALL, "1+1 and never an end"],
        [OUT, "7", DONE, "made up by the model"],
        [CALL, "9**9**9**9", CALLED, "!"],
        [CALL, "1+", OUT, "1", DONE, CALLED, "."],
        [CALL, bytes([0xFF]).decode("latin-1"), CALLED],
    ],
)
def test_absurd_calls_get_no_result_and_do_no_harm(reply: list[int | str]) -> None:
    tokens, mask = play(reply)
    assert tokens == script("", reply)[1]
    assert set(mask) == {1}


def test_a_second_start_begins_a_new_expression_and_calls_may_follow_each_other() -> None:
    tokens, mask = play([CALL, "1+1", CALL, "2+2", CALLED, "###", CALL, "3*3", CALLED, "###"])
    assert [t for t, m in zip(tokens, mask, strict=True) if not m] == forced("4") + forced("9")


def test_a_result_cut_by_the_limit_is_cut_there() -> None:
    start, whole = script("q", [CALL, "6*7", CALLED, "####", "x"])
    result = scripted(whole).generate_many([Request(start, max_tokens=7, temperature=0)])[0]
    assert (result.tokens[-2:], result.mask[-2:], result.stop_reason) == (
        forced("42")[:2],
        [0, 0],
        "length",
    )


def test_rows_have_their_own_tools() -> None:
    pairs = [
        script(name, [CALL, expression, CALLED, "#" * (2 + len(answer)), "ok", STOPS[0]])
        for name, expression, answer in TRIO
    ]
    results = scripted(*(whole for _, whole in pairs)).generate_many(
        [Request(start, temperature=0) for start, _ in pairs]
    )
    for result, (_, _, answer) in zip(results, TRIO, strict=True):
        assert [t for t, m in zip(result.tokens, result.mask, strict=True) if not m] == forced(
            answer
        )


TRIO = [("a", "1+1", "2"), ("bb", "100*100", "10000"), ("ccc", "'abab'.count('b')", "2")]


# ---- text ----------------------------------------------------------------------------------------


@given(st.text(max_size=60))
def test_streamed_text_is_the_text_and_never_half_a_character(text: str) -> None:
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.feed(token) for token in TOKENIZER.encode(text)]
    assert "".join(pieces) == text and decoder.flush() == ""
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.binary(max_size=40))
def test_streamed_bytes_equal_decoding_them_at_once(data: bytes) -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert "".join(map(decoder.feed, data)) + decoder.flush() == TOKENIZER.decode(list(data))
    assert decoder.feed(65) == "A"  # usable again


def test_a_stream_that_ends_within_a_character_says_so() -> None:
    decoder = StreamDecoder(TOKENIZER)
    assert [decoder.feed(byte) for byte in "né".encode()[:-1]] == ["n", ""]
    assert decoder.flush() == "\ufffd"


def test_a_reply_is_taken_apart_into_what_was_said_and_what_was_called() -> None:
    decoder = ReplyDecoder(TOKENIZER)
    tokens = script(
        "", ["Let me see: ", CALL, "6*7", CALLED, *forced("42"), "é", special("user_start"), "!"]
    )[1]
    pieces = [piece for token in tokens for piece in decoder.feed(token)] + decoder.flush()
    assert decoder.parts == [
        {"type": "text", "text": "Let me see: "},
        {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "é!"},
    ]
    assert decoder.text() == "Let me see: é!"
    assert "".join(text for kind, text in pieces if kind == "text") == decoder.text()


def test_half_a_character_before_a_call_belongs_to_what_came_before() -> None:
    decoder = ReplyDecoder(TOKENIZER)
    for token in [0xC3, CALL, 0x31]:
        decoder.feed(token)
    assert decoder.parts == [{"type": "text", "text": "\ufffd"}, {"type": "python", "text": "1"}]


def chat(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    return ([{"role": "system", "content": system}] if system else []) + messages


@pytest.mark.parametrize("system", [None, "be kind"])
def test_the_oldest_turns_are_left_out_when_a_chat_outgrows_the_context(system: str | None) -> None:
    messages = chat("one", "1" * 30, "two", "2" * 30, "three", system=system)
    head = 1 if system else 0
    full = len(TOKENIZER.render_for_completion({"messages": messages}))
    assert fit_conversation(TOKENIZER, messages, full) == (
        TOKENIZER.render_for_completion({"messages": messages}),
        0,
    )
    ids, left_out = fit_conversation(TOKENIZER, messages, full - 1)
    assert left_out == 2
    assert ids == TOKENIZER.render_for_completion(
        {"messages": messages[:head] + messages[head + 2 :]}
    )
    ids, left_out = fit_conversation(TOKENIZER, messages, 1)  # hopeless: the last question stays
    assert left_out == 4 and "three" in TOKENIZER.decode(ids)


# ---- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_counts_what_a_step_reads(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [
        "--depth=1",
        "--head_dim=32",
        "--max_seq_len=64",
        "--vocab_size=64",
        "--contexts=8",
        "--batches=1,3",
        "--steps=8",
    ]
    assert (
        bench_infer.main([*sizes, "--worker=zangchat", "--device_type=cpu", "--dtype=float32"]) == 0
    )
    result = json.loads(capsys.readouterr().out)
    weights = 4 * (12 * 64 * 64 + 64 * 64)
    assert [point["bytes_per_step"] for point in result["decode"]] == [
        weights + rows * (8 + 4) * 2 * 64 * 4 for rows in (1, 3)
    ]
    assert all(
        point["p99_ms"] >= point["p50_ms"] > 0 and point["share_of_bandwidth"] > 0
        for point in result["decode"]
    )
    assert [point["batch"] for point in result["prefill"]] == [1, 3] and result["continuous"][
        "tok_per_sec"
    ] > 0
    assert bench_infer.main([*sizes, "--steps=60"]) == 2  # more than the context holds
    assert "do not fit" in capsys.readouterr().err


WITHOUT_CRATE = """
import sys
sys.path.append(sys.argv[1])
from zangchat.config import GPTConfig
from zangchat.engine.model import InferenceGPT
from zangchat.gpt import GPT
model = GPT(GPTConfig(sequence_len=8, vocab_size=8, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
model.init_weights()
print(InferenceGPT(model).native)
"""


def test_without_the_crate_torch_decodes(tmp_path: Path) -> None:
    """From the repository's root, `import ruststep` then finds the folder of its source."""
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith("ruststep"):
            (tmp_path / entry.name).symlink_to(entry)
    command = [sys.executable, "-S", "-c", WITHOUT_CRATE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr


@pytest.mark.parametrize(
    ("peer", "package"), [("llama.cpp", "xllamacpp"), ("ctranslate2", "ctranslate2")]
)
def test_the_benchmark_measures_other_programs(
    peer: str, package: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(package)
    sizes = ["--depth=1", "--head_dim=64", "--max_seq_len=64", "--vocab_size=400", "--steps=8"]
    flags = ["--contexts=8", "--batches=1,3", "--device_type=cpu", "--dtype=float32"]
    assert bench_infer.main([*sizes, *flags, f"--worker={peer}"]) == 0
    decode = json.loads(capfd.readouterr().out.splitlines()[-1])["decode"]
    assert [point["batch"] for point in decode] == [1, 3]  # their times are too short to compare

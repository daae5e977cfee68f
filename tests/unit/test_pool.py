"""The worker pool without HTTP, and the running batch below it: memory, failures, fair shares, time
limits, text.
"""

import asyncio
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.talker import TOKENIZER, Talker, engine
from zangchat.engine import Engine, Request, RunningBatch, Sequence, kv_cache, runner
from zangchat.engine.replies import ReplyDecoder
from zangchat.errors import UserError
from zangchat.server.pool import EngineFailed, Pool, Token

BOS = TOKENIZER.get_bos_token_id()


def question(text: str, **settings: Any) -> Request:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    prompt = TOKENIZER.render_for_completion({"messages": messages})
    return Request(prompt, **{"temperature": 0.0, "max_tokens": 400, **settings})


def run(batch: RunningBatch, *requests: Request, **more: Any) -> list[Sequence]:
    sequences = [batch.submit(request, **more) for request in requests]
    while batch.busy:
        batch.step()
    return sequences


def text_of(sequence: Sequence) -> str:
    return TOKENIZER.decode(sequence.tokens)


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture
def rows_of_256(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Set the free memory to so many rows of 256 tokens of a Talker; returns the bytes that caches
    have taken at each growth, old and new.
    """
    taken: list[int] = []
    keep, row = kv_cache.KVCache._keep, 2 * 2 * 4 * 256

    def noting(cache: Any, storage: torch.Tensor) -> None:
        kept = cache.storage.nbytes if hasattr(cache, "storage") else 0
        taken.append(storage.nbytes + (kept if storage.size(2) else 0))
        keep(cache, storage)

    def setting(rows: float) -> list[int]:
        free = rows * row / runner.CACHE_SHARE
        monkeypatch.setattr(runner, "free_memory", lambda device: free)
        return taken

    monkeypatch.setattr(kv_cache.KVCache, "_keep", noting)
    return setting


@pytest.mark.parametrize("rows", [1.5, 2, 7])
def test_rows_follow_from_the_free_memory(
    rows: float, rows_of_256: Callable[[float], list[int]]
) -> None:
    taken = rows_of_256(rows)
    batch = RunningBatch(Talker(lambda question: question * 3), TOKENIZER, 16)
    requests = [question(str(i) * 9, max_tokens=200) for i in range(12)]
    most = 0
    sequences = [batch.submit(request) for request in requests]
    while batch.busy:
        batch.step()
        most = max(most, batch.num_rows)
    assert [text_of(s) for s in sequences] == [str(i) * 27 for i in range(12)]
    assert most == int(rows) and max(taken) <= batch.runner.cache.budget


def test_memory_grows_within_the_budget_while_rows_run(
    rows_of_256: Callable[[float], list[int]],
) -> None:
    """Old and new storage exist side by side while rows are copied: together they stay within the
    budget, or the new requests wait.
    """
    taken = rows_of_256(6)
    batch = RunningBatch(Talker(lambda question: question * 3), TOKENIZER, 16)
    sequences = []
    for i in range(10):
        sequences.append(batch.submit(question(str(i) * 9, max_tokens=40 + 30 * i)))
        batch.step()
    while batch.busy:
        batch.step()
    assert [text_of(s) for s in sequences] == [str(i) * 27 for i in range(10)]
    assert max(taken) <= batch.runner.cache.budget and len(taken) > 2


def test_a_request_that_never_fits_fails_by_itself(
    rows_of_256: Callable[[float], list[int]],
) -> None:
    rows_of_256(1)
    batch = RunningBatch(Talker(lambda question: question * 3), TOKENIZER, 16)
    before, large, after = run(
        batch, question("before"), question("large", max_tokens=500), question("after")
    )
    assert {s.stop_reason for s in (before, large, after)} == {"error"}
    batch = RunningBatch(Talker(lambda question: question * 3), TOKENIZER, 16)
    before, large, after = run(
        batch,
        *(question(name, max_tokens=n) for name, n in (("one", 90), ("large", 500), ("two", 90))),
    )
    assert [text_of(s) for s in (before, large, after)] == ["one" * 3, "", "two" * 3]
    with pytest.raises(UserError, match=r"\d+ tokens need 0 MiB .*: ask for fewer new tokens"):
        large.result()
    small = engine(lambda question: question)
    with pytest.raises(UserError, match="free for them"):
        small.generate_many([question("large", max_tokens=500)])
    with pytest.raises(UserError, match="free for them"):
        list(small.generate(question("large").tokens, max_tokens=500))


def test_memory_that_is_not_needed_any_more_serves_longer_rows(
    rows_of_256: Callable[[float], list[int]],
) -> None:
    taken = rows_of_256(4)
    made = Engine(Talker(lambda question: question * 3), TOKENIZER)  # type: ignore[arg-type]
    made.generate_many([question(str(i), max_tokens=100) for i in range(4)])
    made.generate_many([question("long", max_tokens=480)])
    (used,) = made._idle
    assert used.cache.capacity == 512 and max(taken) <= used.cache.budget


# ---- failures ------------------------------------------------------------------------------------


class Moody(Talker):
    """Fails on a question with "boom", once the reply has the length that the question ends with."""

    def _next(self, tokens: list[int]) -> int:
        text = TOKENIZER.decode(tokens)
        if "boom" in text:
            said = text.rpartition("<|assistant_start|>")[2]
            wanted = text.partition("boom")[2].partition("<")[0]
            if len(said) >= int(wanted):
                raise RuntimeError("out of memory, say")
        return super()._next(tokens)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("after", [0, 1, 7])
def test_a_request_that_fails_ends_by_itself(after: int, ahead: bool) -> None:
    batch = RunningBatch(Moody(lambda question: question * 4), TOKENIZER, 8, ahead=ahead)
    names = ["one", f"boom{after}", "three", "four"]
    one, boom, three, four = run(batch, *map(question, names))
    assert [text_of(s) for s in (one, three, four)] == [name * 4 for name in (names[0], *names[2:])]
    assert boom.stop_reason == "error" and len(boom.tokens) <= after
    with pytest.raises(RuntimeError, match="say"):
        boom.result()
    assert text_of(*run(batch, question("again"))) == "again" * 4


def test_a_token_that_cannot_be_taken_ends_its_sequence_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def calculate(expression: str) -> str:
        raise RecursionError("deep")

    monkeypatch.setattr("zangchat.engine.sequence.use_calculator", calculate)
    replies = {"call": "<|python_start|>1<|python_end|>##", "plain": "all is well"}
    batch = RunningBatch(Talker(replies.__getitem__), TOKENIZER, 8)
    call, plain = run(batch, question("call"), question("plain"))
    assert (call.stop_reason, text_of(plain)) == ("error", "all is well")


# ---- the pool ------------------------------------------------------------------------------------


def serve(made: Engine, *streams: list[Request], **settings: Any) -> list[list[Token] | Exception]:
    """The tokens of each stream, or the exception with which it ended; all are opened at once."""
    sizes = {"max_batch": 4, "queue": 64, "request_seconds": 60.0, **settings}

    async def tokens_of(pool: Pool, requests: list[Request]) -> list[Token] | Exception:
        stream, tokens = pool.open(requests), []
        try:
            async for some in stream:
                tokens += some
        except EngineFailed as error:
            return error
        finally:
            stream.close()
        return tokens

    async def main() -> list[list[Token] | Exception]:
        pool = Pool([made], **sizes)
        pool.start()
        try:
            return await asyncio.gather(*(tokens_of(pool, requests) for requests in streams))
        finally:
            pool.stop()

    with ThreadPoolExecutor(1) as thread:  # this one may have the event loop of a browser
        return thread.submit(asyncio.run, main()).result()


def said(tokens: list[Token] | Exception) -> str:
    assert not isinstance(tokens, Exception), tokens
    return "".join(text for token in tokens for kind, text in token.pieces if kind == "text")


def test_one_failure_does_not_end_the_other_streams(caplog: pytest.LogCaptureFixture) -> None:
    made = Engine(Moody(lambda question: question * 4), TOKENIZER)  # type: ignore[arg-type]
    good, bad, impossible = serve(
        made, [question("good")], [question("boom5")], [Request([1] * 600)]
    )
    assert said(good) == "good" * 4 and isinstance(bad, EngineFailed)
    assert "server's log" in str(bad) and "out of memory, say" in caplog.text
    assert isinstance(impossible, EngineFailed) and "600 tokens" in str(impossible)


def test_a_new_batch_has_the_memory_of_the_one_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[weakref.ref[kv_cache.KVCache]] = []
    made, step, found = kv_cache.KVCache.__init__, RunningBatch.step, []

    def noted(cache: kv_cache.KVCache, *args: Any) -> None:
        made(cache, *args)
        caches.append(weakref.ref(cache))

    def free_memory(device: torch.device) -> int:
        found.append(2**30 - sum(c.storage.nbytes for ref in caches if (c := ref())))
        return found[-1]

    def failing(batch: RunningBatch) -> Any:
        step(batch)
        raise RuntimeError("the device is lost, say")

    monkeypatch.setattr(kv_cache.KVCache, "__init__", noted)
    monkeypatch.setattr(runner, "free_memory", free_memory)
    monkeypatch.setattr(RunningBatch, "step", failing)
    # pytest keeps the traceback, and so all that its frames hold
    monkeypatch.setattr("zangchat.server.pool.logger.exception", lambda *_: None)
    [failed] = serve(engine(str), [question("x")])
    assert isinstance(failed, EngineFailed)
    assert len(caches) > 1 and set(found) == {found[0]}


def test_a_request_that_does_not_fit_says_so(rows_of_256: Callable[[float], list[int]]) -> None:
    rows_of_256(1)
    large, small = serve(engine(str), [question("x")], [question("y", max_tokens=90)])
    assert isinstance(large, EngineFailed) and "ask for fewer new tokens" in str(large)
    assert said(small) == "y"


def test_pieces_come_with_the_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is decoded by the engine only, stop strings and unfinished characters included."""
    decoders: list[ReplyDecoder] = []
    made = ReplyDecoder.__init__
    monkeypatch.setattr(
        ReplyDecoder, "__init__", lambda self, *a: decoders.append(self) or made(self, *a)
    )
    reply = "é 你好, <|python_start|>6*7<|python_end|>####, so STOP never"
    requests = [question("a", stop=("STOP",)), question("b", max_tokens=1)]
    tokens = serve(engine(lambda question: reply), requests)[0]
    assert isinstance(tokens, list) and len(decoders) == 2
    first = [token for token in tokens if token.choice == 0]
    pieces = [piece for token in first for piece in token.pieces if piece[1]]
    assert said(first) == "é 你好, , so " and ("python_output", "4") in pieces
    assert [token.pieces for token in tokens if token.choice == 1] == [[("text", "\ufffd")]]
    assert [token.stop_reason for token in first if token.stop_reason] == ["stop"]
    spoken = [token.token for token in first if token.says]
    assert TOKENIZER.decode(spoken) == "é 你好, , so STOP"


def test_output_that_the_model_made_up_has_the_mask_of_its_own_words() -> None:
    reply = (
        "<|python_start|>open(1)<|python_end|><|output_start|>41<|output_end|>"
        "<|python_start|>6*7<|python_end|>####"
    )
    tokens = serve(engine(lambda question: reply), [question("q")])[0]
    assert isinstance(tokens, list)
    outputs = {
        mask: "".join(
            text
            for token in tokens
            for kind, text in token.pieces
            if kind == "python_output" and token.mask == mask
        )
        for mask in (0, 1)
    }
    assert outputs == {0: "42", 1: "41"}
    cut = serve(engine(lambda q: "<|output_start|>4é"), [question("q", max_tokens=3)])[0]
    assert isinstance(cut, list)
    assert [(t.mask, t.pieces) for t in cut if t.pieces and t.pieces[0][1]] == [
        (1, [("python_output", "4")]),
        (1, [("python_output", "\ufffd")]),
    ]


def test_the_end_of_its_time_is_a_reason_of_its_own() -> None:
    slow = engine(lambda question: "é" * 400, pause=0.02)
    running, waiting = serve(
        slow, [question("a")], [question("b")], max_batch=1, request_seconds=0.4
    )
    for tokens, spoke in ((running, True), (waiting, False)):
        assert isinstance(tokens, list)
        assert tokens[-1].token is None and tokens[-1].stop_reason == "timeout"
        assert bool(said(tokens)) == spoke
        assert [t.stop_reason for t in tokens[:-1]] == [None] * (len(tokens) - 1)


def test_many_choices_of_one_request_leave_rows_to_others() -> None:
    batch = RunningBatch(Talker(lambda question: "x" * 100), TOKENIZER, 8)
    greedy, modest, third = "greedy", "modest", "third"
    many = [batch.submit(question("many"), owner=greedy) for _ in range(64)]
    for _ in range(3):
        batch.step()
    assert batch.num_rows == 4
    few = [batch.submit(question("few"), owner=modest) for _ in range(2)]
    late = batch.submit(question("late"), owner=third)
    batch.step()
    assert all(s in batch.scheduler.running for s in (*few, late))
    many += [batch.submit(question("more"), owner=greedy)]
    newcomers = [batch.submit(question(str(i)), owner=str(i)) for i in range(4)]
    while not all(s.stop_reason for s in newcomers):
        batch.step()
        held = [sum(s in many for s in batch.scheduler.running), batch.num_rows]
        assert held[0] <= 4 and held[1] <= 8
    assert sum(s.stop_reason is None for s in many) > 48
    while batch.busy:
        batch.step()
    assert {text_of(s) for s in (*many, *few, late, *newcomers)} == {"x" * 100}


def test_one_request_may_have_all_choices_if_rows_are_few() -> None:
    for rows in (1, 2, 3):
        batch = RunningBatch(Talker(lambda question: "x"), TOKENIZER, rows)
        assert {text_of(s) for s in run(batch, *[question("q")] * 5, owner="me")} == {"x"}


def test_half_of_the_rows_is_half_of_those_that_fit(
    rows_of_256: Callable[[float], list[int]],
) -> None:
    rows_of_256(4)
    batch = RunningBatch(Talker(lambda question: "x" * 50), TOKENIZER, 64)
    for _ in range(10):
        batch.submit(question("many", max_tokens=200), owner="greedy")
    batch.step()
    assert batch.num_rows == 2
    late = batch.submit(question("late", max_tokens=200), owner="modest")
    # the storage grows only once the rows have ended, within the budget
    while late.stop_reason is None:
        batch.step()
    assert len(batch.waiting) > 4

"""A request on its way without a model: what a token does to a sequence, which rows and prompts
come next.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.util import ByteTokenizer
from zangchat.engine import Request, Sequence
from zangchat.engine.replies import Markup
from zangchat.engine.sampling import Logprob
from zangchat.engine.scheduler import Scheduler

TOKENIZER = ByteTokenizer()
MARKUP = Markup(TOKENIZER)
END = TOKENIZER.encode_special("<|assistant_end|>")


def sequence(limit: int = 100, prompt: tuple[int, ...] = (1, 2), **settings) -> Sequence:
    return Sequence(Request(prompt, **settings), limit, MARKUP)


def feed(target: Sequence, *pieces: int | str) -> list[int]:
    """Draw these tokens as long as the sequence lives; returns those that it took instead."""
    taken = []
    for piece in pieces:
        for token in [piece] if isinstance(piece, int) else TOKENIZER.encode(piece):
            if target.stop_reason is None:
                event = target.accept(token)
                taken += [] if event.token in (None, token) else [event.token]
    return taken


# ---- accepting tokens ----------------------------------------------------------------------------


def test_a_sequence_ends_at_its_limit_and_at_the_end_of_its_turn():
    short, turn = sequence(limit=3), sequence()
    feed(short, "abcd")
    feed(turn, "ab", END, "c")
    assert (short.result().tokens, short.stop_reason, short.stop_token) == (
        TOKENIZER.encode("abc"),
        "length",
        None,
    )
    assert (turn.result().tokens, turn.stop_reason, turn.stop_token) == (
        TOKENIZER.encode("ab"),
        "stop",
        END,
    )
    with pytest.raises(ValueError, match="not ended"):
        sequence().result()


def test_a_tool_call_forces_its_result():
    calling = sequence()
    output = [MARKUP.output_start, *TOKENIZER.encode("42"), MARKUP.output_end]
    taken = feed(calling, "so ", MARKUP.python_start, "6*7", MARKUP.python_end, "####", " it is")
    assert taken == output
    assert [t for t, m in zip(calling.tokens, calling.mask, strict=True) if not m] == output
    refused = sequence()
    assert feed(refused, MARKUP.python_start, "open('x')", MARKUP.python_end, "####") == []
    assert set(refused.mask) == {1} and not refused.forced


def test_stop_strings_count_across_tokens_and_not_within_calls():
    stopping = sequence(stop=("END",))
    feed(stopping, MARKUP.python_start, "END", MARKUP.python_end, "an E", "ND", " more")
    assert stopping.stop_reason == "stop" and TOKENIZER.decode(stopping.tokens).endswith("an END")


def test_log_probabilities_follow_the_tokens_and_tool_output_is_certain():
    watched = sequence(logprobs=1)
    likely = Logprob(-0.5, [(65, -0.5), (66, -1.0)])
    for token in (MARKUP.python_start, *TOKENIZER.encode("1+1"), MARKUP.python_end, 0, 0, 0, END):
        watched.accept(token, likely)
    assert watched.logprobs == [Logprob(-0.5, [(65, -0.5)])] * 5 + [Logprob(0.0, [])] * 3 + [
        Logprob(-0.5, [(65, -0.5)])
    ]
    assert len(watched.logprobs) == len(watched.tokens) + 1


# ---- scheduling ----------------------------------------------------------------------------------


def scheduler(*prompts: tuple[int, ...], max_rows: int = 8, prefill_tokens: int = 10) -> Scheduler:
    made = Scheduler(max_rows, prefill_tokens, logprob_tokens=4)
    made.waiting += [sequence(prompt=prompt) for prompt in prompts]
    return made


def test_equal_prompts_are_read_once_and_short_ones_together():
    made = scheduler((1, 2, 3), (4, 5), (1, 2, 3), (6,) * 12)
    assert made.admit() == []
    assert [(p.tokens, p.row, len(p.sequences)) for p in made.reading] == [
        ((4, 5), 0, 1),
        ((1, 2, 3), 1, 2),
        ((6,) * 12, 3, 1),
    ]
    chunk = made.next_chunk(10)
    assert chunk is not None and (len(chunk.prompts), chunk.size) == (2, 3)
    for prompt in chunk.prompts:
        prompt.read = len(prompt.tokens)
    assert made.join()[0] == made.running[:1]
    assert made.join()[0] == made.running[1:] and len(made.running) == 3
    assert (
        made.next_chunk(4) is None
    )  # the rest of the budget: less than a whole chunk of a long prompt
    long = made.next_chunk(10)
    assert long is not None and long.size == 10


def test_requests_wait_for_rows_and_empty_ones_end_at_once():
    made = scheduler((1,), (2,), (3,), max_rows=2)
    made.waiting.appendleft(sequence(limit=0))
    (event,) = made.admit()
    assert (event.token, event.sequence.stop_reason) == (None, "length")
    assert (len(made.in_rows), len(made.waiting), len(made.live())) == (2, 1, 3)
    waiting, reading = made.waiting[0], made.reading[0].sequences[0]
    for gone in (waiting, reading):
        made.remove(gone)
    assert len(made.live()) == len(made.in_rows) == 1


def test_prompts_with_log_probabilities_are_read_in_smaller_passes():
    made = scheduler()
    made.waiting += [sequence(prompt=(i, 2, 3), logprobs=0, prompt_logprobs=True) for i in range(2)]
    made.admit()
    chunk = made.next_chunk(10)
    assert chunk is not None and (len(chunk.prompts), chunk.size) == (
        1,
        3,
    )  # two would be six positions


@given(st.lists(st.booleans(), max_size=20))
def test_rows_that_end_are_filled_from_the_end(ended):
    made = Scheduler(64, 10, 10)
    made.running = [sequence() for _ in ended]
    for running, stopped in zip(made.running, ended, strict=True):
        running.stop_reason = "stop" if stopped else None
    before = list(made.running)
    sources = made.arrange()
    alive = [s for s in before if s.stop_reason is None]
    if sources is None:
        assert not any(ended)
        return
    assert made.running == [before[source] for source in sources]
    assert sorted(map(id, made.running)) == sorted(map(id, alive))
    for row, source in enumerate(sources):  # only the last ones move
        assert source == row or source >= len(alive)
    assert made.arrange() is None

"""The progress line of a long job."""

import pytest

from zangchat.runtime import progress
from zangchat.runtime.progress import Progress, in_words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_durations_in_words():
    assert [in_words(seconds) for seconds in (0.4, 59, 65, 3725)] == ["0s", "59s", "1m05s", "1h02m"]


def test_without_a_terminal_plain_lines_are_printed_at_intervals_and_at_the_end(clock, capsys):
    with Progress("sft", 40) as line:
        for done in range(1, 41):
            line.update(done, f"loss {done}")
            clock[0] += 1.0
    printed = capsys.readouterr().out.splitlines()
    assert [text.split(" |")[0] for text in printed] == [
        "sft 1/40",
        "sft 11/40",
        "sft 21/40",
        "sft 31/40",
        "sft 40/40",
    ]


def test_remaining_time_ignores_the_first_slow_step(clock, capsys):
    with Progress("base", 100) as line:
        clock[0] += 500  # compiling
        line.update(1, "")
        clock[0] += 20
        line.update(11, "")
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 2m58s")


def test_other_ranks_are_silent(capsys):
    with Progress("base", 2, shown=False) as line:
        line.update(2, "loss 1")
    assert capsys.readouterr().out == ""

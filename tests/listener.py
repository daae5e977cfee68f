"""A pytest plugin that parses each command that the product prints during a test.

It reads the message of each UserError, the output that pytest captures (capsys and capfd included),
the log, and the output of child processes that a test collects. A command that its own parser
refuses fails the test that printed it. Modules of other projects pass: the texts that models are
trained on are full of them.
"""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.commands import OURS, find, problem
from zangchat.errors import UserError

_heard: dict[str, str] = {}  # each command -> its problem, or empty
_wrong: list[str] = []  # problems since the last test ended
_parsing = False


def hear(text: "str | bytes | None") -> None:
    """Parse the commands in `text` that have not been parsed before."""
    global _parsing
    if _parsing or not text:
        return
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    _parsing = True  # a parser's own message names commands, too
    try:
        for line in find(text):
            if line not in _heard:
                foreign = " -m " in line and not line.split(" -m ")[1].startswith(OURS)
                _heard[line] = "" if foreign else problem(line)
            if _heard[line]:
                _wrong.append(f"printed: {line}\n    {_heard[line]}")
    finally:
        _parsing = False


def pytest_configure(config: pytest.Config) -> None:
    init, communicate = UserError.__init__, subprocess.Popen.communicate

    def raised(self: UserError, *values: Any) -> None:
        init(self, *values)
        hear(" ".join(map(str, values)))

    def collected(self: Any, *values: Any, **named: Any) -> Any:
        streams = communicate(self, *values, **named)
        for stream in streams:
            hear(stream)
        return streams

    UserError.__init__ = raised  # type: ignore[method-assign]
    subprocess.Popen.communicate = collected  # type: ignore[method-assign]


def _listened(capture: Any) -> Any:
    """Make a capsys or capfd call `hear` on each read; the report's sections have the rest."""
    read = capture.readouterr

    def readouterr() -> Any:
        streams = read()
        for stream in streams:
            hear(stream)
        return streams

    capture.readouterr = readouterr
    return capture


@pytest.fixture
def capsys(capsys: pytest.CaptureFixture[str]) -> Any:
    return _listened(capsys)


@pytest.fixture
def capfd(capfd: pytest.CaptureFixture[str]) -> Any:
    return _listened(capfd)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> "Iterator[None]":
    report = yield
    if report.when == "teardown":
        for _, text in report.sections:
            hear(text)
        if _wrong:
            report.outcome = "failed"
            before = [str(report.longrepr)] if report.longrepr else []
            report.longrepr = "\n".join([*before, *dict.fromkeys(_wrong)])
            _wrong.clear()
    return report

"""The code stays small enough to read: DESIGN's bounds, counted at 100 columns
(dev/code_size.py).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import code_size

CORE_LINES = 5480  # on the way to 4,500
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 450, 250, 50


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield code_size.checkout(tmp_path_factory.mktemp("copy"))


def test_the_core_can_be_read(copy: Path) -> None:
    files = dict(pair for name in code_size.CORE for pair in code_size.lines_of(copy, name))
    assert sum(files.values()) <= CORE_LINES, files


@pytest.mark.parametrize(
    ("kind", "bound", "free"),
    [
        ("files", FILE_LINES, set()),
        ("classes", CLASS_LINES, {"zangchat/gpt.py:GPT"}),
        ("functions", FUNCTION_LINES, set()),
    ],
)
def test_nothing_is_too_large(copy: Path, kind: str, bound: int, free: set[str]) -> None:
    pieces = code_size.measured(copy)[kind]
    assert len(pieces) > 100
    assert [piece for piece in pieces if piece[0] > bound and piece[1] not in free] == []


def test_every_part_that_is_counted_exists(copy: Path) -> None:
    for name in (*code_size.CORE, *code_size.BESIDE, *code_size.PACKAGES):
        assert list(code_size.lines_of(copy, name)), name

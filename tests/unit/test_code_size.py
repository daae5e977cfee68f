"""The code stays small enough to read: DESIGN's bounds, counted at 100 columns
(dev/code_size.py).
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import code_size

# on the way to 4,500; 170 came with decode graphs, bounded memory and failures that stay alone, and
# 90 with the native step, 95 with --arch=modern
CORE_LINES = 5435
FILE_LINES, CLASS_LINES, FUNCTION_LINES = 450, 250, 50
LATE_IMPORTS = 81


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


def test_few_imports_inside_functions() -> None:
    """Only those that keep slow or optional libraries away until they are needed."""
    late = [
        f"{path.relative_to(code_size.ROOT)}:{node.lineno}"
        for package in ("zangchat", "scripts", "tasks")
        for path in sorted((code_size.ROOT / package).rglob("*.py"))
        for node in imports_inside(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert len(late) <= LATE_IMPORTS, late


def imports_inside(node: ast.AST, inside: bool = False) -> Iterator[ast.stmt]:
    inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            if inside:
                yield child
        else:
            yield from imports_inside(child, inside)


def test_every_part_that_is_counted_exists(copy: Path) -> None:
    for name in (*code_size.CORE, *code_size.BESIDE, *code_size.PACKAGES):
        assert list(code_size.lines_of(copy, name)), name

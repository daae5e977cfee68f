"""Read the documentation: its fenced blocks and the commands in them."""

import re
from typing import NamedTuple

import pytest

from tests.commands import ROOT, problem

READMES = ("README.md", "README_CN.md")
LANGUAGES = ("en", "zh")
PAGES = sorted(path.name for path in (ROOT / "dev" / "docs" / "en").glob("*.md"))
# marks after ```bash of the blocks that need more than this machine; files: the user's own
NOT_RUN = ("gpu", "network", "minutes", "files")


class Block(NamedTuple):
    language: str  # bash, python, diff ...; "" for none
    info: str  # the rest of the fence line: "gpu", "file=tasks/percent.py"
    body: str


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    return [
        Block(*found)
        for found in re.findall(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def fenced(text: str, language: str) -> list[str]:
    return [block.body for block in blocks(text) if block.language == language]


def lines_of(body: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    return [line.strip() for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def commands(text: str, info: str | None = None) -> list[str]:
    """The lines of all bash blocks, or of those marked `info` ("" for unmarked)."""
    chosen = [
        block for block in blocks(text) if block.language == "bash" and info in (None, block.info)
    ]
    return [line for block in chosen for line in lines_of(block.body)]


def check_command(line: str, where: str) -> None:
    if why := problem(line):
        pytest.fail(f"{where}: {line}: {why}")

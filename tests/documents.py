"""Reading what is documented: fenced blocks, the commands in them, and whether these commands exist with their flags."""

import importlib
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from zangchat import configurator

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README_CN.md")
LANGUAGES = ("en", "zh")
PAGES = sorted(path.name for path in (ROOT / "dev" / "docs" / "en").glob("*.md"))
NOT_RUN = ("gpu", "network", "minutes", "files")  # what stands behind ```bash where a test cannot run the block; files: of one's own


class Block(NamedTuple):
    language: str  # bash, python, diff ...; "" for none
    info: str  # what follows it: "gpu", "file=tasks/percent.py"
    body: str


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*) ?([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def fenced(text: str, language: str) -> list[str]:
    return [block.body for block in blocks(text) if block.language == language]


def lines_of(body: str) -> list[str]:
    """The commands of a block, continued lines joined."""
    return [line.strip() for line in body.replace("\\\n", " ").splitlines() if line.strip()]


def commands(text: str, info: str | None = None) -> list[str]:
    """The lines of all bash blocks, or of those marked `info` ("" for unmarked)."""
    chosen = [block for block in blocks(text) if block.language == "bash" and info in (None, block.info)]
    return [line for block in chosen for line in lines_of(block.body)]


def check_python(words: list[str], where: str) -> None:
    """`-m module flags...` as it would be parsed."""
    module = importlib.import_module(words[1])
    arguments = words[2:]
    verify = words[1] == "zangchat.dataset" and arguments[:1] == ["verify"]
    try:
        configurator.parse(module.VerifyConfig if verify else module.Config, arguments[1:] if verify else arguments)
    except configurator.UserError as error:
        pytest.fail(f"{where}: {' '.join(words)}: {error}")


def check_command(line: str, where: str) -> None:
    words = shlex.split(line, comments=True)
    variables = []
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variables.append(words.pop(0).partition("=")[0])
    if words[0] in ("bash", "sbatch", "sky"):
        name = next(word for word in words if word.endswith((".sh", ".sbatch", ".yaml")))
        script = text_of(name)
        assert all(re.search(rf"\b{variable}\b", script) for variable in variables), f"{where}: {name} does not read one of {variables}"
    elif words[0] in ("python", "torchrun"):
        check_python(words[words.index("-m") :], where)
        if words[0] == "torchrun":  # it takes abbreviations of its own flags, --run among them, unless a `--` comes first
            assert words[words.index("-m") + 2 :][:1] in ([], ["--"]), f"{where}: {line} needs `--` after the module"
    else:
        assert words[0] in ("source", "lm_eval"), f"{where}: unknown command {line}"

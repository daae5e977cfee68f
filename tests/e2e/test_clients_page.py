"""The lines of dev/docs/en/clients.md, typed against a running server.

The clients that the tests do not install are compiled only; dev/LOG.md says when they were tried.
"""

import contextlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.chat_web import Config, make_settings
from tests.documents import ROOT, blocks, text_of
from tests.talker import engine, serving
from zangchat import configurator

PAGE = "dev/docs/en/clients.md"
BLOCKS = blocks(text_of(PAGE))
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(engine(lambda question: f"You asked: {question}"), temperature=0.0) as (url, _):
        yield url


def test_the_commands_are_answered(url: str) -> None:
    if shutil.which("curl") is None and not os.environ.get("CI"):
        pytest.skip("no curl here")
    lines = [line for block in BLOCKS if block.language == "sh" for line in block.body.splitlines()]
    outputs = [
        subprocess.run(
            ["bash", "-c", line.replace(ADDRESS, url)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
        for line in lines
    ]
    assert len(outputs) == 2
    assert '"id":"zangchat"' in outputs[0] and "You asked: Who are you?" in outputs[1]


PROGRAMS = [block.body for block in BLOCKS if block.language == "py"]


@pytest.mark.parametrize("source", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_programs_are_answered(url: str, source: str) -> None:
    program = compile(source.replace(ADDRESS, url), PAGE, "exec")
    module = re.search(r"^(?:from|import) (\w+)", source, re.MULTILINE)[1]  # type: ignore[index]
    if importlib.util.find_spec(module) is None:
        assert module in ("langchain_openai", "litellm")
        return
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(program, {})
    assert out.getvalue().strip() == "You asked: Who are you?"


def test_the_flags_are_understood(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    flags = re.findall(r"`(--[a-z_-]+(?:=[^` ]+)?)", text_of(PAGE))
    ours = [flag for flag in flags if not flag.startswith("--add-host")]  # docker's
    assert len(ours) >= 10
    for flag in {re.sub("=PATH$", f"={tmp_path / 'key'}", flag) for flag in ours}:
        value = "" if "=" in flag or flag == "--truncate" else "=x"
        if flag in ("--request_timeout", "--max_tokens"):
            value = "=1"
        if flag == "--allowed_origins":
            value = "=https://a.example"
        make_settings(configurator.parse(Config, [flag + value]))


def test_the_page_names_the_default_of_the_time_limit() -> None:
    assert f"--request_timeout={Config().request_timeout:g}" in text_of(PAGE)

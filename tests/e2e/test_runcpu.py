"""Stopping every stage of dev/runcpu.sh by Ctrl-C does not change the result.

The script runs with few steps.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.commands import find

ROOT = Path(__file__).parents[2]
STAGES = 12
PLAN = "# written by a test\nBASE_STEPS=60\nMID_STEPS=40\nSFT_STEPS=30\nRL_STEPS=6\n"
# other stages: at a random time in their first seconds
UNDER_WAY = {3: r"^base \d+/", 4: r"^mid \d+/", 5: r"^sft \d+/", 6: r"^rl \d+/"}


def start(base: Path, log: Path) -> "subprocess.Popen[bytes]":
    base.mkdir(exist_ok=True)
    for name in ("plan", "later"):
        (base / f"runcpu.{name}").write_text(PLAN, encoding="utf-8")
    with log.open("wb") as output:
        return subprocess.Popen(
            ["bash", "dev/runcpu.sh"],
            cwd=ROOT,
            env={**os.environ, "ZANGCHAT_BASE_DIR": str(base), "SEED": "7"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group to send Ctrl-C to, as a terminal does
            # the tests may run with Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def interrupt_in_stage(number: int, base: Path, log: Path) -> str:
    """Run until Ctrl-C stops it in that stage; returns its output."""
    process = start(base, log)
    heading = re.compile(rf"\[{number}/{STAGES}\]")
    pattern = re.compile(UNDER_WAY.get(number, ""), re.MULTILINE)
    try:
        while process.poll() is None:
            begun = heading.search(text := log.read_text(encoding="utf-8", errors="replace"))
            if begun and pattern.search(text, begun.end()):
                time.sleep(0 if number in UNDER_WAY else random.uniform(0, 3))
                os.killpg(process.pid, signal.SIGINT)
                break
            time.sleep(0.1)
        code = process.wait(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(encoding="utf-8", errors="replace")
    assert code in (130, -signal.SIGINT), f"stage {number} ended with {code}:\n{text[-3000:]}"
    return text


def finish(base: Path, log: Path) -> str:
    code = start(base, log).wait(timeout=1800)
    text = log.read_text(encoding="utf-8", errors="replace")
    assert code == 0 and "Done in" in text, text[-3000:]
    talk = [line for line in find(text.partition("Talk to the model:")[2]) if "chat_cli" in line]
    env = {**os.environ, "ZANGCHAT_BASE_DIR": str(base)}
    typed = f"source .venv/bin/activate; {talk[0]} --prompt='Who are you?'"
    answer = subprocess.run(
        ["bash", "-c", typed], cwd=ROOT, env=env, stdout=subprocess.PIPE, timeout=120, check=True
    ).stdout
    assert answer.strip()
    return text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ctrl_c_in_every_stage_changes_nothing(tmp_path: Path) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    for number in range(1, STAGES + 1):
        output = interrupt_in_stage(number, stopped, tmp_path / f"stop{number}.log")
        if number in UNDER_WAY:
            assert "Traceback" not in output, output[-3000:]
            assert "stopped by SIGINT after step" in output and "bash dev/runcpu.sh" in output
    assert finish(stopped, tmp_path / "stopped.log").count("nothing to do") == 4
    finish(straight, tmp_path / "straight.log")
    names = sorted(path.relative_to(straight) for path in straight.rglob("model_*.pt"))
    assert {str(name).split("_")[0] for name in names} == {"base", "mid", "chatsft", "chatrl"}
    for name in names:
        ours, theirs = (torch.load(base / name, weights_only=True) for base in (stopped, straight))
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[key], theirs[key]) for key in ours
        ), name

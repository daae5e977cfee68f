"""`python -m dev.gpu_check` in its rehearsal on a CPU: every part, with tiny sizes; parts that fail
or take too long; the text for an issue; the packages it needs."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev.gpu_check import __main__ as gpu_check
from dev.gpu_check.arithmetic import milliseconds
from dev.gpu_check.parts import PARTS, RANKS, TINY
from tests.documents import ROOT, text_of
from zangchat import flops, schedule

# of zangchat's dependencies, and the crate
NOT_NEEDED = """datasets fastapi huggingface_hub httptools matplotlib nh3 prometheus_client pyarrow
pydantic regex rustbpe safetensors tiktoken tokenizers transformers uvicorn uvloop wandb yaml"""
WITHOUT_THEM = f"""
import sys
sys.modules.update(dict.fromkeys({NOT_NEEDED.split()!r}))
from dev.gpu_check.__main__ import main
for part in ("machine", "train_bf16", "numerics", "resume", "decode"):
    assert main([f"--part={{part}}", "--rehearse", "--device_type=cpu"]) == 0
"""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("check") / "rows.jsonl"
    flags = ("--rehearse", "--device_type=cpu", "--minutes=60", f"--out={out}")
    done = run("-m", "dev.gpu_check", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_rehearsal_goes_through_every_part(rehearsal):
    rows = [json.loads(line) for line in rehearsal[0].read_text().splitlines()]
    assert list(dict.fromkeys(row["part"] for row in rows)) == list(PARTS)
    for part in PARTS:
        assert sum(row["part"] == part for row in rows) > 1, part  # its time, and its rows
    assert not [row for row in rows if row.get("ok") is False or row["name"] == "problem"]
    right = {row["part"] for row in rows if row.get("ok")}
    assert {"train_bf16", "train_fp16", "numerics", "graphs", "resume", "nccl", "failing"} <= right


def test_rows_become_a_table_and_an_issue(rehearsal):
    out, printed = rehearsal
    head = next(line for line in printed.splitlines() if line.startswith("part "))
    assert head.split() == ["part", "what", "measured", "expected", "share"]
    report = run("-m", "dev.gpu_check", "--report", f"--out={out}").stdout
    count = len(out.read_text().splitlines())
    assert report.startswith("# gpu_check: no GPU, torch 2.")
    assert f"0 of {count} rows are wrong" in report
    assert sum(line.startswith("| ") for line in report.splitlines()) == count + 1


def test_failing_and_slow_parts_cost_only_their_own_rows(monkeypatch):
    config = gpu_check.Config(rehearse=True, device_type="cpu")
    crashed, _ = gpu_check.measured(config, "absent", 60)
    assert crashed["ok"] is False and "KeyError: 'absent'" in crashed["note"]
    stopped, _ = gpu_check.measured(config, "resume", 0.5)
    assert (stopped["ok"], stopped["note"]) == (False, "stopped after 0 s")
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert next(gpu_check.not_begun("decode"))["note"] == "the time was up before it began"


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("-m", "dev.gpu_check", "--device_type=cpu", f"--out={tmp_path}/rows")
    assert done.returncode == 2 and not (tmp_path / "rows").exists()
    assert "no CUDA device to check: --rehearse" in done.stderr
    assert run("-m", "dev.gpu_check", "--rehearse", "--only=decoding").returncode == 2


def test_it_needs_only_torch_numpy_tyro_and_rich():
    done = run("-c", WITHOUT_THEM)
    assert done.returncode == 0, done.stderr


def test_all_parts_have_room_in_eight_minutes():
    assert set(RANKS).isdisjoint(PARTS) and TINY.depth == 2
    assert PARTS["machine"][1] < PARTS["train_bf16"][1] <= 8 * 60


@pytest.mark.parametrize("language", ["en", "zh"])
def test_arithmetic_of_the_page_is_that_of_the_code(language):
    gpt = schedule.model_config_for_depth(20, 128, 0, vocab_size=65536, sequence_len=2048)
    times = milliseconds(gpt, 2**16, flops.DEVICES["H100"])
    page = text_of(f"dev/docs/{language}/scaling.md")
    rows = [line.split(" | ")[-1].strip(" |") for line in page.splitlines() if " ms |" in line]
    assert rows == [f"{best:.0f} to {cautious:.0f} ms" for best, cautious in times.values()]

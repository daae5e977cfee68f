"""The real clients download the tasks' datasets and CORE's bundle from an unreliable hub.

They run in a child process, since they read HF_ENDPOINT on import.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub.contents import BUNDLE_PATH, stand_in
from tests.hub.rows import ARC, GSM8K, HUMANEVAL, MMLU, SMOLTALK, TABLES
from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the clients wait between tries, too
from tasks.registry import load_task

found = {}
for name, split in json.loads(sys.argv[1]):
    try:
        task = load_task(name, split)
        found[name] = [len(task), task[0]["messages"][0]["content"]] if name != "CORE" else 0
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
if len(sys.argv) > 2:
    from zangchat import core_eval
    found["CORE"] = len(core_eval.read_tasks(core_eval.find_bundle())[0])
print("FOUND", json.dumps(found))
"""


def first_file(repo: str) -> str:
    return f"{repo}/{next(table.hub_path for table in TABLES if table.hub == repo)}"


@pytest.fixture(scope="module")
def hub() -> Any:
    with stand_in() as hub:
        yield hub


def load(
    hub: Hub, home: Path, *names: str, core: bool = False, **variables: str
) -> tuple[dict[str, Any], str]:
    """Load tasks in a child process.

    Returns [rows, first question] or the error of each task, and the log.
    """
    requests = json.dumps([(name, "test" if name == "HumanEval" else "train") for name in names])
    env = {**os.environ, **hub.environment(home), **variables}
    command = [sys.executable, "-c", CHILD, requests, *(["core"] if core else [])]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rpartition("FOUND ")[2]), done.stderr


def test_temporary_faults_are_retried(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {
        SMOLTALK: [503],  # the API itself
        MMLU: [None, ("busy", 1)],
        first_file(MMLU): [503, ("busy", 1)],
        first_file(GSM8K): ["wrong", ("slow", 0.5)],
        first_file(ARC): [("truncated", 100), ("changed", b"other bytes altogether")],
        first_file(HUMANEVAL): [("drop", 1000)],
        BUNDLE_PATH: [("busy", 1), ("drop", 1000), 503],
    }
    names = ["SmolTalk", "MMLU", "GSM8K", "ARC-Easy", "HumanEval"]
    found, log = load(hub, tmp_path / "hf", *names, core=True)
    assert {name: found[name][0] if name in names else found[name] for name in found} == {
        **{"SmolTalk": 600, "MMLU": 60, "GSM8K": 60, "ARC-Easy": 60, "HumanEval": 12},
        "CORE": 22,
    }
    assert not any(hub.faults.values()), "each of them was met"
    assert not hub.unknown
    assert "is not the one that http://127.0.0.1" in log and log.count("trying again") >= 7
    # downloaded files stay in the cache and need no hub
    hub.requests.clear()
    again, _ = load(hub, tmp_path / "hf", *names, HF_DATASETS_OFFLINE="1")
    assert again == {name: found[name] for name in names} and not hub.requests


def test_permanent_faults_are_reported_and_leave_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.faults = {
        first_file(GSM8K): ["wrong"] * 100,
        ARC: [503] * 100,
        first_file(MMLU): [404] * 100,
        first_file(HUMANEVAL): [("drop", 100)] * 100,
    }
    found, _ = load(hub, tmp_path / "hf", "GSM8K", "ARC-Easy", "MMLU", "HumanEval")
    assert all(
        text.startswith("MissingData: no ") and "run this again later, or download it" in text
        for text in found.values()
    )
    assert "the sha256 of main/train-00000-of-00001.parquet is not the one that" in found["GSM8K"]
    assert "503" in found["ARC-Easy"] and "404" in found["MMLU"]
    hub.faults = {}
    found, _ = load(hub, tmp_path / "hf", "GSM8K", "ARC-Easy", "MMLU")
    assert [rows for rows, _ in found.values()] == [60, 60, 60]


def fetch(hub: Hub, home: Path, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scripts.fetch", *flags]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **hub.environment(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_missing_data_of_later_stages_is_reported_first(hub: Hub, tmp_path: Path) -> None:
    (own := tmp_path / "me.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Hello"}]}\n', encoding="utf-8"
    )
    flags = ["--core=0", "--mid_mixture=identity", "--sft_mixture=arithmetic"]
    done = fetch(
        hub,
        tmp_path / "hf",
        *flags,
        "--rl_task=",
        "--eval_tasks=Identity",
        f"--identity_data={own}",
    )
    assert done.returncode == 2 and f"{own}:1" in done.stderr
    hub.faults = {name: [404] * 100 for name in (first_file(HUMANEVAL), first_file(GSM8K))}
    done = fetch(
        hub, tmp_path / "empty", *flags, "--rl_task=arithmetic", "--eval_tasks=HumanEval|Identity"
    )
    assert done.returncode == 0 and "HumanEval will not be scored: no " in done.stdout, done.stderr
    done = fetch(hub, tmp_path / "empty", *flags)
    assert done.returncode == 2 and "the hub did not give openai/gsm8k" in done.stderr, (
        "RL needs it"
    )

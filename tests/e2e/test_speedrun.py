"""speedrun.sh and run1000.sh, the very scripts, at depth 2 on two CPU processes with a corpus that every machine can make."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from zangchat import pydocs

ROOT = Path(__file__).parents[2]


def rehearsal() -> dict[str, str]:
    """The variables that the head of speedrun.sh gives for a rehearsal, so that what it promises is what is tested."""
    lines = (ROOT / "speedrun.sh").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("#   DEPTH=2"))
    command = ""
    for line in lines[start:]:
        command += line.removeprefix("#").strip().removesuffix("\\")
        if not line.endswith("\\"):
            break
    done = subprocess.run(
        ["bash", "-c", f"{command.replace('bash speedrun.sh', 'env -0')}"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        check=True,
    )
    pairs = (pair.partition("=") for pair in done.stdout.decode().split("\0") if pair)
    return {name: value for name, _, value in pairs if name not in ("PATH", "PWD", "SHLVL", "_", "OLDPWD")}


@pytest.mark.timeout(900)
def test_the_whole_chain_on_two_ranks_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = rehearsal()
    assert variables["NPROC_PER_NODE"] == "2" and variables["DATASET"] == "pydocs"
    roots = pydocs.library_roots()[:1]  # the standard library alone; test_runcpu.py makes the corpus of all packages, which takes longer
    monkeypatch.setattr(pydocs, "library_roots", lambda: roots)
    assert pydocs.build(tmp_path / "base_data" / "pydocs", workers=1) == 0
    env = {**os.environ, **variables, "ZANGCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(script: str, **more: str) -> str:
        done = subprocess.run(["bash", script], cwd=ROOT, env={**env, **more}, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "$ at" not in done.stdout and re.search(r"d2: 0 h \d\d min this time, \$\d+\.\d\d at \$24 an hour", done.stdout)
        return done.stdout

    run("run1000.sh")
    for stage in ("base", "mid", "chatsft"):
        lines = (tmp_path / f"{stage}_checkpoints" / "d2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [values["loss"] for values in map(json.loads, lines) if "loss" in values]
        assert sum(losses[-5:]) < sum(losses[:5]), stage
    assert (tmp_path / "chatrl_checkpoints" / "d2" / "metrics.jsonl").exists()
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "SFT" in report and "RL" in report

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model_*.pt")}
    again = run("speedrun.sh", RATIO="20")  # run1000.sh is speedrun.sh with other numbers
    assert weights and again.count("nothing to do") >= 4, "a second run has no stage left"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model_*.pt")} == weights

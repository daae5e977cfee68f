"""The benchmarks in dev/ run on the smallest input, with --busy, and print JSON.

Their times are not checked.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dev import bench_infer, bench_train
from tests.util import make_dataset

ROOT = Path(__file__).parents[2]
TEXT = [
    "The first document speaks of numbers. " * 9,
    "Another one asks: how many words are there? " * 9,
] * 40


@pytest.fixture
def text(tmp_path):
    return make_dataset(tmp_path / "text", TEXT, TEXT[:4]).folder


def bench(name, *flags):
    done = subprocess.run(
        [sys.executable, "-m", f"dev.bench_{name}", "--busy", *flags],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tokenizer_bench_includes_peers(text):
    flags = (
        "--megabytes=0.05",
        "--vocab_size=300",
        "--repeats=1",
        "--only=zangchat,tiktoken list",
        "--tasks=decode,fresh",
    )
    found = bench("tokenizer", f"--data_path={text}", *flags)
    assert found["decode"]["zangchat"]["digest"] == found["decode"]["tiktoken list"]["digest"]
    assert found["fresh"]["zangchat+tiktoken list"]["zangchat / tiktoken list"] > 0


@pytest.mark.parametrize("module", [bench_infer, bench_train])
def test_architectures_are_not_compared_with_each_other(module, capsys):
    flags = ("--device_type=cpu", "--arch=modern", "--peer=somewhere")
    assert module.main(flags) == 2
    assert "--arch=modern is not somewhere's" in capsys.readouterr().err


def test_infer_bench_varies_rows_and_contexts():
    model = ("--depth=1", "--head_dim=64", "--max_seq_len=64", "--vocab_size=256")
    found = bench("infer", *model, "--batches=1,2", "--contexts=8", "--steps=2", "--repeats=1")[
        "zangchat"
    ]
    assert [(point["batch"], point["context"]) for point in found["decode"]] == [(1, 8), (2, 8)]
    assert found["continuous"]["rows"] == 2


def test_train_bench_measures_steps():
    model = (
        "--depth=1",
        "--head_dim=64",
        "--max_seq_len=32",
        "--vocab_size=256",
        "--total_batch_size=64",
        "--device_batch_size=2",
    )
    found = bench("train", *model, "--steps=1", "--repeats=2")["zangchat"]
    assert len(found["all_tok_per_sec"]) == 2 and found["seconds_to_first_step"] > 0
    assert found["fp8"] == ""
    found = bench("train", *model, "--steps=1", "--repeats=1", "--fp8")["zangchat"]
    assert found["fp8"] == "fp8: not used (no GPU: cpu); the products stay in --dtype"


def test_quality_bench_uses_our_own_steps(text, tmp_path):
    model = (
        "--depth=1",
        "--vocab_size=300",
        "--max_seq_len=32",
        "--total_batch_size=128",
        "--device_batch_size=2",
        "--eval_tokens=128",
    )
    flags = (
        f"--data={text}",
        f"--out={tmp_path}",
        "--seeds=1",
        "--tokenizer_chars=20000",
        "--steps=4",
        "--every=2",
    )
    points = bench("quality", *model, *flags, "--our_batch=64", "--our_steps=6")["zangchat"][
        "median"
    ]
    assert [(point["step"], point["tokens"]) for point in points] == [(3, 192), (6, 384)]
    assert points[1]["bpb"] < points[0]["bpb"]


def test_the_laptop_run_is_planned_by_the_pace_of_this_machine(text, tmp_path):
    script = (ROOT / "dev/runcpu.sh").read_text(encoding="utf-8")
    model = re.search(r'^MODEL="--arch=\$arch (.*)"$', script, re.MULTILINE)[1].split()
    env = {**os.environ, "ZANGCHAT_BASE_DIR": str(tmp_path)}

    def run(module, *flags):
        done = subprocess.run(
            [sys.executable, "-m", module, *flags],
            cwd=ROOT,
            env=env,
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("scripts.tok_train", f"--data_path={text}", "--vocab_size=300")
    first = run("dev.laptop_plan", "--minutes=9", *model)
    assert re.fullmatch(
        r"# [\d.]+ s per step of 1920 tokens \([\d,]+ tok/s\), planned for 9 minutes\n"
        r"BASE_STEPS=\d+\nMID_STEPS=\d+\nSFT_STEPS=\d+\nRL_STEPS=\d+\n",
        first,
    )
    data = (f"--data_path={text}", "--num_iterations=2", "--eval_every=-1", "--sample_every=-1")
    run("scripts.base_train", *model, *data, "--core_metric_every=-1")
    later = run("dev.laptop_plan", "--minutes=9", *model, "--pretrained")
    assert later.startswith("# pretraining took 0.") and "BASE_STEPS" not in later
    assert re.findall(r"(\w+)=\d+", later) == ["MID_STEPS", "SFT_STEPS", "RL_STEPS"]

"""Run every command once, as a user would: real processes, real text, a tiny size.

All stages share one base folder. The tests build on each other in file order. They check the files
that the commands write.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import entry_point

ROOT = Path(__file__).parents[2]
DEVICE = ["--device_type=cpu"]
BASE = """scripts.base_train --depth=2 --n_embd=64 --head_dim=32 --max_seq_len=64 --device_batch_size=4 --total_batch_size=1024
    --num_iterations=40 --embedding_lr=0.27 --matrix_lr=0.022 --unembedding_lr=0.0088 --dtype=float32 --head_init_scale=0.05
    --mixture=identity:1,arithmetic:500 --mixture_ratio=0.3 --eval_every=20 --eval_tokens=4000 --sample_every=-1
    --core_metric_every=-1 --device_type=cpu""".split()
MID = """scripts.mid_train --mixture=identity:1,arithmetic:500,spellingbee:300 --num_iterations=30 --eval_every=15 --eval_tokens=4000
    --device_type=cpu""".split()
SFT = """scripts.chat_sft --mixture=identity:1,arithmetic:500,spellingbee:300 --num_iterations=20 --target_examples_per_step=16
    --init_lr_frac=0.5 --eval_every=10 --eval_steps=2 --device_type=cpu""".split()
RL = """scripts.chat_rl --task=arithmetic --num_iterations=3 --examples_per_step=4 --num_samples=4 --max_new_tokens=24 --eval_every=-1
    --device_type=cpu""".split()


class Home:
    """A base folder, and commands run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.env = {
            **os.environ,
            "ZANGCHAT_BASE_DIR": str(path),
            "OMP_NUM_THREADS": "1",
            "WANDB_RUN": "dummy",
            "PYTHONUNBUFFERED": "1",
        }

    def command(self, args: list[str], ranks: int = 1) -> list[str]:
        if ranks == 1:
            return [sys.executable, "-m", *args]
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            "-m",
            *args,
        ]

    def run(self, *args: str, ranks: int = 1, code: int = 0) -> str:
        """stdout and stderr of a command that must exit with `code`."""
        done = subprocess.run(
            self.command(list(args), ranks),
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, (
            f"{' '.join(args)}\nleft with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout + done.stderr

    def folder(self, stage: str, tag: str = "d2") -> Path:
        return self.path / f"{stage}_checkpoints" / tag

    def metrics(self, stage: str, tag: str = "d2", key: str = "loss") -> list[Any]:
        lines = [
            json.loads(line)
            for line in (self.folder(stage, tag) / "metrics.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ]
        return [line[key] for line in lines if key in line]

    def weights(self, stage: str, tag: str) -> dict[str, torch.Tensor]:
        newest = sorted(self.folder(stage, tag).glob("model_*.pt"))[-1]
        return torch.load(newest, weights_only=True)


def fell(losses: list[float]) -> bool:
    """The mean of the last quarter is below that of the first."""
    quarter = max(len(losses) // 4, 1)
    return sum(losses[-quarter:]) < sum(losses[:quarter])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A corpus of real text: Python's own help pages."""
    from pydoc_data.topics import topics

    from zangchat.dataset.manifest import write_dataset

    home = Home(tmp_path_factory.mktemp("base"))
    texts = [
        text[start : start + 2000]
        for text in topics.values()
        for start in range(0, len(text), 2000)
    ]
    write_dataset(home.path / "base_data" / "topics", "topics", texts[:-20], texts[-20:])
    return home


def test_tokenizer(home: Home) -> None:
    home.run("scripts.tok_train", "--vocab_size=512", "--max_chars=500000")
    assert (
        "kept" in (again := home.run("scripts.tok_train", "--vocab_size=512", "--max_chars=500000"))
        or "already" in again
    )
    assert "gpt" in home.run("scripts.tok_eval").lower()


def test_base(home: Home) -> None:
    home.run(*BASE)
    losses, bpb = home.metrics("base"), home.metrics("base", key="val_bpb")
    assert len(losses) == 40 and fell(losses)
    assert bpb[-1] < 0.8 * bpb[0]


def test_losses_are_the_same_on_two_ranks(home: Home) -> None:
    home.run(*BASE, "--model_tag=two", "--num_iterations=40", ranks=2)
    one, two = home.metrics("base")[:20], home.metrics("base", "two")[:20]
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_resumed_run_equals_uninterrupted_run(home: Home, number: signal.Signals) -> None:
    tag = number.name.lower()
    flags = [*BASE, f"--model_tag={tag}", "--save_every=5"]
    metrics = home.folder("base", tag) / "metrics.jsonl"
    process = subprocess.Popen(
        home.command(flags),
        cwd=ROOT,
        env=home.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > 12):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended, or never got so far"
        )
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(60) == (143 if number == signal.SIGTERM else -9)
    home.run(*flags, "--resume=latest")
    assert home.metrics("base", tag) == home.metrics("base")
    expected = home.weights("base", "d2")
    for name, weight in home.weights("base", tag).items():
        assert torch.equal(weight, expected[name]), name
    assert "nothing to do" in home.run(*flags, "--resume=latest")


def test_base_evaluations(home: Home) -> None:
    home.run("scripts.base_loss", "--model_tag=d2", "--split_tokens=4000", *DEVICE)
    bundle = home.path / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    (bundle / "core.yaml").write_text(
        "icl_tasks:\n- label: copa\n  dataset_uri: copa.jsonl\n  num_fewshot: [1]\n  "
        "icl_task_type: multiple_choice\n"
        "  continuation_delimiter: ' '\n",
        encoding="utf-8",
    )
    (bundle / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline\ncopa,50\n", encoding="utf-8"
    )
    items = [
        {
            "query": f"Number {i}: the sky is",
            "choices": ["blue", "made of cheese and iron"],
            "gold": 0,
        }
        for i in range(6)
    ]
    (bundle / "eval_data" / "copa.jsonl").write_text(
        "".join(json.dumps(item) + "\n" for item in items), encoding="utf-8"
    )
    assert "CORE (1/22" in home.run("scripts.base_eval", "--model_tag=d2", *DEVICE)


@pytest.mark.parametrize(
    ("stage", "flags"),
    [("mid", MID), ("chatsft", SFT), ("chatrl", RL)],
    ids=["midtraining", "finetuning", "reinforcement learning"],
)
def test_later_stages(home: Home, stage: str, flags: list[str]) -> None:
    """On one rank; test_speedrun.py runs them on two."""
    home.run(*flags, "--model_tag=d2")
    losses = home.metrics(stage)
    assert len(losses) == int(
        next(flag for flag in flags if "num_iterations" in flag).partition("=")[2]
    )
    assert fell(losses) or stage == "chatrl"  # the loss of a policy gradient need not fall


def test_greedy_engine_output_equals_plain_forward_pass(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zangchat.checkpoint_manager import load_model
    from zangchat.engine import Engine

    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(home.path))
    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "eval", model_tag="d2")
    stops = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    for question in ("Who are you?", "你是谁？", "tell me more"):
        tokens = tokenizer.render_for_completion(
            {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": ""},
                ]
            }
        )
        generated = [
            column[0]
            for column, masks in Engine(model, tokenizer).generate(
                tokens, max_tokens=16, temperature=0.0
            )
        ]
        for position, token in enumerate(generated):
            with torch.inference_mode():
                logits = model(torch.tensor([tokens + generated[:position]]))[0, -1]
            best = logits.topk(2).values
            assert token == int(logits.argmax()) or best[0] - best[1] < 1e-4
            assert token not in stops


def test_chat_evaluation(home: Home) -> None:
    output = home.run(
        "scripts.chat_eval",
        "-g",
        "d2",
        "-a",
        "SpellingBee|arithmetic|Identity",
        "-x",
        "10",
        "-m",
        "24",
        *DEVICE,
    )
    assert "spellingbee" in output.lower() and "arithmetic" in output.lower()
    assert list((home.path / "chat_eval").rglob("*.jsonl"))


def test_chat_in_the_terminal(home: Home) -> None:
    command = home.command(
        [
            "scripts.chat_cli",
            "-g",
            "d2",
            "-p",
            "Who are you?",
            "-t",
            "0",
            "--max_tokens=16",
            *DEVICE,
        ]
    )
    done = subprocess.run(
        command, cwd=ROOT, env=home.env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.fixture
def server(home: Home) -> Iterator[str]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = home.command(["scripts.chat_web", "-g", "d2", f"--port={port}", *DEVICE])
    process = subprocess.Popen(
        command, cwd=ROOT, env=home.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def test_chat_in_the_browser(server: str) -> None:
    import httpx

    deadline = time.monotonic() + 90
    while True:
        try:
            assert httpx.get(f"{server}/health", timeout=5).status_code == 200
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.2)
    assert "zangchat" in httpx.get(server).text
    question = {
        "messages": [{"role": "user", "content": "Who are you?"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(f"{server}/v1/chat/completions", json=question, timeout=60)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] >= 1


def test_report(home: Home) -> None:
    home.run("zangchat.report", "generate")
    text = (home.path / "report" / "report.md").read_text(encoding="utf-8")
    for section in ("Tokenizer", "Base model training", "Midtraining", "SFT"):
        assert section in text
    assert (
        "<svg" in (html := (home.path / "report" / "report.html").read_text(encoding="utf-8"))
        or "data:image" in html
    )


@pytest.fixture
def mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """stderr of a command that must exit with 2.

    It runs in this process, since a new one would spend most of its time importing torch.
    """

    def complaint(base: Path, module: str, *flags: str) -> str:
        monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(base))
        assert entry_point(module).main(flags) == 2
        return capsys.readouterr().err

    return complaint


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["scripts.base_train", "--dataset=nowhere"], ["nowhere", "python -m"]),
        (["scripts.base_train", "--dpeth=4"], ["--dpeth", "--depth"]),
        (["scripts.base_train", "--depth=two"], ["--depth", "two"]),
        (
            ["scripts.base_train", "--total_batch_size=1000", "--max_seq_len=64"],
            ["--total_batch_size", "--max_seq_len"],
        ),
        (["scripts.chat_cli", "-p", "hi", "-g", "d99"], ["d99"]),
        (["scripts.chat_eval", "-g", "d2", "-a", "SpelingBee"], ["SpelingBee", "SpellingBee"]),
        (
            ["scripts.mid_train", "--model_tag=d2", "--overwrite", "--mixture=arthmetic:10"],
            ["arthmetic", "Arithmetic"],
        ),
        (["scripts.base_train", *BASE[1:]], ["--resume=latest", "--overwrite"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_user_mistake_is_reported_by_name(
    home: Home, mistake: Callable[..., str], args: list[str], names: list[str]
) -> None:
    before = sorted(path for path in home.path.rglob("*.pt"))
    output = mistake(home.path, *args)
    for name in names:
        assert name in output
    assert sorted(path for path in home.path.rglob("*.pt")) == before


def test_damaged_shard_is_named(home: Home) -> None:
    shard = sorted((home.path / "base_data" / "topics").glob("*.parquet"))[0]
    intact = shard.read_bytes()
    shard.write_bytes(intact[: len(intact) // 2])
    try:
        output = home.run(*BASE, "--model_tag=damaged", code=2)
        assert shard.name in output and "Traceback" not in output
    finally:
        shard.write_bytes(intact)


def test_empty_base_folder_names_the_next_command(
    mistake: Callable[..., str], tmp_path: Path
) -> None:
    assert "zangchat.dataset" in mistake(tmp_path, "scripts.tok_train")
    assert "scripts.tok_train" in mistake(tmp_path, "scripts.base_train", *DEVICE)
    assert "base_train" in mistake(tmp_path, "scripts.mid_train", *DEVICE)
    assert "scripts." in mistake(tmp_path, "scripts.chat_cli", "-p", "hi", *DEVICE)

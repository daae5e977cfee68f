"""Run the commands of the READMEs and dev/docs on a CPU, and the examples of extending.md.

A command runs verbatim, followed by flags that make it small (the last of a repeated flag counts).
Single-process commands share this process, since starting Python and torch takes most of the time.
test_marked_docs.py runs the marked blocks (network, gpu ...).
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import entry_point
from tests.documents import PAGES, READMES, ROOT, blocks, commands, lines_of, text_of

# tests/unit/test_readme.py: the Chinese ones are the same
DOCUMENTS = [READMES[0], *(f"dev/docs/en/{page}" for page in PAGES if page != "extending.md")]
BASE = """--depth=2 --n_embd=32 --head_dim=16 --max_seq_len=96 --device_batch_size=4 --total_batch_size=384 --num_iterations=3
    --eval_tokens=500 --sample_every=-1 --core_metric_every=-1 --device_type=cpu --dtype=float32"""
SMALL = {
    "scripts.tok_train": "--vocab_size=400 --max_chars=200000 --overwrite",
    "scripts.base_train": BASE,
    "scripts.base_loss": "--split_tokens=500 --device_type=cpu",
    "scripts.mid_train": "--num_iterations=2 --eval_tokens=500 --device_type=cpu --model_tag=d4 "
    "--overwrite",
    "scripts.chat_sft": "--num_iterations=2 --target_examples_per_step=4 --eval_steps=1 "
    "--device_type=cpu --model_tag=d4 --overwrite",
    "scripts.chat_rl": "--num_iterations=1 --max_new_tokens=8 --eval_every=-1 --device_type=cpu "
    "--model_tag=d4 --overwrite",
    "scripts.chat_eval": "-x 2 -m 4 -g d4 --device_type=cpu",
    "scripts.chat_cli": "--max_tokens=4 -g d4 --device_type=cpu",
    "scripts.export_hf": "-g d4",
    "scripts.chat_web": "--port=0 -g d4 --device_type=cpu",
}
# other, faster tests cover these
SLOW = ("scripts.chat_web", "scripts.export_hf", "scripts.import_model")


def small(line: str, number: int) -> list[str]:
    """[module, flag...] of `python -m module flag...`, made small. Each pretraining run without a
    tag gets one of its own.
    """
    module, *flags = shlex.split(line, comments=True)[2:]
    more = [] if "--dry_run" in flags else SMALL.get(module, "").split()
    if any(flag.startswith(("--model_tag=", "--demo")) for flag in flags):  # it names its model
        more = [word for word in more if word not in ("--model_tag=d4", "-g", "d4")]
    elif module == "scripts.base_train" and "--dry_run" not in flags:
        more.append(f"--model_tag=doc{number}")
    return [module, *flags, *more]


def run(module: str, *flags: str) -> str:
    """stdout of a command, run in this process; it must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = entry_point(module).main(list(flags))
    assert code == 0, f"{module} {' '.join(flags)} left with {code}:\n{out.getvalue()}"
    return out.getvalue()


def runnable() -> list[str]:
    """The unmarked commands of all documents, each once, in their order."""
    found = dict.fromkeys(line for name in DOCUMENTS for line in commands(text_of(name), ""))
    return [line for line in found if not line.startswith("source ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base folder with a tokenizer and a model of each stage.

    The working folder holds the files that the commands name.
    """
    from pydoc_data.topics import topics

    from zangchat.dataset.manifest import write_dataset

    texts = [
        text[start : start + 2000]
        for text in topics.values()
        for start in range(0, len(text), 2000)
    ]
    base, work = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("work")
    (work / "my_texts").mkdir()
    for number in range(4):
        (work / "my_texts" / f"{number}.txt").write_text(
            "\n\n".join(texts[10 * number : 10 * number + 10]), encoding="utf-8"
        )
    sample = next(
        block.body for block in blocks(text_of("dev/docs/en/sft.md")) if block.language == "json"
    )
    (work / "me.jsonl").write_text(sample, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZANGCHAT_BASE_DIR", str(base))
        patch.setenv("WANDB_RUN", "dummy")
        patch.setattr(sys, "stdin", io.StringIO())  # ends an interactive chat
        patch.chdir(work)
        write_dataset(base / "base_data" / "topics", "topics", texts[:-20], texts[-20:])
        run("scripts.tok_train", *SMALL["scripts.tok_train"].split())
        run("scripts.base_train", *BASE.split(), "--model_tag=d4")
        for stage in ("scripts.mid_train", "scripts.chat_sft"):
            run(stage, "--mixture=identity:1,arithmetic:100,spellingbee:100", *SMALL[stage].split())
        yield base


@pytest.fixture(autouse=True)
def base_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(home))


def parameters() -> list[Any]:
    return [
        pytest.param(
            number,
            line,
            id=line,
            marks=[pytest.mark.slow] if any(name in line for name in SLOW) else [],
        )
        for number, line in enumerate(runnable())
    ]


@pytest.mark.parametrize(("number", "line"), parameters())
def test_command(number: int, line: str, home: Path) -> None:
    if not line.startswith("python"):
        env = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            ["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and "memory" in done.stdout, done.stderr
    elif "scripts.chat_web" in line:
        serve(small(line, number))
    else:
        run(*small(line, number))


def serve(words: list[str]) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        # the tests may run with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        assert "chat at http" in (process.stdout.readline())
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


PYTHON = [
    (name, block.body)
    for name in DOCUMENTS[1:]
    for block in blocks(text_of(name))
    if block.language == "python"
    and block.info != "llama-server"  # tests/unit/test_hf_programs.py runs it
]


@pytest.mark.parametrize(("name", "source"), PYTHON, ids=[name for name, _ in PYTHON])
def test_python(name: str, source: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from zangchat.execution import SandboxLevel, find_sandbox

    if "execute_code" in source and find_sandbox().level < SandboxLevel.FILTERED:
        pytest.skip("this machine allows no sandbox")
    exec(compile(source, name, "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_two_nodes_find_each_other(home: Path) -> None:
    """The command for two nodes by hand, as two torchruns on this machine."""
    line = next(
        line
        for line in commands(text_of("dev/docs/en/scaling.md"), "gpu")
        if line.startswith("torchrun")
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(
        line.replace("HEAD:29500", f"127.0.0.1:{port}").replace(
            "--nproc_per_node=8", "--nproc_per_node=1"
        )
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *words[1:],
        *BASE.split(),
        "--model_tag=nodes",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert "on each of 2 ranks" in "".join(outputs)
    assert len(list((home / "base_checkpoints" / "nodes").glob("optim_*_rank?.pt"))) == 2


# -- the examples of extending.md, in a copy of the repository -------------------------------------


def apply(root: Path, info: str, language: str, body: str) -> None:
    """Write the file of a block, or apply a diff: the unmarked lines locate the place."""
    path = root / info.removeprefix("file=")
    if language == "python":
        assert not path.exists(), f"{path.name} is there already: the example needs another name"
        path.write_text(body, encoding="utf-8")
        return
    edits = body.splitlines()
    old = [line[1:] for line in edits if line[0] in " -"]
    lines = path.read_text(encoding="utf-8").splitlines()
    places = [
        i
        for i in range(len(lines))
        if all(
            line.startswith(want) for line, want in zip(lines[i : i + len(old)], old, strict=False)
        )
    ]
    places = [i for i in places if i + len(old) <= len(lines)]
    assert len(places) == 1, f"{info}: {old} stands {len(places)} times in the file, not once"
    kept = iter(lines[places[0] : places[0] + len(old)])
    new = [line[1:] if line[0] == "+" else next(kept) for line in edits]
    lines[places[0] : places[0] + len(old)] = [
        line for line, edit in zip(new, edits, strict=True) if edit[0] != "-"
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


DRIVER = """
import importlib, json, sys
packages = ("zangchat.dataset", "zangchat.report")
for module, *flags in json.loads(sys.argv[1]):
    print("$", module, *flags, flush=True)
    found = importlib.import_module(f"{module}.__main__" if module in packages else module)
    assert (found.main(flags) if hasattr(found, "Config") else found.main()) in (0, None), module
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/unit/test_gated_mlp.py"]))
"""


def test_examples_of_extending(home: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    for folder in ("zangchat", "scripts", "tasks", "dev"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "tests" / "unit").mkdir(parents=True)
    calls = []
    for block in blocks(text_of("dev/docs/en/extending.md")):
        if block.info:
            apply(root, block.info, block.language, block.body)
            continue
        for line in lines_of(block.body):
            module, *flags = shlex.split(line)[2:]
            more = (
                re.sub(r"--overwrite|--model_tag=\S+", "", SMALL.get(module, ""))
                if module == "scripts.base_train"
                else SMALL.get(module, "")
            )
            dataset = (
                []
                if "--dataset=notes" in flags or module != "scripts.base_train"
                else ["--dataset=topics"]
            )
            if module == "scripts.base_loss":
                dataset = ["--dataset=topics"]
            calls.append([module, *flags, *more.split(), *dataset])
    base = tmp_path / "base"
    shutil.copytree(home, base)
    env = {
        **os.environ,
        "ZANGCHAT_BASE_DIR": str(base),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Percent" in done.stdout and "nothing to do" in done.stdout and "3 passed" in done.stdout
    state = next((base / "base_checkpoints" / "lion").glob("optim_*"))
    assert state.exists() and (base / "base_data" / "notes" / "manifest.json").exists()

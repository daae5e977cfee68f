"""Each command that a message recommends keeps the promise of the message.

The tests provoke each message and run its command verbatim: Python commands in this process, since
starting torch takes most of the time, and some of each kind in a shell. A command without sizes
gets small ones. All paths contain a space.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import ROOT, entry_point, find
from tests.hub.contents import stand_in
from tests.hub.server import Hub
from tests.talker import engine, serving
from tests.unit.test_train_scripts import base as trained  # noqa: F401 (a fixture)
from tests.unit.test_train_scripts import (
    base_flags,
    ctrl_c_in_step,
    final,
    folder,
    losses,
    mid_flags,
    sft_flags,
)
from zangchat import checkpoint_manager, configurator
from zangchat.dataset.hub import HUB_REPOS
from zangchat.training.settings import command

Say = Callable[..., str]
Flags = dict[str, list[str]]


def module_of(stage: str) -> str:
    return checkpoint_manager.COMMANDS[stage]


@pytest.fixture
def flags_of(trained: Path) -> dict[str, list[str]]:  # noqa: F811
    """The flags with which each stage was trained; they name files of the first base folder."""
    return {"base": base_flags(trained), "mid": mid_flags(trained), "sft": sft_flags(trained)}


@pytest.fixture
def root(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A copy of the base folder with a model of each stage, set in the environment."""
    copy = shutil.copytree(trained, tmp_path / "my base")
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(copy))
    monkeypatch.chdir(tmp_path)
    return copy


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Say:
    """run(module, *flags, code=0) runs a command in this process and returns its output."""

    def command(module: str, *flags: str, code: int = 0) -> str:
        capsys.readouterr()
        exit_code = entry_point(module).main(list(flags))
        streams = capsys.readouterr()
        output = streams.out + streams.err
        assert exit_code == code, f"{module} {shlex.join(flags)} left with {exit_code}\n{output}"
        return output

    return command


@pytest.fixture
def typed(run: Say) -> Say:
    """typed(command, *more flags, code=0) runs a command line and returns its output."""

    def command(line: str, *more: str, code: int = 0) -> str:
        python, m, module, *flags = shlex.split(line, comments=True)
        assert (python, m) == ("python", "-m")
        return run(module, *flags, *more, code=code)

    return command


def shell(line: str, code: int | None = 0, **variables: str) -> str:
    """Run a line in a shell at the top of the repository and return its output."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        restore_signals=True,
    )
    assert code in (None, done.returncode), f"{line}\nleft with {done.returncode}\n{done.stdout}"
    return done.stdout


def environment(**variables: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        **os.environ,
        "PATH": path,
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def the_command(output: str, containing: str = "") -> str:
    """The only command of a message, or the only one that contains these words."""
    found = [line for line in dict.fromkeys(find(output)) if containing in line]
    assert len(found) == 1, f"{found} in\n{output}"
    return found[0]


# ---- a run that stops ----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_ctrl_c_names_the_command_to_resume(
    stage: str,
    root: Path,
    flags_of: Flags,
    run: Say,
    typed: Say,
) -> None:
    expected = final(root, stage)
    shutil.rmtree(folder(root, stage))
    with ctrl_c_in_step(4):
        output = run(module_of(stage), *flags_of[stage], code=130)
    assert "continue with:" in output
    assert "continuing from step 4" in typed(the_command(output))
    assert same(final(root, stage), expected)


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    names = one["tensors"].keys() | two["tensors"].keys()
    return all(torch.equal(one["tensors"][name], two["tensors"][name]) for name in names)


def interrupted(line: str, seen: str) -> str:
    """The output of a command that Ctrl-C stops after it has printed `seen`."""
    process = subprocess.Popen(
        ["bash", "-c", line],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    output = ""
    assert process.stdout is not None
    try:
        while not re.search(seen, output):
            character = process.stdout.read(1)
            assert character, output
            output += character
        os.killpg(process.pid, signal.SIGINT)
        return output + process.communicate(timeout=120)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_at_a_terminal(ranks: int, root: Path, flags_of: Flags) -> None:
    """With --run, which torchrun would take for an abbreviation of its own flag."""
    shutil.rmtree(folder(root, "base"))
    launcher = "python -m" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks} -m"
    flags = shlex.join([*flags_of["base"], "--run=first", "--num_iterations=60"])
    output = interrupted(f"{launcher} scripts.base_train -- {flags}", "base step 10: validation")
    line = the_command(output, "--resume=latest")
    assert line.startswith(launcher.removesuffix(" -m")) and "--run=first" in line
    assert "continuing from step" in shell(line)
    assert checkpoint_manager.find_last_step(folder(root, "base")) == 60


ONE_NODE = "--standalone --nproc_per_node=2"
TWO_NODES = "--nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node1:29500"
SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.mark.parametrize(("ranks", "nodes", "place"), [(2, 1, ONE_NODE), (16, 2, TWO_NODES)])
def test_command_of_a_run_on_several_ranks(
    ranks: int,
    nodes: int,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = f"torchrun {place} {SIGNALS} -m scripts.base_train -- "
    from scripts import base_train

    variables = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": ranks,
        "LOCAL_WORLD_SIZE": ranks // nodes,
        "MASTER_ADDR": "node1",
    }
    for name, value in variables.items():  # as torchrun sets them
        monkeypatch.setenv(name, str(value))
    config = base_train.Config(run="first", dataset="my texts")
    line = command("base", config, resume="latest")
    assert line.startswith(start) and line.endswith("  # on each node") == (nodes > 1)
    flags = shlex.split(line.removeprefix(start), comments=True)
    assert configurator.parse(base_train.Config, flags) == replace(config, resume="latest")


@pytest.mark.slow
def test_full_disk_names_the_command_to_resume(root: Path, flags_of: Flags) -> None:
    """Files are limited to 20 KiB, so no save succeeds."""
    expected = final(root, "base")
    shutil.rmtree(folder(root, "base"))
    flags = shlex.join(flags_of["base"])
    output = shell(f"ulimit -f 20; python -m scripts.base_train {flags}", code=2)
    assert "make room" in output
    shell(the_command(output))
    assert same(final(root, "base"), expected)


def test_nonfinite_loss_says_how_to_start_again(
    root: Path,
    flags_of: Flags,
    run: Say,
) -> None:
    flags = [*flags_of["base"], "--overwrite", "--model_tag=hot"]
    rates = ["--embedding_lr=1e30", "--matrix_lr=1e30", "--unembedding_lr=1e30", "--grad_clip=0"]
    output = run("scripts.base_train", *flags, *rates, "--num_iterations=100", code=2)
    assert "not finite" in output and "--overwrite and lower learning rates" in output
    run(
        "scripts.base_train",
        *flags,
        "--overwrite",
        "--embedding_lr=0.1",
        "--matrix_lr=0.01",
        "--unembedding_lr=0.001",
    )
    assert losses(root, "base")[-1] < losses(root, "base")[0]


# ---- a run that exists already -------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_existing_tag_offers_three_ways(
    stage: str,
    root: Path,
    flags_of: Flags,
    run: Say,
    typed: Say,
) -> None:
    output = run(module_of(stage), *flags_of[stage], code=2)
    line = the_command(output)
    assert "nothing to do" in typed(line)
    before = folder(root, stage) / "meta_000010.json"
    written = before.stat().st_mtime_ns
    assert "put --overwrite=1 in place of --resume=latest" in output
    typed(line.replace("--resume=latest", "--overwrite=1"))
    assert before.stat().st_mtime_ns > written
    if stage == "base":
        assert "choose another --model_tag" in output
        another = "--model_tag=other"
    else:
        named = re.search(r"--from_tag=\S+ --model_tag=", output)
        assert named, output
        another = named[0] + "other"
    run(module_of(stage), *flags_of[stage], *another.split())
    assert checkpoint_manager.find_last_step(folder(root, stage, "other")) == 10


def test_missing_intact_checkpoint_says_how_to_start_over(
    root: Path,
    flags_of: Flags,
    run: Say,
    typed: Say,
) -> None:
    for path in folder(root, "mid").glob("model_*.pt"):
        path.write_bytes(b"")
    output = run("scripts.mid_train", *flags_of["mid"], "--resume=latest", code=2)
    assert "start over with" in output
    typed(the_command(output))
    assert checkpoint_manager.find_verified_step(folder(root, "mid")) == 10


def test_retrained_source_says_how_to_start_from_it(
    root: Path,
    flags_of: Flags,
    run: Say,
    typed: Say,
) -> None:
    before = final(root, "mid")
    run("scripts.base_train", *flags_of["base"], "--overwrite", "--seed=7")
    output = run("scripts.mid_train", *flags_of["mid"], "--resume=latest")
    assert "trained again" in output and "to start over from there" in output
    typed(the_command(output))
    assert not same(final(root, "mid"), before)
    assert "nothing to do" in run("scripts.mid_train", *flags_of["mid"], "--resume=latest")


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_command_in_the_report_reproduces_the_run(
    stage: str,
    root: Path,
    flags_of: Flags,
    run: Say,
    typed: Say,
) -> None:
    """The base folder holds the inputs of the run, but not the run."""
    run("zangchat.report", "generate")
    report = (root / "report" / "report.md").read_text(encoding="utf-8")
    line = the_command(report, f"-m {module_of(stage)}")
    expected = final(root, stage)
    shutil.rmtree(folder(root, stage))
    typed(line)
    assert same(final(root, stage), expected)


def test_flag_that_a_resumed_run_cannot_change(root: Path, flags_of: Flags, run: Say) -> None:
    flags = [*flags_of["base"], "--resume=latest"]
    output = run("scripts.base_train", *flags, "--matrix_lr=0.5", "--data_path=no where", code=2)
    restored = re.search(r"give ([^,]*), or start over with --overwrite", output)
    assert restored, output
    flags += ["--matrix_lr=0.5", *shlex.split(restored[1])]
    assert "nothing to do" in run("scripts.base_train", *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--total_batch_size=100"],
        ["--device_batch_size=5"],
    ],
)
def test_unsuitable_size_names_a_suitable_one(
    flags: list[str],
    root: Path,
    flags_of: Flags,
    run: Say,
) -> None:
    plan = ["--dry_run", *flags_of["base"], "--model_tag=other", *flags]
    output = run("scripts.base_train", *plan, code=2)
    better = re.search(r"try (--\w+=\d+)", output)
    assert better, output
    run("scripts.base_train", *plan, better[1])


# ---- missing files -------------------------------------------------------------------------------

TOKENIZER = ["--vocab_size=300", "--max_chars=100000"]
SIZES = {  # for recommended commands without any
    "scripts.tok_train": TOKENIZER,
    "scripts.base_train": """--depth=1 --n_embd=32 --head_dim=16 --max_seq_len=64
        --device_batch_size=4 --total_batch_size=256 --num_iterations=2 --eval_tokens=400
        --sample_every=-1 --core_metric_every=-1 --device_type=cpu""".split(),
    "scripts.mid_train": """--mixture=identity:1 --num_iterations=2 --eval_tokens=400
        --device_type=cpu""".split(),
    "scripts.chat_sft": """--mixture=identity:1 --num_iterations=2 --eval_steps=1
        --device_type=cpu""".split(),
    "scripts.chat_rl": """--task=arithmetic --num_iterations=1 --examples_per_step=2
        --num_samples=2 --max_new_tokens=4 --eval_every=-1 --device_type=cpu""".split(),
}


def follow(line: str, typed: Say, more: list[str]) -> list[str]:
    """Run a command, after the commands that its messages recommend for anything missing.

    Returns the modules that ran, in order.
    """
    done: list[str] = []
    waiting = [(line, more)]
    while waiting:
        assert len(done) + len(waiting) < 20, (waiting, done)
        line, more = waiting[-1]
        module = shlex.split(line)[2]
        try:
            typed(line, *more)
        except AssertionError as error:
            following = the_command(str(error).partition("\n")[2])
            assert following != line, error
            waiting.append((following, SIZES.get(shlex.split(following)[2], [])))
            continue
        done.append(module)
        waiting.pop()
    return done


@pytest.mark.slow
def test_messages_lead_from_nothing_to_a_conversation(
    base_dir: Path,
    run: Say,
    typed: Say,
) -> None:
    """They also repair a damaged corpus. The corpus is built from this machine."""
    begun = [
        "zangchat.dataset",
        "scripts.tok_train",
        "scripts.base_train",
        "scripts.mid_train",
        "scripts.chat_sft",
    ]
    talk = "python -m scripts.chat_cli"
    assert follow(talk, typed, ["-p", "hi", "--max_tokens=4", "--device_type=cpu"]) == [
        *begun,
        "scripts.chat_cli",
    ]
    assert follow(f"{talk} -i rl", typed, ["-p", "hi", "--max_tokens=4", "--device_type=cpu"]) == [
        "scripts.chat_rl",
        "scripts.chat_cli",
    ]
    shard = next((base_dir / "base_data" / "pydocs").glob("*.parquet"))
    shard.write_bytes(b"")
    line = the_command(run("scripts.tok_train", *TOKENIZER, "--overwrite", code=2))
    assert "--overwrite" in line
    typed(line)
    run("scripts.tok_train", *TOKENIZER, "--overwrite")


@pytest.fixture
def small_base(base_dir: Path, tmp_path: Path) -> Path:
    """A base folder with a tokenizer, and a file of text elsewhere."""
    from pydoc_data.topics import topics

    from zangchat.tokenizer import RustBPETokenizer

    RustBPETokenizer.train_from_iterator(iter(topics.values()), 300).save(base_dir / "tokenizer")
    texts = "<|endoftext|>".join(list(topics.values())[:20])
    (tmp_path / "my texts.txt").write_text(texts, encoding="utf-8")
    return base_dir


def test_damaged_tokenizer_says_how_to_train_it_again(
    small_base: Path,
    tmp_path: Path,
    run: Say,
    typed: Say,
) -> None:
    (small_base / "tokenizer" / "tokenizer.json").write_text("{", encoding="utf-8")
    output = run(
        "scripts.base_train",
        *SIZES["scripts.base_train"],
        f"--data_path={tmp_path / 'my texts.txt'}",
        code=2,
    )
    typed(the_command(output, "tok_train"), *TOKENIZER, f"--data_path={tmp_path / 'my texts.txt'}")
    run(
        "scripts.base_train",
        *SIZES["scripts.base_train"],
        f"--data_path={tmp_path / 'my texts.txt'}",
    )


def test_damaged_token_shard_says_how_to_make_it_again(
    small_base: Path,
    tmp_path: Path,
    run: Say,
    typed: Say,
) -> None:
    """The text is not a dataset of the base folder."""
    output = run("zangchat.dataset", "tokenize", f"--data_path={tmp_path / 'my texts.txt'}")
    train = shlex.split(output.partition("train on them with ")[2])
    run("scripts.base_train", *SIZES["scripts.base_train"], *train)
    shard = next((small_base / "base_data").glob("*/*.tokens"))
    shard.write_bytes(b"")
    train = [*SIZES["scripts.base_train"], *train, "--model_tag=other"]
    typed(the_command(run("scripts.base_train", *train, code=2)))
    run("scripts.base_train", *train)


def test_tokenized_dataset_names_its_text(
    small_base: Path,
    tmp_path: Path,
    run: Say,
) -> None:
    run("zangchat.dataset", "tokenize", f"--data_path={tmp_path / 'my texts.txt'}")
    name = next((small_base / "base_data").glob("*/manifest.json")).parent.name
    for words in (
        ["scripts.tok_train", *TOKENIZER, "--overwrite"],
        ["zangchat.dataset", "tokenize", "--overwrite"],
    ):
        output = run(*words, f"--dataset={name}", code=2)
        run(*words, *shlex.split(output.rpartition("give ")[2]))


def test_missing_dataset_says_how_to_get_it(base_dir: Path, run: Say) -> None:
    """The hub has some datasets; no command can make the others."""
    assert "-n 8" in the_command(run("scripts.tok_train", "--dataset=climbmix", code=2))
    output = run("scripts.tok_train", "--dataset=my texts", code=2)
    assert "--data_path" in output and "that needs no download" in output
    output = run("scripts.tok_train", "--dataset=pydocs", code=2)
    assert the_command(output) == "python -m zangchat.dataset --source=pydocs"
    output = run("scripts.tok_train", "--dataset=pydocs-tokens", code=2)
    assert the_command(output) == "python -m zangchat.dataset tokenize --dataset=pydocs"


# ---- next steps ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_import_says_how_to_talk_to_the_model(
    root: Path,
    tmp_path: Path,
    run: Say,
    typed: Say,
) -> None:
    run("scripts.export_hf", "-i", "sft", "-o", str(tmp_path / "my export"))
    output = run(
        "scripts.import_model",
        f"--path={tmp_path / 'my export'}",
        "--source=sft",
        "--model_tag=back",
    )
    typed(the_command(output), "-p", "hi", "--max_tokens=4")


def test_generated_conversations_say_how_to_train_on_them(
    root: Path,
    tmp_path: Path,
    run: Say,
    typed: Say,
) -> None:
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am Ada."},
    ]
    replies = iter(range(1000))

    def reply(prompt: str) -> str:
        messages[0]["content"] = f"Who are you, number {next(replies)}?"
        return json.dumps({"messages": messages})

    with serving(engine(reply, sequence_len=4096), max_batch=4, queue=8, model_name="talker") as (
        url,
        _,
    ):
        flags = [
            f"--base_url={url}/v1",
            f"--output={tmp_path / 'about me.jsonl'}",
            "--max_tokens=300",
        ]
        output = run("dev.gen_synthetic_data", *flags, "--num=4", "--max_similarity=1")
    typed(
        the_command(output),
        "--model_tag=me",
        "--from_tag=d1",
        "--mixture=identity:1",
        "--num_iterations=2",
        "--device_type=cpu",
    )
    assert checkpoint_manager.find_last_step(folder(root, "mid", "me")) == 2


@pytest.mark.slow
def test_submitted_jobs_say_how_to_finish(
    base_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for sbatch runs no job, so the last command does all of the work."""
    pytest.importorskip("datatrove")
    corpus, programs = tmp_path / "my corpus", tmp_path / "programs"
    for place in (corpus, programs):
        place.mkdir()
    rows = "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(50))
    (corpus / "a.jsonl").write_text(rows, encoding="utf-8")
    (programs / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 1\n", encoding="utf-8")
    (programs / "sbatch").chmod(0o755)
    flags = [
        "--format=.jsonl",
        "--num_shards=2",
        "--tasks=1",
        "--workers=1",
        "--name=mine",
        "--slurm_partition=cpu",
    ]
    line = shlex.join(["python", "-m", "dev.repackage_datatrove", f"--data_path={corpus}", *flags])
    output = shell(line, PATH=f"{programs}:{environment()['PATH']}")
    shell(the_command(output, "dev.repackage_datatrove"))
    assert (base_dir / "base_data" / "mine" / "manifest.json").exists()


def test_unknown_flag_names_the_help(base_dir: Path) -> None:
    output = shell("python -m scripts.base_train --dpeth=4", code=2)
    assert "--depth" in shell(the_command(output))


# ---- with a hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The only network."""
    with stand_in(count=10) as hub:
        for name, value in hub.environment(tmp_path / "cache").items():
            monkeypatch.setenv(name, value)
        yield hub


def test_missing_source_names_the_choices(
    hub: Hub,
    base_dir: Path,
    run: Say,
    typed: Say,
) -> None:
    fetch = the_command(run("zangchat.dataset", code=2), "-n 8")
    typed(fetch)
    assert (base_dir / "base_data" / "climbmix" / "manifest.json").exists()


def test_hub_dataset_is_downloaded_verified_and_repaired(
    hub: Hub,
    base_dir: Path,
    run: Say,
    typed: Say,
) -> None:
    fetch = the_command(run("scripts.tok_train", *TOKENIZER, "--dataset=fineweb-edu", code=2))
    typed(fetch)
    check = the_command(typed(fetch))
    assert "are what the manifest says" in typed(check)
    next((base_dir / "base_data" / "fineweb-edu").glob("*0.parquet")).unlink()
    repair = the_command(run("scripts.tok_train", *TOKENIZER, "--dataset=fineweb-edu", code=2))
    assert the_command(typed(check, code=2)) == repair
    typed(repair)
    run("scripts.tok_train", *TOKENIZER, "--dataset=fineweb-edu")


def test_unreachable_hub_names_the_dataset_that_needs_none(
    hub: Hub,
    base_dir: Path,
    run: Say,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    output = run("zangchat.dataset", "-n", "8", code=2)
    assert "set HF_ENDPOINT to a mirror" in output
    assert the_command(output) == "python -m zangchat.dataset --source=pydocs"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    run("zangchat.dataset", "-n", "8")


def test_damaged_download_succeeds_with_the_same_command(
    hub: Hub, base_dir: Path, run: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zangchat.dataset.hub.RETRY_WAIT", 0.01)
    hub.faults[f"{HUB_REPOS['climbmix']}/shard_00001.parquet"] = ["wrong"] * 5
    output = run("zangchat.dataset", "-n", "8", code=2)
    assert "run the same command again later" in output
    assert "8 training shards" in run("zangchat.dataset", "-n", "8")


@pytest.mark.slow
def test_missing_core_names_the_command_that_downloads_it(
    hub: Hub, root: Path, flags_of: Flags
) -> None:
    line = shlex.join(
        [
            "python",
            "-m",
            "scripts.base_train",
            *flags_of["base"],
            "--overwrite",
            "--core_metric_every=10",
        ]
    )
    output = shell(f"{line} --core_metric_max_per_task=1")
    assert "training goes without CORE evaluations" in output
    assert "CORE: 22 tasks" in shell(the_command(output, "fetch"))
    assert "base step 10: CORE" in shell(f"{line} --core_metric_max_per_task=1")


@pytest.mark.slow
def test_failed_download_succeeds_with_the_same_command(hub: Hub, root: Path) -> None:
    line = "python -m scripts.base_eval --max_per_task=1 --device_type=cpu"
    output = shell(line, code=2, ZANGCHAT_EVAL_BUNDLE_URL="http://127.0.0.1:9/bundle.zip")
    assert "eval_bundle" in output and "run this again" in output
    assert "CORE" in shell(line)


# ---- a chain -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_failed_stage_names_its_command_and_the_chain(
    hub: Hub,
    base_dir: Path,
    tmp_path: Path,
) -> None:
    """Two stages fail: first one with a missing file, then one with too small a vocabulary."""
    identity = tmp_path / "about me.jsonl"
    variables = {
        "NPROC_PER_NODE": "2",
        "NUM_SHARDS": "4",
        "MAX_CHARS": "500000",
        "VOCAB_SIZE": "100",
        "IDENTITY_DATA": str(identity),
    }
    output = shell("bash speedrun.sh", code=2, **variables)
    assert "stopped with exit code 2" in output and str(identity) in output
    failed, chain = the_command(output, "scripts."), the_command(output, "bash ")
    shell(failed, code=2)
    row = {
        "messages": [
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "Ada."},
        ]
    }
    identity.write_text(json.dumps(row) + "\n", encoding="utf-8")
    shell(failed)
    output = shell(chain, code=2, **variables)
    failed = the_command(output, "scripts.tok_train")
    assert the_command(output, "bash ") == chain and "--vocab_size=100" in output
    shell(f"{failed} --vocab_size=512")
    assert (base_dir / "tokenizer" / "tokenizer.json").exists()

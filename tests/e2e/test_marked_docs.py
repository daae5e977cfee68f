"""Run the marked blocks of the READMEs and pages as well.

A stand-in for the hub replaces the network, and two CPU ranks replace eight GPUs. Only sizes are
added to each command; all other settings keep their defaults. ELSEWHERE lists the commands that
other tests run.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests import sizes
from tests.documents import NOT_RUN, PAGES, READMES, ROOT, commands, text_of
from tests.hub.contents import parquet, stand_in
from tests.hub.server import Hub, Repo
from zangchat.dataset import load_dataset

DOCUMENTS = [
    READMES[0],
    "dev/LEADERBOARD.md",
    *(f"dev/docs/en/{page}" for page in PAGES if page != "extending.md"),
]
ELSEWHERE = {  # test file -> the commands that it runs, whose programs it names
    "tests/e2e/test_speedrun.py": """bash speedrun.sh | WANDB_RUN=first bash speedrun.sh
        | bash run1000.sh | bash dev/rungpu.sh 24""",
    "tests/unit/test_setup.py": "bash dev/setup.sh",
    "tests/e2e/test_runcpu.py": "bash dev/runcpu.sh | SEED=42 bash dev/runcpu.sh",
    # with stand-ins for nvidia-smi, srun and the programs that they start
    "tests/unit/test_readme.py": """bash dev/rungpu.sh | sbatch dev/slurm.sbatch
        | sky launch dev/skypilot.yaml --env BUCKET=s3://my-bucket/zangchat""",
    "tests/e2e/test_docs.py": """torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d
        --rdzv_endpoint=HEAD:29500 --rdzv_id=1 --max-restarts=3 -m scripts.base_train
        -- --depth=26 --resume=latest""",
    "tests/e2e/test_gpu_check.py": "python -m dev.gpu_check | python -m dev.gpu_check --report",
    "tests/unit/test_hf.py": """python -m scripts.import_model --path=nanochat --source=base
        --from_tag=d20 --model_tag=nano20""",
    "tests/unit/test_hf_examples.py": """python -m dev.examples.lora --model=d20-sft
        --data=conversations.jsonl --output=d20-lora | python -m dev.examples.dpo --model=d20-sft
        --data=preferences.jsonl --output=d20-dpo""",
}
THIS_SUITE = "bash dev/test.sh"
SHARDS = 117  # the commands request 115 of them
MODEL = "--depth=2 --max_seq_len=256 --total_batch_size=2048 --device_batch_size=4"
SIZES = {
    "scripts.tok_train": "--vocab_size=512 --max_chars=500000",
    "scripts.base_train": f"""{MODEL} --num_iterations=4 --eval_tokens=2048
        --core_metric_max_per_task=1""",
    "scripts.base_loss": "--split_tokens=2048 --device_batch_size=4",
    "scripts.base_eval": "--max_per_task=2",
    "scripts.mid_train": "--num_iterations=2 --eval_tokens=2048 --device_batch_size=4",
    "scripts.chat_sft": "--num_iterations=2 --eval_steps=1 --device_batch_size=4",
    "scripts.chat_rl": """--num_iterations=1 --examples_per_step=2 --num_samples=2
        --max_new_tokens=8 --eval_examples=2 --device_batch_size=4""",
    "scripts.chat_eval": "--max_problems=4 --max_new_tokens=8",
}


def marked(reason: str, name: str | None = None) -> list[str]:
    """The commands of all blocks with this mark, or of those of one document, in order."""
    names = [name] if name else DOCUMENTS
    return [re.sub(r"\s+", " ", line) for each in names for line in commands(text_of(each), reason)]


def listed(text: str) -> list[str]:
    return [" ".join(command.split()) for command in re.split(r" \|\s|\s\| ", text)]


# ---- which test runs which command ---------------------------------------------------------------

HOME = [line for line in marked("gpu", READMES[0]) if line.startswith(("python", "torchrun"))]
RACE = [line for line in marked("gpu", "dev/LEADERBOARD.md") if line.startswith("torchrun")]
TEXT = [line for line in marked("network") if "zangchat.dataset" in line and "pydocs" not in line]
SCORES = [line for line in marked("network") if "scripts." in line]
HARNESS = [line for line in marked("network") if line.startswith("lm_eval")]
PYDOCS = [line for line in (*marked("network"), *marked("minutes")) if "pydocs" in line]


def test_every_marked_command_is_run_by_a_test() -> None:
    elsewhere = {line for text in ELSEWHERE.values() for line in listed(text)}
    here = {*HOME, *RACE, *TEXT, *SCORES, *HARNESS, *PYDOCS}
    everything = {line for reason in NOT_RUN for line in marked(reason)}
    assert here.isdisjoint(elsewhere) and everything == here | elsewhere | {THIS_SUITE}


def test_only_sizes_are_added_to_commands() -> None:
    flags = " ".join(SIZES.values()).split()
    names = {flag.partition("=")[0].lstrip("-") for flag in flags}
    assert names <= sizes.FLAGS


@pytest.mark.parametrize("file", ELSEWHERE)
def test_other_test_files_name_their_commands(file: str) -> None:
    source = text_of(file)
    for line in listed(ELSEWHERE[file]):
        program = re.search(
            r"[\w/]+\.(?:sh|sbatch|yaml)\b|\b(?:scripts|examples|dev)\.(?!examples)(\w+)", line
        )
        assert program, line
        name = program[1] or program[0]
        assert name in source or Path(name).name in source, f"{file} no longer names {name}"


# ---- the machine that runs them ------------------------------------------------------------------


class Machine(NamedTuple):
    """A base folder, a working folder, and a hub as the only network."""

    base: Path
    work: Path
    hub: Hub

    def type(self, line: str, code: int = 0) -> str:
        """Run a command in a shell and return its output."""
        env = {
            **os.environ,
            **self.hub.environment(self.base / "hub"),
            "ZANGCHAT_BASE_DIR": str(self.base),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.work,
            env=env,
            capture_output=True,
            text=True,
            timeout=580,
        )
        output = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == code, f"{line}\nleft with {done.returncode}\n{output}"
        # lm_eval looks up every model on the hub
        unknown = [request for request in self.hub.unknown if "/api/models/d20" not in request]
        assert not unknown, unknown
        return done.stdout + done.stderr


def small(line: str) -> str:
    """A command followed by its sizes, on two ranks instead of eight."""
    module = re.search(r"-m (\S+)", line)
    assert module
    more = " ".join(SIZES.get(module[1], "").split())
    if not line.startswith("torchrun"):
        return f"{line} {more}".strip()
    line = line.replace(" -m ", " --nproc_per_node=2 -m ")
    return f"{line} {'' if ' -- ' in line else '-- '}{more}" if more else line


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    work = tmp_path_factory.mktemp("work")
    (work / "dev").symlink_to(ROOT / "dev")
    with stand_in(count=SHARDS) as hub:
        hub.repos["Rowan/hellaswag"] = hellaswag()
        yield Machine(tmp_path_factory.mktemp("base"), work, hub)


def hellaswag() -> Repo:
    """A dataset that lm_eval downloads and none of our defaults does."""
    rows = [
        {
            "ind": index,
            "activity_label": "Counting",
            "ctx_a": f"A child counts to {index}.",
            "ctx_b": "then",
            "ctx": f"A child counts to {index}. then",
            "endings": [f"says {index + shift}." for shift in range(4)],
            "source_id": str(index),
            "split": "train",
            "split_type": "indomain",
            "label": str(index % 4),
        }
        for index in range(8)
    ]
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]
    return Repo("Rowan/hellaswag", dict.fromkeys(names, parquet(rows)))


# ---- text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", dict.fromkeys(line for line in TEXT if " -n " in line))
def test_text_is_downloaded(line: str, machine: Machine) -> None:
    source = re.search(r"--source=(\S+) -n (\d)", line)
    assert source and f"{source[1]}: {source[2]} training shard" in machine.type(line)
    train = load_dataset(machine.base / "base_data" / source[1]).shards("train")
    assert len(train) == int(source[2])


@pytest.mark.parametrize("line", dict.fromkeys(line for line in TEXT if " -n " not in line))
def test_damaged_text_is_repaired(line: str, machine: Machine) -> None:
    name = re.search(r"--dataset=(\S+)", line)
    assert name and "--repair" in line
    dataset = load_dataset(machine.base / "base_data" / name[1])
    shard = dataset.folder / dataset.shards("train")[3]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    machine.type(line)
    assert shard.read_bytes() == whole
    machine.type(line.replace("--repair", ""))


@pytest.mark.slow
def test_pydocs_corpus_is_built(machine: Machine) -> None:
    for line in dict.fromkeys(PYDOCS):
        machine.type(line)
    assert (machine.base / "base_data" / "pydocs" / "manifest.json").exists()
    shutil.rmtree(machine.base / "base_data" / "pydocs")


# ---- the whole pipeline, stage by stage ----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(machine: Machine) -> Machine:
    """After the README's commands of each stage, with climbmix as the only text."""
    for name in ("fineweb-edu", "climbmix", "tinystories"):
        shutil.rmtree(machine.base / "base_data" / name, ignore_errors=True)
    for line in HOME:
        machine.type(small(line))
    return machine


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_readme_commands_train_a_model_of_each_stage(trained: Machine) -> None:
    trained_stages = {
        path.parent.parent.name for path in trained.base.glob("*_checkpoints/d2/meta_*.json")
    }
    assert trained_stages == {
        f"{stage}_checkpoints" for stage in ("base", "mid", "chatsft", "chatrl")
    }
    report = (trained.base / "report" / "report.md").read_text(encoding="utf-8")
    for section in (
        "Tokenizer evaluation",
        "Base model evaluation",
        "Midtraining",
        "Chat SFT",
        "Chat RL",
        "Chat evaluation sft",
    ):
        assert section in report


@pytest.mark.slow
@pytest.mark.parametrize("line", RACE)
def test_leaderboard_command(line: str, trained: Machine) -> None:
    trained.type(small(line))
    assert list((trained.base / "base_checkpoints" / "race").glob("meta_*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("line", SCORES)
def test_scores_of_all_tasks(line: str, trained: Machine) -> None:
    """CORE in full."""
    output = trained.type(line if "base_eval" in line else small(line))
    assert "CORE" in output if "base_eval" in line else "ChatCORE" in output
    assert "not scored" not in output


@pytest.mark.slow
@pytest.mark.parametrize("line", HARNESS)
def test_lm_eval_scores_an_export(line: str, trained: Machine) -> None:
    pytest.importorskip("lm_eval")
    for stage in ("base", "sft"):
        if not (trained.work / f"d20-{stage}").exists():
            trained.type(f"python -m scripts.export_hf -i {stage} -g d2 -o d20-{stage}")
    if "local-completions" not in line:
        assert "|acc" in trained.type(f"{line} --limit 2 --device cpu").replace(" ", "")
        return
    serving = subprocess.Popen(
        [sys.executable, "-m", "scripts.chat_web", "-g", "d2", "--port=0", "--device_type=cpu"],
        cwd=ROOT,
        env={**os.environ, "ZANGCHAT_BASE_DIR": str(trained.base)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert serving.stdout is not None
        url = re.search(r"http://\S+", serving.stdout.readline())
        assert url and httpx.get(f"{url[0]}/health").status_code == 200
        line = line.replace("http://localhost:8000", url[0])
        assert "|acc" in trained.type(f"{line} --limit 2").replace(" ", "")
    finally:
        serving.terminate()
        serving.wait(30)

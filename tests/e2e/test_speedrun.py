"""Run the chain scripts on their defaults: depth 2, two CPU processes, a stand-in for the hub.

Only sizes are set. The ordinary suite runs speedrun.sh once. The slow tests interrupt it, and run
run1000.sh and rungpu.sh.
"""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tasks.registry import MID_MIXTURE, SFT_MIXTURE, scored_tasks
from tests import sizes
from tests.documents import ROOT
from tests.hub.contents import stand_in
from tests.hub.server import Hub
from zangchat.core_eval import CORE_TASKS
from zangchat.dataset.hub import HUB_REPOS

# stage -> first word of its folder
STAGES = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
CARDS = [  # cards of the report, in the order of a chain
    *(
        "Tokenizer training",
        "Tokenizer evaluation",
        "Base model training",
        "Base model evaluation",
        "Base model loss",
        "Midtraining",
    ),
    *("Chat evaluation mid", "Chat SFT", "Chat evaluation sft", "Chat RL", "Chat evaluation rl"),
]
pytestmark = pytest.mark.timeout(1800)


class Chain(NamedTuple):
    """A base folder for a chain, and the network that the chain sees."""

    base: Path
    hub: Hub
    home: Path  # holds the cache of the hub's client

    def start(
        self, script: str, *arguments: str, log: Path, **more: str
    ) -> "subprocess.Popen[bytes]":
        variables = {**sizes.rehearsal(), **more}
        assert not sizes.others(variables), "a rehearsal sets sizes alone"
        env = sizes.users_environment(
            **variables, **self.hub.environment(self.home), ZANGCHAT_BASE_DIR=str(self.base)
        )
        with log.open("wb") as out:
            command = ["bash", script, *arguments]
            return subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def run(self, script: str, *arguments: str, **more: str) -> str:
        """The output of a chain, which must succeed."""
        log = self.base.with_suffix(".log")
        process = self.start(script, *arguments, log=log, **more)
        code, output = process.wait(), log.read_text(encoding="utf-8")
        assert code == 0, output[-5000:]
        assert not self.hub.unknown
        return output

    def checkpoints(self, stage: str) -> Path:
        (tag,) = (
            path for path in (self.base / f"{STAGES[stage]}_checkpoints").iterdir() if path.is_dir()
        )
        return tag

    def meta(self, stage: str) -> dict[str, Any]:
        return json.loads(
            max(self.checkpoints(stage).glob("meta_*.json")).read_text(encoding="utf-8")
        )

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.checkpoints(stage) / "metrics.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()
        ]

    def weights(self) -> dict[str, str]:
        return {
            stage: hashlib.sha256(
                max(self.checkpoints(stage).glob("model_*.pt")).read_bytes()
            ).hexdigest()
            for stage in STAGES
        }

    def report(self) -> str:
        return (self.base / "report" / "report.md").read_text(encoding="utf-8")

    def results(self) -> list[str]:
        """The report's summary and cards, without the lines that differ in any two runs."""
        drop = re.compile(
            r"Logged |Generated |\| (?:.*(?:minutes|seconds|memory|wall-clock|cost|git|source).*) "
            r"\|"
        )
        return [line for line in self.report().splitlines() if not drop.match(line)]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with stand_in() as hub:
        yield hub


@pytest.fixture
def empty(hub: Hub, tmp_path: Path) -> Chain:
    """An empty base folder, and a hub without faults."""
    hub.faults = {}
    return Chain(tmp_path / "base", hub, tmp_path / "hf")


@pytest.fixture(scope="module")
def whole(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, str]:
    """An undisturbed chain and its output."""
    folder = tmp_path_factory.mktemp("whole")
    chain = Chain(folder / "base", hub, folder / "hf")
    return chain, chain.run("speedrun.sh")


# ---- the expected result -------------------------------------------------------------------------


def check_result(chain: Chain, output: str, tag: str = "d2") -> None:
    assert "$ at" not in output and re.search(
        rf"\n{tag}: 0 h \d\d min this time, \$\d+\.\d\d at \$\d+ an hour", output
    )
    assert {stage: chain.checkpoints(stage).name for stage in STAGES} == dict.fromkeys(STAGES, tag)
    fetched = {"SmolTalk, train": 600, "SmolTalk, test": 600, "HumanEval, test": 12}
    for name in (
        "MMLU, auxiliary_train",
        "MMLU, test",
        "GSM8K, train",
        "GSM8K, test",
        "ARC-Easy, train",
        "ARC-Challenge, test",
    ):
        fetched[name] = 60
    before = output.partition("Pretraining")[0]
    assert (
        all(f"{name}: {count} conversations\n" in before for name, count in fetched.items())
        and "CORE: 22 tasks\n" in before
    )
    # each stage trained on its own mixture, with something of every entry
    for stage, mixture in (("mid", MID_MIXTURE), ("sft", SFT_MIXTURE)):
        config = chain.meta(stage)["user_config"]
        assert (config["mixture"], config["identity_data"]) == (mixture, None)
        (entries,) = re.findall(rf"^{stage}: [\d,]+ conversations \((.*)\);", output, re.MULTILINE)
        counts = {
            name.lower(): int(count.replace(",", ""))
            for name, count in re.findall(r"([\w-]+) ([\d,]+)(?:, |$)", entries)
        }
        assert (
            set(counts) == {entry.partition(":")[0] for entry in mixture.split(",")}
            and min(counts.values()) > 0
        ), entries
    assert chain.meta("rl")["user_config"]["task"].lower() == "gsm8k"
    for stage in ("base", "mid"):  # ten steps of finetuning at its small rate show no progress
        losses = [values["loss"] for values in chain.metrics(stage) if "loss" in values]
        assert sum(losses[-5:]) < sum(losses[:5]), stage
    # every evaluation took place
    assert any("CORE" in values for values in chain.metrics("base")), (
        "CORE is looked at while pretraining"
    )
    (table,) = (chain.base / "base_eval").glob("*.csv")
    assert [line.partition(",")[0] for line in table.read_text(encoding="utf-8").splitlines()] == [
        "task",
        *CORE_TASKS,
        '"CORE"',
    ]
    for stage in ("mid", "sft", "rl"):
        for name in scored_tasks(every=True):
            (answers,) = (chain.base / "chat_eval").glob(f"{stage}_{tag}_*_{name}.jsonl")
            assert len(answers.read_text(encoding="utf-8").splitlines()) == 4
    assert "not scored" not in output and "will not be scored" not in output
    # the report has all of it
    report = chain.report()
    assert (
        re.findall(r"^## (.*)$", report, re.MULTILINE) == ["Summary", "Curves", *CARDS]
        and "Not scored" not in report
    )
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in report.partition("## Curves")[0].splitlines()
        if line.startswith("|")
    }
    assert all(rows[name].count(" - ") <= 1 for name in (*scored_tasks(every=True), "ChatCORE")), (
        report[:2000]
    )
    assert rows["CORE"].count(" - ") == 3


RENDER = """
import json, sys
from tasks.registry import training_conversations
from zangchat.dataloader import example_batches, packed_batches
from zangchat.streams import ConversationStream
from zangchat.tokenizer import get_tokenizer

tokenizer, seen = get_tokenizer(), {}
for entry in sys.argv[1:]:
    task = training_conversations(entry, tokenizer=tokenizer, seed=42)
    stream = ConversationStream(task, tokenizer, 42, max_tokens=2049)
    midtraining = packed_batches(stream, rows_per_step=2, sequence_len=2048, bos=tokenizer.get_bos_token_id())
    finetuning = example_batches(task, tokenizer, examples_per_step=4, sequence_len=2048, seed=42)
    seen[entry] = []
    for batches in (midtraining, finetuning):
        seen[entry].append(int((next(batches).targets >= 0).sum()))
        batches.close()  # ends the loader's thread
print(json.dumps(seen))
"""


def test_speedrun_on_its_defaults(whole: tuple[Chain, str]) -> None:
    check_result(*whole)


def test_second_call_has_nothing_to_do(whole: tuple[Chain, str]) -> None:
    chain, _ = whole
    before, old_requests = (
        {path: path.stat().st_mtime_ns for path in chain.base.rglob("model_*.pt")},
        len(chain.hub.requests),
    )
    again = chain.run("speedrun.sh")
    assert (
        len(
            re.findall(
                r"^(?:base|mid|sft|rl): d2 is finished at step \d+ of \d+; nothing to do$",
                again,
                re.MULTILINE,
            )
        )
        == 4
    )
    assert again.count("=== ") == 14 and again.count(": done before") == 8
    assert {path: path.stat().st_mtime_ns for path in chain.base.rglob("model_*.pt")} == before
    assert chain.hub.requests[old_requests:] == []


def test_every_entry_of_the_default_mixtures_is_trained_on(whole: tuple[Chain, str]) -> None:
    """Each entry goes through the loaders by itself.

    A few steps over 280,000 generated conversations include none of the small tasks.
    """
    chain, _ = whole
    entries = [*MID_MIXTURE.split(","), *SFT_MIXTURE.split(",")]
    env = {**os.environ, **chain.hub.environment(chain.home), "ZANGCHAT_BASE_DIR": str(chain.base)}
    done = subprocess.run(
        [sys.executable, "-c", RENDER, *entries], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen) == set(entries) and all(min(supervised) > 0 for supervised in seen.values()), (
        seen
    )


# ---- interrupted ---------------------------------------------------------------------------------


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the script and all its children at once, like a power cut."""
    script = psutil.Process(process.pid)
    script.suspend()  # so that it cannot start another child meanwhile
    for child in script.children(recursive=True):
        child.kill()
    script.kill()
    process.wait()


def in_a_download(chain: Chain, rng: random.Random) -> Callable[[], bool]:
    """During the download of a shard or a dataset."""
    corpus = HUB_REPOS["climbmix"]
    files = [
        f"{corpus}/shard_00000.parquet",
        f"{corpus}/shard_00006.parquet",
        "cais/mmlu/all/auxiliary_train-00000-of-00001.parquet",
    ]
    target = rng.choice(files)
    chain.hub.faults = {target: [("slow", 3)]}
    return lambda: bool(chain.hub.fetched(target))


def between_a_save_and_its_card(chain: Chain, rng: random.Random) -> Callable[[], bool]:
    stage = rng.choice(list(STAGES))
    card = {
        "base": "base-model-training",
        "mid": "midtraining",
        "sft": "chat-sft",
        "rl": "chat-rl",
    }[stage]
    last = {"base": 20, "mid": 10, "sft": 10, "rl": 2}[stage]

    def due() -> bool:
        saved = list((chain.base / f"{STAGES[stage]}_checkpoints").glob(f"*/meta_{last:06d}.json"))
        assert not (chain.base / "report" / f"{card}.card.json").exists(), "the moment went by"
        # at any time after the first save: in an evaluation or the second save
        return bool(saved) and rng.random() < 0.02

    return due


def in_an_evaluation(chain: Chain, rng: random.Random) -> Callable[[], bool]:
    stage, task = rng.choice(["mid", "sft", "rl"]), rng.choice(scored_tasks(every=True)[:-1])
    return lambda: any((chain.base / "chat_eval").glob(f"{stage}_*_{task}.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
@pytest.mark.parametrize("event", [in_a_download, between_a_save_and_its_card, in_an_evaluation])
def test_killed_chain_resumes_to_the_same_result(
    whole: tuple[Chain, str],
    empty: Chain,
    event: Callable[[Chain, random.Random], Callable[[], bool]],
    seed: int,
) -> None:
    empty.hub.requests.clear()
    due = event(empty, random.Random(seed))
    process = empty.start("speedrun.sh", log=empty.base.with_suffix(".log"))
    while not due():
        assert process.poll() is None, empty.base.with_suffix(".log").read_text(encoding="utf-8")[
            -5000:
        ]
        time.sleep(0.005)
    kill(process)
    empty.hub.faults = {}
    empty.run("speedrun.sh")
    assert empty.weights() == whole[0].weights()
    assert empty.results() == whole[0].results()


# ---- the other chains ----------------------------------------------------------------------------


@pytest.mark.slow
def test_run1000_on_its_defaults(empty: Chain) -> None:
    check_result(empty, empty.run("run1000.sh"))
    assert empty.meta("base")["user_config"]["target_param_data_ratio"] == 20


@pytest.mark.slow
def test_rungpu_on_its_defaults(empty: Chain) -> None:
    check_result(empty, empty.run("dev/rungpu.sh", "8"))

"""The commands that reward and evaluate (chat_rl, chat_eval, base_eval), and what measures them, at
a tiny size, as a user starts them.
"""

import functools
import json
import os
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dev import agreement, bench_core, bench_sandbox
from scripts import base_eval, chat_eval, chat_rl
from tasks import common, spellingbee
from tasks.common import GeneratedTask, chat, visible_text
from tasks.registry import REGISTRY, Entry
from tests.hub import rows
from tests.unit.test_core_eval import make_bundle
from tests.util import lively_model
from zangchat import checkpoint_manager, execution
from zangchat.config import RunState
from zangchat.dataset import hub
from zangchat.execution import ExecutionResult, Jail, Sandbox, SandboxLevel
from zangchat.report import get_report
from zangchat.runtime import collectives
from zangchat.tokenizer import RustBPETokenizer
from zangchat.training import trainer

TEXT = Path(common.__file__).read_text(encoding="utf-8") + Path(spellingbee.__file__).read_text(
    encoding="utf-8"
)
CPU = ["--device_type=cpu", "--dtype=float32"]
SIZE = [
    "--task=vowels",
    "--task_size=40",
    "--examples_per_step=4",
    "--num_samples=4",
    "--max_new_tokens=8",
    "--eval_examples=6",
    "--eval_samples=2",
]
RATES = [
    "--optimizer=adamw",
    "--matrix_lr=0.05",
    "--embedding_lr=0.05",
    "--unembedding_lr=0.05",
    "--init_lr_frac=1",
    "--eval_every=5",
]


class Vowels(GeneratedTask):
    """Earns the share of vowels in the answer: even noise earns something, and more can be learnt
    within a few steps.
    """

    rewarded = True

    def make(self, rng: Any) -> Any:
        return chat(f"say {rng.randrange(100)}", "aaa")

    def evaluate(self, conversation: Any, completion: Any) -> bool:
        return self.reward(conversation, completion) > 0.5

    def reward(self, conversation: Any, completion: Any) -> float:
        said = visible_text(completion)
        return sum(char in "aeiou" for char in said) / max(len(said), 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with a random model that passes for a finetuned one (tags a and b) and for a
    base model.
    """
    root = tmp_path_factory.mktemp("base")
    tokenizer = RustBPETokenizer.train_from_iterator(iter([TEXT] * 2), 400)
    model = lively_model(
        tokenizer.get_vocab_size(), sequence_len=64, n_layer=1, n_embd=32, seed=2, std=0.2
    )
    for stage, tag in (("sft", "a"), ("sft", "b"), ("base", "a")):
        folder = root / checkpoint_manager.SOURCES[stage] / tag
        folder.mkdir(parents=True)
        meta = {
            "stage": stage,
            "val_bpb": None,
            "model_config": model.config.to_dict(),
            "user_config": {"model_tag": tag, "max_seq_len": 64, "device_batch_size": 4},
            "run_state": RunState(step=3).to_dict(),
        }
        checkpoint_manager.save_checkpoint(folder, 3, model.state_dict(), {}, meta)
        tokenizer.save(folder)
    return root


@pytest.fixture
def base(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "base"
    shutil.copytree(made, root)
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(root))
    monkeypatch.setenv("WANDB_RUN", "dummy")
    (root / "tasks" / "words").mkdir(parents=True)
    (root / "tasks" / "words" / "w.txt").write_text(
        "\n".join(f"w{a}{b}rd" for a in "abcdefghijklmn" for b in "abcdefghijklmn"),
        encoding="utf-8",
    )
    return root


@pytest.fixture(autouse=True)
def vowels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A task more, and no hub."""
    module = types.ModuleType("tasks.vowels")
    module.Vowels = Vowels  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tasks.vowels", module)
    monkeypatch.setitem(REGISTRY, "Vowels", Entry("tasks.vowels", "Vowels"))
    monkeypatch.setattr(hub, "unreachable", lambda url: "it cannot be reached")
    yield


def rl(*more: str, tag: str = "a") -> int:
    return chat_rl.main([f"--model_tag={tag}", *CPU, *SIZE, *RATES, *more])


def metrics(base: Path, tag: str = "a") -> list[dict[str, Any]]:
    lines = (
        (base / "chatrl_checkpoints" / tag / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return [
        {key: value for key, value in json.loads(line).items() if key not in trainer.TIMES}
        for line in lines
    ]


# ---- chat_rl -------------------------------------------------------------------------------------


def test_rl_raises_the_reward_and_leaves_a_model_curves_and_a_report(base):
    assert rl("--num_iterations=15") == 0
    lines = metrics(base)
    rewards = [line["reward"] for line in lines if "reward" in line]
    assert len(rewards) == 15 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    held_out = {line["step"]: line["pass@1"] for line in lines if "pass@1" in line}
    assert list(held_out) == [0, 5, 10, 15] and held_out[15] >= held_out[0]
    model, _, meta = checkpoint_manager.load_model("rl", "cpu", "eval")
    assert meta["stage"] == "rl" and meta["step"] == 15
    first, last = (
        meta["run_state"]["results"]["held_out"][f"{when} pass@2"] for when in ("first", "last")
    )
    assert 0 <= first <= 1 and 0 <= last <= 1
    assert any(card.section == "Chat RL" for card in get_report().cards())


def test_a_stopped_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(base, monkeypatch):
    assert rl("--num_iterations=8") == 0
    original = trainer.Trainer.train_step

    def interrupted(self: Any, batch: Any) -> Any:
        if self.state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        assert rl("--num_iterations=8", tag="b") == 130
    assert rl("--num_iterations=8", "--resume=latest", tag="b") == 0
    one, two = (
        checkpoint_manager.load_checkpoint(
            base / "chatrl_checkpoints" / tag, 8, "cpu", load_optimizer=True
        )
        for tag in "ab"
    )
    assert all(torch.equal(one[0][name], two[0][name]) for name in one[0])
    assert one[1] is not None and two[1] is not None and one[1].keys() == two[1].keys()
    for name, entry in one[1].items():
        assert all(
            torch.equal(tensor, two[1][name]["tensors"][key])
            for key, tensor in entry["tensors"].items()
        )
    assert metrics(base, "a") == metrics(base, "b")


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--task=gsm9k"], "unknown task 'gsm9k'"),
        (
            ["--task=identity"],
            "has no reward to learn from: choose one of GSM8K, SpellingBee, Arithmetic",
        ),
        (["--num_samples=1"], "teaches nothing"),
        (["--temperature=0"], "--temperature=0 teaches nothing"),
        (["--temperature=1e-6"], "--temperature=1e-06 teaches nothing"),
        (["--top_k=1"], "--top_k=1 teaches nothing"),
        (["--source=base"], "choose sft or mid"),
        (["--examples_per_step=0"], "--examples_per_step=0"),
        (["--model_tag=c"], "--model_tag=c is not in"),
        (["--task=gsm8k"], "gsm8k"),
    ],
)
def test_rl_says_what_is_wrong_in_one_sentence(base, capsys, flags, complaint):
    assert rl("--num_iterations=2", *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and complaint in error
    assert not list(base.glob("chatrl_checkpoints/*/meta_*"))


def test_ranks_that_cannot_share_the_prompts_are_told_a_way_out(base, capsys, monkeypatch):
    assert rl("--num_iterations=1", "--eval_every=-1") == 0
    monkeypatch.setattr(collectives, "world", lambda: (0, 3))
    for flags, way_out in (
        (["--resume=latest"], "start 1 or 2 ranks"),
        (["--overwrite"], "give a multiple"),
    ):
        assert rl("--num_iterations=2", "--eval_every=-1", *flags) == 2
        assert capsys.readouterr().err.strip().endswith(way_out)


# ---- chat_eval -----------------------------------------------------------------------------------


def test_chat_eval_scores_tasks_and_keeps_what_was_said(base, capsys):
    assert (
        chat_eval.main(
            [
                "-g",
                "a",
                "-a",
                "vowels|Spelling-Bee|VOWELS",
                "-x",
                "7",
                "-m",
                "6",
                "-n",
                "2",
                "-t",
                "1",
                *CPU,
            ]
        )
        == 0
    )
    rows = [
        json.loads(line)
        for line in (base / "chat_eval" / "sft_a_000003_Vowels.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    assert [row["index"] for row in rows] == list(range(7)) and all(
        len(row["completions"]) == 2 for row in rows
    )
    (card,) = [card for card in get_report().cards() if card.section == "Chat evaluation sft"]
    assert set(card.data[0]) == {"Vowels", "SpellingBee"}
    assert card.data[0]["Vowels"] == pytest.approx(sum(row["passed"] for row in rows) / 7)
    assert "ChatCORE" not in capsys.readouterr().out


def test_chat_eval_of_everything_names_what_it_could_not_score(base, capsys):
    (base / "tasks" / "gsm8k" / "main").mkdir(parents=True)
    (base / "tasks" / "gsm8k" / "main" / "test.jsonl").write_text(
        '{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8"
    )
    assert chat_eval.main(["-g", "a", "-x", "4", "-m", "4", *CPU]) == 0
    out = capsys.readouterr().out
    assert (
        "ChatCORE (2/6, no ARC-Easy, ARC-Challenge, MMLU, HumanEval)" in out
        and "ARC-Easy: not scored" in out
    )
    (card,) = [card for card in get_report().cards() if card.section == "Chat evaluation sft"]
    assert sum("Not scored: MMLU" in item for item in card.data if isinstance(item, str)) == 1


def test_chat_eval_that_scored_nothing_is_a_failure(base, capsys):
    shutil.rmtree(base / "tasks")
    assert chat_eval.main(["-g", "a", "-x", "2", "-m", "2", *CPU]) == 2
    out, err = capsys.readouterr()
    names = ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    assert [line.partition(":")[0] for line in out.splitlines() if "not scored" in line] == names
    error = err.strip().splitlines()[-1]
    assert error.startswith(
        f"error: nothing was scored: {', '.join(names)} lack what the lines above name; "
    )
    assert error.endswith('; these have their data here: -a "Arithmetic|PyDocs|Identity|Vowels"'), (
        error
    )
    assert chat_eval.main(["-g", "a", "-x", "2", "-m", "2", "-a", "Arithmetic|Identity", *CPU]) == 0


def test_on_macos_humaneval_is_not_scored_and_its_answers_are_not_run(base, capsys, monkeypatch):
    """The real search for a sandbox, on a system that has none."""
    programs = []
    run = execution.run_in_jail
    for module in (execution, execution.probe):
        monkeypatch.setattr(
            module, "sys", types.SimpleNamespace(**{**vars(sys), "platform": "darwin"})
        )
        monkeypatch.setattr(
            module,
            "run_in_jail",
            lambda code, *rest, **more: programs.append(code) or run(code, *rest, **more),
        )
    monkeypatch.setattr(
        execution, "find_sandbox", functools.cache(execution.find_sandbox.__wrapped__)
    )
    row = {
        "task_id": "0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1",
        "test": "def check(f): ...",
        "entry_point": "one",
    }
    rows.write_rows(base / "tasks" / "openai_humaneval" / "test.jsonl", [row])
    assert chat_eval.main(["-g", "a", "--all_tasks", "-x", "2", "-m", "4", *CPU]) == 0
    assert (
        "HumanEval: not scored, model-written code is not run here: the sandbox of this machine"
        in capsys.readouterr().out
    )
    assert len(programs) == 1 and "succeeds(" in programs[0], "the probe alone"
    (card,) = [card for card in get_report().cards() if card.section == "Chat evaluation sft"]
    assert any(
        "Not scored: HumanEval. model-written code is not run here" in item
        for item in card.data
        if isinstance(item, str)
    )
    assert chat_eval.main(["-g", "a", "-a", "HumanEval", "-x", "2", "-m", "4", *CPU]) == 2
    assert "darwin has no such sandbox: run this on Linux" in capsys.readouterr().err
    assert len(programs) == 1


def test_what_one_rank_lacks_no_rank_scores(base, capsys, monkeypatch):
    """Or the ranks that have it would wait in vain for the other's part of the answers."""
    agree = collectives.max_over_ranks
    monkeypatch.setattr(
        collectives, "max_over_ranks", lambda values: [1.0] if values == [False] else agree(values)
    )
    assert chat_eval.main(["-g", "a", "-a", "vowels", *CPU]) == 2
    assert "another rank lacks" in capsys.readouterr().err


def test_chat_eval_refuses_missing_data_that_was_asked_for(base, capsys):
    for flags, complaint in (
        (["-a", "MMLU"], "cais/mmlu"),
        (["-a", "gsm9k"], "unknown task"),
        (["-a", "smoltalk"], "without right answers"),
        (["-a", "vowels", "--all_tasks"], "exclude each other"),
        (["-a", "vowels", "-n", "2"], "--temperature"),
        (["-a", "vowels", "-x", "0"], "--max_problems=0"),
        (["-a", "vowels", "-g", "nobody"], "nobody"),
    ):
        assert chat_eval.main(["-g", "a", *flags, *CPU]) == 2
        assert complaint in capsys.readouterr().err


def test_programs_of_answers_run_only_where_a_sandbox_holds_them_unless_told_otherwise(
    base, capsys, monkeypatch
):
    (base / "tasks" / "openai_humaneval").mkdir()
    row = {
        "task_id": "T/0",
        "prompt": "def f(x):\n",
        "canonical_solution": "    return x\n",
        "test": "def check(f): f(1)",
        "entry_point": "f",
    }
    (base / "tasks" / "openai_humaneval" / "test.jsonl").write_text(
        json.dumps(row), encoding="utf-8"
    )
    monkeypatch.setattr(execution, "find_sandbox", lambda: Sandbox(Jail(), SandboxLevel.LIMITS))
    ran: list[str] = []
    monkeypatch.setattr(
        execution, "run_in_jail", lambda code, *_: ran.append(code) or ExecutionResult(True, "", "")
    )
    evaluate = ["-g", "a", "-m", "4", "-a", "HumanEval", *CPU]
    assert chat_eval.main(evaluate) == 2 and not ran
    assert "'limits', below 'filtered'" in capsys.readouterr().err
    assert chat_eval.main([*evaluate, "--allow_unsafe_code"]) == 0 and len(ran) == 1
    (card,) = [card for card in get_report().cards() if card.section == "Chat evaluation sft"]
    assert card.data[1]["sandbox"] == "limits (resource limits)"


def test_the_whole_of_chatcore_is_the_mean_of_centred_accuracies():
    class Scored:
        def __init__(self, accuracy: float) -> None:
            self.accuracy = accuracy

    counted = [name for name, entry in REGISTRY.items() if entry.baseline is not None]
    assert counted == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee"]
    values = dict(zip(counted, (0.25, 0.5, 0.4, 0.1, 0.2, 0.9), strict=True))
    table = chat_eval.scores({name: Scored(value) for name, value in values.items()}, {})  # type: ignore[misc]
    assert table["ChatCORE"] == pytest.approx((0 + 0.25 / 0.75 + 0.15 / 0.75 + 0.1 + 0.2 + 0.9) / 6)


# ---- base_eval -----------------------------------------------------------------------------------


def test_base_eval_writes_a_table_and_a_report_card(base, capsys):
    make_bundle(base / "eval_bundle")
    assert base_eval.main(["--max_per_task=5", *CPU]) == 0
    lines = (base / "base_eval" / "base_a_000003.csv").read_text(encoding="utf-8").splitlines()
    assert (
        lines[0] == "task,accuracy,centered"
        and lines[1].startswith("jeopardy,")
        and "coqa,," in lines
    )
    assert lines[-1].startswith('"CORE (3/22, no ')
    (card,) = [card for card in get_report().cards() if card.section == "Base model evaluation"]
    name = next(name for name in card.data[1] if name.startswith("CORE"))
    assert (
        name.startswith("CORE (3/22") and f"{card.data[1][name]:.6f}" == lines[-1].rsplit(",", 1)[1]
    )
    assert base_eval.main(["--max_per_task=0", *CPU]) == 2
    assert "--max_per_task=0" in capsys.readouterr().err


# ---- what measures them --------------------------------------------------------------------------


def test_core_is_timed_both_ways_on_the_same_items(base, capsys):
    make_bundle(base / "eval_bundle")
    RustBPETokenizer.from_directory(base / "base_checkpoints" / "a").save(base / "tokenizer")
    size = ["--depth=1", "--head_dim=32", "--max_seq_len=64", "--items=4", "--repeats=1", "--busy"]
    assert bench_core.main([*size, *CPU]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["items"] == 12
        and figures["verdicts_differ"] == 0
        and figures["data"].startswith("CORE (3/22")
    )
    assert (
        bench_core.main([*size, *CPU, "--tasks=piqa"]) == 2
        and "no data of piqa" in capsys.readouterr().err
    )


def test_rounded_weights_are_compared_with_exact_ones(base, capsys):
    flags = ["-g=a", "--task=vowels", "--questions=5", "--device_type=cpu"]
    assert agreement.main([*flags, "--max_tokens=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["replies"] == 5 and len(found["against_float32"]) == len(agreement.KINDS)
    assert all(
        "impossible" in kind or 0 <= kind["same_token"] <= 1 for kind in found["against_float32"]
    )
    assert (
        agreement.main([*flags, "--max_tokens=64"]) == 2
        and "--max_tokens=64 leaves no room" in capsys.readouterr().err
    )


def test_programs_in_the_sandbox_are_timed(capsys):
    if execution.find_sandbox().level < SandboxLevel.FILTERED:
        pytest.skip("the sandbox of this machine is too weak")
    assert bench_sandbox.main(["--programs=10", "--at_once=2", "--busy"]) == 0
    figures = json.loads(capsys.readouterr().out)
    for kind in ("program", "program with tests"):
        assert all(
            figures[kind][how]["p99_ms"] >= figures[kind][how]["p50_ms"] > 0
            for how in ("one_at_a_time", "at_once")
        )

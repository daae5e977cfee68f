"""The training commands at a tiny size, as a user starts them: what they refuse, what they resume,
what they leave behind.

One small base directory serves all tests: a tokenizer of 300 tokens, a text file, a base model of
one layer, and what was trained from it.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import base_loss, base_train, chat_rl, chat_sft, mid_train
from tasks.registry import MID_MIXTURE, SFT_MIXTURE, training_conversations
from tests.hub import rows
from zangchat import checkpoint_manager, configurator, flops, schedule
from zangchat.dataset import folder_lock
from zangchat.dataset.manifest import write_dataset
from zangchat.errors import UserError
from zangchat.flops import checkpoint_bytes
from zangchat.tokenizer import RustBPETokenizer
from zangchat.training import batch_size, hooks, start, trainer
from zangchat.training.resolve import REPORTED
from zangchat.training.settings import INHERITED, TEXT, check_batch, fill, inherited
from zangchat.training.start import warn_if_disk_is_small

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "ran",
    "to",
    "it",
    "while",
    "one",
    "bird",
    "sang",
    "of",
    "two",
]
MODEL = [
    "--depth=1",
    "--n_embd=32",
    "--head_dim=16",
    "--max_seq_len=32",
    "--device_type=cpu",
    "--dtype=float32",
]
BATCH = ["--device_batch_size=4", "--total_batch_size=256"]
QUIET = ["--sample_every=-1", "--core_metric_every=-1", "--eval_every=5", "--eval_tokens=400"]


def text(index: int) -> str:
    return " ".join(
        WORDS[(index * 7 + k * (index % 5 + 1)) % len(WORDS)] for k in range(12 + index % 9)
    )


def chat(index: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"say {WORDS[index % 18]}"},
            {"role": "assistant", "content": text(index)},
        ]
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base directory with a pretrained, a midtrained and a finetuned model, each of 10 steps."""
    root = tmp_path_factory.mktemp("a base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZANGCHAT_BASE_DIR", str(root))
        patch.setenv("WANDB_RUN", "dummy")
        documents = [text(index) for index in range(300)]
        RustBPETokenizer.train_from_iterator(iter(documents), 300).save(root / "tokenizer")
        (root / "text.jsonl").write_text(
            "".join(json.dumps({"text": document}) + "\n" for document in documents),
            encoding="utf-8",
        )
        (root / "chats.jsonl").write_text(
            "".join(json.dumps(chat(index)) + "\n" for index in range(60)), encoding="utf-8"
        )
        assert base_train.main(base_flags(root)) == 0
        assert mid_train.main(mid_flags(root)) == 0
        assert chat_sft.main(sft_flags(root)) == 0
        yield root


@pytest.fixture(autouse=True)
def home(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(base))


def base_flags(root: Path, *more: str) -> list[str]:
    return [
        *MODEL,
        *BATCH,
        *QUIET,
        "--num_iterations=10",
        f"--data_path={root / 'text.jsonl'}",
        *more,
    ]


def mid_flags(root: Path, *more: str) -> list[str]:
    mixture = f"--mixture={root / 'chats.jsonl'}:1,arithmetic:40"
    return [
        mixture,
        "--mixture_ratio=0.7",
        "--num_iterations=10",
        "--eval_every=5",
        "--eval_tokens=400",
        "--device_type=cpu",
        *more,
    ]


def sft_flags(root: Path, *more: str) -> list[str]:
    mixture = f"--mixture={root / 'chats.jsonl'}:1,arithmetic:20"
    return [
        mixture,
        "--target_examples_per_step=8",
        "--eval_every=5",
        "--eval_steps=2",
        "--init_lr_frac=0.5",
        "--device_type=cpu",
        *more,
    ]


def folder(root: Path, stage: str, tag: str = "d1") -> Path:
    return root / checkpoint_manager.SOURCES[stage] / tag


def metrics(root: Path, stage: str, tag: str = "d1") -> list[dict[str, Any]]:
    path = folder(root, stage).with_name(tag) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in trainer.TIMES}
        for line in lines
    ]


def losses(root: Path, stage: str) -> list[float]:
    return [line["loss"] for line in metrics(root, stage) if "loss" in line]


def final(root: Path, stage: str) -> dict[str, Any]:
    """Weights, optimizer state and run state at the end, without what the clock decides."""
    directory = folder(root, stage)
    model, optimizer, meta = checkpoint_manager.load_checkpoint(
        directory, checkpoint_manager.find_last_step(directory), "cpu", load_optimizer=True
    )
    assert optimizer is not None
    tensors = {
        f"{name}/{key}": tensor
        for name, entry in optimizer.items()
        for key, tensor in entry["tensors"].items()
    }
    return {"tensors": {**model, **tensors}, "state": {**meta["run_state"], "training_seconds": 0}}


@contextlib.contextmanager
def ctrl_c_in_step(step: int) -> Iterator[None]:
    original = trainer.Trainer.train_step

    def train_step(self: Any, batch: Any) -> Any:
        if self.state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", train_step)
        yield


# ---- what a run leaves ---------------------------------------------------------------------------


def test_every_stage_learns_and_leaves_a_model_that_loads(base):
    for stage, steps in (("base", 10), ("mid", 10), ("sft", 10)):
        values = losses(base, stage)
        assert len(values) == steps and values[-1] < values[0]
        model, tokenizer, meta = checkpoint_manager.load_model(stage, "cpu", "eval")
        assert meta["step"] == steps and meta["stage"] == stage
        assert tokenizer.get_vocab_size() == model.config.vocab_size == 300
        assert not list(folder(base, stage).glob(".*"))


def test_validation_is_measured_and_falls(base):
    curve = [line["val_bpb"] for line in metrics(base, "base") if "val_bpb" in line]
    assert len(curve) == 3 and curve[-1] < curve[0]  # at 0, 5, 10
    meta = checkpoint_manager.read_meta(folder(base, "base"), 10)
    assert meta["val_bpb"] == curve[-1] == meta["run_state"]["last_val_bpb"]


def test_conversations_of_a_row_can_be_kept_apart(before):
    short = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": word}]}
        for word in WORDS
    ]
    (before / "short.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in short), encoding="utf-8"
    )
    first = []
    for more in ([], ["--block_diagonal"]):
        flags = [
            f"--mixture={before / 'short.jsonl'}",
            "--num_iterations=1",
            "--eval_every=-1",
            "--device_type=cpu",
            "--overwrite",
            *more,
        ]
        assert chat_sft.main(flags) == 0
        first += losses(before, "sft")
    assert len(first) == 2 and first[0] != first[1] and abs(first[0] - first[1]) < 1


def test_the_modern_architecture_trains_through_the_stages(base, before):
    assert base_train.main(base_flags(base, "--arch=modern", "--model_tag=modern")) == 0
    values = [line["loss"] for line in metrics(before, "base", "modern") if "loss" in line]
    assert values[-1] < values[0] - 0.3
    assert chat_sft.main(sft_flags(base, "--source=base", "--model_tag=modern")) == 0
    model, _, _ = checkpoint_manager.load_model("sft", "cpu", "eval", "modern")
    assert model.config.key_offset and model.config.value_embeds


def test_later_stages_inherit_the_settings_of_the_model(base):
    before = checkpoint_manager.read_meta(folder(base, "base"), 10)["user_config"]
    for stage in ("mid", "sft"):
        after = checkpoint_manager.read_meta(folder(base, stage), 10)["user_config"]
        for name in (
            "max_seq_len",
            "device_batch_size",
            "matrix_lr",
            "embedding_lr",
            "grad_clip",
            "optimizer",
        ):
            assert after[name] == before[name], name
    assert (
        checkpoint_manager.read_meta(folder(base, "sft"), 10)["run_state"]["source"]
        == "mid d1 step 10"
    )


# ---- the defaults: a later stage has its own mixture, files and step, whatever the stage before it

SHORT = ["--num_iterations=1", "--eval_every=-1", "--device_type=cpu", "--overwrite"]


def user_config(root: Path, stage: str, tag: str = "d1") -> dict[str, Any]:
    directory = folder(root, stage, tag)
    return checkpoint_manager.read_meta(directory, checkpoint_manager.find_last_step(directory))[
        "user_config"
    ]


def trained_on(root: Path, stage: str) -> int:
    """The conversations that the report's card counts."""
    card = json.loads(
        (
            root / "report" / {"mid": "midtraining.card.json", "sft": "chat-sft.card.json"}[stage]
        ).read_text(encoding="utf-8")
    )
    return card["data"][0]["conversations"]


def test_each_later_stage_trains_on_its_own_default_mixture(base, before):
    rows.write_local_copies(before, 100)
    assert mid_train.main(SHORT) == 0
    assert chat_sft.main(SHORT) == 0
    assert user_config(before, "mid")["mixture"] == MID_MIXTURE
    assert user_config(before, "sft")["mixture"] == SFT_MIXTURE
    assert trained_on(before, "mid") > 280_000 > 10_000 > trained_on(before, "sft") > 600


@pytest.mark.parametrize("mixture", [MID_MIXTURE, SFT_MIXTURE])
def test_every_entry_of_a_default_mixture_brings_examples_that_can_be_rendered(
    base, before, mixture
):
    rows.write_local_copies(before, 500)
    tokenizer = RustBPETokenizer.from_directory(before / "tokenizer")
    for entry in mixture.split(","):
        task = training_conversations(entry, tokenizer=tokenizer, seed=42)
        ids, mask = tokenizer.render_conversation(task[0], max_tokens=4096)
        assert len(task) > 0 and len(ids) == len(mask) and any(mask), entry


def test_conversations_of_ones_own_are_added_to_the_default_mixture(base, before):
    rows.write_local_copies(before, 100)
    sizes = {}
    for script, stage, mixture in ((mid_train, "mid", MID_MIXTURE), (chat_sft, "sft", SFT_MIXTURE)):
        for more in ([], [f"--identity_data={base / 'chats.jsonl'}"]):
            assert script.main([*SHORT, *more]) == 0
            sizes[stage, bool(more)] = trained_on(before, stage)
            assert user_config(before, stage)["mixture"] == mixture
        assert user_config(before, stage)["identity_data"] == str(base / "chats.jsonl")
    assert (
        sizes["mid", True] == sizes["mid", False] + 2 * 60
        and sizes["sft", True] == sizes["sft", False] + 60
    )
    assert (
        chat_sft.main(SHORT) == 0
    )  # the file was midtraining's and finetuning's own: it does not travel
    assert (
        user_config(before, "sft")["identity_data"] is None
        and trained_on(before, "sft") == sizes["sft", False]
    )


def test_what_a_later_stage_takes_over_is_written_down(base, before):
    """A flag of the later stages that is left open (None) is taken over, or belongs to the stage: a
    new one has to be put on a side.
    """
    own = {"model_tag", "from_tag", "model_step", "mixture", "identity_data", "compile"}
    for script in (mid_train, chat_sft, chat_rl):
        left_open = {
            name for name, value in configurator.to_dict(script.Config()).items() if value is None
        }
        assert left_open <= own | {*INHERITED, *TEXT}, script.__name__
    settings = dict.fromkeys(configurator.to_dict(mid_train.Config()), "from the model")
    config = mid_train.Config()
    after = configurator.to_dict(fill(config, inherited(config, settings)))
    assert {name for name, value in after.items() if value == "from the model"} == {
        *INHERITED,
        *TEXT,
    }


def test_the_step_to_start_from_is_not_that_of_the_stage_before(base, before):
    assert mid_train.main([*mid_flags(base), *SHORT, "--model_step=10"]) == 0
    assert chat_sft.main([*sft_flags(base), *SHORT]) == 0
    assert (user_config(before, "mid")["model_step"], user_config(before, "sft")["model_step"]) == (
        10,
        None,
    )


def test_another_text_for_the_later_stage_replaces_the_one_of_the_base_model(base, before):
    documents = [text(index) for index in range(300)]
    write_dataset(before / "base_data" / "words", "words", documents[:-20], documents[-20:])
    assert (
        mid_train.main([*mid_flags(base), *SHORT, "--dataset=words"]) == 0
    )  # the base model had --data_path
    assert (user_config(before, "mid")["dataset"], user_config(before, "mid")["data_path"]) == (
        "words",
        None,
    )
    assert (
        base_train.main(
            [*MODEL, *BATCH, *QUIET, "--num_iterations=1", "--dataset=words", "--model_tag=words"]
        )
        == 0
    )
    path = base / "text.jsonl"
    assert (
        mid_train.main([*mid_flags(base), *SHORT, f"--data_path={path}", "--model_tag=words"]) == 0
    )
    assert (
        user_config(before, "mid", "words")["dataset"],
        user_config(before, "mid", "words")["data_path"],
    ) == (None, str(path))


def test_a_second_personality_beside_the_first_from_one_base_model(base, before, capsys):
    weights = {
        path: path.read_bytes()
        for stage in ("base", "mid", "sft")
        for path in folder(before, stage).glob("model_*.pt")
    }
    me = [
        f"--mixture={base / 'chats.jsonl'}",
        "--num_iterations=1",
        "--eval_every=-1",
        "--device_type=cpu",
        "--model_tag=me",
    ]
    assert "--from_tag" in refused(mid_train.main, me, capsys)  # the base model has another name
    assert mid_train.main([*me, "--from_tag=d1"]) == 0
    assert chat_sft.main([*me]) == 0
    assert chat_sft.main([*me[:-1], "--source=base", "--from_tag=d1", "--model_tag=you"]) == 0
    rl = [
        "--task=arithmetic",
        "--max_new_tokens=4",
        "--num_samples=2",
        "--examples_per_step=1",
        *SHORT,
    ]
    assert chat_rl.main([*rl, "--from_tag=me", "--model_tag=mine"]) == 0
    for stage, tag, source in (
        ("mid", "me", "base d1 step 10"),
        ("sft", "me", "mid me step 1"),
        ("sft", "you", "base d1 step 10"),
        ("rl", "mine", "sft me step 1"),
    ):
        directory = folder(before, stage, tag)
        assert checkpoint_manager.read_meta(directory, 1)["run_state"]["source"] == source
    assert all(path.read_bytes() == content for path, content in weights.items())
    capsys.readouterr()
    assert mid_train.main([*me, "--resume=latest"]) == 0  # a resumed run knows where it started
    assert "me is finished at step 1 of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--from_tag=d9", "--model_tag=me"], "--from_tag=d9 is not in"),
        (["--from_tag=../base"], "--from_tag='../base'"),
    ],
)
def test_a_tag_to_start_from_that_is_not_there_is_named(base, flags, named, capsys):
    assert named in refused(mid_train.main, mid_flags(base, *flags), capsys)


def test_a_refused_stage_leads_to_a_second_model(base, before, capsys):
    message = refused(mid_train.main, mid_flags(base), capsys)
    flags = shlex.split(message[message.index("--from_tag") :])
    assert mid_train.main(mid_flags(base, *flags, "--num_iterations=1")) == 0
    assert folder(before, "mid", "NAME").is_dir()


def test_a_source_that_has_moved_on_is_said(base, before, capsys):
    """The base model is trained further, then anew; a model that was started from an earlier state
    says so, and how to start over.
    """
    assert base_train.main([*base_flags(base, "--resume=latest"), "--num_iterations=12"]) == 0
    capsys.readouterr()
    assert mid_train.main(mid_flags(base, "--resume=latest")) == 0
    out = capsys.readouterr().out
    assert (
        "finished" not in out
        and "started from base d1 step 10, and that model is at step 12 now" in out
    )
    command = shlex.split(out[out.index("`python") + 1 : out.rindex("`")])
    assert command[:3] == ["python", "-m", "scripts.mid_train"] and mid_train.main(command[3:]) == 0
    capsys.readouterr()
    assert mid_train.main(mid_flags(base, "--resume=latest")) == 0
    assert "d1 is finished at step 10 of 10; nothing to do" in capsys.readouterr().out
    assert (
        base_train.main([*base_flags(base, "--overwrite", "--seed=7"), "--num_iterations=12"]) == 0
    )
    capsys.readouterr()
    assert mid_train.main(mid_flags(base, "--resume=latest")) == 0
    assert (
        "started from base d1 step 12, and that model has been trained again"
        in capsys.readouterr().out
    )
    shutil.rmtree(folder(before, "base"))
    assert mid_train.main(mid_flags(base, "--resume=latest", "--model_tag=d1")) == 0
    assert (
        "nothing to do" in capsys.readouterr().out
    )  # nothing to compare with: the model stands by itself


def test_a_run_under_way_whose_source_has_moved_on_says_so_and_is_resumed(base, before, caplog):
    shutil.rmtree(folder(before, "sft"))
    with ctrl_c_in_step(5):
        assert chat_sft.main(sft_flags(base)) == 130
    assert mid_train.main([*mid_flags(base, "--resume=latest"), "--num_iterations=11"]) == 0
    assert chat_sft.main(sft_flags(base, "--resume=latest")) == 0
    assert (
        "d1 is resumed, but it was started from mid d1 step 10, and that model is at step 11 now"
        in caplog.text
    )
    assert losses(before, "sft") == losses(base, "sft")


def test_another_batch_brings_the_rates_that_pretraining_would_give_it(base, before, monkeypatch):
    config = checkpoint_manager.model_config(
        checkpoint_manager.read_meta(folder(base, "base"), 10), "base"
    )
    more = ["--num_iterations=1", "--eval_every=-1", "--overwrite"]
    for floor, batch in ((None, 512), (0.0, 512), (0.0, 2048)):
        if floor is not None:
            monkeypatch.setattr(schedule, "SMALLEST_LR_SCALE", floor)
            monkeypatch.setattr(schedule, "SMALLEST_ADAMW_LR_SCALE", floor)
        assert mid_train.main(mid_flags(base, *more, f"--total_batch_size={batch}")) == 0
        plan = checkpoint_manager.read_meta(folder(before, "mid"), 1)["run_state"]["plan"]
        wanted = schedule.plan_run(config, total_batch_size=batch)
        assert (plan["lr_scale"], plan["adamw_lr_scale"]) == (
            wanted.lr_scale,
            wanted.adamw_lr_scale,
        )


def test_each_stage_reports(base):
    sections = {
        json.loads(path.read_text(encoding="utf-8"))["section"]
        for path in (base / "report").glob("*.card.json")
    }
    assert {"Base model training", "Midtraining", "Chat SFT"} <= sections


def test_base_loss_measures_the_validation_text_as_training_did(base, capsys):
    assert (
        base_loss.main(
            ["--split_tokens=400", "--device_batch_size=3", "--device_type=cpu", "--dtype=float32"]
        )
        == 0
    )
    out = capsys.readouterr().out
    measured = float(out.split("validation bits per byte: ")[1].split()[0])
    assert measured == pytest.approx(
        checkpoint_manager.read_meta(folder(base, "base"), 10)["val_bpb"], abs=1e-3
    )
    assert "train bits per byte: " in out and "The capital of France is|" in out


# ---- stopping and resuming ------------------------------------------------------------------------

STAGES = {
    "base": (base_train.main, base_flags),
    "mid": (mid_train.main, mid_flags),
    "sft": (chat_sft.main, sft_flags),
}


@pytest.fixture
def before(base: Path, home: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the base directory, to be taken back to before some stage."""
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path / "copy"))
    return shutil.copytree(base, tmp_path / "copy")


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_by_ctrl_c_and_resumed_equals_uninterrupted(base, before, stage, capsys):
    shutil.rmtree(folder(before, stage))
    main, flags = STAGES[stage][0], STAGES[stage][1](base, "--resume=latest")
    with ctrl_c_in_step(7):
        assert main(flags) == 130
    printed = capsys.readouterr().out
    assert "yet, starting at step 0" in printed  # --resume=latest is how scripts start a run, too
    assert (
        f"python -m {checkpoint_manager.COMMANDS[stage]} " in printed
        and "--resume=latest" in printed
    )
    assert checkpoint_manager.find_last_step(folder(before, stage)) == 7
    assert main(flags) == 0
    one, two = final(base, stage), final(before, stage)
    assert one["state"] == two["state"] and metrics(base, stage) == metrics(before, stage)
    assert one["tensors"].keys() == two["tensors"].keys()
    assert all(torch.equal(one["tensors"][name], two["tensors"][name]) for name in one["tensors"])
    capsys.readouterr()
    assert (
        main(flags) == 0
        and "is finished at step 10 of 10; nothing to do" in capsys.readouterr().out
    )


def test_another_number_of_threads_is_announced(base, before, caplog):
    threads = torch.get_num_threads()
    assert checkpoint_manager.read_meta(folder(base, "base"), 10)["run_state"]["threads"] == threads
    flags = base_flags(base, "--resume=latest")
    assert base_train.main([*flags, "--num_iterations=11"]) == 0
    assert "threads" not in caplog.text
    torch.set_num_threads(threads + 1)
    try:
        assert base_train.main([*flags, "--num_iterations=12"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert f"OMP_NUM_THREADS={threads} keeps them" in caplog.text


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_validation_of_conversations_does_not_depend_on_the_rows_of_a_pass(
    base, before, stage, monkeypatch
):
    heights: set[int] = set()
    name = {"mid": "evaluate_bpb", "sft": "evaluate_loss"}[stage]
    measure = getattr(hooks, name)

    def watch(model: Any, batches: Any, *rest: Any) -> float:
        watched = ((heights.add(len(batch.inputs)), batch)[1] for batch in batches)
        return measure(model, watched, *rest)

    monkeypatch.setattr(hooks, name, watch)
    main, flags = STAGES[stage]
    found = {}
    few = ["--eval_tokens=150"] if stage == "mid" else []
    for size in (1, 4):
        options = [
            *few,
            "--dtype=float32",  # the step between the two validations is rounded less
            f"--device_batch_size={size}",
            "--num_iterations=1",
            f"--model_tag=b{size}",
        ]
        assert main(flags(base, "--from_tag=d1", *options)) == 0
        lines = metrics(before, stage, f"b{size}")
        found[size] = [
            line[key] for line in lines for key in ("val_bpb", "val_loss") if key in line
        ]
        assert max(heights) <= size
    assert len(found[1]) == 2 and found[1] == pytest.approx(found[4], rel=1e-5)


def test_a_killed_run_continues_its_curve_at_wandb(base, before, monkeypatch):
    class Curve:
        step = 0

        def __init__(self, **flags: Any) -> None:
            self.flags, self.id, self.steps, self.code = flags, flags["id"], [], None
            curves.append(self)

        def log(self, values: dict[str, Any], step: int) -> None:
            self.steps.append(step)

        def finish(self, exit_code: int = 0) -> None:
            self.code = exit_code

    def train_step(self: Any, batch: Any) -> Any:
        if self.state.step == 7 and len(curves) == 1:
            raise RuntimeError("killed")
        return original(self, batch)

    curves: list[Curve] = []
    original = trainer.Trainer.train_step
    monkeypatch.setattr(trainer.Trainer, "train_step", train_step)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Curve))
    flags = base_flags(base, "--run=first", "--save_every=4", "--model_tag=w", "--resume=latest")
    with pytest.raises(RuntimeError, match="killed"):
        base_train.main(flags)
    assert base_train.main(flags) == 0
    first, second = curves
    assert first.id == second.id and second.flags["resume"] == "allow"
    assert (first.code, second.code) == (1, 0)
    assert sorted({*first.steps}) == list(range(8)) and sorted({*second.steps}) == [8, 9, 10]


def test_without_a_key_nothing_begins(base, before, monkeypatch, capsys):
    class NoKey(Exception):
        pass

    def init(**flags: Any) -> None:
        raise NoKey("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=NoKey))
    message = refused(base_train.main, base_flags(base, "--run=first", "--model_tag=w"), capsys)
    assert "no API key" in message and "wandb login" in message
    assert not list(folder(base, "base").with_name("w").glob("*"))


def test_the_command_that_is_printed_goes_on_with_the_run(base, before, capsys):
    shutil.rmtree(folder(before, "base"))
    with ctrl_c_in_step(3):
        assert base_train.main(base_flags(base, "--seed=7")) == 130
    command = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if "python -m scripts.base_train" in line
    )
    assert base_train.main(shlex.split(command)[3:]) == 0
    assert checkpoint_manager.find_last_step(folder(before, "base")) == 10


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_before_it_wrote_its_card_writes_it_when_it_is_resumed(
    base, before, stage, capsys
):
    """What is left then: the last checkpoint, after its evaluation."""
    main, flags = STAGES[stage][0], STAGES[stage][1](base, "--resume=latest")
    name = {"base": "base-model-training", "mid": "midtraining", "sft": "chat-sft"}[stage]
    card = before / "report" / f"{name}.card.json"
    written = json.loads(card.read_text(encoding="utf-8"))["data"]
    card.unlink()
    (folder(before, stage) / REPORTED).unlink()
    model = folder(before, stage) / checkpoint_manager.model_name(10)
    age = model.stat().st_mtime_ns
    assert main(flags) == 0 and "nothing to do" not in capsys.readouterr().out
    again = json.loads(card.read_text(encoding="utf-8"))["data"]
    for data in (again, written):
        data[0] = {
            name: value
            for name, value in data[0].items()
            if name not in ("training minutes", "peak memory MiB")
        }
    assert again[0] == written[0]
    assert (
        model.stat().st_mtime_ns == age
        and main(flags) == 0
        and "nothing to do" in capsys.readouterr().out
    )
    with ctrl_c_in_step(3):
        assert main([*STAGES[stage][1](base), "--overwrite"]) == 130
    assert not (folder(before, stage) / REPORTED).exists(), (
        "the card of the run before is not this one's"
    )


def test_a_finished_run_can_be_made_longer(base, before):
    assert base_train.main([*base_flags(base, "--resume=latest"), "--num_iterations=12"]) == 0
    assert checkpoint_manager.find_last_step(folder(before, "base")) == 12
    assert losses(before, "base")[:10] == losses(base, "base") and len(losses(before, "base")) == 12


def test_the_device_batch_size_may_change_on_the_way(base, before):
    shutil.rmtree(folder(before, "base"))
    with ctrl_c_in_step(5):
        base_train.main(base_flags(base))
    assert base_train.main([*base_flags(base, "--resume=latest"), "--device_batch_size=2"]) == 0
    assert losses(before, "base") == pytest.approx(losses(base, "base"), abs=1e-5)


def test_the_rows_of_a_pass_are_chosen_by_the_memory_there_is(base, before, capsys, monkeypatch):
    config = checkpoint_manager.model_config(
        checkpoint_manager.read_meta(folder(base, "base"), 10), "base"
    )
    needed = {
        rows: flops.memory_estimate(config, rows, dtype="float32", device_type="cpu")["total"]
        / flops.USABLE_CPU
        for rows in (1, 3)
    }
    monkeypatch.setattr(batch_size, "free_memory", lambda device: int(needed[3]) + 1)
    flags = base_flags(base, "--device_batch_size=auto", "--overwrite")
    assert (
        base_train.main(flags) == 0
        and "base: --device_batch_size=2, so 4 passes a step" in capsys.readouterr().out
    )
    assert losses(before, "base") == pytest.approx(losses(base, "base"), abs=1e-5)
    assert (
        checkpoint_manager.read_meta(folder(before, "base"), 10)["user_config"]["device_batch_size"]
        == 2
    )
    for main, more in ((mid_train.main, mid_flags(base)), (chat_sft.main, sft_flags(base))):
        assert (
            main(
                [
                    *more,
                    "--device_batch_size=auto",
                    "--num_iterations=1",
                    "--eval_every=-1",
                    "--overwrite",
                ]
            )
            == 0
        )
        assert "--device_batch_size=" in capsys.readouterr().out
    monkeypatch.setattr(batch_size, "free_memory", lambda device: int(needed[1]) - 10)
    message = refused(base_train.main, flags, capsys)
    assert all(
        told in message
        for told in ("--device_batch_size=auto: one row takes", "--grad_checkpoint=1", "--depth")
    ), message


def test_a_resumed_run_keeps_its_own_tokenizer(base, before):
    shutil.rmtree(folder(before, "base"))
    with ctrl_c_in_step(5):
        base_train.main(base_flags(base))
    RustBPETokenizer.train_from_iterator(iter(["another text altogether"]), 280).save(
        before / "tokenizer"
    )
    assert base_train.main(base_flags(base, "--resume=latest")) == 0
    assert losses(before, "base") == losses(base, "base")


def test_overwriting_starts_over(base, before):
    assert base_train.main([*base_flags(base, "--overwrite"), "--num_iterations=4"]) == 0
    assert sorted(checkpoint_manager.steps(folder(before, "base"))) == [4]
    assert losses(before, "base") != losses(base, "base")[:4]  # its rates fall sooner
    assert len(losses(before, "base")) == 4


# ---- what is refused, in one sentence, with nothing lost -----------------------------------------


def refused(main: Any, flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(flags) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def test_an_existing_run_is_not_written_over(base, capsys):
    for stage, (main, flags) in STAGES.items():
        earlier = sorted(
            (path.name, path.stat().st_mtime_ns) for path in folder(base, stage).iterdir()
        )
        message = refused(main, flags(base), capsys)
        assert (
            "--resume=latest" in message and "--overwrite" in message and "--model_tag" in message
        )
        assert (
            sorted((path.name, path.stat().st_mtime_ns) for path in folder(base, stage).iterdir())
            == earlier
        )


def test_a_changed_flag_that_alters_the_maths_is_refused_by_name(base, capsys):
    message = refused(
        base_train.main,
        base_flags(base, "--resume=latest", "--matrix_lr=0.5", "--warmup_ratio=0.3"),
        capsys,
    )
    assert (
        "--matrix_lr=0.5 (was 0.02)" in message
        and "--warmup_ratio=0.3 (was 0.05)" in message
        and "--num_iterations" not in message
    )
    message = refused(
        chat_sft.main, sft_flags(base, "--resume=latest", "--target_examples_per_step=4"), capsys
    )
    assert "--target_examples_per_step=4 (was 8)" in message


def test_a_run_does_not_go_on_with_another_text(base, before, capsys):
    path = base / "text.jsonl"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace("cat", "cow"), encoding="utf-8")
        message = refused(
            base_train.main, base_flags(base, "--resume=latest", "--num_iterations=12"), capsys
        )
    finally:
        path.write_text(text, encoding="utf-8")
    assert "other shards" in message and "--overwrite" in message


@pytest.mark.parametrize("stage", ["mid", "sft"])
@pytest.mark.parametrize("change", ["a word", "fewer"])
def test_a_run_does_not_continue_with_other_conversations(base, before, stage, change, capsys):
    path, (main, flags) = base / "chats.jsonl", STAGES[stage]
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = lines[:-5]
    if change == "a word":
        changed = [*lines[:30], lines[30].replace("say", "tell"), *lines[31:]]
    try:
        path.write_text("".join(changed), encoding="utf-8")
        message = refused(main, flags(base, "--resume=latest", "--num_iterations=12"), capsys)
    finally:
        path.write_text("".join(lines), encoding="utf-8")
    assert "chats has other conversations" in message and "--overwrite" in message
    assert "arithmetic" not in message.lower()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--total_batch_size=100"], ["--total_batch_size=100", "--max_seq_len=32"]),
        (["--eval_tokens=0"], ["--eval_tokens=0"]),
        (["--keep_last=-1"], ["--keep_last=-1", "at least 1"]),
        (["--keep_last=0", "--dry_run"], ["--keep_last=0"]),
        (["--matrix_lr=-0.1"], ["--matrix_lr=-0.1"]),
        (["--matrix_lr=-0.1", "--dry_run"], ["--matrix_lr=-0.1"]),
        (["--device_batch_size=3"], ["--total_batch_size=256", "--device_batch_size=3"]),
        (["--n_embd=40"], ["--n_embd=40", "--head_dim=16"]),
        (["--n_kv_head=3"], ["--n_kv_head"]),
        (["--optimizer=lion"], ["--optimizer=lion", "muon, adamw, sgd"]),
        (["--mixture=arithmetic:10"], ["--mixture", "--mixture_ratio"]),
        (["--num_iterations=0"], ["--num_iterations"]),
        (["--model_tag=../../etc"], ["--model_tag"]),
        (["--resume=last"], ["--resume=last"]),
        (["--resume=latest", "--overwrite"], ["--resume", "--overwrite"]),
        (["--data_path=/nowhere/at/all.txt"], ["/nowhere/at/all.txt"]),
        (["--dataset=nope", "--data_path="], ["--dataset=nope", "python -m zangchat.dataset"]),
        (["--mixture=nope:1", "--mixture_ratio=0.5"], ["nope"]),
        (["--device_type=tpu"], ["--device_type=tpu"]),
        (["--dtype=float12"], ["--dtype=float12"]),
        (["--dtype=half", "--dry_run"], ["--dtype=half"]),
        (["--device_type=tpu", "--dry_run"], ["--device_type=tpu"]),
        (["--target_param_data_ratio=1e300", "--num_iterations=-1"], ["--target_param_data_ratio"]),
        (["--target_flops=1e300", "--num_iterations=-1", "--dry_run"], ["--target_flops=1e+300"]),
        (["--resume=latest", "--overwrite", "--dry_run"], ["--resume", "--overwrite"]),
        (["--model_tag=a/b", "--dry_run"], ["--model_tag='a/b'"]),
        (["--fsdp", "--fp8", "--dry_run"], ["--fp8 and --fsdp"]),
        (["--warmdown_ratio=9", "--dry_run"], ["--warmdown_ratio=9"]),
        (["--resume=\u00b2", "--dry_run"], ["--resume=\u00b2"]),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_made(base, flags, names, capsys):
    tag = "d1" if "--resume=latest" in flags else "new"
    message = refused(base_train.main, base_flags(base, f"--model_tag={tag}", *flags), capsys)
    assert all(name in message for name in names), message
    assert not folder(base, "base", "new").exists() or not sorted(
        checkpoint_manager.steps(folder(base, "base", "new"))
    )


def test_a_batch_below_one_is_named_by_later_stages(base, capsys):
    message = refused(mid_train.main, mid_flags(base, "--total_batch_size=-5"), capsys)
    assert "--total_batch_size=-5" in message


def test_what_is_missing_names_the_command_that_makes_it(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZANGCHAT_BASE_DIR", str(tmp_path))
    message = refused(base_train.main, base_flags(base), capsys)
    path = shlex.quote(f"--data_path={base / 'text.jsonl'}")
    assert f"run `python -m scripts.tok_train {path}`" in message
    assert "python -m scripts.base_train" in refused(mid_train.main, mid_flags(base), capsys)
    assert "python -m scripts.mid_train" in refused(chat_sft.main, sft_flags(base), capsys)
    assert "python -m scripts.base_train" in refused(base_loss.main, ["--device_type=cpu"], capsys)
    assert "--device_batch_size=0" in refused(
        base_loss.main, ["--device_batch_size=0", "--device_type=cpu"], capsys
    )


def test_unknown_tags_steps_and_tasks_are_named(base, capsys):
    assert "choose one of d1" in refused(mid_train.main, mid_flags(base, "--model_tag=d7"), capsys)
    assert "no step 3" in refused(
        mid_train.main, mid_flags(base, "--model_step=3", "--overwrite"), capsys
    )
    assert "no step 3" in refused(base_train.main, base_flags(base, "--resume=3"), capsys)
    assert "unknown task 'nope'" in refused(
        chat_sft.main, sft_flags(base, "--overwrite", "--mixture=nope:1"), capsys
    )
    assert "--eval_steps=0" in refused(
        chat_sft.main, sft_flags(base, "--overwrite", "--eval_steps=0"), capsys
    )
    assert "--identity_data=me.txt" in refused(
        chat_sft.main, sft_flags(base, "--overwrite", "--identity_data=me.txt"), capsys
    )
    assert "max_seq_len=64" in refused(
        chat_sft.main, sft_flags(base, "--overwrite", "--max_seq_len=64"), capsys
    )
    assert checkpoint_manager.find_last_step(folder(base, "mid")) == 10  # --overwrite lost nothing


def test_a_run_none_of_whose_checkpoints_is_intact_does_not_start_over_by_itself(
    before, base, capsys
):
    for path in folder(before, "base").glob("model_*.pt"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    message = refused(base_train.main, base_flags(base, "--resume=latest"), capsys)
    assert "intact" in message and "--overwrite" in message


def test_two_processes_do_not_train_one_tag(base, capsys, monkeypatch):
    monkeypatch.setattr(start, "LOCK_WAIT", 0.05)
    with folder_lock(folder(base, "base")):
        message = refused(base_train.main, base_flags(base, "--resume=latest"), capsys)
        assert "another process is training" in message and "--model_tag" in message
    assert (
        base_train.main(base_flags(base, "--resume=latest")) == 0
    )  # and nobody holds it afterwards


def test_a_checkpoint_with_another_vocabulary_is_named(before, base, capsys):
    RustBPETokenizer.train_from_iterator(iter(["another text altogether"]), 280).save(
        folder(before, "base")
    )
    message = refused(
        base_train.main, base_flags(base, "--resume=latest", "--num_iterations=12"), capsys
    )
    assert "tokenizer.json is not the one that step 10 was trained with" in message
    RustBPETokenizer.train_from_iterator((text(index) for index in range(90)), 310).save(
        folder(before, "base")
    )
    assert "has 310 tokens, the model of step 10 only 300" in refused(
        mid_train.main, mid_flags(base, "--overwrite"), capsys
    )


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GiB)."),
    ],
)
def test_too_little_memory_names_the_flags(base, capsys, monkeypatch, error):
    def step(self: Any, batch: Any) -> Any:
        raise error

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    message = refused(base_train.main, base_flags(base, "--model_tag=big"), capsys)
    assert all(
        flag in message
        for flag in ("--device_batch_size=4", "=auto", "--grad_checkpoint=1", "--depth")
    ), message


def test_a_disk_that_will_be_full_is_announced_with_numbers(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 0, 5 * 10**9)
    )
    warn_if_disk_is_small(tmp_path / "not yet" / "d9", 2 * 10**9, keep_last=1)
    assert not caplog.text
    warn_if_disk_is_small(tmp_path / "not yet" / "d9", 2 * 10**9, keep_last=2)
    assert (
        "5.0 GB free" in caplog.text and "3 checkpoints of 2.00 GB take 6.0 GB more" in caplog.text
    )


def test_the_size_of_a_checkpoint_is_foreseen(base):
    meta = checkpoint_manager.read_meta(folder(base, "base"), 10)
    written = sum(entry["size"] for entry in meta["files"].values())
    foreseen = checkpoint_bytes(checkpoint_manager.model_config(meta, "base"), "muon", "float32")
    assert (
        foreseen == pytest.approx(written, rel=0.2) and foreseen < written
    )  # so small a file is in part headers
    assert {"Python", "torch", "numpy"} <= meta["software"].keys()


# ---- the smallest data there is ------------------------------------------------------------------


def test_one_line_of_prompt_and_completion_trains_a_base_model_and_a_chat_model(
    before, caplog, capsys
):
    line = before / "data.jsonl"
    line.write_text('{"prompt": "the cat sat", "completion": " on a mat"}\n', encoding="utf-8")
    assert (
        base_train.main(
            base_flags(before, f"--data_path={line}", "--model_tag=lone", "--num_iterations=2")
        )
        == 0
    )
    assert (
        caplog.messages.count(f"{line} holds one document: training and validation both read it")
        == 1
    )
    assert "base step 2: validation" in capsys.readouterr().out
    caplog.clear()
    flags = [
        f"--mixture={line}:1",
        "--mixture_ratio=0.5",
        "--from_tag=lone",
        "--model_tag=lone",
        "--device_type=cpu",
    ]
    assert mid_train.main(flags) == 0  # its text is the base model's
    assert (
        chat_sft.main(
            [
                f"--mixture={line}:2",
                "--model_tag=lone",
                "--device_type=cpu",
                "--target_examples_per_step=1",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "mid: 1 conversations" in out and "sft: 2 conversations" in out


# ---- looking on ----------------------------------------------------------------------------------


def test_samples_and_core_are_reported_where_their_data_is(base, before, capsys):
    """A bundle with one task of three questions; without one, training continues and says so."""
    flags = [
        *MODEL,
        *BATCH,
        f"--data_path={base / 'text.jsonl'}",
        "--num_iterations=2",
        "--eval_every=-1",
        "--sample_every=2",
    ]
    assert base_train.main([*flags, "--model_tag=without", "--core_metric_every=2"]) == 0
    out = capsys.readouterr().out
    assert "training goes without CORE evaluations" in out and "The capital of France is|" in out
    bundle = before / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    icl_task = {
        "label": "lambada_openai",
        "dataset_uri": "toy.jsonl",
        "num_fewshot": [0],
        "icl_task_type": "language_modeling",
    }
    (bundle / "core.yaml").write_text(json.dumps({"icl_tasks": [icl_task]}), encoding="utf-8")
    (bundle / "eval_meta_data.csv").write_text(
        "Eval Task,Random baseline\nlambada_openai,0\n", encoding="utf-8"
    )
    items = [{"context": f"the {word}", "continuation": " sat"} for word in WORDS[:3]]
    (bundle / "eval_data" / "toy.jsonl").write_text(
        "".join(json.dumps(item) + "\n" for item in items), encoding="utf-8"
    )
    assert base_train.main([*flags, "--model_tag=with", "--core_metric_every=2"]) == 0
    lines = [
        json.loads(line)
        for line in (folder(before, "base", "with") / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    (score,) = [
        value
        for line in lines
        for name, value in line.items()
        if name.startswith("CORE (1/22, no hellaswag_zeroshot, ")
    ]
    assert 0 <= score <= 1


# ---- the plan ------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_without_torch_and_without_a_trace(tmp_path):
    program = "import sys; from scripts import base_train; code = base_train.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    environment = {**os.environ, "ZANGCHAT_BASE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program, "--dry_run", "--depth=20", "--device_batch_size=32"]
    out = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    for expected in (
        "20 layers, width 1280",
        "560,988,160",
        "1,048,576 tokens",
        "vocabulary 65,536",
        "GiB with --device_batch_size=32",
        "141 GB: 32 rows x 16 passes",
    ):
        assert expected in out, out
    out = subprocess.run(
        [*command[:-1], "--device_batch_size=auto"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (
        "in passes of what fits" in out and " 24 GB: " in out and "with --grad_checkpoint=1" in out
    )
    assert not list(tmp_path.iterdir())


def test_a_batch_is_cut_into_whole_rows_equal_shares_and_equal_passes():
    check_batch(256, 32, 4, 1)
    check_batch(256, 32, 64, 2)  # fewer rows than a pass may hold
    for arguments, flag in (
        ((100, 32, 4, 1), "--max_seq_len=32"),
        ((96, 32, 4, 2), "2 ranks"),
        ((192, 32, 4, 1), "--device_batch_size=4"),
    ):
        with pytest.raises(UserError, match=flag):
            check_batch(*arguments)
    with pytest.raises(
        UserError, match="12 rows .* 5 ranks .* keeps its batch: start 1 or 2 or 3 or 4 ranks$"
    ):
        check_batch(384, 32, 4, 5, resume="latest")

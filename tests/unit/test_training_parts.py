"""The parts beside the training loop, each by itself: run state, metrics, saves, signals, loss
scale, settings.
"""

import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import base_train, chat_rl, mid_train
from tests.unit.test_trainer import evaluating_stage, make_trainer, outcome
from zangchat import checkpoint_files, checkpoint_manager, configurator
from zangchat.config import RunState, TrainPlan
from zangchat.errors import UserError
from zangchat.runtime import collectives
from zangchat.runtime.files import atomic_write
from zangchat.training import saves, signals
from zangchat.training.flags import RunConfig
from zangchat.training.metrics import MetricsFile, last_step
from zangchat.training.resolve import REPORTED, is_finished
from zangchat.training.saves import SaveSchedule
from zangchat.training.settings import DEFAULTS, fill, inherited, resumed
from zangchat.training.signals import StopSignals
from zangchat.training.start import choose_tags, find_source
from zangchat.training.step import PATIENCE, LossScale, strictly_deterministic

# ---- the run state, and that of checkpoints with `extra` -----------------------------------------

PLAN = {
    "tokens": 2560,
    "total_batch_size": 256,
    "num_iterations": 10,
    "lr_scale": 1.0,
    "adamw_lr_scale": 2.449489742783178,
    "weight_decay_scale": 0.05629165124598851,
}
OLD_STATE: dict[str, Any] = {
    "step": 5,
    "tokens": 1280,
    "supervised_tokens": 1280,
    "num_iterations": 10,
    "smooth_loss": 2.2713,
    "last_val_bpb": 2.1,
    "min_val_bpb": 2.0,
    "skipped_steps": 1,
    "training_seconds": 0.25,
    "cursor": {"step": 5, "reward": 0.125, "sample_tokens": 5.5, "solved": 0.25},
    "extra": {
        "facts": {
            "source": "sft d1 step 9",
            "source_sha256": "ab12",
            "dataset": "cd34",
            "plan": PLAN,
        },
        "hooks_done": 5,
        "metrics_lines": 7,
        "loss_scale": 32768.0,
        "steps_at_scale": 4,
        "skips_in_a_row": 2,
        "val_loss": None,
        "core": {"CORE (1/22)": 0.25},
        "held_out": {"first pass@1": 0.0, "last pass@1": 0.5},
    },
}


def test_the_run_state_of_an_older_checkpoint_is_understood():
    assert RunState.from_dict(OLD_STATE) == RunState(
        step=5,
        tokens=1280,
        supervised_tokens=1280,
        num_iterations=10,
        smooth_loss=2.2713,
        last_val_bpb=2.1,
        min_val_bpb=2.0,
        skipped_steps=1,
        skips_in_a_row=2,
        loss_scale=32768.0,
        steps_at_scale=4,
        training_seconds=0.25,
        cursor={"step": 5},
        batch_metrics={"reward": 0.125, "sample_tokens": 5.5, "solved": 0.25},
        hooks_done=5,
        metrics_lines=7,
        results={
            "core": {"CORE (1/22)": 0.25},
            "held_out": {"first pass@1": 0.0, "last pass@1": 0.5},
            "validation": {"validation loss": None},
        },
        plan=TrainPlan(**PLAN),
        source="sft d1 step 9",
        source_sha256="ab12",
        dataset="cd34",
    )
    assert RunState.from_dict({"step": 3, "extra": {}}) == RunState(step=3)


def test_a_run_state_comes_back_from_json():
    state = RunState.from_dict(OLD_STATE)
    assert RunState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    assert RunState.from_dict({**state.to_dict(), "from a later version": 1}) == state
    assert RunState.from_dict(json.loads(json.dumps(RunState().to_dict()))) == RunState()


@pytest.mark.parametrize("hooks_done", [True, False])
def test_a_run_saved_with_extra_continues_bit_for_bit(tmp_path, hooks_done):
    """The meta of step 8, an evaluation, as this project wrote it before its keys became fields."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    uninterrupted = make_trainer(whole, stage=evaluating_stage(), save_every=4)
    uninterrupted.fit()
    make_trainer(stopped, num_iterations=8, stage=evaluating_stage(), save_every=4).fit()
    meta = checkpoint_manager.read_meta(stopped, 8)
    new = meta["run_state"]
    same = (
        "step",
        "tokens",
        "supervised_tokens",
        "num_iterations",
        "smooth_loss",
        "skipped_steps",
        "training_seconds",
        "cursor",
    )
    before_evaluation = json.loads((whole / "meta_000004.json").read_text())["run_state"]
    measured = new if hooks_done else before_evaluation
    meta["run_state"] = {
        **{name: new[name] for name in same},
        "last_val_bpb": measured["last_val_bpb"],
        "min_val_bpb": measured["min_val_bpb"],
        "extra": {"hooks_done": 8 if hooks_done else 7, "metrics_lines": 11 if hooks_done else 10},
    }
    assert new["metrics_lines"] == 11  # 8 steps, evaluations at 0, 4 and 8
    atomic_write(stopped / checkpoint_files.meta_name(8), json.dumps(meta))
    resumed_run = make_trainer(stopped, stage=evaluating_stage(), save_every=4, resume=8)
    resumed_run.fit()
    one, two = outcome(uninterrupted, whole), outcome(resumed_run, stopped)
    assert one["state"] == two["state"] and one["metrics"] == two["metrics"]
    for part in ("weights", "optimizer"):
        assert str(one[part]) == str(two[part])
    assert all((one["weights"][name] == two["weights"][name]).all() for name in one["weights"])


# ---- metrics -------------------------------------------------------------------------------------


def test_lines_from_before_the_file_is_open_come_first(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.write({"step": 0})
    with metrics.open(known_lines=1):
        metrics.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_opening_cuts_the_file_back_to_the_lines_of_the_state(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    with MetricsFile(path).open(known_lines=1):
        pass
    assert path.read_text() == '{"step": 1}\n' and not caplog.text
    with MetricsFile(path).open(known_lines=3):
        pass
    assert "lacks 2 lines" in caplog.text


@pytest.mark.parametrize(
    "end",
    [b"", b'{"step": 8', b"\n", b"\0\0\0\n", b'\xff{"step": 8}\n', b"[]\n{}\n"],
    ids=["whole", "half", "blank", "zeros", "not text", "other JSON"],
)
def test_the_last_step_in_the_file(tmp_path, end):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == -1
    path.write_bytes(b'{"step": 6}\n{"step": 7}\n' + end)
    assert last_step(path) == 7
    with MetricsFile(path).open(known_lines=2):
        pass
    assert path.read_bytes() == b'{"step": 6}\n{"step": 7}\n'


def test_without_a_path_nothing_is_written(tmp_path):
    metrics = MetricsFile(None)
    with metrics.open(known_lines=5):
        metrics.write({"step": 1})
    assert not metrics._unwritten and not list(tmp_path.iterdir())


def test_a_trainer_logs_before_it_trains(tmp_path):
    trainer = make_trainer(tmp_path, num_iterations=2)
    trainer.log({"note": 1.0, "broken": float("nan")})
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 0, "note": 1.0, "broken": None}
    assert [line["step"] for line in lines] == [0, 1, 2] and trainer.state.metrics_lines == 3


# ---- saves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "due"), [(4, [4, 8, 10]), (-1, [10]), (0, [10])])
def test_a_save_is_due_at_its_interval_and_at_the_end(tmp_path, every, due):
    schedule = SaveSchedule(tmp_path, RunConfig(save_every=every))
    assert [step for step in range(11) if schedule.is_due(step, last=step == 10)] == due
    schedule.last_step = 10
    assert not schedule.is_due(10, last=True)  # it is saved already
    assert not SaveSchedule(None, RunConfig(save_every=every)).is_due(10, last=True)


def test_the_clock_asks_for_a_save_only_without_an_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(saves, "SAVE_SECONDS", 0.0)
    for every, is_due in ((-1, True), (4, False), (0, False)):
        schedule = SaveSchedule(tmp_path, RunConfig(save_every=every))
        assert schedule.clock_is_due
        schedule.requested = True
        assert schedule.is_due(3, last=False) is is_due


# ---- signals -------------------------------------------------------------------------------------


def test_the_first_signal_is_noted_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_a_print_that_waits_for_its_reader_is_noted(monkeypatch):
    class Waiting(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            if not stop.received:
                os.kill(os.getpid(), signal.SIGTERM)
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Waiting())))
    with StopSignals() as stop:
        print("base 1/10 | loss 5", flush=True)
    assert stop.received == signal.SIGTERM


def test_a_relayed_ctrl_c_is_not_a_second_one(monkeypatch):
    with StopSignals(world_size=2):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's
        later = time.monotonic() + 2 * signals.RELAY_SECONDS
        monkeypatch.setattr(time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_no_handler_is_set():
    received = []

    def train() -> None:
        with StopSignals() as stop:
            received.append(stop.received)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert received == [0]


# ---- loss scale ----------------------------------------------------------------------------------


def test_the_loss_scale_halves_on_an_overflow_and_doubles_with_patience():
    state = RunState()
    scale = LossScale(state, torch.float16)
    scale.after_update()
    assert scale.value == 2.0**16 and scale.after_overflow() and scale.value == 2.0**15
    assert state.steps_at_scale == 0
    for _ in range(PATIENCE):
        assert scale.value == 2.0**15
        scale.after_update()
    assert scale.value == 2.0**16 and state.steps_at_scale == 0
    again = LossScale(replace(state), torch.float16)  # a resumed run keeps it
    assert again.value == 2.0**16


def test_without_fp16_there_is_no_loss_scale():
    state = RunState()
    scale = LossScale(state, torch.float32)
    scale.after_update()
    assert scale.value == 1.0 and not scale.after_overflow() and state == RunState()


def test_a_loss_scale_of_one_is_not_the_cause_of_an_overflow():
    scale = LossScale(RunState(loss_scale=2.0), torch.float16)
    assert scale.after_overflow() and not scale.after_overflow() and scale.value == 1.0


# ---- settings ------------------------------------------------------------------------------------


def test_an_open_flag_is_filled_from_the_first_source_that_has_it():
    config = mid_train.Config(matrix_lr=0.5)
    filled = fill(
        config,
        {"matrix_lr": 1.0, "grad_clip": None, "optimizer": "sgd", "model_tag": "x"},
        {"grad_clip": 2.0},
        DEFAULTS,
    )
    assert (filled.matrix_lr, filled.grad_clip, filled.optimizer, filled.embedding_lr) == (
        0.5,
        2.0,
        "sgd",
        0.3,
    )
    assert filled.device_type == "" and filled.mixture is None and config.grad_clip is None


def test_the_text_is_inherited_as_one_choice():
    settings = {
        "dataset": "words",
        "data_path": None,
        "mixture": "theirs",
        "model_step": 3,
        "grad_clip": 0.5,
    }
    assert inherited(mid_train.Config(), settings) == {
        "dataset": "words",
        "data_path": None,
        "grad_clip": 0.5,
    }
    assert inherited(mid_train.Config(data_path="x.txt"), settings) == {"grad_clip": 0.5}
    assert fill(chat_rl.Config(), inherited(chat_rl.Config(), settings)).grad_clip == 0.5


def test_a_resumed_run_has_its_old_settings_and_new_free_flags():
    saved = configurator.to_dict(
        base_train.Config(data_path="a.txt", matrix_lr=0.1, dtype="float32")
    )
    again = resumed(base_train.Config(matrix_lr=0.1, num_iterations=7, keep_last=5), saved)
    assert (again.data_path, again.dtype, again.num_iterations, again.keep_last) == (
        "a.txt",
        "float32",
        7,
        5,
    )
    del saved["fp8"]  # a flag that is newer than the checkpoint
    assert resumed(base_train.Config(matrix_lr=0.1), saved) == replace(base_train.Config(), **saved)
    with pytest.raises(
        UserError,
        match=r"cannot change --dataset=b \(was not given\), --matrix_lr=0.02 \(was 0.1\).*",
    ) as refusal:
        resumed(base_train.Config(dataset="b"), saved)
    assert "give --matrix_lr=0.1 and leave out --dataset, or start over with --overwrite" in str(
        refusal.value
    )


def test_all_ranks_start_from_the_model_that_rank_0_has_chosen(base_dir, monkeypatch):
    for step in (3, 4):  # and d3, of which rank 0 has seen nothing yet
        for tag in ("d2", "d3"):
            folder = base_dir / "base_checkpoints" / tag
            meta = {"model_config": {}, "user_config": {}}
            checkpoint_manager.save_checkpoint(folder, step, {"w": torch.ones(1)}, None, meta)
    monkeypatch.setattr(collectives, "world", lambda: (1, 2))
    monkeypatch.setattr(collectives, "from_rank_0", lambda own: ("d2", None))
    config = choose_tags(mid_train.Config(), "base")
    assert config.model_tag == "d2"
    monkeypatch.setattr(collectives, "from_rank_0", lambda own: (3, None))
    assert find_source("mid", config, "base").step == 3


def test_all_ranks_agree_whether_a_run_is_finished(tmp_path, monkeypatch):
    (tmp_path / REPORTED).write_text("5")
    state = RunState(step=5, num_iterations=5, hooks_done=5)
    for agreed in (True, False):
        monkeypatch.setattr(collectives, "from_rank_0", lambda own, agreed=agreed: agreed)
        assert is_finished("mid", mid_train.Config(), tmp_path, state, "") is agreed


def test_a_checkpoint_folder_of_another_run_is_not_mixed_up(tmp_path: Path):
    make_trainer(tmp_path, num_iterations=2).fit()
    with pytest.raises(ValueError, match="another run"):
        SaveSchedule(tmp_path).prepare(0)
    SaveSchedule(tmp_path, RunConfig(overwrite=True)).prepare(0)
    assert not list(checkpoint_manager.steps(tmp_path))


def test_passes_are_strict_where_deterministic_algorithms_are_wanted():
    """Attention's backward on CUDA takes "warn only" for leave to add in any order."""
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled,
        torch.is_deterministic_algorithms_warn_only_enabled,
    )
    with strictly_deterministic():
        assert not strict()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with strictly_deterministic():
            assert strict() and not warn_only()
        assert strict() and warn_only()
    finally:
        torch.use_deterministic_algorithms(False)

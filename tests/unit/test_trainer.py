"""The training loop: what a step computes, what may not change it, and that stopping and going on
changes nothing.

Models are tiny, batches a function of the step number, as in the real loader.
"""

import json
import math
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from zangchat import checkpoint_files, checkpoint_manager
from zangchat.config import GPTConfig, RunState, StepMultipliers
from zangchat.dataloader import Batch
from zangchat.errors import UserError
from zangchat.gpt import GPT, ForwardOptions
from zangchat.optim import build_optimizer
from zangchat.runtime import collectives
from zangchat.runtime.devices import compute_init
from zangchat.runtime.processes import compute_cleanup
from zangchat.runtime.seeds import derive_seed
from zangchat.training.flags import RunConfig
from zangchat.training.hooks import record_validation
from zangchat.training.saves import SaveSchedule
from zangchat.training.step import sum_loss
from zangchat.training.trainer import MAX_SKIPS_IN_A_ROW, TIMES, Every, Stage, Trainer

CONFIG = GPTConfig(sequence_len=16, vocab_size=60, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
ROWS = 8


def make_batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """Rows that can be learnt: each counts upwards in its own stride; some targets are ignored,
    more in some rows than in others.
    """
    generator = torch.Generator().manual_seed(derive_seed("batch", step))
    start, stride = (torch.randint(1, 8, (ROWS, 1), generator=generator) for _ in range(2))
    tokens = (start + stride * torch.arange(CONFIG.sequence_len + 1)) % CONFIG.vocab_size
    targets = tokens[:, 1:].clone()
    targets[1, 4:] = -1
    mine = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    return Batch(tokens[mine, :-1], targets[mine], {"step": step + 1})


def batches(cursor: dict[str, Any] | None) -> Iterator[Batch]:
    step = cursor["step"] if cursor else 0
    while True:
        yield make_batch(step, *collectives.world())
        step += 1


def schedule(step: int) -> StepMultipliers:
    return StepMultipliers(lr=1 - step / 40, momentum=0.9, weight_decay=1.0)


def make_trainer(
    directory: Path | None = None,
    *,
    num_iterations: int = 12,
    resume: int | None = None,
    device_batch_size: int = ROWS,
    kind: str = "muon",
    shard: Any = None,
    dtype: torch.dtype = torch.float32,
    **kw: Any,
) -> Trainer:
    config = replace(CONFIG, **kw.pop("architecture", {}))
    model = GPT(config, dtype, kw.pop("options", ForwardOptions()))
    model.init_weights(generator=torch.Generator().manual_seed(7))
    rank, world_size = collectives.world()
    optimizer = build_optimizer(
        model,
        embedding_lr=0.05,
        unembedding_lr=0.01,
        matrix_lr=0.01,
        weight_decay=0.01,
        kind=kind,
        rank=rank,
        world_size=world_size,
    )
    state = RunState()
    if resume is not None:
        model_data, optimizer_data, meta = checkpoint_manager.load_checkpoint(
            directory, resume, "cpu", load_optimizer=True
        )
        checkpoint_manager.load_weights(model, model_data, "checkpoint")
        optimizer.load_shards(optimizer_data)
        state = RunState.from_dict(meta["run_state"])
    state.num_iterations = num_iterations
    stage = kw.pop("stage", None) or Stage("base", batches, schedule)
    run_config = RunConfig(
        save_every=kw.pop("save_every", 5),
        keep_last=kw.pop("keep_last", 9),
        overwrite=kw.pop("overwrite", False),
    )
    resume_command = kw.pop("resume_command", "the same command with --resume=latest")
    return Trainer(
        model,
        shard(optimizer, model) if shard else optimizer,
        stage,
        state,
        device="cpu",
        device_batch_size=device_batch_size,
        saves=SaveSchedule(directory, run_config, resume_command),
        **kw,
    )


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: Any, right: Any) -> bool:
    """Bit for bit, through containers."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def losses(trainer: Trainer, steps: int) -> list[float]:
    stream = trainer.stage.batches(None)
    return [trainer.train_step(next(stream))["loss"] for _ in range(steps)]


def metrics(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what the clock decides."""
    lines = [
        json.loads(line)
        for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


# ---- a step --------------------------------------------------------------------------------------


def test_the_loss_falls():
    values = losses(make_trainer(), 20)
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("size", [1, 3])
def test_slices_of_any_size_give_the_same_training(size):
    whole, sliced = make_trainer(), make_trainer(device_batch_size=size)
    assert losses(whole, 8) == pytest.approx(losses(sliced, 8), abs=1e-5)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(sliced)[name], atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_mean_over_all_supervised_tokens_not_a_mean_of_means():
    trainer = make_trainer(device_batch_size=2)
    batch = make_batch(0)
    expected = float(trainer.model(batch.inputs, batch.targets, loss_reduction="mean").detach())
    assert trainer.train_step(batch)["loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.state.supervised_tokens == int((batch.targets >= 0).sum())
    assert trainer.state.tokens == batch.inputs.numel()


def test_a_step_with_a_zero_gradient_changes_nothing(caplog):
    """Muon and Adam would go on by momentum: in RL, where all rewards of a step may be equal."""
    trainer = make_trainer()
    batch = make_batch(0)
    trainer.train_step(batch)
    before = weights(trainer)
    zero = replace(batch, loss_weights=torch.zeros(batch.targets.shape))
    trainer.train_step(zero)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert (trainer.state.step, trainer.state.skipped_steps) == (2, 1) and not caplog.text
    trainer.train_step(batch)
    assert any(not torch.equal(before[name], t) for name, t in weights(trainer).items())


def test_rows_without_supervision_change_nothing():
    batch = make_batch(0)
    padding = torch.zeros(4, CONFIG.sequence_len, dtype=torch.int64)
    padded = replace(
        batch,
        inputs=torch.cat([batch.inputs, padding]),
        targets=torch.cat([batch.targets, padding - 1]),
    )
    plain, more = make_trainer(device_batch_size=4), make_trainer(device_batch_size=4)
    assert plain.train_step(batch)["loss"] == more.train_step(padded)["loss"]
    assert same(weights(plain), weights(more))


def test_a_step_without_any_supervision_moves_no_weight():
    trainer = make_trainer()
    before, batch = weights(trainer), make_batch(0)
    result = trainer.train_step(replace(batch, targets=torch.full_like(batch.targets, -1)))
    assert math.isnan(result["loss"]) and same(before, weights(trainer))
    assert (trainer.state.step, trainer.state.skipped_steps) == (1, 1)


def test_weights_of_tokens_are_factors_on_their_losses():
    batch = make_batch(0)
    factors = torch.rand(batch.targets.shape, generator=torch.Generator().manual_seed(1)) - 0.5
    trainer = make_trainer(device_batch_size=3)
    each = trainer.model(batch.inputs, batch.targets, loss_reduction="none").detach()
    expected = float((each * factors).sum() / (batch.targets >= 0).sum())
    assert trainer.train_step(replace(batch, loss_weights=factors))["loss"] == pytest.approx(
        expected, rel=1e-4
    )


def test_gradients_are_clipped_once_by_their_global_norm(monkeypatch):
    trainer = make_trainer(device_batch_size=2, grad_clip=1e-3)
    seen = []
    monkeypatch.setattr(
        trainer.optimizer,
        "step",
        lambda multipliers: seen.append(
            math.fsum(float(p.grad.square().sum()) for p in trainer.model.parameters()) ** 0.5
        ),
    )
    assert trainer.train_step(make_batch(0))["grad_norm"] > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_the_schedule_reaches_the_optimizer(monkeypatch):
    trainer, seen = make_trainer(), []
    monkeypatch.setattr(trainer.optimizer, "step", seen.append)
    losses(trainer, 3)
    assert seen == [schedule(step) for step in range(3)]


# ---- what is not finite --------------------------------------------------------------------------


def nan_at(*steps: int) -> Stage:
    calls = iter(range(1000))
    return Stage(
        "base",
        batches,
        schedule,
        loss=lambda model, batch: (
            sum_loss(model, batch) * (math.nan if next(calls) in steps else 1.0)
        ),
    )


def test_a_non_finite_loss_skips_the_step_and_training_goes_on(caplog):
    trainer = make_trainer(stage=nan_at(2))
    losses(trainer, 2)
    before, shards = (
        weights(trainer),
        {name: dict(shard["tensors"]) for name, shard in trainer.optimizer.state_shards().items()},
    )
    trainer.train_step(make_batch(2))
    assert same(before, weights(trainer))
    assert same(
        shards, {name: shard["tensors"] for name, shard in trainer.optimizer.state_shards().items()}
    )
    assert trainer.state.skipped_steps == 1 and "step 3: loss nan" in caplog.text
    assert 'in the batch after {"step": 2}' in caplog.text
    assert math.isfinite(trainer.train_step(make_batch(3))["loss"]) and not same(
        before, weights(trainer)
    )
    assert math.isfinite(trainer.smooth_loss)


def test_a_non_finite_gradient_is_named(caplog):
    trainer = make_trainer()
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(trainer)
    trainer.train_step(make_batch(0))
    assert same(before, weights(trainer)) and "first in lm_head.weight" in caplog.text


def test_a_diverged_run_stops():
    trainer = make_trainer(stage=nan_at(*range(1000)))
    with pytest.raises(UserError, match="in a row"):
        losses(trainer, MAX_SKIPS_IN_A_ROW)
    assert trainer.state.skipped_steps == MAX_SKIPS_IN_A_ROW


def test_single_skipped_steps_do_not_add_up_to_a_row():
    trainer = make_trainer(stage=nan_at(*range(0, 60, 2)), num_iterations=100)
    losses(trainer, 30)
    assert trainer.state.skipped_steps == 15 > MAX_SKIPS_IN_A_ROW


def test_the_loss_shown_is_of_counted_steps_only():
    trainer = make_trainer(stage=nan_at(0))
    trainer.train_step(make_batch(0))
    assert math.isnan(trainer.smooth_loss)
    assert trainer.train_step(make_batch(1))["loss"] == pytest.approx(trainer.smooth_loss)


def test_in_fp16_an_overflow_lowers_the_loss_scale():
    trainer = make_trainer()
    trainer.state.loss_scale = 2.0**140  # beyond fp32: certain to overflow
    trainer.train_step(make_batch(0))
    assert trainer.state.skipped_steps == 1 and trainer.state.loss_scale == 2.0**139
    trainer.state.loss_scale = 2.0**10
    plain = make_trainer()
    plain.state.step = 1
    assert trainer.train_step(make_batch(1))["grad_norm"] == pytest.approx(
        plain.train_step(make_batch(1))["grad_norm"], rel=1e-4
    )
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(tensor, weights(trainer)[name], atol=1e-4, rtol=1e-4)


# ---- the loop ------------------------------------------------------------------------------------


def test_a_step_takes_as_long_as_its_data_and_no_evaluation(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("zangchat.training.step.time.monotonic", lambda: clock[0])

    def slow_batches(cursor: Any) -> Iterator[Batch]:
        for batch in batches(cursor):
            clock[0] += 60 if batch.cursor["step"] == 1 else 3  # the first pays for its compilation
            yield batch

    def slow_loss(model: Any, batch: Batch) -> torch.Tensor:
        clock[0] += 9 if batch.cursor["step"] == 4 else 1
        return sum_loss(model, batch)

    def evaluate(trainer: Trainer) -> None:
        clock[0] += 100

    stage = Stage("base", slow_batches, schedule, [Every(1, evaluate)], slow_loss)
    trainer = make_trainer(stage=stage, num_iterations=4, device_batch_size=ROWS)
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(trainer, "log", found.append)
    trainer.fit()
    assert [line["seconds"] for line in found] == [61, 4, 4, 12]
    assert trainer.state.training_seconds == 81
    tokens = trainer.state.tokens / 4
    rates = [tokens / 61, tokens / 4, tokens / 4, tokens / (0.9 * 4 + 0.1 * 12)]
    assert [line["tok_per_sec"] for line in found] == pytest.approx(rates)


def test_hooks_run_when_due():
    calls: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda trainer: calls.append((name, trainer.state.step))

    hooks = [
        Every(4, note("a"), at_start=True),
        Every(-1, note("b")),
        Every(5, note("c"), at_end=False),
    ]
    make_trainer(num_iterations=10, stage=Stage("base", batches, schedule, hooks)).fit()
    assert calls == [("a", 0), ("a", 4), ("c", 5), ("a", 8), ("a", 10), ("b", 10), ("c", 10)]


def test_checkpoints_are_written_when_due_and_old_ones_purged(tmp_path):
    make_trainer(tmp_path, num_iterations=12, save_every=5, keep_last=2).fit()
    assert sorted(checkpoint_manager.steps(tmp_path)) == [10, 12]
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


def test_the_clock_saves_where_no_interval_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr("zangchat.training.saves.SAVE_SECONDS", 0.0)
    make_trainer(tmp_path, num_iterations=3, save_every=-1).fit()
    assert sorted(checkpoint_manager.steps(tmp_path)) == [1, 2, 3]


def test_what_the_last_hooks_measure_is_in_the_last_checkpoint(tmp_path):
    hooks = [Every(-1, lambda trainer: record_validation(trainer, 1.25))]
    state = make_trainer(
        tmp_path, num_iterations=3, stage=Stage("base", batches, schedule, hooks)
    ).fit()
    meta = checkpoint_manager.verify_checkpoint(tmp_path, 3, hashes=True)
    assert meta["val_bpb"] == 1.25 and RunState.from_dict(meta["run_state"]) == state


def test_a_validation_that_gives_no_number_does_not_lose_the_training(tmp_path, caplog):
    hooks = [
        Every(
            1,
            lambda trainer: record_validation(trainer, math.inf if trainer.state.step else 1.5),
            at_start=True,
        )
    ]
    state = make_trainer(
        tmp_path, num_iterations=2, stage=Stage("base", batches, schedule, hooks)
    ).fit()
    assert checkpoint_manager.find_verified_step(tmp_path) == 2 and state.last_val_bpb == 1.5
    assert "validation gave inf" in caplog.text


def test_a_crash_in_the_last_evaluation_does_not_lose_the_training(tmp_path):
    def crash(trainer: Trainer) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        make_trainer(
            tmp_path, num_iterations=3, stage=Stage("base", batches, schedule, [Every(-1, crash)])
        ).fit()
    assert checkpoint_manager.find_verified_step(tmp_path) == 3
    ran = []
    make_trainer(
        tmp_path,
        num_iterations=3,
        resume=3,
        stage=Stage("base", batches, schedule, [Every(-1, lambda t: ran.append(t.state.step))]),
    ).fit()
    assert ran == [3]  # resuming makes up for it


def full_at(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The disk is full whenever one of these steps is written."""
    write = checkpoint_files.write_tensors

    def writing(path: Path, data: Any) -> tuple[int, str]:
        if any(path.name == checkpoint_manager.model_name(step) for step in steps):
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(checkpoint_files, "write_tensors", writing)


def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, monkeypatch, caplog):
    full_at(monkeypatch, 10)
    make_trainer(tmp_path, num_iterations=12).fit()
    assert sorted(checkpoint_manager.steps(tmp_path)) == [5, 12] and "No space left" in caplog.text


def test_a_save_that_cannot_even_begin_costs_a_checkpoint_not_the_run(tmp_path, caplog):
    (tmp_path / checkpoint_manager.meta_name(5)).mkdir()  # cannot be deleted as a file
    make_trainer(tmp_path, num_iterations=12).fit()
    assert (
        sorted(checkpoint_manager.steps(tmp_path)) == [10, 12]
        and "could not save step 5" in caplog.text
    )


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    full_at(monkeypatch, 3)
    with pytest.raises(UserError, match="No space left.*--resume=latest"):
        make_trainer(tmp_path, num_iterations=3).fit()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer is held back for three steps: what it writes is what there was, and the step
    exists only when all of it is there.
    """
    write, release, seen = checkpoint_files.write_tensors, threading.Event(), {}

    def slowly(path: Path, data: Any) -> tuple[int, str]:
        assert threading.current_thread() is not threading.main_thread() and release.wait(60)
        return write(path, data)

    def look(trainer: Trainer) -> None:
        step = trainer.state.step
        if step == 5:
            seen["weights"] = weights(trainer)
            record_validation(trainer, 1.5)
        if step == 7:
            seen["while writing"] = sorted(checkpoint_manager.steps(tmp_path))
            release.set()

    monkeypatch.setattr(checkpoint_files, "write_tensors", slowly)
    make_trainer(
        tmp_path, num_iterations=9, stage=Stage("base", batches, schedule, [Every(1, look)])
    ).fit()
    assert seen["while writing"] == [] and sorted(checkpoint_manager.steps(tmp_path)) == [5, 9]
    model, _, meta = checkpoint_manager.load_checkpoint(tmp_path, 5, "cpu")
    assert (
        same(model, seen["weights"])
        and meta["val_bpb"] == 1.5
        and meta["run_state"]["hooks_done"] == 5
    )


def test_a_broken_writer_is_not_silent(tmp_path, monkeypatch):
    def broken(path: Path, data: Any) -> tuple[int, str]:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(checkpoint_files, "write_tensors", broken)
    trainer = make_trainer(tmp_path, num_iterations=12)
    with pytest.raises(ArithmeticError, match="a bug"):
        trainer.fit()
    assert trainer.state.step < 12


def test_an_exception_waits_for_the_checkpoint_under_way(tmp_path):
    def crash(trainer: Trainer) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        make_trainer(tmp_path, stage=Stage("base", batches, schedule, [Every(5, crash)])).fit()
    assert checkpoint_manager.find_verified_step(tmp_path) == 5


def test_metrics_that_a_full_disk_refuses_are_written_later(tmp_path, caplog):
    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if 3 <= trainer.state.step < 6:
                raise OSError(28, "No space left on device")
            return self.file.write(data[:7])  # as a nearly full disk does

    def fill_disk(trainer: Trainer) -> None:
        if trainer.state.step == 1:
            trainer.metrics._file = Full(trainer.metrics._file)

    stage = Stage("base", batches, schedule, [Every(1, fill_disk)])
    trainer = make_trainer(tmp_path, stage=stage)
    trainer.fit()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))
    assert caplog.text.count("could not write") == 1


def test_a_new_run_does_not_write_over_another_unasked(tmp_path):
    make_trainer(tmp_path, num_iterations=3).fit()
    with pytest.raises(ValueError, match="another run"):
        make_trainer(tmp_path, num_iterations=5).fit()
    make_trainer(tmp_path, num_iterations=2, overwrite=True).fit()
    assert sorted(checkpoint_manager.steps(tmp_path)) == [2] and len(metrics(tmp_path)) == 2


# ---- stopping and resuming ------------------------------------------------------------------------


def evaluating_stage() -> Stage:
    """With an evaluation every 4 steps, so that resuming has something to repeat or to leave
    alone.
    """

    def evaluate(trainer: Trainer) -> None:
        batch = make_batch(1000)
        with torch.no_grad():
            record_validation(trainer, float(trainer.model(batch.inputs, batch.targets)))

    return Stage("base", batches, schedule, [Every(4, evaluate, at_start=True)])


def outcome(trainer: Trainer, directory: Path) -> dict[str, Any]:
    """All that a run leaves, without what the clock decides."""
    state = replace(trainer.state, training_seconds=0.0)
    return {
        "weights": weights(trainer),
        "optimizer": trainer.optimizer.state_shards(),
        "state": state.to_dict(),
        "metrics": metrics(directory),
    }


@pytest.fixture(scope="module", params=["muon", "adamw"])
def uninterrupted(request, tmp_path_factory) -> tuple[str, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(directory, stage=evaluating_stage(), kind=request.param)
    trainer.fit()
    return request.param, outcome(trainer, directory)


@pytest.mark.parametrize("stop", [3, 8, 12])  # between evaluations; at one; at the end
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    uninterrupted, stop, tmp_path, capsys
):
    kind, expected = uninterrupted
    stage = evaluating_stage()
    stage.loss = lambda model, batch: (
        sum_loss(model, batch),
        first.state.step + 1 == stop and os.kill(os.getpid(), signal.SIGTERM),
    )[0]
    first = make_trainer(
        tmp_path,
        stage=stage,
        kind=kind,
        resume_command="python -m scripts.base_train --resume=latest",
    )
    first.fit()
    assert first.state.step == stop and first.exit_code == 143
    assert "python -m scripts.base_train --resume=latest" in capsys.readouterr().out
    second = make_trainer(
        tmp_path,
        stage=evaluating_stage(),
        kind=kind,
        resume=checkpoint_manager.find_verified_step(tmp_path),
    )
    second.fit()
    assert second.exit_code == 0
    assert same(outcome(second, tmp_path), expected)


@pytest.mark.parametrize("crash", [6, 9])
def test_killed_between_saves_and_resumed_equals_uninterrupted(uninterrupted, crash, tmp_path):
    kind, expected = uninterrupted
    stage = evaluating_stage()

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        if first.state.step + 1 == crash:
            raise SystemError("power cut")
        return sum_loss(model, batch)

    stage.loss = loss
    first = make_trainer(tmp_path, stage=stage, kind=kind)
    with pytest.raises(SystemError):
        first.fit()
    assert checkpoint_manager.find_verified_step(tmp_path) == 5
    second = make_trainer(tmp_path, stage=evaluating_stage(), kind=kind, resume=5)
    second.fit()
    assert same(outcome(second, tmp_path), expected)


def test_going_on_from_an_older_step_forgets_what_came_after_it(uninterrupted, tmp_path):
    kind, expected = uninterrupted
    make_trainer(tmp_path, stage=evaluating_stage(), kind=kind).fit()
    again = make_trainer(tmp_path, stage=evaluating_stage(), kind=kind, resume=5)
    again.fit()
    assert same(outcome(again, tmp_path), expected)
    assert sorted(checkpoint_manager.steps(tmp_path)) == [5, 10, 12]


def test_a_damaged_newest_checkpoint_is_passed_over(uninterrupted, tmp_path, caplog):
    kind, expected = uninterrupted
    make_trainer(tmp_path, stage=evaluating_stage(), kind=kind).fit()
    path = tmp_path / "optim_000012_rank0.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    step = checkpoint_manager.find_verified_step(tmp_path)
    assert step == 10 and path.name in caplog.text
    again = make_trainer(tmp_path, stage=evaluating_stage(), kind=kind, resume=step)
    again.fit()
    assert same(outcome(again, tmp_path), expected)


def test_ctrl_c_twice_stops_at_once(tmp_path):
    def interrupt(model: Any, batch: Batch) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return sum_loss(model, batch)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, stage=Stage("base", batches, schedule, loss=interrupt)).fit()
    assert signal.getsignal(signal.SIGINT) is handler
    assert sorted(checkpoint_manager.steps(tmp_path)) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_a_signal_saves_and_is_the_exit_code(tmp_path, number, code):
    trainer = make_trainer(tmp_path)
    trainer.stage.loss = lambda model, batch: (
        sum_loss(model, batch),
        os.kill(os.getpid(), number),
    )[0]
    trainer.fit()
    assert trainer.exit_code == code and sorted(checkpoint_manager.steps(tmp_path)) == [1]


# ---- several ranks -------------------------------------------------------------------------------


def gradients(
    rank: int = 0, world_size: int = 1, device_batch_size: int = ROWS
) -> dict[str, torch.Tensor]:
    """Of the first step, summed over ranks."""
    trainer = make_trainer(device_batch_size=device_batch_size)
    supervised = int((make_batch(0).targets >= 0).sum())
    trainer.passes.backward(trainer.stage.loss, make_batch(0, rank, world_size), 1 / supervised)
    trainer.optimizer.sum_gradients()
    mine, whole = trainer.optimizer.gradients(), {}
    for p, name in trainer.optimizer.names.items():
        whole[name], piece = torch.zeros_like(p), trainer.optimizer._own[p]
        if piece:
            piece.of(whole[name]).copy_(mine[name])
        if world_size > 1:
            torch.distributed.all_reduce(whole[name])
    return whole


def join_ranks(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    compute_init("cpu")


def rank_of_four(rank: int, port: int, directory: str) -> None:
    join_ranks(rank, 4, port)
    try:
        first = gradients(rank, 4, device_batch_size=1)
        if rank == 0:
            torch.save(first, f"{directory}/gradients4.pt")
        make_trainer(
            Path(directory) / "four", num_iterations=20, save_every=10, device_batch_size=1
        ).fit()
    finally:
        compute_cleanup()


def rank_main(rank: int, port: int, directory: str) -> None:
    """What each of two processes does; rank 0 leaves its findings in files."""
    join_ranks(rank, 2, port)
    root = Path(directory)
    try:
        first = gradients(rank, 2, device_batch_size=3)
        if rank == 0:
            torch.save(first, f"{directory}/gradients2.pt")
        trainer = make_trainer(root / "run", num_iterations=20, save_every=10, device_batch_size=3)
        trainer.fit()

        poisoned = make_trainer()
        poisoned.stage.loss = lambda model, batch: (
            sum_loss(model, batch) * (math.nan if rank == 1 else 1.0)
        )
        before = weights(poisoned)
        poisoned.train_step(make_batch(0, rank, 2))
        skipped = collectives.gather(
            [same(before, weights(poisoned)) and poisoned.state.skipped_steps == 1]
        )

        overflow = make_trainer(dtype=torch.float16)
        scale, before = overflow.loss_scale.value, weights(overflow)
        if rank == 1:  # a finite loss, and one gradient that fp16 cannot hold
            overflow.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
        overflow.train_step(make_batch(0, rank, 2))
        unchanged = same(before, weights(overflow))
        halved = collectives.gather([overflow.loss_scale.value / scale, unchanged])

        stopped = make_trainer(root / "stopped")
        stopped.stage.loss = lambda model, batch: (
            sum_loss(model, batch),
            rank == 1 and os.kill(os.getpid(), signal.SIGTERM),
        )[0]
        stopped.fit()
        stops = collectives.gather([stopped.exit_code, stopped.state.step])

        resumed = make_trainer(root / "one", num_iterations=20, resume=10)
        resumed.fit()
        equal = all(
            torch.equal(p, q) for p in resumed.model.parameters() for q in [collective_copy(p)]
        )
        if rank == 0:
            (root / "facts.json").write_text(
                json.dumps({"skipped": skipped, "halved": halved, "stops": stops, "equal": equal})
            )
    finally:
        compute_cleanup()


def collective_copy(parameter: torch.Tensor) -> torch.Tensor:
    """Rank 0's values."""
    copy = parameter.detach().clone()
    torch.distributed.broadcast(copy, 0)
    return copy


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """20 steps on one rank in `single`, on two in `run`, on four in `four`; `one` is begun by one
    rank, and two continue from its step 10.
    """
    root = tmp_path_factory.mktemp("ranks")
    single = make_trainer(root / "single", num_iterations=20, save_every=10)
    single.fit()
    make_trainer(root / "one", num_iterations=10).fit()
    for main, count in (
        (rank_main, 2),
        (rank_of_four, 4),
    ):  # forked from a server that has imported this
        mp.start_processes(
            main, args=(free_port(), str(root)), nprocs=count, start_method="forkserver"
        )
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def loss_curve(directory: Path) -> list[float]:
    return [line["loss"] for line in metrics(directory) if "loss" in line]


@pytest.mark.parametrize("run", ["run", "four"])
def test_two_and_four_ranks_compute_the_losses_of_one_in_passes_of_any_size(ranks, run):
    assert loss_curve(ranks / run) == pytest.approx(loss_curve(ranks / "single"), abs=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_two_and_four_ranks_have_the_gradients_of_one(ranks, world_size):
    expected = gradients()
    found = torch.load(ranks / f"gradients{world_size}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=0)


def test_one_rank_goes_on_with_the_checkpoint_of_four(ranks):
    shutil.copytree(ranks / "four", ranks / "four, then one")
    make_trainer(ranks / "four, then one", num_iterations=20, resume=10).fit()
    assert loss_curve(ranks / "four, then one") == pytest.approx(
        loss_curve(ranks / "single"), abs=1e-5
    )


def test_two_ranks_go_on_with_the_checkpoint_of_one(ranks):
    assert loss_curve(ranks / "one") == pytest.approx(loss_curve(ranks / "single"), abs=1e-5)


def test_one_rank_goes_on_with_the_checkpoint_of_two(ranks):
    trainer = make_trainer(ranks / "run", num_iterations=20, resume=10)
    trainer.fit()
    assert loss_curve(ranks / "run") == pytest.approx(loss_curve(ranks / "single"), abs=1e-5)


def test_ranks_agree_on_skipping_and_stopping_and_hold_the_same_weights(ranks):
    facts = json.loads((ranks / "facts.json").read_text())
    assert facts == {
        "skipped": [[1], [1]],
        "halved": [[0.5, True], [0.5, True]],
        "stops": [[143, 1], [143, 1]],
        "equal": True,
    }
    assert sorted(checkpoint_manager.steps(ranks / "stopped")) == [1]

"""The one training loop, for all stages: pretraining, midtraining, finetuning and RL differ only in
the `Stage` that they pass in.

A step takes this rank's rows, runs them in slices of `device_batch_size`, sums the gradients over
ranks, clips, and lets the optimizer step. Between the steps: hooks (evaluations, samples), saves,
metrics, a progress line, signals.

The loss of a step is the sum over all supervised tokens of all ranks divided by their number, which
is known before the first backward pass. So neither the size of the slices nor the number of ranks
changes the result of a step.

A run continues from its `RunState`, saved with each checkpoint. The order at each step boundary is:
save, then hooks, then update the saved meta. So a run that was stopped anywhere computes again only
the steps after its last save, with the same result.
"""

import contextlib
import gc
import json
import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from zangchat.config import RunState, StepMultipliers
from zangchat.errors import UserError
from zangchat.optim import OptimizerGroup, global_norm
from zangchat.runtime import collectives
from zangchat.runtime.logs import DummyWandb, print0
from zangchat.runtime.progress import Progress, in_words
from zangchat.training.metrics import finite
from zangchat.training.saves import SaveSchedule
from zangchat.training.signals import StopSignals
from zangchat.training.step import (
    SMOOTHING,
    Loss,
    LossScale,
    Pace,
    Passes,
    describe_non_finite,
    sum_loss,
)

if TYPE_CHECKING:
    from zangchat.dataloader import Batch
    from zangchat.gpt import GPT

MAX_SKIPS_IN_A_ROW = 10  # non-finite steps, after which the run has diverged for good
TIMES = ("seconds", "tok_per_sec", "mfu")  # metrics that differ between two runs of the same steps

logger = logging.getLogger(__name__)


@dataclass
class Every:
    """Call `fn(trainer)` after every n-th step (none, if n < 1), and at start or end if asked."""

    n: int
    fn: Callable[["Trainer"], None]
    at_start: bool = False
    at_end: bool = True

    def is_due(self, step: int, num_iterations: int) -> bool:
        if step == 0:
            return self.at_start
        return (self.at_end and step >= num_iterations) or (self.n > 0 and step % self.n == 0)


@dataclass
class Stage:
    """The parts of training that differ from stage to stage."""

    name: str  # base | mid | sft | rl
    batches: Callable[[dict[str, Any] | None], Iterator["Batch"]]  # from a cursor; None: the start
    schedule: Callable[[int], StepMultipliers]  # steps done so far -> multipliers of the next step
    hooks: list[Every] = field(default_factory=list)
    loss: Loss = sum_loss


class Trainer:
    """Trains `model` from the step in `state` to `state.num_iterations`; the weights and the
    optimizer's state must be those of that step.

    Without `saves` nothing is written. `meta` are further entries of each checkpoint's meta.
    """

    def __init__(
        self,
        model: "GPT",
        optimizer: OptimizerGroup,
        stage: Stage,
        state: RunState,
        *,
        device: torch.device | str,
        device_batch_size: int,
        grad_clip: float = 1.0,
        tokenizer: Any = None,
        saves: SaveSchedule | None = None,
        meta: Mapping[str, Any] | None = None,
        wandb: Any = None,
    ):
        self.model, self.optimizer, self.stage, self.state = model, optimizer, stage, state
        self.passes = Passes(model, optimizer, torch.device(device), device_batch_size)
        self.grad_clip = grad_clip
        self.tokenizer, self.meta, self.wandb = tokenizer, dict(meta or {}), wandb or DummyWandb()
        self.saves = saves or SaveSchedule(None)
        self.metrics = self.saves.metrics
        self.rank, self.world_size = collectives.world()
        self.loss_scale = LossScale(state, getattr(model, "compute_dtype", None))
        self.signals = StopSignals(self.world_size)
        self.stop_signal = 0  # the signal that ended the run, agreed on by all ranks
        self.pace = Pace(model, torch.device(device), self.world_size)

    def train_step(self, batch: "Batch") -> dict[str, Any]:
        """One optimizer step on this rank's rows -> its metrics, equal on all ranks but for times.

        A step with no supervised token, a zero gradient (equal rewards), or a non-finite value on
        any rank is skipped. Raises UserError after MAX_SKIPS_IN_A_ROW non-finite ones.
        """
        state = self.state
        self.pace.begin()
        multipliers = self.stage.schedule(state.step)
        supervised_here = int((batch.targets >= 0).sum().item())
        counts = collectives.sum_over_ranks([batch.inputs.numel(), supervised_here])
        tokens, supervised = map(round, counts)
        self.optimizer.zero_grad()
        self.model.train()
        factor = self.loss_scale.value / max(supervised, 1)
        loss_sum = self.passes.backward(self.stage.loss, batch, factor)
        self.optimizer.sum_gradients()
        own_norm = float(global_norm(self.optimizer.gradients().values()))  # of this rank's rows
        total, squares = collectives.sum_over_ranks([loss_sum, own_norm**2])
        grad_norm = squares**0.5 / self.loss_scale.value
        loss = total / supervised if supervised else math.nan
        if not (supervised and squares):  # momentum would move the weights all the same
            self._skip("nothing to learn from", logging.DEBUG if supervised else logging.WARNING)
            self.loss_scale.after_update()  # a scale that became too small rises again
        elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip_non_finite(loss_sum, loss, grad_norm)
        else:
            self._update(multipliers, grad_norm)
            state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * loss
        self.optimizer.zero_grad()
        pace = self.pace.end(tokens)
        state.step += 1
        state.tokens += tokens
        state.supervised_tokens += supervised
        state.cursor, state.batch_metrics = batch.cursor, batch.metrics
        state.training_seconds += pace["seconds"]
        return {
            "step": state.step,
            "loss": loss,
            "smooth_loss": self.smooth_loss,
            "lr": multipliers.lr,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "skipped_steps": state.skipped_steps,
            **pace,
        }

    @property
    def smooth_loss(self) -> float:
        """The moving average of the training loss, debiased; nan before the first counted step."""
        counted = self.state.step - self.state.skipped_steps
        return self.state.smooth_loss / (1 - SMOOTHING**counted) if counted > 0 else math.nan

    def _update(self, multipliers: StepMultipliers, grad_norm: float) -> None:
        clip = min(self.grad_clip / (grad_norm + 1e-6), 1.0) if self.grad_clip > 0 else 1.0
        factor = clip / self.loss_scale.value
        if factor != 1.0:
            torch._foreach_mul_(list(self.optimizer.gradients().values()), factor)
        self.optimizer.step(multipliers)
        self.state.skips_in_a_row = 0
        self.loss_scale.after_update()

    def _skip(self, reason: str, level: int = logging.WARNING) -> None:
        self.state.skipped_steps += 1
        if self.rank == 0:
            logger.log(level, f"step {self.state.step + 1}: {reason}; skipped")

    def _skip_non_finite(self, loss_sum: float, loss: float, grad_norm: float) -> None:
        state = self.state
        problem = describe_non_finite(self.optimizer, loss_sum, loss, grad_norm)
        # the loader gives the same batch again from this cursor
        self._skip(f"{problem} in the batch after {json.dumps(state.cursor)}")
        if self.loss_scale.after_overflow():
            return
        state.skips_in_a_row += 1
        if state.skips_in_a_row >= MAX_SKIPS_IN_A_ROW:
            steps = f"{MAX_SKIPS_IN_A_ROW} steps in a row up to step {state.step + 1}"
            remedy = "lower learning rates, or with --dtype=float32"
            problem = f"{steps} were not finite (the last: {problem})"
            raise UserError(f"{problem}: start again with --overwrite and {remedy}")

    def fit(self) -> RunState:
        """Train to the end, or until a signal: then the step under way is finished and saved."""
        state, batches = self.state, None
        self.saves.prepare(state.step, self.tokenizer)
        progress = Progress(self.stage.name, state.num_iterations, state.step, shown=self.rank == 0)
        metrics_file = self.metrics.open(state.metrics_lines)
        with metrics_file, self.signals, _no_garbage_collection(), progress:
            try:
                while True:
                    self._save_if_due()
                    if self.stop_signal:
                        break
                    self._run_hooks()
                    if state.step >= state.num_iterations:
                        break
                    batches = batches or self.stage.batches(state.cursor or None)
                    self.pace.begin()  # with the wait for data; RL samples it
                    metrics = self.train_step(next(batches))
                    self.log(metrics)
                    progress.update(state.step, progress_line(metrics, state.last_val_bpb))
                    self._agree()
            except Exception:
                if self.world_size == 1:  # finishing a save takes all ranks
                    self.saves.finish()
                raise
            finally:
                if (close := getattr(batches, "close", None)) is not None:
                    close()  # ends the loader's thread
        if self.stop_signal:
            print0(stop_message(self.stop_signal, state.step, self.saves))
        else:
            duration = in_words(state.training_seconds)
            print0(f"{self.stage.name}: {state.step} steps, {state.tokens:,} tokens in {duration}")
        return state

    @property
    def exit_code(self) -> int:
        """0, or 128 + the signal that ended the run, as the shell expects it (130 for Ctrl-C)."""
        return 128 + self.stop_signal if self.stop_signal else 0

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line to metrics.jsonl and to wandb, for the state's step. All ranks call it."""
        line = finite({"step": self.state.step, **values})
        self.state.metrics_lines += 1
        self.metrics.write(line)
        self.wandb.log({k: v for k, v in line.items() if v is not None}, step=self.state.step)

    def _run_hooks(self) -> None:
        """Those that are due, once per step boundary, also if the run was resumed there."""
        state = self.state
        if state.hooks_done == state.step:
            return
        due = [hook for hook in self.stage.hooks if hook.is_due(state.step, state.num_iterations)]
        for hook in due:
            self.model.eval()
            hook.fn(self)
            self.model.train()
        state.hooks_done = state.step
        if due:
            gc.collect()
        self.saves.update_meta(state.step, self._checkpoint_meta)

    def _save_if_due(self) -> None:
        state = self.state
        last = state.step >= state.num_iterations or bool(self.stop_signal)
        if self.saves.is_due(state.step, last):
            self.saves.finish()
            weights = self.optimizer.model_weights(self.model)
            shards = self.optimizer.state_shards()
            self.saves.begin(state.step, weights, shards, self._checkpoint_meta(), last)
            gc.collect()

    def _checkpoint_meta(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "val_bpb": self.state.last_val_bpb,
            "model_config": self.model.config.to_dict(),
            "run_state": self.state.to_dict(),
            "world_size": self.world_size,
            "tokenizer": self.saves.tokenizer_sha256,
            **self.meta,
        }

    def _agree(self) -> None:
        """All ranks decide alike: to stop (a signal on any rank), to save (the clock of rank 0),
        and to finish the save under way (all ranks have written)."""
        clock = self.rank == 0 and self.saves.clock_is_due
        flags = [self.signals.received, clock, self.saves.is_writing]
        received, save_now, still_writing = collectives.max_over_ranks(flags)
        self.stop_signal, self.saves.requested = int(received), bool(save_now)
        if not still_writing:
            self.saves.finish()


def stop_message(signal_number: int, step: int, saves: SaveSchedule) -> str:
    name = signal.Signals(signal_number).name
    saved = f"saved to {saves.directory}" if saves.directory else "not saved"
    return f"stopped by {name} after step {step}, {saved}; continue with:\n  {saves.resume_command}"


def progress_line(metrics: Mapping[str, Any], last_val_bpb: float | None) -> str:
    parts = [f"loss {metrics['smooth_loss']:.4f}", f"{metrics['tok_per_sec']:,.0f} tok/s"]
    if "mfu" in metrics:
        parts.append(f"mfu {100 * metrics['mfu']:.1f}%")
    if last_val_bpb is not None:
        parts.append(f"bpb {last_val_bpb:.4f}")
    return " | ".join(parts)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting cycles in a step stalls the device: inside the block only hooks and saves do."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()

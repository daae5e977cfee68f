"""The one training loop. It knows no stage: what differs between pretraining, midtraining, finetuning and RL comes in as a `Stage`.

Per step: take this rank's rows, run them through in slices of `device_batch_size`, sum the gradients over ranks, clip, let the optimizer
step, count. Around the steps: hooks (evaluations, samples), saves, metrics, a progress line, signals.

The loss of a step is the sum over all supervised tokens of all ranks divided by their number, which is known before the first backward
pass. So neither the size of the slices nor the number of ranks changes what a step computes.

What a run needs to go on is `RunState`, saved with each checkpoint. Order at each step boundary: save, then hooks, then the saved meta is
brought up to date; a run stopped anywhere computes again only what came after its last save, with the same result. A save in the
middle of a run is a copy in memory that a thread writes while training goes on; the step exists from the first boundary at which
all ranks have written. Only one is under way at a time, and a last one is waited for.
"""

import contextlib
import gc
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zangchat import checkpoint_manager
from zangchat.config import RunState, StepMultipliers
from zangchat.errors import UserError
from zangchat.flops import peak_flops
from zangchat.optim import OptimizerGroup, global_norm
from zangchat.runtime import collectives
from zangchat.runtime.files import atomic_write, file_sha256
from zangchat.runtime.logs import DummyWandb, print0
from zangchat.runtime.progress import Progress, in_words
from zangchat.training.flags import RunConfig

if TYPE_CHECKING:
    from zangchat.dataloader import Batch
    from zangchat.gpt import GPT

SAVE_SECONDS = 600.0  # --save_every=-1
SMOOTHING = 0.9  # of the training loss shown
MAX_SKIPS_IN_A_ROW = 10  # non-finite steps, after which the run has diverged for good
FIRST_LOSS_SCALE, LOSS_SCALE_PATIENCE = 2.0**16, 1000  # fp16 only: as torch's GradScaler, kept in RunState
RELAY_SECONDS = 5.0  # torchrun repeats a Ctrl-C to its processes; within this time the repetition is not the user's
# SIGHUP: the terminal was closed. SIGUSR1: schedulers send it some time before the end.
STOPPING = [number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if (number := getattr(signal, name, None)) is not None]
TIMES = ("seconds", "tok_per_sec", "mfu")  # metrics that two runs of the same steps need not share

logger = logging.getLogger(__name__)


def sum_loss(model: Callable[..., Tensor], batch: "Batch") -> Tensor:
    """The sum of the next-token losses (nats) of a batch's supervised tokens, each times its weight where the batch has weights."""
    weights = {} if batch.weights is None else {"loss_weights": batch.weights}
    return model(batch.inputs, batch.targets, loss_reduction="sum", **weights)


@dataclass
class Every:
    """Call `fn(trainer)` after every n-th step (never, for n < 1), before the first step and after the last where asked."""

    n: int
    fn: Callable[["Trainer"], None]
    at_start: bool = False
    at_end: bool = True
    name: str = ""

    def is_due(self, step: int, num_iterations: int) -> bool:
        if step == 0:
            return self.at_start
        return (self.at_end and step >= num_iterations) or (self.n > 0 and step % self.n == 0)


@dataclass
class Stage:
    """What one kind of training supplies."""

    name: str  # base | mid | sft | rl
    batches: Callable[[dict[str, Any] | None], Iterator["Batch"]]  # from a cursor (None: the beginning)
    schedule: Callable[[int], StepMultipliers]  # steps done so far -> multipliers of the next step
    hooks: list[Every] = field(default_factory=list)
    loss: Callable[[Callable[..., Tensor], "Batch"], Tensor] = sum_loss  # a sum over the micro-batch


class Trainer:
    """Trains `model` (weights and optimizer state loaded, `state` telling how far it is) until `state.num_iterations` steps are done.

    Without `checkpoint_dir` nothing is written. `resume_command` is told to the user when the run stops early.
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
        checkpoint_dir: str | Path | None = None,
        tokenizer: Any = None,
        user_config: Mapping[str, Any] | None = None,
        run_config: RunConfig | None = None,
        software: Mapping[str, str] | None = None,
        overwrite: bool = False,
        wandb: Any = None,
        compile: bool = False,
        resume_command: str = "the same command with --resume=latest",
    ):
        if device_batch_size < 1:
            raise ValueError(f"device_batch_size must be at least 1, not {device_batch_size}")
        self.model, self.optimizer, self.stage, self.state = model, optimizer, stage, state
        if compile:
            model.compile_blocks()
        self.device = torch.device(device)
        self.device_batch_size, self.grad_clip = device_batch_size, grad_clip
        self.checkpoint_dir = Path(checkpoint_dir) if checkpoint_dir is not None else None
        self.tokenizer = tokenizer
        self.user_config = dict(user_config or {})
        self.run_config = run_config or RunConfig()
        self.software = dict(software or {})  # versions, kept with each checkpoint
        self.overwrite = overwrite
        self.wandb = wandb or DummyWandb()
        self.resume_command = resume_command
        self.rank, self.world_size = collectives.world()
        self.stop_signal = 0  # the signal that ended the run, agreed on by all ranks
        self._received, self._received_at = 0, 0.0
        self._saved_step = state.step if state.step else -1
        self._save: checkpoint_manager.Save | None = None  # under way
        self.tokenizer_sha256: str | None = None
        self._saved_at = time.monotonic()
        self._save_now = False
        self._flops_per_token = model.estimate_flops()
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        self._peak_flops = peak_flops(name, getattr(model, "compute_dtype", torch.float32))
        if getattr(model, "compute_dtype", None) == torch.float16:
            state.extra.setdefault("loss_scale", FIRST_LOSS_SCALE)

    # ---- one step -----------------------------------------------------------------------------------------------------

    def train_step(self, batch: "Batch") -> dict[str, Any]:
        """One optimizer step on this rank's rows of it; returns the step's metrics, equal on all ranks but for the times.

        A step without supervised tokens, or with a non-finite loss or gradient on any rank, changes no weight and counts as skipped.
        Raises UserError after MAX_SKIPS_IN_A_ROW non-finite ones.
        """
        state, start = self.state, time.monotonic()
        multipliers = self.stage.schedule(state.step)
        tokens, supervised = (
            round(count) for count in collectives.sum_over_ranks([batch.inputs.numel(), int((batch.targets >= 0).sum().item())])
        )
        self.optimizer.zero_grad()
        self.model.train()
        loss_sum = self._backward(batch, supervised)
        self.optimizer.sum_gradients()
        mine = float(global_norm(self.optimizer.gradients().values()))  # of the rows that are summed up on this rank
        total, squares = collectives.sum_over_ranks([loss_sum, mine**2])
        scale = state.extra.get("loss_scale", 1.0)
        grad_norm = squares**0.5 / scale
        loss = total / supervised if supervised else math.nan
        if supervised == 0:
            self._skip("not one supervised token")
        elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skip_non_finite(loss_sum, loss, grad_norm)
        else:
            self._update(multipliers, grad_norm, scale)
            state.smooth_loss = SMOOTHING * state.smooth_loss + (1 - SMOOTHING) * loss
        self.optimizer.zero_grad()
        seconds = time.monotonic() - start
        state.step += 1
        state.tokens += tokens
        state.supervised_tokens += supervised
        state.cursor = batch.cursor
        state.training_seconds += seconds
        return {
            "step": state.step,
            "loss": loss,
            "smooth_loss": self.smooth_loss,
            "lr": multipliers.lr,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "supervised_tokens": state.supervised_tokens,
            "skipped_steps": state.skipped_steps,
            **self._pace(tokens, seconds),
        }

    @property
    def smooth_loss(self) -> float:
        """The moving average of the training loss, debiased; nan before the first step that counts."""
        counted = self.state.step - self.state.skipped_steps
        return self.state.smooth_loss / (1 - SMOOTHING**counted) if counted > 0 else math.nan

    def _backward(self, batch: "Batch", supervised: int) -> float:
        """Gradients of (this rank's part of) the step's mean loss; returns the sum of its losses."""
        losses = []
        passes = self._passes(batch)
        with contextlib.nullcontext() if self.optimizer.lockstep else self.model.cast_once():
            for number, rows in enumerate(passes, 1):
                loss = self.stage.loss(self.model, self._on_device(batch, rows))
                if number == len(passes):
                    self.optimizer.last_pass()
                (loss * (self.state.extra.get("loss_scale", 1.0) / max(supervised, 1))).backward()
                losses.append(loss.detach())
        return math.fsum(torch.stack(losses).tolist()) if losses else 0.0

    def _passes(self, batch: "Batch") -> list[slice]:
        """Slices of device_batch_size rows; those without a supervised token add nothing and are left out."""
        firsts = range(0, batch.inputs.size(0), self.device_batch_size)
        slices = [slice(first, first + self.device_batch_size) for first in firsts]
        return [rows for rows in slices if self.optimizer.lockstep or bool((batch.targets[rows] >= 0).any())]

    def _on_device(self, batch: "Batch", rows: slice) -> "Batch":
        parts = {name: getattr(batch, name) for name in ("inputs", "targets", "weights")}
        there = {name: part[rows].to(self.device, non_blocking=True) for name, part in parts.items() if part is not None}
        return replace(batch, **there)

    def _update(self, multipliers: StepMultipliers, grad_norm: float, scale: float) -> None:
        extra = self.state.extra
        factor = min(self.grad_clip / (grad_norm + 1e-6), 1.0) if self.grad_clip > 0 else 1.0
        if factor / scale != 1.0:
            torch._foreach_mul_(list(self.optimizer.gradients().values()), factor / scale)
        self.optimizer.step(multipliers)
        extra.pop("skips_in_a_row", None)
        if "loss_scale" in extra:
            extra["steps_at_scale"] = extra.get("steps_at_scale", 0) + 1
            if extra["steps_at_scale"] >= LOSS_SCALE_PATIENCE:
                extra.update(loss_scale=extra["loss_scale"] * 2, steps_at_scale=0)

    def _skip(self, reason: str) -> None:
        self.state.skipped_steps += 1
        if self.rank == 0:
            logger.warning(f"step {self.state.step + 1}: {reason}; skipped")

    def _skip_non_finite(self, loss_sum: float, loss: float, grad_norm: float) -> None:
        """All ranks come here together, since they share the sums."""
        extra = self.state.extra
        culprits = [str(rank) for rank, (fine,) in enumerate(collectives.gather([math.isfinite(loss_sum)])) if not fine]
        where = f" (rank {', '.join(culprits)})" if culprits and self.world_size > 1 else ""
        before = json.dumps(self.state.cursor)  # with it the loader gives the same batch again
        what = f"loss {loss}{where}" if culprits else f"gradient norm {grad_norm}, {self._first_non_finite_gradient()}"
        self._skip(f"{what} in the batch behind {before}")
        if extra.get("loss_scale", 1.0) > 1:  # fp16 overflowed: what the scale is for
            extra.update(loss_scale=extra["loss_scale"] / 2, steps_at_scale=0)
            return
        extra["skips_in_a_row"] = extra.get("skips_in_a_row", 0) + 1
        if extra["skips_in_a_row"] >= MAX_SKIPS_IN_A_ROW:
            raise UserError(
                f"{MAX_SKIPS_IN_A_ROW} steps in a row up to step {self.state.step + 1} were not finite (the last: {what}): start again "
                "with --overwrite and lower learning rates, or with --dtype=float32"
            )

    def _first_non_finite_gradient(self) -> str:
        """Of all ranks', in the order of the model."""
        names = list(self.optimizer.names.values())
        mine = [name for name, gradient in self.optimizer.gradients().items() if not bool(torch.isfinite(gradient).all())]
        first = -round(collectives.max_over_ranks([-min(map(names.index, mine), default=len(names))])[0])
        return f"first in {names[first]}" if first < len(names) else "each gradient finite by itself"

    def _pace(self, tokens: int, seconds: float) -> dict[str, float]:
        pace = {"seconds": seconds, "tok_per_sec": tokens / max(seconds, 1e-9)}
        if self._peak_flops:
            pace["mfu"] = pace["tok_per_sec"] * self._flops_per_token / (self._peak_flops * self.world_size)
        return pace

    # ---- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> RunState:
        """Train to the end, or until SIGINT, SIGTERM or SIGUSR1: then the step under way is finished and saved (see `exit_code`)."""
        state = self.state
        self._prepare()
        batches = None
        shown = Progress(self.stage.name, state.num_iterations, state.step, shown=self.rank == 0)
        with self._metrics_file(), _signals(self._on_signal), _no_garbage_collection(), shown as self._progress:
            try:
                while True:
                    self._save_if_due()
                    if self.stop_signal:
                        break
                    self._run_hooks()
                    if state.step >= state.num_iterations:
                        break
                    batches = batches or self.stage.batches(state.cursor or None)
                    metrics = self.train_step(next(batches))
                    self.log(metrics)
                    self._progress.update(state.step, self._line(metrics))
                    self._agree()
            except Exception:
                if self._save is not None and self.world_size == 1:  # nobody else has to agree to finish it
                    self._finish_save()
                raise
            finally:
                if (close := getattr(batches, "close", None)) is not None:
                    close()  # ends the loader's thread
        if self.stop_signal:
            where = f"saved to {self.checkpoint_dir}" if self.checkpoint_dir else "not saved"
            print0(f"stopped by {signal.Signals(self.stop_signal).name} after step {state.step}, {where}; go on with:")
            print0(f"  {self.resume_command}")
        else:
            print0(f"{self.stage.name}: {state.step} steps, {state.tokens:,} tokens in {in_words(state.training_seconds)}")
        return state

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process: 0, or 128 + the signal that ended it (130 for Ctrl-C, 143 for SIGTERM)."""
        return 128 + self.stop_signal if self.stop_signal else 0

    def log(self, values: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl (and to wandb), for the step that the state is at. Hooks call it too, on every rank."""
        line = {"step": self.state.step, **values}
        line = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()}
        self.state.extra["metrics_lines"] = self.state.extra.get("metrics_lines", 0) + 1
        if self._metrics is not None:
            self._unwritten += (json.dumps(line) + "\n").encode()
        self._write_metrics()
        self.wandb.log({key: value for key, value in line.items() if value is not None}, step=self.state.step)

    def record_validation(self, bpb: float) -> None:
        """For hooks: keep a validation result in the state, and log it; one that is no number is only logged."""
        state = self.state
        if not math.isfinite(bpb):
            logger.warning(f"step {state.step}: validation gave {bpb}: the text may be empty, or the weights are no numbers any more")
            self.log({"val_bpb": bpb, "tokens": state.tokens})
            return
        state.last_val_bpb = bpb
        state.min_val_bpb = bpb if state.min_val_bpb is None else min(bpb, state.min_val_bpb)
        self.log({"val_bpb": bpb, "tokens": state.tokens})
        print0(f"{self.stage.name} step {state.step}: validation {bpb:.4f} bits per byte (best {state.min_val_bpb:.4f})")

    def _run_hooks(self) -> None:
        """Those that are due, once per step boundary, a resumed run included."""
        state = self.state
        if state.extra.get("hooks_done", -1) == state.step:
            return
        due = [hook for hook in self.stage.hooks if hook.is_due(state.step, state.num_iterations)]
        for hook in due:
            self.model.eval()
            hook.fn(self)
            self.model.train()
        state.extra["hooks_done"] = state.step
        if due:
            gc.collect()
        if self._saved_step == state.step:
            self._update_saved_meta()

    def _line(self, metrics: Mapping[str, Any]) -> str:
        parts = [f"loss {self.smooth_loss:.4f}", f"{metrics['tok_per_sec']:,.0f} tok/s"]
        if "mfu" in metrics:
            parts.append(f"mfu {100 * metrics['mfu']:.1f}%")
        if self.state.last_val_bpb is not None:
            parts.append(f"bpb {self.state.last_val_bpb:.4f}")
        return " | ".join(parts)

    # ---- signals ------------------------------------------------------------------------------------------------------

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """The first signal asks for a stop after this step; a second Ctrl-C stops at once."""
        now = time.monotonic()
        if self._received and signum == signal.SIGINT and (self.world_size == 1 or now - self._received_at > RELAY_SECONDS):
            raise KeyboardInterrupt
        if not self._received:
            self._received, self._received_at = signum, now
            print0("\nstopping after this step (Ctrl-C again: at once, losing what was not saved)")

    def _agree(self) -> None:
        """Whether to stop (a signal on any rank), to save (rank 0's clock), or to finish a save, decided by all ranks alike."""
        clock = self.rank == 0 and time.monotonic() - self._saved_at >= SAVE_SECONDS
        writing = self._save is not None and self._save.writing
        received, save_now, still_writing = collectives.max_over_ranks([self._received, clock, writing])
        self.stop_signal, self._save_now = int(received), bool(save_now)
        if self._save is not None and not still_writing:
            self._finish_save()

    # ---- files --------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the folder hold what belongs to the state this run starts from, and nothing later."""
        directory = self.checkpoint_dir
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            if self.state.step == 0 and not self.overwrite and checkpoint_manager.valid_steps(directory):
                raise ValueError(f"{directory} holds the checkpoints of another run; overwrite=True deletes them")
            checkpoint_manager.remove_temporary_files(directory)
            gone = checkpoint_manager.discard_after(directory, self.state.step or -1)
            if gone:
                logger.info(
                    f"deleted step {', '.join(map(str, gone))} from {directory}: this run makes what follows step {self.state.step} anew"
                )
            if self.tokenizer is not None and (self.state.step == 0 or not (directory / "tokenizer.json").exists()):
                self.tokenizer.save(directory)
            if (directory / "tokenizer.json").exists():
                self.tokenizer_sha256 = file_sha256(directory / "tokenizer.json")
        collectives.barrier()

    @contextlib.contextmanager
    def _metrics_file(self) -> Iterator[None]:
        """metrics.jsonl, cut back to the lines that the state knows of."""
        self._metrics: FileIO | None = None
        self._unwritten, self._metrics_full = b"", False
        if self.checkpoint_dir is None or self.rank != 0:
            yield
            return
        path = self.checkpoint_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        known = self.state.extra.get("metrics_lines", 0)
        if len(lines) < known:
            logger.warning(f"{path} lacks {known - len(lines)} lines of the steps before step {self.state.step}")
        atomic_write(path, "".join(lines[:known]))
        with open(path, "ab", buffering=0) as self._metrics:
            yield
            self._write_metrics()

    def _write_metrics(self) -> None:
        """What a full disk refuses is kept, and tried again with the next line."""
        try:
            while self._metrics is not None and self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
            self._metrics_full = False
        except OSError as error:
            if not self._metrics_full:
                logger.warning(f"could not write {self.checkpoint_dir}/metrics.jsonl ({error}): its lines wait until there is room")
            self._metrics_full = True

    def _save_if_due(self) -> None:
        state, every = self.state, self.run_config.save_every
        last = state.step >= state.num_iterations or bool(self.stop_signal)
        due = last or (state.step % every == 0 if every > 0 else every < 0 and self._save_now)
        if self.checkpoint_dir is None or state.step == 0 or state.step == self._saved_step or not due:
            return
        self._finish_save()
        self._save = checkpoint_manager.Save(
            self.checkpoint_dir,
            state.step,
            self.optimizer.weights(self.model),
            self.optimizer.state_shards(),
            self._meta(),
            self.rank,
            snapshot=not last,
        )
        self._saved_step, self._saved_at, self._save_now = state.step, time.monotonic(), False
        if last:
            self._finish_save(last)
        gc.collect()

    def _finish_save(self, last: bool = False) -> None:
        """Make the step exist whose files have been written. If they could not be, the previous step and the training stay; raises
        UserError where there is no training left (`last`)."""
        save, self._save = self._save, None
        if save is None:
            return
        self._write_metrics()
        problem = f"could not save step {save.step} to {save.directory}"
        try:
            save.commit()
        except OSError as error:
            if last:
                raise UserError(f"{problem} ({error}): make room, then go on with `{self.resume_command}`") from error
            logger.warning(f"{problem} ({error}): training goes on, the previous save stays, and the next one is tried in its time")
            return
        if self.rank == 0:
            checkpoint_manager.purge(save.directory, self.run_config.keep_last, self.run_config.keep_every)
            logger.info(f"saved step {save.step} to {save.directory}")

    def _meta(self) -> dict[str, Any]:
        return {
            "stage": self.stage.name,
            "val_bpb": self.state.last_val_bpb,
            "model_config": self.model.config.to_dict(),
            "user_config": self.user_config,
            "run_state": self.state.to_dict(),
            "world_size": self.world_size,
            "software": self.software,
            **({} if self.tokenizer_sha256 is None else {"tokenizer": self.tokenizer_sha256}),
        }

    def _update_saved_meta(self) -> None:
        """What the hooks found out belongs to the step that was saved just before them."""
        if self._save is not None:
            self._save.meta_data = self._meta()
            return
        if self.checkpoint_dir is None or self.rank != 0:
            return
        try:
            checkpoint_manager.update_meta(self.checkpoint_dir, self.state.step, self._meta())
        except OSError as error:
            logger.warning(f"could not bring the meta of step {self.state.step} up to date ({error}): resuming evaluates that step again")


@contextlib.contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """STOPPING signals go to `handler` inside the block (in the main thread, which alone may say so)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in STOPPING if not _is_ignored(number)]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _is_ignored(number: signal.Signals) -> bool:
    """Whether SIGHUP is not meant for this process, as under nohup. torchrun passes it on all the same, before it kills its processes."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN and not under_torchrun


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting cycles in the middle of a step stalls the device, and finds little: it is done by hand at hooks and saves."""
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

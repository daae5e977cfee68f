"""The parts of an optimizer step that know neither stage nor run: passes, gradients, loss scale,
diagnosis."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zangchat.config import RunState
from zangchat.flops import peak_flops
from zangchat.optim import OptimizerGroup
from zangchat.runtime import collectives

if TYPE_CHECKING:
    from zangchat.dataloader import Batch
    from zangchat.gpt import GPT

SMOOTHING = 0.9  # of the training loss and the pace shown
FIRST_LOSS_SCALE = 2.0**16
PATIENCE = 1000  # updates without an overflow before the loss scale is doubled

Loss = Callable[[Callable[..., Tensor], "Batch"], Tensor]  # (model, micro-batch) -> sum of losses


def sum_loss(model: Callable[..., Tensor], batch: "Batch") -> Tensor:
    """Sum of the next-token losses (nats) of the supervised tokens, times the batch's loss
    weights.
    """
    weights = {} if batch.loss_weights is None else {"loss_weights": batch.loss_weights}
    return model(batch.inputs, batch.targets, loss_reduction="sum", **weights)


@contextlib.contextmanager
def strictly_deterministic() -> Iterator[None]:
    """Turn torch's warnings of --deterministic into errors: with "warn only", the backward pass of
    attention on CUDA adds in any order.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


class Passes:
    """Runs a batch through the model, `rows_per_pass` rows at a time, and adds up their
    gradients.
    """

    def __init__(
        self,
        model: "GPT",
        optimizer: OptimizerGroup,
        device: torch.device,
        rows_per_pass: int,
    ) -> None:
        if rows_per_pass < 1:
            raise ValueError(f"a pass takes at least one row, not {rows_per_pass}")
        self.model, self.optimizer, self.device = model, optimizer, device
        self.rows_per_pass = rows_per_pass

    def backward(self, loss: Loss, batch: "Batch", factor: float) -> float:
        """Add the gradients of `factor` times the sum of this rank's losses; returns that sum."""
        losses = []
        passes = self._slices(batch)
        lockstep = self.optimizer.lockstep
        cast = contextlib.nullcontext() if lockstep else self.model.cast_once()
        with cast, strictly_deterministic():
            for number, rows in enumerate(passes, 1):
                loss_sum = loss(self.model, self._on_device(batch, rows))
                if number == len(passes):
                    self.optimizer.last_pass()
                (loss_sum * factor).backward()
                losses.append(loss_sum.detach())
        return math.fsum(torch.stack(losses).tolist()) if losses else 0.0

    def _slices(self, batch: "Batch") -> list[slice]:
        """Unless the ranks run in lockstep, without the slices that have no supervised token."""
        starts = range(0, batch.inputs.size(0), self.rows_per_pass)
        slices = [slice(start, start + self.rows_per_pass) for start in starts]
        if self.optimizer.lockstep:
            return slices
        return [rows for rows in slices if bool((batch.targets[rows] >= 0).any())]

    def _on_device(self, batch: "Batch", rows: slice) -> "Batch":
        names = ("inputs", "targets", "loss_weights")
        parts = {name: part for name in names if (part := getattr(batch, name)) is not None}
        moved = {
            name: part[rows].to(self.device, non_blocking=True) for name, part in parts.items()
        }
        return replace(batch, **moved)


class LossScale:
    """A factor on the loss that keeps small gradients above fp16's underflow, as torch's
    GradScaler.

    Its state is in the RunState. Without fp16 the factor is 1.
    """

    def __init__(self, state: RunState, dtype: torch.dtype | None) -> None:
        self.state = state
        if dtype == torch.float16 and state.loss_scale is None:
            state.loss_scale = FIRST_LOSS_SCALE

    @property
    def value(self) -> float:
        return 1.0 if self.state.loss_scale is None else self.state.loss_scale

    def after_update(self) -> None:
        state = self.state
        if state.loss_scale is not None:
            state.steps_at_scale += 1
            if state.steps_at_scale >= PATIENCE:
                state.loss_scale, state.steps_at_scale = state.loss_scale * 2, 0

    def after_overflow(self) -> bool:
        """Halve the scale; False if it is 1 already, so that it cannot be the cause."""
        if self.value <= 1:
            return False
        self.state.loss_scale, self.state.steps_at_scale = self.value / 2, 0
        return True


def describe_non_finite(
    optimizer: OptimizerGroup, loss_sum: float, loss: float, grad_norm: float
) -> str:
    """Which rank's loss, or else which parameter's gradient, is not finite. All ranks call it."""
    finite = collectives.gather(math.isfinite(loss_sum))
    culprits = ", ".join(str(rank) for rank, is_finite in enumerate(finite) if not is_finite)
    if not culprits:
        return f"gradient norm {grad_norm}, {_first_non_finite_gradient(optimizer)}"
    return f"loss {loss} (rank {culprits})" if len(finite) > 1 else f"loss {loss}"


def _first_non_finite_gradient(optimizer: OptimizerGroup) -> str:
    """In the order of the model, over all ranks."""
    names = list(optimizer.names.values())
    gradients = optimizer.gradients().items()
    own = [name for name, gradient in gradients if not bool(torch.isfinite(gradient).all())]
    own_first = min(map(names.index, own), default=len(names))
    first = -round(collectives.max_over_ranks([-own_first])[0])
    return f"first in {names[first]}" if first < len(names) else "each gradient finite by itself"


class Pace:
    """Tokens per second, and the share of the device's peak FLOP/s (mfu) if the peak is known, as
    moving averages over whole steps: waiting for their data included, evaluations and saves not.

    The first step, which pays for compiling and warming up, stands for itself.
    """

    def __init__(self, model: "GPT", device: torch.device, world_size: int) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = peak_flops(name, getattr(model, "compute_dtype", torch.float32))
        self.peak = peak * world_size if peak else None
        self.flops_per_token = model.estimate_flops()
        self._began: float | None = None  # the step under way
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0  # the averages, not debiased

    def begin(self) -> None:
        """A step begins, unless one is under way."""
        if self._began is None:
            self._began = time.monotonic()

    def end(self, tokens: int) -> dict[str, float]:
        """The metrics of the step under way, which took `tokens` on all ranks."""
        assert self._began is not None
        seconds, self._began = time.monotonic() - self._began, None
        keep = SMOOTHING if self._steps > 1 else 0.0
        self._tokens = keep * self._tokens + (1 - keep) * tokens
        self._seconds = keep * self._seconds + (1 - keep) * seconds
        self._steps += 1
        tok_per_sec = self._tokens / max(self._seconds, 1e-9)
        pace = {"seconds": seconds, "tok_per_sec": tok_per_sec}
        if self.peak:
            pace["mfu"] = tok_per_sec * self.flops_per_token / self.peak
        return pace

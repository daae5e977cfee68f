"""The few collective operations that the training loop and the checkpoints need; without a process
group each is the identity.

Small values only: gradients and parameters travel in optim.py.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from zangchat.errors import UserError

T = TypeVar("T")


def is_active() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world() -> tuple[int, int]:
    """(rank, world size) of the running process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if is_active() else (0, 1)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    return _reduced(values, dist.ReduceOp.SUM)


def max_over_ranks(values: Sequence[float]) -> list[float]:
    return _reduced(values, dist.ReduceOp.MAX)


def gather(value: T) -> list[T]:
    """Every rank's value, by rank: anything that pickles, for it stays among the processes of one
    run.
    """
    values = [value]
    if is_active():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T) -> T:
    """Rank 0's value, on every rank."""
    return gather(value)[0]


def decided(choose: Callable[[], T]) -> T:
    """What rank 0 chooses, on every rank: files may change between two looks. Its UserError is
    raised on all.
    """
    found: T | None = None
    refusal: UserError | None = None
    if world()[0] == 0:
        try:
            found = choose()
        except UserError as error:
            refusal = error
    found, refusal = from_rank_0((found, refusal))
    if refusal is not None:
        raise refusal
    return cast(T, found)


def barrier() -> None:
    if is_active():
        dist.barrier()


def _reduced(values: Sequence[float], operation: "dist.ReduceOp.RedOpType") -> list[float]:
    if not is_active():
        return [float(value) for value in values]
    device = _device()
    # Counts stay exact: float64 holds every whole number up to 2^53 (MPS, which lacks it, has no
    # collectives either).
    vector = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(vector, op=operation)
    return vector.tolist()


def _device() -> torch.device:
    """The device of this backend's tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if dist.get_backend() == "nccl"
        else torch.device("cpu")
    )

"""The common part of the optimizers: parameters are dealt to the ranks in pieces, and each piece's
gradient, state and update belong to one rank.

A piece is all rows of a parameter, or one of as many equal slices of them as there are ranks. In a
step
  1. `GradientSums` adds up each piece's gradient on the rank that owns it, while the backward pass
     still computes the others;
  2. the owner updates the piece (the subclasses' part);
  3. the result goes to all ranks.
Together they move as much as a reduce-scatter and an all-gather (arXiv:1910.02054), without copies
into common buffers.
"""

import inspect
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

SHARD_NUMEL = 2**16  # smaller parameters are not worth cutting
Params = Iterable[Tensor] | Iterable[dict[str, Any]]


class Piece(NamedTuple):
    """Rows [first, end) of a parameter, and the rank they belong to. A scalar counts as one row."""

    first: int
    end: int
    owner: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor that is like the parameter."""
        return tensor[self.first : self.end] if tensor.dim() else tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """A torch optimizer that knows its rank. `state` has only parameters with an `own_piece`."""

    # torch's own method has a wrapper whose only effect outside of torch.compile is to import the
    # compiler, which takes seconds
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(
        self, params: Params, defaults: dict[str, Any], rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size}")
        self.rank, self.world_size = rank, world_size
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, on as many ranks as saved it; but state keeps its dtype.

        torch would round the fp32 state of a bf16 parameter to bf16.
        """
        super().load_state_dict(state_dict)
        numbers = (number for group in state_dict["param_groups"] for number in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for number, p in zip(numbers, params, strict=True):
            for key, tensor in state_dict["state"].get(number, {}).items():
                self.state[p][key] = tensor.to(p.device, copy=True)

    @cached_property
    def pieces(self) -> dict[Tensor, list[Piece]]:
        """How each parameter is dealt. Here: a large one with evenly divisible rows is cut, the
        others go round robin."""
        dealt, ranks = {}, self.world_size
        for index, p in enumerate(p for group in self.param_groups for p in group["params"]):
            rows = p.size(0) if p.dim() else 1
            dealt[p] = [Piece(0, rows, index % ranks)]
            if ranks > 1 and p.numel() >= SHARD_NUMEL and rows % ranks == 0:
                share = rows // ranks
                dealt[p] = [Piece(rank * share, (rank + 1) * share, rank) for rank in range(ranks)]
        return dealt

    def own_piece(self, p: Tensor) -> Piece | None:
        """The part of p that this rank keeps state for and updates."""
        return next((piece for piece in self.pieces[p] if piece.owner == self.rank), None)

    def update_groups(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """The group's parameters, as lists of those that one `update` takes."""
        return [[p] for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Update every piece on its rank from the gradients summed there, and send it to all."""
        broadcasts = []
        for group in self.param_groups:
            for params in self.update_groups(group):
                self.update([p for p in params if self.own_piece(p)], group)
                if self.world_size > 1:
                    broadcasts += [
                        dist.broadcast(piece.of(p.data), src=piece.owner, async_op=True)
                        for p in params
                        for piece in self.pieces[p]
                    ]
        for work in broadcasts:
            work.wait()

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update this rank's piece of each of `params`, in place."""
        for p in params:
            if p.grad is not None and (piece := self.own_piece(p)) is not None:
                self.update_rows(p, piece.of(p), piece.of(p.grad), group)

    def update_rows(self, p: Tensor, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Update rows of p, in place, from their gradient: for optimizers that work by element."""
        raise NotImplementedError


class GradientSums:
    """Adds up gradients over ranks, each piece on its owner, while the backward pass continues.

    The sums run in `dtype`. All ranks must begin them in the order of `pieces`, even if later ones
    are ready; the order of the backward pass is best. A rank without a gradient adds zeros.
    """

    def __init__(self, pieces: Mapping[Tensor, list[Piece]], rank: int, dtype: torch.dtype) -> None:
        self.pieces, self.rank, self.dtype = dict(pieces), rank, dtype
        self._begin_step()
        for p in self.pieces:
            p.register_post_accumulate_grad_hook(self._on_gradient)

    def _begin_step(self) -> None:
        # set before a step's last backward pass; earlier ones only accumulate
        self.last_pass = False
        self._ready: set[Tensor] = set()
        self._waiting = list(self.pieces)  # not begun, in order
        self._reductions: list[tuple[Any, Tensor, Tensor]] = []  # work, sent, target of the sum

    def _on_gradient(self, p: Tensor) -> None:
        if self.last_pass:
            self._ready.add(p)
            while self._waiting and self._waiting[0] in self._ready:
                self._begin(self._waiting.pop(0))

    @torch.no_grad()
    def _begin(self, p: Tensor) -> None:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        for piece in self.pieces[p]:
            rows = piece.of(p.grad)
            sent = rows.to(self.dtype).contiguous()
            self._reductions.append((dist.reduce(sent, dst=piece.owner, async_op=True), sent, rows))

    @torch.no_grad()
    def finish(self) -> None:
        """After the last backward pass: gradients hold the sums in the rows that this rank owns."""
        while self._waiting:
            self._begin(self._waiting.pop(0))
        for work, sent, rows in self._reductions:
            work.wait()
            if sent is not rows:
                rows.copy_(sent)
        for p, pieces in self.pieces.items():
            if all(piece.owner != self.rank for piece in pieces):
                p.grad = None
        self._begin_step()

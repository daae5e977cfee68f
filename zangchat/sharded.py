"""What Muon and AdamW share: each rank keeps the state of some rows of some parameters, and updates those."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """A torch optimizer that knows its rank. `state` holds entries only for parameters of which `own_rows` is not None."""

    # torch's own method carries a wrapper whose only effect, outside of torch.compile, is to import the compiler: seconds of start-up
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], defaults: dict[str, Any], rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist among {world_size}")
        self.rank, self.world_size = rank, world_size
        super().__init__(params, defaults)

    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def own_rows(self, p: Tensor) -> tuple[int, int] | None:
        """(first, end) of the rows of p that this rank keeps state for and updates, or None. Here all; a scalar counts as one row."""
        return 0, p.size(0) if p.dim() else 1

"""AdamW (arXiv:1711.05101) whose state is sharded over ranks; one implementation for one and for many ranks.

A large parameter whose rows divide evenly is cut into equal row slices, one per rank; every other one belongs whole to one rank.
A rank keeps state for its own rows, updates those, and the results are gathered. Gradients must be equal on all ranks. The maths is
that of torch.optim.AdamW: decoupled weight decay, and eps added after the bias correction.

A parameter that is not fp32 (an embedding stored in bf16) is updated through an fp32 master copy of the own rows, kept in the
state: late in training the steps are smaller than bf16 can represent.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from zangchat.sharded import ShardedOptimizer

SHARD_NUMEL = 2**16  # smaller parameters are not worth cutting


class AdamW(ShardedOptimizer):
    """`step()` reads lr, betas, eps and weight_decay from its param groups, so schedules may change them.

    State of an own slice: exp_avg and exp_avg_sq like it (fp32), step (scalar), and master where the parameter is not fp32.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}, rank, world_size)

    def is_sharded(self, p: Tensor) -> bool:
        """Whether the rows of p are dealt to all ranks."""
        return self.world_size > 1 and p.dim() > 0 and p.numel() >= SHARD_NUMEL and p.size(0) % self.world_size == 0

    def own_rows(self, p: Tensor) -> tuple[int, int] | None:
        rows = p.size(0) if p.dim() else 1
        if self.is_sharded(p):
            share = rows // self.world_size
            return self.rank * share, (self.rank + 1) * share
        return (0, rows) if self._owner(p) == self.rank else None

    def _owner(self, p: Tensor) -> int:
        index = next(i for i, other in enumerate(self.params()) if other is p)
        return index % self.world_size

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                rows = self.own_rows(p)
                if rows is not None and p.grad is not None:
                    self._update(p, rows, group)
                if self.world_size > 1:
                    self._share(p, rows)

    def _update(self, p: Tensor, rows: tuple[int, int], group: dict[str, Any]) -> None:
        assert p.grad is not None
        mine, grad = (t if t.dim() == 0 else t[rows[0] : rows[1]] for t in (p, p.grad))
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(mine, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(mine, dtype=torch.float32)
        if p.dtype == torch.float32:
            state.pop("master", None)  # from a run that stored this parameter in 16 bits
        elif "master" not in state:
            state["master"] = mine.float()
        target = state.get("master", mine)
        beta1, beta2 = group["betas"]
        fused_adamw(
            [target],
            [grad.float()],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=target.device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if target is not mine:
            mine.copy_(target)

    def _share(self, p: Tensor, rows: tuple[int, int] | None) -> None:
        if not self.is_sharded(p):
            dist.broadcast(p, src=self._owner(p))
            return
        assert rows is not None
        dist.all_gather(list(p.data.chunk(self.world_size)), p.data[rows[0] : rows[1]].clone())

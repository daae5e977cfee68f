"""AdamW (arXiv:1711.05101) with its state sharded over ranks; one implementation for one and many
ranks.

sharded.py deals the parameters to the ranks. The maths is that of torch.optim.AdamW: decoupled
weight decay, and eps added after the bias correction.

A parameter that is not fp32 (an embedding stored in bf16) is updated through an fp32 master copy of
the own rows, kept in the state: late in training the steps are smaller than bf16 can represent.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as fused_adamw

from zangchat.sharded import Params, ShardedOptimizer


class AdamW(ShardedOptimizer):
    """`step()` reads lr, betas, eps and weight_decay from its param groups.

    State of an owned slice: exp_avg and exp_avg_sq of its shape (fp32), step (scalar), and master
    if the parameter is not fp32.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **ranks: int,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **ranks)

    def update_rows(self, p: Tensor, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(rows, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(rows, dtype=torch.float32)
        if p.dtype == torch.float32:
            state.pop("master", None)  # from a run that stored this parameter in 16 bits
        elif "master" not in state:
            state["master"] = rows.float()
        target = state.get("master", rows)
        beta1, beta2 = group["betas"]
        fused_adamw(
            *([target], [grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]]),
            max_exp_avg_sqs=[],
            state_steps=[state["step"]],
            fused=target.device.type in ("cpu", "cuda"),
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            **{name: group[name] for name in ("lr", "weight_decay", "eps")},
        )
        if target is not rows:
            rows.copy_(target)

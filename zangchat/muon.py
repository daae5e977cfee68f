"""Muon: momentum, orthogonalised, for the matrices of the model; one implementation for one and for
many ranks.

Per matrix and step:
  1. Nesterov momentum on the gradient (https://kellerjordan.github.io/posts/muon);
  2. orthogonalisation by five Polar Express iterations (arXiv:2505.16932): the nearest
     semi-orthogonal matrix, from products only;
  3. NorMuon (arXiv:2510.05491): each neuron's row is divided by a running root mean square of its
     updates, the norm kept;
  4. cautious weight decay (arXiv:2510.12402): only for weights that it pulls the same way as the
     update.

Matrices of one shape are stacked and go through one batched product. With several ranks the
matrices of a shape are dealt round robin; a rank keeps state for its own and updates only those
(sharded.py).

Shapes: K matrices of one shape, R rows (outputs), C columns (inputs).
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from zangchat.sharded import Params, Piece, ShardedOptimizer

# Five Polar Express steps for singular values from 1e-3 to 1 after the division by the norm;
# tests/reference/muon.py derives them.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY = 1.02  # keeps rounding errors in 16-bit products from pushing a singular value past 1


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The polar factor U V^T of each of the (K, R, C) matrices, in `dtype`; approximately: its
    singular values are within about 0.2 of 1."""
    x = matrices.to(dtype)
    wide = x.size(-2) <= x.size(-1)
    if not wide:
        x = x.mT  # the Gram matrix below is then the small one
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 on GPUs whose tensor cores have it; older ones emulate it."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.bfloat16
    return torch.float32


def _neuron_dim(shape: torch.Size) -> int:
    """NorMuon sums over the shorter dimension: norms along the shorter side are all equal."""
    return -1 if shape[-2] >= shape[-1] else -2


class Muon(ShardedOptimizer):
    """Muon over 2-D parameters. `step()` reads lr, momentum and weight_decay from param groups.

    The update of a matrix has the root-mean-square size lr * sqrt(max(1, R/C) / max(R, C)).
    `ortho_dtype` None means `fast_dtype`. State of an own parameter: momentum (R, C) and
    second_moment (R, 1) or (1, C), fp32.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        beta2: float = 0.95,
        ortho_dtype: torch.dtype | None = None,
        **ranks: int,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "beta2": beta2}
        super().__init__(params, defaults, **ranks)
        self.ortho_dtype = ortho_dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.dim() != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}")

    def update_groups(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """By shape, in the order given."""
        stacks: dict[tuple[torch.Size, torch.dtype, torch.device], list[Tensor]] = {}
        for p in group["params"]:
            stacks.setdefault((p.shape, p.dtype, p.device), []).append(p)
        return list(stacks.values())

    @cached_property
    def pieces(self) -> dict[Tensor, list[Piece]]:
        return {
            p: [Piece(0, p.size(0), i % self.world_size)]
            for group in self.param_groups
            for stack in self.update_groups(group)
            for i, p in enumerate(stack)
        }

    def update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        R, C = params[0].shape
        states = [self._state(p) for p in params]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        keys = ("momentum", "second_moment")
        momentum, second = (torch.stack([state[key] for state in states]) for key in keys)

        update = torch.stack(grads).float()
        momentum.lerp_(update, 1 - group["momentum"])
        dtype = self.ortho_dtype or fast_dtype(update.device)
        update = orthogonalise(update.lerp_(momentum, group["momentum"]), dtype).float()

        # of shape (K, R, 1) or (K, 1, C)
        mean_square = update.square().mean(dim=_neuron_dim(params[0].shape), keepdim=True)
        second.lerp_(mean_square, 1 - group["beta2"])
        scale = second.clamp(min=1e-10).rsqrt()
        # rows have one length, so means of mean squares compare the norms of whole matrices
        squares = (mean_square, mean_square * scale.square())
        before, after = (m.mean(dim=(-2, -1), keepdim=True) for m in squares)
        update.mul_(scale * (before / after.clamp(min=1e-20)).sqrt())

        lr = group["lr"] * max(1.0, R / C) ** 0.5
        weights = torch.stack(params)
        decay = ((update * weights >= 0) * weights).mul_(lr * group["weight_decay"])
        weights.sub_(update.mul_(lr).add_(decay).to(weights.dtype))
        torch._foreach_copy_(params, list(weights))
        for key, stack in zip(keys, (momentum, second), strict=True):
            torch._foreach_copy_([state[key] for state in states], list(stack))

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            shape = (p.size(0), 1) if _neuron_dim(p.shape) == -1 else (1, p.size(1))
            state["momentum"] = torch.zeros_like(p, dtype=torch.float32)
            state["second_moment"] = torch.zeros(shape, dtype=torch.float32, device=p.device)
        return state

"""--fsdp: models that one device cannot hold, by torch's FSDP2 (arXiv:2304.11277); the only place
that knows of it.

Each rank keeps its rows of every parameter and gradient. A block's parameters are gathered only for
its own forward and backward pass, and its gradients are summed and cut up again after it. The
optimizers are those of optim.py on whole matrices: as many at a time as there are ranks are
gathered, each rank updates the one it keeps state for, and every rank takes its rows back. So the
maths of a step, the files of a checkpoint and its loading are the same as without: a run may
continue with or without --fsdp.

Tested: 2 and 4 processes on CPUs by gloo (tests/unit/test_fsdp.py). Untested: CUDA and NCCL, models
that need it. The model is filled on the CPU before it is cut up, so each process needs the whole
model, and its own part of the optimizer's state, in main memory once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from zangchat.optim import OptimizerGroup
from zangchat.runtime import collectives


class FSDPGroup(OptimizerGroup):
    """The optimizers of `group`, made and loaded for the whole model, after `model` was cut up over
    the ranks in place.
    """

    lockstep = True

    def __init__(self, group: OptimizerGroup, model: nn.Module, device: torch.device) -> None:
        super().__init__(group.optimizers, group.names, group.comm_dtype)
        self._sums = None  # FSDP sums after each block
        self.rank, self.world_size = collectives.world()
        _shard(model, device, group)
        named = dict(model.named_parameters())
        # DTensors
        self._parts: dict[Tensor, Any] = {p: named[name] for p, name in self.names.items()}
        for optimizer in self.optimizers:
            for state in optimizer.state.values():
                state.update({key: tensor.to(device) for key, tensor in state.items()})

    def _step(self, optimizer: Any) -> None:
        groups = optimizer.param_groups
        for portion in _portions(optimizer, self.world_size):
            for p in (p for group in portion for p in group["params"]):
                part = self._parts[p]
                p.data = part.detach().full_tensor()
                p.grad = None if part.grad is None else part.grad.full_tensor()
            optimizer.param_groups = portion
            optimizer.step()
            for p in (p for group in portion for p in group["params"]):
                local = self._parts[p].detach().to_local()
                rows = p.data.chunk(self.world_size)
                if self.rank < len(rows):  # of few rows the last ranks have none
                    local.copy_(rows[self.rank])
                _release(p, local.device)
        optimizer.param_groups = groups

    def zero_grad(self) -> None:
        for part in self._parts.values():
            part.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: self._parts[p].grad.to_local()
            for p, name in self.names.items()
            if self._parts[p].grad is not None
        }

    def model_weights(self, model: nn.Module) -> dict[str, Tensor]:  # noqa: ARG002
        """Gathers one parameter after the other, and keeps them on rank 0 only."""
        whole = {}
        for name, part in ((name, self._parts[p]) for p, name in self.names.items()):
            tensor = part.detach().full_tensor().cpu()
            if self.rank == 0:
                whole[name] = tensor
        return whole


def _shard(model: Any, device: torch.device, group: OptimizerGroup) -> None:
    mesh = init_device_mesh(device.type, (collectives.world()[1],))
    # each embedding by itself: it may have a dtype of its own
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    modules = [*tables, *model.transformer["h"], model]
    policy = MixedPrecisionPolicy(reduce_dtype=group.comm_dtype)
    for module in modules:
        whole = [p for p in module.parameters() if p in group.names]
        fully_shard(module, mesh=mesh, mp_policy=policy)
        for p in whole:  # on the device now, and kept alive by the optimizers
            _release(p, device)
    for module in modules:
        # the loss is divided by the tokens of all ranks already
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # a plain sum, which gloo knows as well
        # its buffers are made here: by a first evaluation, under inference_mode, they would be of
        # no use for training
        module.unshard()
        module.reshard()
    model.cos, model.sin = model.cos.to(device), model.sin.to(device)


def _release(p: Tensor, device: torch.device) -> None:
    """Keep shape and dtype of a whole parameter, without its memory."""
    p.grad = None
    p.data = torch.zeros((), dtype=p.dtype, device=device).expand(p.shape)


def _portions(optimizer: Any, world_size: int) -> Iterator[list[dict[str, Any]]]:
    """The optimizer's groups, `world_size` parameters at a time, which mostly belong to as many
    ranks.
    """
    singles = [
        {**group, "params": [p]}
        for group in optimizer.param_groups
        for params in optimizer.update_groups(group)
        for p in params
    ]
    for start in range(0, len(singles), world_size):
        yield singles[start : start + world_size]

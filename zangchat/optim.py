"""Which parameter goes to which optimizer, and what a training loop needs around them: gradient sums, norms, clipping, state.

State is exchanged in *shards*, keyed by parameter name, so that a run saved on some number of ranks goes on with any other:

    {name: {"shape": [rows, ...] of the whole parameter, "slice": [first, end) rows covered, "tensors": {key: tensor}}}

A tensor of one shard either covers those rows or, where one shard covers the whole parameter, belongs to it as a whole; scalars are
equal in all shards. `merge_shards` puts the shards of all ranks together into one such dict in which every slice is complete.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zangchat.adamw import AdamW
from zangchat.config import OPTIMIZERS, StepMultipliers
from zangchat.muon import Muon
from zangchat.sharded import ShardedOptimizer

Shards = dict[str, dict[str, Any]]
BUCKET_BYTES = 32 * 2**20  # gradients per collective: large enough for full bandwidth, small enough for a bounded copy


class SGD(ShardedOptimizer):
    """p -= lr * (grad + weight_decay * p), without state: the baseline that everything else has to beat. The same on every rank."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(p.grad.to(p.dtype), alpha=group["lr"])


class OptimizerGroup:
    """Several optimizers stepped as one. Base learning rates and weight decays are fixed here; each step multiplies them."""

    def __init__(self, optimizers: Sequence[ShardedOptimizer], names: Mapping[Tensor, str]) -> None:
        self.optimizers = list(optimizers)
        self.names = dict(names)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["initial_weight_decay"] = group["weight_decay"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, multipliers: StepMultipliers = StepMultipliers()) -> None:  # noqa: B008 (an immutable NamedTuple)
        """Update all parameters from their gradients, which must already be summed over ranks."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * multipliers.lr
            group["weight_decay"] = group["initial_weight_decay"] * multipliers.weight_decay
            if "momentum" in group:
                group["momentum"] = multipliers.momentum
        for optimizer in self.optimizers:
            self._step(optimizer)

    def _step(self, optimizer: ShardedOptimizer) -> None:
        optimizer.step()

    # What is another matter where parameters are cut up over the ranks (fsdp.py):

    lockstep = False  # whether ranks must run the same passes, even those without anything to learn

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """What this rank has of them, by name."""
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def sum_gradients(self, model: nn.Module) -> None:
        all_reduce_gradients(model)

    def grad_norm(self, model: nn.Module) -> Tensor:
        return global_grad_norm(model.parameters())

    def clip(self, model: nn.Module, max_norm: float, norm: Tensor) -> None:
        clip_gradients(model.parameters(), max_norm, norm)

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds; every rank asks, rank 0 alone needs the answer."""
        return model.state_dict()

    def zero_grad(self) -> None:
        for p in self.names:
            p.grad = None

    def state_shards(self) -> Shards:
        """This rank's part of the state: plain containers and tensors (not copies), see the module's docstring."""
        shards: Shards = {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                rows = optimizer.own_rows(p)
                assert rows is not None
                shards[self.names[p]] = {"shape": list(p.shape), "slice": list(rows), "tensors": dict(state)}
        return shards

    def load_shards(self, merged: Mapping[str, Mapping[str, Any]]) -> None:
        """Take this rank's part out of a complete state (see merge_shards; on one rank state_shards() is complete).

        A parameter without an entry starts without state, as one that has not been stepped yet. Raises ValueError for an unknown
        name, another shape or an incomplete slice.
        """
        unknown = set(merged) - set(self.names.values())
        if unknown:
            raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(unknown))}")
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for p in optimizer.params():
                name, rows = self.names[p], optimizer.own_rows(p)
                if name not in merged or rows is None:
                    continue
                entry = merged[name]
                whole = p.size(0) if p.dim() else 1
                if list(entry["shape"]) != list(p.shape):
                    raise ValueError(f"optimizer state of {name} has shape {list(entry['shape'])}, the parameter {list(p.shape)}")
                if list(entry["slice"]) != [0, whole]:
                    raise ValueError(f"optimizer state of {name} covers rows {list(entry['slice'])} of {whole}: merge all shards first")
                part = slice(None) if rows == (0, whole) else slice(*rows)
                for key, tensor in entry["tensors"].items():
                    optimizer.state[p][key] = (tensor[part] if tensor.dim() else tensor).to(p.device, copy=True)


def merge_shards(shards: Iterable[Mapping[str, Mapping[str, Any]]]) -> Shards:
    """The complete state from the shards of all ranks, in any order. Raises ValueError where rows of a parameter are missing."""
    pieces: dict[str, list[Mapping[str, Any]]] = {}
    for shard in shards:
        for name, entry in shard.items():
            pieces.setdefault(name, []).append(entry)
    merged: Shards = {}
    for name, entries in pieces.items():
        entries.sort(key=lambda entry: entry["slice"][0])
        shape, end = list(entries[0]["shape"]), 0
        for entry in entries:
            if entry["slice"][0] != end:
                raise ValueError(f"optimizer state of {name}: rows from {end} are missing or there twice")
            end = entry["slice"][1]
        if end != (shape[0] if shape else 1):
            raise ValueError(f"optimizer state of {name}: rows from {end} are missing")
        tensors = {
            key: first if first.dim() == 0 or len(entries) == 1 else torch.cat([entry["tensors"][key] for entry in entries])
            for key, first in entries[0]["tensors"].items()
        }
        merged[name] = {"shape": shape, "slice": [0, end], "tensors": tensors}
    return merged


def build_optimizer(
    model: nn.Module,
    *,
    embedding_lr: float,
    unembedding_lr: float,
    matrix_lr: float,
    weight_decay: float = 0.0,
    kind: str = "muon",
    betas: tuple[float, float] = (0.8, 0.95),
    ortho_dtype: torch.dtype | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> OptimizerGroup:
    """Embedding and head to AdamW with their learning rates, the matrices of the blocks to `kind`: muon, adamw or sgd (all by SGD).

    Learning rates are used as given (scaling by batch and width is the caller's); weight_decay acts on the matrices only.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer kind {kind!r}; there are {', '.join(OPTIMIZERS)}")
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    embedding, head = named["transformer.wte.weight"], named["lm_head.weight"]
    matrices = [p for p in named.values() if p is not embedding and p is not head]
    wrong = [name for name, p in named.items() if p.dim() != 2]
    if wrong:
        raise ValueError(f"no optimizer is planned for parameters that are not matrices: {', '.join(wrong)}")
    tables = [{"params": [embedding], "lr": embedding_lr}, {"params": [head], "lr": unembedding_lr}]
    blocks: dict[str, Any] = {"params": matrices, "lr": matrix_lr, "weight_decay": weight_decay}
    ranks = {"rank": rank, "world_size": world_size}
    optimizers: list[ShardedOptimizer]
    if kind == "muon":
        optimizers = [AdamW(tables, betas=betas, eps=1e-10, **ranks), Muon([blocks], ortho_dtype=ortho_dtype, **ranks)]
    elif kind == "adamw":
        optimizers = [AdamW([*tables, blocks], betas=betas, eps=1e-10, **ranks)]
    else:
        optimizers = [SGD([*tables, blocks], lr=matrix_lr)]
    return OptimizerGroup(optimizers, {p: name for name, p in named.items()})


@torch.no_grad()
def all_reduce_gradients(model: nn.Module) -> None:
    """Sum every gradient over all ranks, in fp32 buckets; nothing to do without a process group. A missing gradient counts as zero."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    bucket: list[Tensor] = []
    size = 0
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        size += 4 * p.numel()
        if size >= BUCKET_BYTES:
            _reduce_bucket(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce_bucket(bucket)


def _reduce_bucket(grads: list[Tensor]) -> None:
    flat = torch.cat([grad.flatten().float() for grad in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(part.view_as(grad))


@torch.no_grad()
def global_grad_norm(params: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, an fp32 scalar on their device; not finite if any gradient is not."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in params if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale all gradients by min(1, max_norm / norm), norm being their global norm. Call once, after the sum over ranks."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p in params:
        if p.grad is not None:
            p.grad.mul_(factor.to(p.grad.dtype))

"""Which parameter goes to which optimizer, and the group of them that a training loop steps:
gradient sums, norms, state.

State is exchanged in *shards*, keyed by parameter name, so that a run saved on some number of ranks
continues on any other:

    {name: {"shape": [rows, ...] of the whole parameter,
            "slice": [first, end) rows covered,
            "tensors": {key: tensor}}}

A tensor of a shard either covers those rows or, if the shard covers the whole parameter, belongs to
it as a whole; scalars are equal in all shards. `merge_shards` joins the shards of all ranks into
one such dict in which every slice is complete.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zangchat.adamw import AdamW
from zangchat.config import OPTIMIZERS, StepMultipliers
from zangchat.muon import Muon
from zangchat.sharded import GradientSums, Params, ShardedOptimizer

Shards = dict[str, dict[str, Any]]
VALUE_LR = 0.5  # of the embedding's rate, for value embeddings


class SGD(ShardedOptimizer):
    """p -= lr * (grad + weight_decay * p), without state: the baseline to beat."""

    def __init__(self, params: Params, lr: float, weight_decay: float = 0.0, **ranks: int) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, **ranks)

    def update_rows(self, p: Tensor, rows: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        lr = group["lr"]
        rows.mul_(1 - lr * group["weight_decay"]).sub_(grad.to(p.dtype), alpha=lr)


class OptimizerGroup:
    """Several optimizers stepped as one, with base rates and decays that each step multiplies.

    A loop over the group gives its optimizers, each a torch optimizer: [opt.state_dict() for opt in
    group] is the state of this rank, to be loaded on as many ranks as saved it; state_shards() can
    be loaded on any number. `names` in the order of the forward pass. Gradients are summed over
    ranks in `comm_dtype`.
    """

    def __init__(
        self,
        optimizers: Sequence[ShardedOptimizer],
        names: Mapping[Tensor, str],
        comm_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.optimizers = list(optimizers)
        self.names, self.comm_dtype = dict(names), comm_dtype
        owner = {p: optimizer for optimizer in self.optimizers for p in optimizer.pieces}
        self._own = {p: optimizer.own_piece(p) for p, optimizer in owner.items()}
        self._sums, first = None, self.optimizers[0]
        if first.world_size > 1:
            backwards = {p: owner[p].pieces[p] for p in reversed(self.names)}
            self._sums = GradientSums(backwards, first.rank, comm_dtype)
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["initial_weight_decay"] = group["weight_decay"]

    def __iter__(self) -> Iterator[ShardedOptimizer]:
        return iter(self.optimizers)

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

    # fsdp.py overrides these for parameters that are cut up over the ranks:

    lockstep = False  # whether ranks must run the same passes, even those with no supervised token

    def last_pass(self) -> None:
        """The next backward pass is the last of this step: its gradients may be summed."""
        if self._sums is not None:
            self._sums.last_pass = True

    def sum_gradients(self) -> None:
        """Over ranks; a missing gradient counts as zero. Afterwards `gradients` holds the sums."""
        if self._sums is not None:
            self._sums.finish()

    def gradients(self) -> dict[str, Tensor]:
        """This rank's part of them, by name: all rows, once, over all ranks."""
        return {
            name: piece.of(p.grad)
            for p, name in self.names.items()
            if p.grad is not None and (piece := self._own[p]) is not None
        }

    def model_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights, for a checkpoint; every rank calls it, only rank 0 uses the result."""
        return model.state_dict()

    def zero_grad(self) -> None:
        for p in self.names:
            p.grad = None

    def state_shards(self) -> Shards:
        """This rank's part of the state (no copies), in the form of the module's docstring."""
        shards: Shards = {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                piece = self._own[p]
                assert piece is not None
                entry = {"shape": list(p.shape), "slice": list(piece[:2]), "tensors": dict(state)}
                shards[self.names[p]] = entry
        return shards

    def load_shards(self, merged: Mapping[str, Mapping[str, Any]]) -> None:
        """Take this rank's part out of a complete state (of merge_shards, or of a single rank).

        A parameter without an entry starts without state, like one that has not been stepped yet.
        Raises ValueError for an unknown name, another shape or form, or an incomplete slice.
        """
        if not is_shards(merged):
            advice = "load state dicts with each optimizer's load_state_dict"
            raise ValueError(f"this is not the form of state_shards(): {advice}")
        unknown = set(merged) - set(self.names.values())
        if unknown:
            raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(unknown))}")
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for p in optimizer.pieces:
                name, piece = self.names[p], self._own[p]
                if name not in merged or piece is None:
                    continue
                shape, rows, tensors = (merged[name][key] for key in ("shape", "slice", "tensors"))
                whole, problem = p.size(0) if p.dim() else 1, f"optimizer state of {name}"
                if list(shape) != list(p.shape):
                    own = f"the parameter {list(p.shape)}"
                    raise ValueError(f"{problem} has shape {list(shape)}, {own}")
                if list(rows) != [0, whole]:
                    advice = "merge all shards first"
                    raise ValueError(f"{problem} covers rows {list(rows)} of {whole}: {advice}")
                # a tensor that belongs to the whole parameter may have other rows than it
                part = slice(None) if piece[:2] == (0, whole) else slice(*piece[:2])
                for key, tensor in tensors.items():
                    rows_of = tensor[part] if tensor.dim() else tensor
                    optimizer.state[p][key] = rows_of.to(p.device, copy=True)


def is_shards(data: Any) -> bool:
    """Whether this has the form that state_shards() gives."""
    keys = {"shape", "slice", "tensors"}
    return isinstance(data, Mapping) and all(
        isinstance(entry, Mapping) and keys <= entry.keys() for entry in data.values()
    )


def merge_shards(shards: Iterable[Mapping[str, Mapping[str, Any]]]) -> Shards:
    """The complete state from all ranks' shards, in any order; ValueError if rows are missing."""
    pieces: dict[str, list[Mapping[str, Any]]] = {}
    for shard in shards:
        for name, entry in shard.items():
            pieces.setdefault(name, []).append(entry)
    merged: Shards = {}
    for name, entries in pieces.items():
        entries.sort(key=lambda entry: entry["slice"][0])
        shape, end = list(entries[0]["shape"]), 0
        whole = shape[0] if shape else 1
        for first, last in (*(entry["slice"] for entry in entries), (whole, whole)):
            if first != end:
                problem = f"optimizer state of {name}: rows from {end} are missing or there twice"
                raise ValueError(problem)
            end = last
        tensors = dict(entries[0]["tensors"])
        for key, first in tensors.items():
            if first.dim() and len(entries) > 1:
                tensors[key] = torch.cat([entry["tensors"][key] for entry in entries])
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
    comm_dtype: torch.dtype = torch.float32,
    rank: int = 0,
    world_size: int = 1,
) -> OptimizerGroup:
    """Embedding and head to AdamW, the blocks' matrices to `kind`: muon, adamw, or sgd (for all).

    Learning rates are used as given (scaling by batch and width is the caller's task); weight_decay
    acts on the matrices only. `ortho_dtype` None: bf16 if the model computes in it, else Muon's.
    """
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer kind {kind!r}; there are {', '.join(OPTIMIZERS)}")
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    embedding, head = named["transformer.wte.weight"], named["lm_head.weight"]
    values = [p for name, p in named.items() if name.endswith("value_embed.weight")]
    tables = {embedding, head, *values}
    matrices = [p for p in named.values() if p not in tables]
    if wrong := [name for name, p in named.items() if p.dim() != 2]:
        problem = "no optimizer is planned for parameters that are not matrices"
        place = "zangchat/optim.py:build_optimizer"
        advice = f"leave them out (bias=False), or give them to one in {place}"
        raise ValueError(f"{problem}: {', '.join(wrong)}: {advice}")
    groups: list[dict[str, Any]] = [
        {"params": [embedding], "lr": embedding_lr},
        {"params": [head], "lr": unembedding_lr},
        *([{"params": values, "lr": VALUE_LR * embedding_lr}] if values else []),
        {"params": matrices, "lr": matrix_lr, "weight_decay": weight_decay},
    ]
    ranks, optimizers = {"rank": rank, "world_size": world_size}, list[ShardedOptimizer]()
    if kind == "muon":
        if ortho_dtype is None and getattr(model, "compute_dtype", None) == torch.bfloat16:
            ortho_dtype = torch.bfloat16
        optimizers = [Muon([groups.pop()], ortho_dtype=ortho_dtype, **ranks)]
    if kind == "sgd":
        optimizers = [SGD(groups, lr=matrix_lr, **ranks)]
    else:
        optimizers.insert(0, AdamW(groups, betas=betas, eps=1e-10, **ranks))
    return OptimizerGroup(optimizers, {p: name for name, p in named.items()}, comm_dtype)


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all together, an fp32 scalar on their device; not finite if any is not."""
    norms = [_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)).float() if norms else torch.zeros(())


def _norm(gradient: Tensor) -> Tensor:
    # a CPU's fp32 sum over millions of squares is a percent off, less if ranks cut the matrix
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dtype=torch.float32)
    rows = torch.linalg.vector_norm(gradient, dim=-1, dtype=torch.float32)
    return torch.linalg.vector_norm(rows, dtype=torch.float64)

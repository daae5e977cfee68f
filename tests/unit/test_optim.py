"""Groups, schedules, gradient sums and clipping, on one and two ranks; saved state."""

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from zangchat.checkpoint_manager import load_checkpoint, save_checkpoint
from zangchat.config import GPTConfig, StepMultipliers
from zangchat.gpt import GPT
from zangchat.optim import OptimizerGroup, build_optimizer, global_norm, merge_shards
from zangchat.runtime import collectives

# wide enough to cut the embedding into rows per rank (2^16 elements); an odd number of layers gives
# ranks unequal shares
CONFIG = GPTConfig(sequence_len=8, vocab_size=1020, n_layer=3, n_head=2, n_kv_head=1, n_embd=64)
RATES = {"embedding_lr": 0.05, "unembedding_lr": 0.01, "matrix_lr": 0.02, "weight_decay": 0.2}
STEPS = 6


def build_model(dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(CONFIG)
    model.init_weights(head_init_scale=0.05, generator=torch.Generator().manual_seed(0))
    model.set_compute_dtype(dtype)
    return model


def multipliers(step: int) -> StepMultipliers:
    return StepMultipliers(lr=1 - step / 10, momentum=0.85 + step / 100, weight_decay=1 - step / 20)


def train(
    model: GPT, optimizer: OptimizerGroup, first: int, last: int, rank: int = 0, world_size: int = 1
) -> None:
    """Steps [first, last) on random gradients, cut into one part per rank.

    The parts are multiples of 2^-10, so their sum is exact and only the optimizers are compared.
    With rounded sums Adam would turn the last bit of a gradient near zero into a full step.
    """
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            parts = [
                torch.randint(-512, 512, p.shape, generator=generator) / 1024 for _ in range(2)
            ]
            p.grad = (parts[rank] if world_size == 2 else parts[0] + parts[1]).to(p.dtype)
        optimizer.sum_gradients()
        optimizer.step(multipliers(step))
        optimizer.zero_grad()


def rows_of_a_step(rank: int = 0, world_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randint(0, CONFIG.vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = rows[rank * 4 // world_size : (rank + 1) * 4 // world_size]
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def learn(model: GPT, optimizer: OptimizerGroup, rank: int = 0, world_size: int = 1) -> list[float]:
    """Ten real steps on the same rows, each rank on its share.

    Returns the losses of this rank's rows and the last step's clipped gradient norm.
    """
    losses = []
    for _ in range(10):
        loss = model(*rows_of_a_step(rank, world_size), loss_reduction="sum") / 32
        optimizer.last_pass()
        loss.backward()
        optimizer.sum_gradients()
        gradients = optimizer.gradients().values()
        norm = collectives.sum_over_ranks([float(global_norm(gradients)) ** 2])[0] ** 0.5
        for gradient in gradients:
            gradient.mul_(min(0.5 / norm, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [*losses, norm]


def _rank(rank: int, folder: str) -> None:
    """One of two processes: for each kind, run and save half way, rerun the second half, and learn.

    The second half starts from the state of one rank.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    ranks = {"rank": rank, "world_size": 2}
    for kind in ("muon", "adamw", "sgd"):
        model = build_model()
        optimizer = build_optimizer(model, kind=kind, **RATES, **ranks)
        train(model, optimizer, 0, STEPS // 2, **ranks)
        torch.save((model.state_dict(), optimizer.state_shards()), f"{folder}/{kind}_half{rank}.pt")
        train(model, optimizer, STEPS // 2, STEPS, **ranks)
        torch.save(model.state_dict(), f"{folder}/{kind}_whole{rank}.pt")

        weights, shards = torch.load(f"{folder}/{kind}_half_alone.pt", weights_only=True)
        model.load_state_dict(weights)
        optimizer = build_optimizer(model, kind=kind, **RATES, **ranks)
        optimizer.load_shards(merge_shards([shards]))
        train(model, optimizer, STEPS // 2, STEPS, **ranks)
        torch.save(model.state_dict(), f"{folder}/{kind}_from_alone{rank}.pt")

        model = build_model()
        torch.save(
            learn(model, build_optimizer(model, kind=kind, **RATES, **ranks), **ranks),
            f"{folder}/{kind}_learn{rank}.pt",
        )
    dist.destroy_process_group()


def _summing_rank(rank: int, folder: str, world_size: int) -> None:
    """Compare sums started during and after the backward pass with an all-reduce of gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    # ranks have equally many passes, unless `passes` limits them
    rows = [part.split(1) for part in rows_of_a_step(rank, world_size)]
    for kind, dtype in [("muon", torch.float32), ("adamw", torch.bfloat16), ("sgd", torch.float32)]:
        for comm_dtype, tolerance in [(torch.float32, 1e-6), (torch.bfloat16, 2**-7 * world_size)]:
            # in the last case, rank 0 has no pass
            for early, passes in [(True, 2), (False, 2), (True, rank)]:
                model = build_model(dtype)
                optimizer = build_optimizer(
                    model,
                    kind=kind,
                    **RATES,
                    comm_dtype=comm_dtype,
                    rank=rank,
                    world_size=world_size,
                )
                begun: list[int] = []
                model.wte.weight.register_hook(
                    lambda _, sums=optimizer._sums, begun=begun: begun.append(len(sums._reductions))
                )

                def learn(last_pass, model=model, passes=passes):
                    passed_rows = list(zip(*rows, strict=True))[:passes]
                    for number, (inputs, targets) in enumerate(passed_rows, 1):
                        if number == len(passed_rows):
                            last_pass()
                        model(inputs, targets, loss_reduction="sum").backward()

                learn(lambda: None)
                expected = {
                    name: torch.zeros(p.shape) if p.grad is None else p.grad.float()
                    for p, name in optimizer.names.items()
                }
                for gradient in expected.values():
                    dist.all_reduce(gradient)
                optimizer.zero_grad()
                begun.clear()
                learn(optimizer.last_pass if early else lambda: None)
                if begun:  # the embedding's gradient is the last: all other sums were in progress
                    others = sum(
                        len(pieces)
                        for o in optimizer.optimizers
                        for p, pieces in o.pieces.items()
                        if p is not model.wte.weight
                    )
                    assert begun == [0] * (len(begun) - 1) + [others if early else 0]
                optimizer.sum_gradients()
                found = optimizer.gradients()
                for p, name in optimizer.names.items():
                    piece = optimizer._own[p]
                    assert (piece is None) == (name not in found)
                    if piece is not None:
                        want = piece.of(expected[name])
                        error = (found[name].float() - want).abs().max() / want.abs().max().clamp(
                            min=1e-3
                        )
                        assert error <= max(tolerance, 2**-7 * (p.dtype == torch.bfloat16)), (
                            kind,
                            name,
                            error,
                        )
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_gets_the_sums_of_its_rows_at_any_start(world_size: int, tmp_path: Path) -> None:
    mp.start_processes(
        _summing_rank,
        args=(str(tmp_path), world_size),
        nprocs=world_size,
        start_method="forkserver",
    )


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the half-way state of one rank and the results of two ranks.

    One launch serves all tests, since it is slow.
    """
    folder = tmp_path_factory.mktemp("ranks")
    for kind in ("muon", "adamw", "sgd"):
        model = build_model()
        optimizer = build_optimizer(model, kind=kind, **RATES)
        train(model, optimizer, 0, STEPS // 2)
        torch.save((model.state_dict(), optimizer.state_shards()), folder / f"{kind}_half_alone.pt")
        train(model, optimizer, STEPS // 2, STEPS)
        torch.save(model.state_dict(), folder / f"{kind}_alone.pt")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return folder


def load(path: Path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_two_ranks_train_the_same_parameters_as_one(kind: str, two_ranks: Path) -> None:
    first, second = (load(two_ranks / f"{kind}_whole{rank}.pt") for rank in range(2))
    assert_same(first, second, atol=0)
    assert_same(first, load(two_ranks / f"{kind}_alone.pt"))


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_state_of_one_rank_resumes_on_two(kind: str, two_ranks: Path) -> None:
    first, second = (load(two_ranks / f"{kind}_from_alone{rank}.pt") for rank in range(2))
    assert_same(first, second, atol=0)
    assert_same(first, load(two_ranks / f"{kind}_alone.pt"))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_state_of_two_ranks_resumes_on_one(kind: str, two_ranks: Path) -> None:
    (weights, shards0), (_, shards1) = (
        load(two_ranks / f"{kind}_half{rank}.pt") for rank in range(2)
    )
    assert shards0["transformer.wte.weight"]["slice"] == [0, 512] and shards1[
        "transformer.wte.weight"
    ]["slice"] == [512, 1024]
    whole = [name for name in shards0 if name not in ("transformer.wte.weight", "lm_head.weight")]
    assert whole and not set(whole) & set(shards1)  # each matrix has its state on one rank
    model = build_model()
    model.load_state_dict(weights)
    optimizer = build_optimizer(model, kind=kind, **RATES)
    optimizer.load_shards(merge_shards([shards1, shards0]))
    train(model, optimizer, STEPS // 2, STEPS)
    assert_same(model.state_dict(), load(two_ranks / f"{kind}_alone.pt"))


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_two_ranks_have_the_losses_and_gradient_norm_of_one(kind: str, two_ranks: Path) -> None:
    model = build_model()
    *losses, norm = learn(model, build_optimizer(model, kind=kind, **RATES))
    (*first, norm0), (*second, norm1) = (
        load(two_ranks / f"{kind}_learn{rank}.pt") for rank in range(2)
    )
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(losses, abs=1e-5)
    assert norm0 == norm1 == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_resuming_from_saved_state_is_exact(kind: str, dtype: torch.dtype) -> None:
    model = build_model(dtype)
    optimizer = build_optimizer(model, kind=kind, **RATES)
    train(model, optimizer, 0, 2)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_shards()), file)
    train(model, optimizer, 2, 4)

    file.seek(0)
    weights, shards = torch.load(file, weights_only=True)
    resumed = build_model(dtype)
    resumed.load_state_dict(weights)
    optimizer = build_optimizer(resumed, kind=kind, **RATES)
    optimizer.load_shards(merge_shards([shards]))
    train(resumed, optimizer, 2, 4)
    assert_same(resumed.state_dict(), model.state_dict(), atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_loop_over_the_optimizers_saves_and_loads_them_exactly(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Save a list of torch's state dicts in a checkpoint, as nanochat's loop does.

    torch itself rounds fp32 state to bf16.
    """
    model = build_model(dtype)
    optimizers = build_optimizer(model, kind=kind, **RATES)
    assert list(optimizers) == optimizers.optimizers
    train(model, optimizers, 0, 2)
    states = [opt.state_dict() for opt in optimizers]
    save_checkpoint(tmp_path, 2, model.state_dict(), states, {"model_config": CONFIG.to_dict()})
    train(model, optimizers, 2, 4)

    resumed = build_model(dtype)
    weights, states, _ = load_checkpoint(tmp_path, 2, "cpu", load_optimizer=True)
    resumed.load_state_dict(weights)
    optimizers = build_optimizer(resumed, kind=kind, **RATES)
    for opt, state in zip(optimizers, states, strict=True):
        opt.load_state_dict(state)
    train(resumed, optimizers, 2, 4)
    assert_same(resumed.state_dict(), model.state_dict(), atol=0)
    with pytest.raises(ValueError, match="load_state_dict"):
        optimizers.load_shards(states)


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd"])
def test_each_kind_learns(kind: str) -> None:
    model = build_model()
    rates = (
        RATES
        if kind != "sgd"
        else dict.fromkeys(("embedding_lr", "unembedding_lr", "matrix_lr"), 0.5)
    )
    optimizer = build_optimizer(model, kind=kind, **rates)
    rows = torch.randint(0, CONFIG.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        loss = model(rows[:, :-1], rows[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_parameters_are_in_the_right_groups() -> None:
    model = build_model()
    optimizer = build_optimizer(model, **RATES)
    rates = {
        optimizer.names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]
    }
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates.pop("transformer.wte.weight") == 0.05 and rates.pop("lm_head.weight") == 0.01
    assert set(rates.values()) == {0.02}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0, 0.2]


def test_orthogonalisation_uses_the_compute_dtype() -> None:
    for dtype, requested, expected in (
        (torch.float32, None, None),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ):
        optimizer = build_optimizer(build_model(dtype), ortho_dtype=requested, **RATES)
        assert [
            part.ortho_dtype for part in optimizer.optimizers if hasattr(part, "ortho_dtype")
        ] == [expected]


def test_multipliers_apply_to_the_base_values_each_step() -> None:
    optimizer = build_optimizer(build_model(), **RATES)
    for _ in range(2):
        optimizer.step(StepMultipliers(lr=0.5, momentum=0.9, weight_decay=0.25))
        groups = optimizer.param_groups
        assert [group["lr"] for group in groups] == [0.025, 0.005, 0.01]
        assert groups[2]["weight_decay"] == pytest.approx(0.05) and groups[2]["momentum"] == 0.9


def test_global_norm_covers_all_gradients_and_shows_nonfinite_ones() -> None:
    gradients = [torch.full((3,), 2.0), torch.ones(2, 2)]
    assert global_norm(gradients).item() == 4.0  # sqrt(3 * 4 + 4)
    gradients[1][0, 0] = float("nan")
    assert not torch.isfinite(global_norm(gradients))


def test_unsuitable_shards_are_named() -> None:
    model = build_model()
    optimizer = build_optimizer(model, **RATES)
    train(model, optimizer, 0, 1)
    shards = optimizer.state_shards()
    name = "transformer.wte.weight"
    with pytest.raises(ValueError, match="rows from 1024 are missing"):
        merge_shards([{name: {**shards[name], "shape": [2048, 64]}}])
    with pytest.raises(ValueError, match="rows from 0"):
        merge_shards([{name: {**shards[name], "slice": [512, 1024]}}])
    with pytest.raises(ValueError, match=r"covers rows \[0, 512\]"):
        optimizer.load_shards({name: {**shards[name], "slice": [0, 512]}})
    with pytest.raises(ValueError, match="has shape"):
        optimizer.load_shards({name: {**shards[name], "shape": [1024, 32]}})
    with pytest.raises(ValueError, match="unknown parameters: other"):
        optimizer.load_shards({"other": shards[name]})


def test_parameter_without_an_optimizer_is_an_error() -> None:
    class GPTCustom(GPT):
        def __init__(self, bias: bool) -> None:
            super().__init__(CONFIG)
            self.custom_layer = torch.nn.Linear(CONFIG.n_embd, CONFIG.n_embd, bias=bias)

    with pytest.raises(
        ValueError,
        match=r"not matrices: custom_layer\.bias: leave them out \(bias=False\), .*build_optimizer",
    ):
        build_optimizer(GPTCustom(bias=True), **RATES)
    optimizer = build_optimizer(GPTCustom(bias=False), **RATES)
    assert "custom_layer.weight" in optimizer.names.values()


def test_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="lion"):
        build_optimizer(build_model(), kind="lion", **RATES)


def test_the_global_norm_is_exact_however_ranks_cut_a_matrix():
    matrix = torch.randn(40_000, 600, generator=torch.Generator().manual_seed(1))
    exact = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    norms = [float(global_norm(matrix.split(rows))) for rows in (40_000, 20_000, 10_000, 777)]
    assert norms == pytest.approx([exact] * 4, rel=1e-6)

"""--fsdp on CPUs: the losses of one process, whatever the number of ranks; checkpoints go to and from runs without it."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.unit.test_trainer import ROWS, free_port, join_ranks, loss_curve, make_batch, make_trainer, schedule
from tests.unit.test_trainer import batches as plain_batches
from zangchat import checkpoint_manager
from zangchat.flops import memory_estimate
from zangchat.runtime import collectives
from zangchat.runtime.processes import compute_cleanup
from zangchat.training.hooks import record_validation
from zangchat.training.trainer import Every, Stage, Trainer


def sharded_trainer(*args, **settings) -> Trainer:
    from zangchat.fsdp import FSDPGroup

    return make_trainer(*args, shard=lambda optimizer, model: FSDPGroup(optimizer, model, torch.device("cpu")), **settings)


def looking_on() -> Stage:
    """Evaluates between the steps, and has a row without a target: on two or four ranks, a pass with nothing to learn."""

    def evaluate(trainer: Trainer) -> None:
        with torch.inference_mode():
            loss = trainer.model(*[part[:1] for part in (make_batch(99).inputs, make_batch(99).targets)])
        record_validation(trainer, float(loss))

    def batches(cursor):
        for batch in plain_batches(cursor):
            if collectives.world()[0] == 0:
                batch.targets[0] = -1
            yield batch

    return Stage("base", batches, schedule, [Every(4, evaluate, at_start=True)])


def rank_main(rank: int, world_size: int, port: int, directory: str) -> None:
    join_ranks(rank, world_size, port)
    root = Path(directory)
    try:
        for kind in ("muon", "adamw"):
            trainer = sharded_trainer(root / kind, kind=kind, stage=looking_on(), num_iterations=20, save_every=10, device_batch_size=1)
            trainer.fit()
        for part in trainer.optimizer._parts.values():  # rows of everything, and no whole parameter beside them
            assert part.to_local().size(0) <= -(-part.size(0) // world_size)
        assert all(p.untyped_storage().nbytes() <= 4 for p in trainer.optimizer.names)
        checkpointed = sharded_trainer(root / "checkpointed", stage=looking_on(), num_iterations=10, save_every=10)
        checkpointed.model.grad_checkpoint = True
        checkpointed.fit()
        sharded_trainer(root / "one", stage=looking_on(), num_iterations=20, resume=10).fit()
    finally:
        compute_cleanup()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request, tmp_path_factory) -> Path:
    """20 steps on one process in `single-*`, sharded in `muon` and `adamw`; `one` is begun by one process and gone on with sharded."""
    root = tmp_path_factory.mktemp("fsdp")
    for kind in ("muon", "adamw"):
        make_trainer(root / f"single-{kind}", kind=kind, stage=looking_on(), num_iterations=20, save_every=10).fit()
    make_trainer(root / "one", stage=looking_on(), num_iterations=10).fit()
    world_size = request.param
    mp.start_processes(rank_main, args=(world_size, free_port(), str(root)), nprocs=world_size, start_method="forkserver")
    return root


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_losses_are_those_of_one_process(runs, kind):
    assert loss_curve(runs / kind) == pytest.approx(loss_curve(runs / f"single-{kind}"), abs=1e-5)


def test_recomputed_activations_change_nothing(runs):
    assert loss_curve(runs / "checkpointed") == pytest.approx(loss_curve(runs / "single-muon")[:10], abs=1e-5)


def test_a_run_goes_on_with_and_without(runs):
    assert loss_curve(runs / "one") == pytest.approx(loss_curve(runs / "single-muon"), abs=1e-5)
    shutil.copytree(runs / "muon", runs / "without")
    make_trainer(runs / "without", stage=looking_on(), num_iterations=20, resume=10).fit()
    assert loss_curve(runs / "without") == pytest.approx(loss_curve(runs / "single-muon"), abs=1e-5)


def test_a_checkpoint_is_that_of_a_run_without(runs):
    sharded, plain = (checkpoint_manager.load_checkpoint(runs / name, 20, "cpu", load_optimizer=True) for name in ("muon", "single-muon"))
    assert sharded[0].keys() == plain[0].keys() and sharded[1].keys() == plain[1].keys()
    for name in plain[0]:
        assert type(sharded[0][name]) is torch.Tensor
        torch.testing.assert_close(sharded[0][name], plain[0][name], atol=1e-3, rtol=0)
        assert sharded[1][name]["tensors"].keys() == plain[1][name]["tensors"].keys()


def test_the_planner_counts_the_shares():
    config = make_trainer().model.config
    alone, shared = (memory_estimate(config, ROWS, world_size=8, fsdp=fsdp) for fsdp in (False, True))
    assert shared["gradients"] == alone["gradients"] // 8

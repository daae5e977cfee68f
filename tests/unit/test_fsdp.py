"""--fsdp on CPUs keeps the losses of one process; checkpoints load with and without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.documents import ROOT
from tests.unit.test_train_scripts import text
from tests.unit.test_trainer import (
    ROWS,
    free_port,
    join_ranks,
    loss_curve,
    make_batch,
    make_trainer,
    schedule,
)
from tests.unit.test_trainer import batches as plain_batches
from zangchat import checkpoint_manager
from zangchat.config import ARCHITECTURES, GPTConfig
from zangchat.flops import memory_estimate
from zangchat.gpt import GPT, ForwardOptions
from zangchat.runtime import collectives
from zangchat.runtime.processes import compute_cleanup
from zangchat.tokenizer import RustBPETokenizer
from zangchat.training.hooks import record_validation
from zangchat.training.trainer import Every, Stage, Trainer

MODERN = {"architecture": ARCHITECTURES["modern"], "dtype": torch.bfloat16, "num_iterations": 10}


def sharded_trainer(*args, **settings) -> Trainer:
    from zangchat.fsdp import FSDPGroup

    return make_trainer(
        *args,
        shard=lambda optimizer, model: FSDPGroup(optimizer, model, torch.device("cpu")),
        **settings,
    )


def eval_stage() -> Stage:
    """Evaluates between the steps, and has a row without a target.

    On two or four ranks that row is a pass without a loss.
    """

    def evaluate(trainer: Trainer) -> None:
        with torch.inference_mode():
            loss = trainer.model(
                *[part[:1] for part in (make_batch(99).inputs, make_batch(99).targets)]
            )
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
            trainer = sharded_trainer(
                root / kind,
                kind=kind,
                stage=eval_stage(),
                num_iterations=20,
                save_every=10,
                device_batch_size=1,
            )
            trainer.fit()
        for part in trainer.optimizer._parts.values():  # only a share of the rows of each parameter
            assert part.to_local().size(0) <= -(-part.size(0) // world_size)
        assert all(p.untyped_storage().nbytes() <= 4 for p in trainer.optimizer.names)
        sharded_trainer(
            root / "checkpointed",
            stage=eval_stage(),
            num_iterations=10,
            save_every=10,
            options=ForwardOptions(grad_checkpoint=True),
        ).fit()
        sharded_trainer(root / "modern", stage=eval_stage(), **MODERN).fit()
        sharded_trainer(root / "one", stage=eval_stage(), num_iterations=20, resume=10).fit()
    finally:
        compute_cleanup()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request, tmp_path_factory) -> Path:
    """Runs of 20 steps: `single-*` on one process, `muon` and `adamw` sharded.

    `one` starts on one process and continues sharded.
    """
    root = tmp_path_factory.mktemp("fsdp")
    for kind in ("muon", "adamw"):
        make_trainer(
            root / f"single-{kind}", kind=kind, stage=eval_stage(), num_iterations=20, save_every=10
        ).fit()
    make_trainer(root / "single-modern", stage=eval_stage(), **MODERN).fit()
    make_trainer(root / "one", stage=eval_stage(), num_iterations=10).fit()
    world_size = request.param
    mp.start_processes(
        rank_main,
        args=(world_size, free_port(), str(root)),
        nprocs=world_size,
        start_method="forkserver",
    )
    return root


def test_a_module_is_cut_up_after_the_ones_before_it_were_released(monkeypatch):
    """Whole parameters are on the device for one module at a time."""
    from zangchat import fsdp

    whole: list[int] = []

    def fully_shard(module: torch.nn.Module, **_: object) -> None:
        whole.append(sum(p.untyped_storage().nbytes() > 4 for p in model.parameters()))
        for name in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms"):
            setattr(module, name, lambda _: None)
        module.unshard = module.reshard = lambda: None

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    monkeypatch.setattr(fsdp, "init_device_mesh", lambda *_: None)
    model = GPT(
        GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=1, n_kv_head=1, n_embd=32)
    )
    number = len(list(model.parameters()))
    group = model.setup_optimizers(embedding_lr=0.1, unembedding_lr=0.01, matrix_lr=0.01)
    fsdp.FSDPGroup(group, model, torch.device("cpu"))
    assert whole[0] == number and whole == sorted(set(whole), reverse=True)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_losses_equal_one_process(runs, kind):
    assert loss_curve(runs / kind) == pytest.approx(loss_curve(runs / f"single-{kind}"), abs=1e-5)


def test_value_embeddings_in_bf16_are_spread(runs):
    assert loss_curve(runs / "modern") == pytest.approx(
        loss_curve(runs / "single-modern"), abs=0.02
    )


def test_recomputed_activations_do_not_change_the_losses(runs):
    assert loss_curve(runs / "checkpointed") == pytest.approx(
        loss_curve(runs / "single-muon")[:10], abs=1e-5
    )


def test_run_resumes_with_and_without_fsdp(runs):
    assert loss_curve(runs / "one") == pytest.approx(loss_curve(runs / "single-muon"), abs=1e-5)
    shutil.copytree(runs / "muon", runs / "without")
    make_trainer(runs / "without", stage=eval_stage(), num_iterations=20, resume=10).fit()
    assert loss_curve(runs / "without") == pytest.approx(loss_curve(runs / "single-muon"), abs=1e-5)


def test_checkpoint_equals_that_of_an_unsharded_run(runs):
    sharded, plain = (
        checkpoint_manager.load_checkpoint(runs / name, 20, "cpu", load_optimizer=True)
        for name in ("muon", "single-muon")
    )
    assert sharded[0].keys() == plain[0].keys() and sharded[1].keys() == plain[1].keys()
    for name in plain[0]:
        assert type(sharded[0][name]) is torch.Tensor
        torch.testing.assert_close(sharded[0][name], plain[0][name], atol=1e-3, rtol=0)
        assert sharded[1][name]["tensors"].keys() == plain[1][name]["tensors"].keys()


def test_pretraining_runs_to_its_end_with_only_sizes(base_dir):
    texts = [text(index) for index in range(300)]
    RustBPETokenizer.train_from_iterator(iter(texts), 300).save(base_dir / "tokenizer")
    lines = (json.dumps({"text": line}) + "\n" for line in texts)
    (base_dir / "text.jsonl").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    sizes = ["--depth=2", "--max_seq_len=32", "--device_batch_size=4", "--total_batch_size=256"]
    sizes += ["--num_iterations=3", "--eval_tokens=400", f"--data_path={base_dir / 'text.jsonl'}"]
    done = subprocess.run(
        [*command, "-m", "scripts.base_train", "--", "--fsdp", "--device_type=cpu", *sizes],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("python -m scripts.base_eval --model_tag=d2") == 1
    assert list(checkpoint_manager.steps(base_dir / "base_checkpoints" / "d2")) == [3]


def test_planner_counts_the_shares():
    config = make_trainer().model.config
    whole, shared = (
        memory_estimate(config, ROWS, world_size=8, fsdp=fsdp) for fsdp in (False, True)
    )
    assert shared["gradients"] == whole["gradients"] // 8
    assert shared["weights"] == whole["weights"] // 8 and shared["casts"] > whole["casts"]

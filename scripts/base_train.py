"""Pretrain a base model from nothing. --depth sets its size; the rest follows, or is set by hand.

    python -m scripts.base_train --depth=20
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
    python -m scripts.base_train --depth=20 --dry_run     the plan and its memory, no training

Checkpoints go to <base>/base_checkpoints/<model_tag>; --resume=latest continues from them.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tasks.registry import training_conversations
from zangchat import configurator, schedule
from zangchat.config import Architecture, GPTConfig, Optimizer, TrainPlan
from zangchat.errors import UserError
from zangchat.runtime.logs import print0, print_banner
from zangchat.training import planning
from zangchat.training.flags import BatchSize, RunConfig

if TYPE_CHECKING:
    from zangchat.dataset import Dataset
    from zangchat.training.run import Run
    from zangchat.training.trainer import Every, Stage


@dataclass
class Config(RunConfig):
    # the model
    depth: int = 20  # layers; the width is depth x 64, rounded up to whole heads
    n_embd: int = 0  # width, a multiple of --head_dim; 0 = from --depth
    head_dim: int = 128  # width of one attention head
    n_kv_head: int = 0  # key/value heads (grouped-query attention); 0 = as many as query heads
    max_seq_len: int = 2048  # context, tokens
    arch: Architecture = "nanochat"
    """modern: keys that hold half of the token before, value embeddings: learns more from the same
    tokens, and no export carries it
    """
    head_init_scale: float = 0.0
    """start lm_head as this times the embedding (helps very small models to copy); 0 = small
    random numbers
    """
    # the data
    dataset: str | None = None  # a folder of <base>/base_data; default: the only one there
    data_path: str | None = None  # a .parquet, .jsonl or .txt file, or a folder of them, instead
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    mixture: str = ""
    """conversations to mix in, like "pydocs:1,identity:4,spellingbee:4000" in mid_train"""
    mixture_ratio: float = 0.0  # their share of the tokens, 0 to 1
    # length and batches; the first of these that is set counts, else the ratio
    num_iterations: int = -1  # optimizer steps
    target_flops: float = -1.0  # training FLOPs
    target_param_data_ratio: float = 12.0  # tokens per (matrix + lm_head) parameter
    total_batch_size: int = -1
    """tokens per step, all ranks; -1 = derived from the length of the run"""
    device_batch_size: BatchSize = 32  # rows per rank in one pass, at most; auto = as many as fit
    # the optimizer; rates are those of 12 layers at 2^19 tokens per step, and scaled from there
    optimizer: Optimizer = "muon"
    """for the matrices; the embedding and the head always take adamw (sgd: sgd)"""
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    matrix_lr: float = 0.02
    weight_decay: float = 0.2  # of the matrices
    grad_clip: float = 1.0  # largest global gradient norm; 0 = no clipping
    warmup_ratio: float = 0.05  # share of the run with rising rates (40 steps at most)
    warmdown_ratio: float = 0.65  # share of the run with falling rates
    final_lr_frac: float = 0.05  # of the full rate, at the end
    grad_checkpoint: bool = False
    """recompute activations in backward: less memory, a third more time"""
    fsdp: bool = False  # spread the model over the ranks, if one device cannot hold it
    # evaluation
    eval_every: int = 250  # steps between validations; -1 = none
    eval_tokens: int = 20 * 524288  # validation tokens at most
    core_metric_every: int = 2000  # steps between CORE evaluations; -1 = none
    core_metric_max_per_task: int = 500  # questions per CORE task; -1 = all
    sample_every: int = 2000  # steps between samples of text; -1 = none
    dry_run: bool = False  # print the plan and leave


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    check(config)
    if config.dry_run:
        return planning.dry_run(config, make_plan)
    from zangchat.training.run import Run  # and with it torch

    tag = config.model_tag or f"d{config.depth}"
    with Run.open("base", config, tag=tag, design=make_plan) as run:
        if run is None:
            return 0
        print_banner()
        gpt, plan = run.model_config, run.plan
        planning.print_plan(run.config, gpt, plan, run.world_size)
        costs, tables = planning.costs(gpt, plan), (gpt.to_dict(), plan._asdict())
        return run.fit(make_stage(run), plan, "Base model training", costs, *tables)


def check(config: Config) -> None:
    """Refuse flags that are wrong in themselves, before anything is loaded."""
    ratio = config.mixture_ratio
    if not 0 <= ratio < 1 or (ratio > 0) != bool(config.mixture):
        problem = f"--mixture={config.mixture!r} does not go with --mixture_ratio={ratio:g}"
        raise UserError(f"{problem}: give both, with a ratio between 0 and 1, or neither")
    configurator.check_range(1, config, "eval_tokens")
    planning.check(config)


def make_plan(config: Config, vocab_size: int) -> tuple[GPTConfig, TrainPlan]:
    gpt = planning.model_config(config, vocab_size)
    return gpt, planning.train_plan(config, gpt)


def make_stage(run: "Run") -> "Stage":
    from zangchat.training import data
    from zangchat.training.trainer import Stage

    config: Config = run.config
    dataset, task = data.pretraining_text(run), None
    if config.mixture:
        task = training_conversations(
            config.mixture,
            tokenizer=run.tokenizer,
            seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
        )
        task = data.conversations(run, task)
    multipliers = partial(
        schedule.base_multipliers,
        num_iterations=run.plan.num_iterations,
        warmup_ratio=config.warmup_ratio,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    batches = data.packed(run, task, config.mixture_ratio, dataset)
    return Stage("base", batches, multipliers, make_hooks(run, dataset))


def make_hooks(run: "Run", dataset: "Dataset") -> list["Every"]:
    from zangchat.training import data, hooks

    config, found = run.config, []
    if config.eval_every > 0:
        found.append(hooks.validation_bpb(config.eval_every, data.validation(run, dataset)))
    if config.fsdp:
        if max(config.core_metric_every, config.sample_every) > 0:
            problem = "with --fsdp no rank has the whole model for CORE and samples"
            score = f"python -m scripts.base_eval --model_tag={config.model_tag}"
            print0(f"base: {problem}: score it afterwards with `{score}`")
        return found
    if config.core_metric_every > 0:
        found += hooks.core_metric(config.core_metric_every, config.core_metric_max_per_task)
    if config.sample_every > 0:
        found.append(hooks.samples(config.sample_every))
    return found


if __name__ == "__main__":
    sys.exit(main())

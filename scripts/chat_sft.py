"""Finetune on conversations: a step takes whole conversations and learns only the assistant's
words.

    python -m scripts.chat_sft                                from the midtrained model
    python -m scripts.chat_sft --source=base --num_epochs=2 --mixture="identity:3,arithmetic:2000"

Starts from <base>/mid_checkpoints/<model_tag> with its settings, and writes to chatsft_checkpoints;
--resume=latest continues.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import SFT_MIXTURE, held_out_conversations, training_conversations
from zangchat import configurator, schedule
from zangchat.errors import UserError
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.dataloader import Batch
    from zangchat.training.run import Run
    from zangchat.training.trainer import Every, Stage


@dataclass
class Config(FinetuneConfig):
    source: str = "mid"  # mid | base: the stage to start from
    # the data
    mixture: str | None = None
    """NAME:EPOCHS, or NAME:EXAMPLES if generated, with commas between; default: SFT_MIXTURE
    in tasks/registry.py
    """
    identity_data: str | None = None
    """a .jsonl file of conversations of your own, added to the mixture: seen once per epoch"""
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    # length and batches
    num_epochs: int = 1  # times through the mixture
    num_iterations: int = -1  # optimizer steps; -1 = from --num_epochs
    target_examples_per_step: int = 32  # conversations per step, all ranks
    block_diagonal: bool = False  # conversations that share a row do not see each other
    device_batch_size: BatchSize | None = None
    """rows per rank in one pass, at most; auto = as many as fit the memory; None = as that model"""
    # the optimizer
    load_optimizer: bool = False  # continue with the optimizer's state of the model it starts from
    init_lr_frac: float = 0.02  # factor on all rates, which then fall to 0
    grad_checkpoint: bool = False
    """recompute activations in backward: less memory, a third more time"""
    fsdp: bool = False  # spread the model over the ranks, if one device cannot hold it
    # evaluation
    eval_every: int = 100  # steps between validations; -1 = none
    eval_steps: int = 100  # held-out batches of target_examples_per_step conversations, at most


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    from zangchat.training.run import Run

    check(config)
    with Run.open(
        "sft",
        config,
        source=config.source,
        rows=config.target_examples_per_step,
        defaults={"mixture": SFT_MIXTURE},
    ) as run:
        if run is None:
            return 0
        config = run.config
        task = training_conversations(
            run.config.mixture,
            config.identity_data,
            tokenizer=run.tokenizer,
            seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
        )
        epochs, per_step = config.num_epochs, config.target_examples_per_step
        steps = run.steps(lambda: math.ceil(len(task) * epochs / per_step))
        print0(f"sft: {len(task):,} conversations ({task}); {steps:,} steps of {per_step}")
        plan, stage = run.plan._replace(num_iterations=steps), make_stage(run, steps, task)
        results = {"conversations": len(task), "mixture": str(task)}
        return run.fit(stage, plan, "Chat SFT", results)


def check(config: Config) -> None:
    if config.source not in ("mid", "base"):
        raise UserError(f"--source={config.source} is no stage to finetune: choose mid or base")
    configurator.check_range(1, config, "num_epochs", "target_examples_per_step", "eval_steps")


def make_stage(run: "Run", steps: int, task: "Task") -> "Stage":
    from zangchat.training import data, trainer

    config = run.config
    size, seed, init_lr_frac = config.target_examples_per_step, config.seed, config.init_lr_frac
    task = data.conversations(run, task)

    def batches(cursor: dict[str, Any] | None) -> Iterator["Batch"]:
        return data.examples(run, task, size, seed=seed, cursor=cursor)

    multipliers = partial(
        schedule.finetune_multipliers,
        num_iterations=steps,
        init_lr_frac=init_lr_frac,
    )
    return trainer.Stage("sft", batches, multipliers, make_hooks(run))


def make_hooks(run: "Run") -> list["Every"]:
    """The loss of held-out conversations of the same mixture."""
    from zangchat.training import data, hooks

    config = run.config
    held_out = held_out_conversations(config, run.tokenizer)
    if held_out is None:
        return []

    size, steps = config.target_examples_per_step, config.eval_steps
    batches = partial(data.held_out, run, held_out, size, steps)
    return [hooks.validation_loss(config.eval_every, batches)]


if __name__ == "__main__":
    sys.exit(main())

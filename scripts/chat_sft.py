"""Finetune on conversations: each step takes a number of whole conversations and learns the assistant's words alone.

    python -m scripts.chat_sft                                from the midtrained model
    python -m scripts.chat_sft --source=base --num_epochs=2 --mixture="identity:3,arithmetic:2000"

Starts from <base>/mid_checkpoints/<model_tag> with its settings and writes <base>/chatsft_checkpoints/<model_tag>; --resume=latest goes on.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from tasks.registry import SFT_MIXTURE, held_out_conversations, training_conversations
from zangchat import configurator, schedule
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig
from zangchat.training.run import Run, open_run

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.dataloader import Batch
    from zangchat.training.trainer import Every, Stage


@dataclass
class Config(FinetuneConfig):
    source: str = "mid"  # mid | base: the stage to start from
    # the data
    mixture: str | None = None  # NAME:EPOCHS, or NAME:EXAMPLES if generated, with commas between; default: SFT_MIXTURE in tasks/registry.py
    identity_data: str | None = None  # a .jsonl file of conversations of your own, added to the mixture: seen once per epoch
    # how long, and in what batches
    num_epochs: int = 1  # times through the mixture
    num_iterations: int = -1  # optimizer steps; -1 = from --num_epochs
    target_examples_per_step: int = 32  # conversations per step, all ranks
    block_diagonal: bool = False  # conversations that share a row do not see each other
    device_batch_size: BatchSize | None = None  # rows per rank in one pass, at most; auto = what fits the memory; None = as that model
    # the optimizer
    load_optimizer: bool = False  # go on with the optimizer's state of the model it starts from
    init_lr_frac: float = 0.02  # factor on all rates, which then fall to 0
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False  # spread the model over the ranks, where one device cannot hold it
    # looking on
    eval_every: int = 100  # steps between validations; -1 = none
    eval_steps: int = 100  # held-out batches of target_examples_per_step conversations, at most


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    check(config)
    with open_run("sft", config, source=config.source) as run:
        if run.finished:
            return 0
        run.start_from_source()
        tokenizer, model = run.tokenizer(), run.new_model()
        run.settle(model.config, mixture=SFT_MIXTURE)
        settled = run.choose_batch(model.config, run.config.target_examples_per_step, even=False)
        model.document_start = tokenizer.get_bos_token_id() if settled.block_diagonal else None
        task = training_conversations(settled.mixture, settled.identity_data, tokenizer=tokenizer, seed=settled.seed)
        steps = run.steps(lambda: math.ceil(len(task) * settled.num_epochs / settled.target_examples_per_step))
        print0(f"sft: {len(task):,} conversations ({task}); {steps:,} steps of {settled.target_examples_per_step}")
        plan = run.plan(model.config)._replace(num_iterations=steps)
        stage = make_stage(run, steps, task, tokenizer)
        trainer = run.trainer(model, stage, plan, tokenizer, keep_optimizer=settled.load_optimizer)
        trainer.fit()
        if not trainer.exit_code:
            loss = trainer.state.extra.get("val_loss")
            run.report("Chat SFT", trainer, conversations=len(task), mixture=str(task), **{"validation loss": loss})
        return trainer.exit_code


def check(config: Config) -> None:
    if config.source not in ("mid", "base"):
        raise configurator.UserError(f"--source={config.source} is no stage to finetune: choose mid or base")
    configurator.check_range(1, config, "num_epochs", "target_examples_per_step", "eval_steps")


def make_stage(run: Run, steps: int, task: "Task", tokenizer: Any) -> "Stage":
    from zangchat.training.trainer import Stage

    config = run.config

    def batches(cursor: dict[str, Any] | None) -> Iterator["Batch"]:
        return run.examples(task, tokenizer, config.target_examples_per_step, seed=config.seed, cursor=cursor)

    multipliers = partial(schedule.finetune_multipliers, num_iterations=steps, init_lr_frac=config.init_lr_frac)
    return Stage("sft", batches, multipliers, make_hooks(run, tokenizer))


def make_hooks(run: Run, tokenizer: Any) -> list["Every"]:
    """The loss of held-out conversations of the same mixture."""
    from zangchat.training import hooks

    config = run.config
    held_out = held_out_conversations(config.mixture, tokenizer=tokenizer, seed=config.seed) if config.eval_every > 0 else None
    if held_out is None:
        return []

    def batches() -> Iterator["Batch"]:
        return islice(run.examples(held_out, tokenizer, config.target_examples_per_step, seed=0, num_epochs=1), config.eval_steps)

    return [hooks.validation_loss(config.eval_every, batches)]


if __name__ == "__main__":
    sys.exit(main())

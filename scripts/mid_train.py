"""Midtrain a base model on conversations, multiple choice and tools, optionally mixed with text.

    python -m scripts.mid_train
    python -m scripts.mid_train --mixture="pydocs:1,identity:4,spellingbee:4000" --mixture_ratio=0.9
    python -m scripts.mid_train --identity_data=me.jsonl      and your own conversations, twice
    python -m scripts.mid_train --from_tag=d4 --model_tag=me       a second model next to the first

Starts from <base>/base_checkpoints/<model_tag> with its settings, and writes to mid_checkpoints;
--resume=latest continues.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import MID_MIXTURE, held_out_conversations, training_conversations
from zangchat import configurator, schedule
from zangchat.config import TrainPlan
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.training.run import Run
    from zangchat.training.trainer import Every, Stage

SAMPLE = 512  # conversations from which the length of the mixture is estimated
HELD_OUT_STEP = 32  # conversations that validation packs at a time


@dataclass
class Config(FinetuneConfig):
    # the data
    mixture: str | None = None
    """NAME:EPOCHS, or NAME:EXAMPLES if generated, with commas between; default: MID_MIXTURE
    in tasks/registry.py
    """
    identity_data: str | None = None
    """a .jsonl file of conversations of your own, added to the mixture and seen twice"""
    mixture_ratio: float = 1.0
    """share of the tokens that come from the mixture, above 0; the rest is pretraining text"""
    dataset: str | None = None
    """the pretraining text, of which --mixture_ratio < 1 takes a share; default: as the base
    model
    """
    data_path: str | None = None
    skip_bad_rows: bool = False  # leave out rows of own files that cannot be read, and count them
    # length and batches
    num_iterations: int = -1  # optimizer steps; -1 = about once through the mixture
    block_diagonal: bool = False  # conversations that share a row do not see each other
    total_batch_size: int | None = None
    """tokens per step, all ranks; None here and below: as the base model"""
    device_batch_size: BatchSize | None = None
    """rows per rank in one pass, at most; auto = as many as fit the memory"""
    # the optimizer
    load_optimizer: bool = True  # continue with the optimizer's state of the base model
    init_lr_frac: float = 1.0  # factor on all rates
    warmdown_ratio: float = 0.2  # share of the run with falling rates
    final_lr_frac: float = 0.0
    grad_checkpoint: bool = False
    """recompute activations in backward: less memory, a third more time"""
    fsdp: bool = False  # spread the model over the ranks, if one device cannot hold it
    # evaluation
    eval_every: int = 150  # steps between validations; -1 = none
    eval_tokens: int = 20 * 524288  # validation tokens at most


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    from zangchat.training.run import Run

    configurator.check_fraction(config, "mixture_ratio")
    configurator.check_range(1, config, "eval_tokens")
    with Run.open("mid", config, source="base", defaults={"mixture": MID_MIXTURE}) as run:
        if run is None:
            return 0
        config = run.config
        task = training_conversations(
            run.config.mixture,
            config.identity_data,
            2,
            tokenizer=run.tokenizer,
            seed=config.seed,
            skip_bad_rows=config.skip_bad_rows,
        )
        plan = make_plan(run, task)
        results = {"conversations": len(task), "mixture": str(task)}
        return run.fit(make_stage(run, plan, task), plan, "Midtraining", results)


def make_plan(run: "Run", task: "Task") -> TrainPlan:
    """Batch and rates of the base model; the given length, or about once through the mixture."""
    config, batch = run.config, run.plan.total_batch_size
    length, ratio = config.max_seq_len, config.mixture_ratio
    steps = run.steps(lambda: tokens_in(task, run.tokenizer, length) / ratio / batch)
    print0(f"mid: {len(task):,} conversations ({task}); {steps:,} steps of {batch:,} tokens")
    return run.plan._replace(num_iterations=steps, tokens=steps * batch)


def tokens_in(task: "Task", tokenizer: Any, max_tokens: int) -> float:
    """The tokens of all conversations, estimated from an even sample, the same on every rank."""
    count = min(SAMPLE, len(task))
    sample = (task[i * len(task) // count] for i in range(count))
    rendered = (tokenizer.render_conversation(chat, max_tokens=max_tokens) for chat in sample)
    return len(task) * sum(len(ids) for ids, _ in rendered) / count


def make_stage(run: "Run", plan: TrainPlan, task: "Task") -> "Stage":
    from zangchat.training import data, trainer

    config = run.config
    multipliers = partial(
        schedule.finetune_multipliers,
        num_iterations=plan.num_iterations,
        init_lr_frac=config.init_lr_frac,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    dataset = data.pretraining_text(run) if config.mixture_ratio < 1 else None
    task = data.conversations(run, task)
    batches = data.packed(run, task, config.mixture_ratio, dataset)
    return trainer.Stage("mid", batches, multipliers, make_hooks(run))


def make_hooks(run: "Run") -> list["Every"]:
    """Bits per byte of the answers in held-out conversations of the same mixture."""
    from zangchat.training import data, hooks

    config = run.config
    held_out = held_out_conversations(config, run.tokenizer)
    if held_out is None:
        return []

    length = tokens_in(held_out, run.tokenizer, config.max_seq_len) / len(held_out)
    steps = math.ceil(config.eval_tokens / length / HELD_OUT_STEP)
    batches = partial(data.held_out, run, held_out, HELD_OUT_STEP, steps)
    return [hooks.validation_bpb(config.eval_every, batches)]


if __name__ == "__main__":
    sys.exit(main())

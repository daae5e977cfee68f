"""Midtrain: a base model learns the form of conversations, multiple choice and tools, on a mixture of tasks and, if wanted, text.

    python -m scripts.mid_train
    python -m scripts.mid_train --mixture="pydocs:1,identity:4,spellingbee:4000" --mixture_ratio=0.9
    python -m scripts.mid_train --identity_data=me.jsonl      the default mixture, and twice the conversations of your own
    python -m scripts.mid_train --from_tag=d4 --model_tag=me --identity_data=me.jsonl     a second model beside the first

Starts from <base>/base_checkpoints/<model_tag> with its settings and writes <base>/mid_checkpoints/<model_tag>; --resume=latest goes on.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import MID_MIXTURE, held_out_conversations, training_conversations
from zangchat import configurator, schedule
from zangchat.config import GPTConfig
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig
from zangchat.training.run import Run, check_batch, open_run

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.dataloader import Batch
    from zangchat.training.trainer import Every, Stage


@dataclass
class Config(FinetuneConfig):
    # the data
    mixture: str | None = None  # NAME:EPOCHS, or NAME:EXAMPLES if generated, with commas between; default: MID_MIXTURE in tasks/registry.py
    identity_data: str | None = None  # a .jsonl file of conversations of your own, added to the mixture and seen twice
    mixture_ratio: float = 1.0  # share of the tokens that come from the mixture, above 0; the rest is pretraining text
    dataset: str | None = None  # the pretraining text (also for validation where mixture_ratio < 1); default: as the base model
    data_path: str | None = None
    # how long, and in what batches
    num_iterations: int = -1  # optimizer steps; -1 = about once through the mixture
    block_diagonal: bool = False  # conversations that share a row do not see each other
    total_batch_size: int | None = None  # tokens per step, all ranks; None here and below: as the base model
    device_batch_size: BatchSize | None = None  # rows per rank in one pass, at most; auto = what fits the memory
    # the optimizer
    load_optimizer: bool = True  # go on with the optimizer's state of the base model
    init_lr_frac: float = 1.0  # factor on all rates
    warmdown_ratio: float = 0.2  # share of the run with falling rates
    final_lr_frac: float = 0.0
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, a third more time
    fsdp: bool = False  # spread the model over the ranks, where one device cannot hold it
    # looking on
    eval_every: int = 150  # steps between validations; -1 = none
    eval_tokens: int = 20 * 524288  # validation tokens at most


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    check(config)
    with open_run("mid", config, source="base") as run:
        if run.finished:
            return 0
        run.start_from_source()
        tokenizer, model = run.tokenizer(), run.new_model()
        settled = run.settle(model.config, mixture=MID_MIXTURE)
        model.document_start = tokenizer.get_bos_token_id() if settled.block_diagonal else None
        task = training_conversations(settled.mixture, settled.identity_data, 2, tokenizer=tokenizer, seed=settled.seed)
        plan = make_plan(run, model.config, task, tokenizer)
        stage = make_stage(run, plan, task, tokenizer)
        trainer = run.trainer(model, stage, plan, tokenizer, keep_optimizer=settled.load_optimizer)
        trainer.fit()
        if not trainer.exit_code:
            run.report("Midtraining", trainer, conversations=len(task), mixture=str(task))
        return trainer.exit_code


def check(config: Config) -> None:
    configurator.check_fraction(config, "mixture_ratio")
    configurator.check_range(1, config, "eval_tokens")


def make_plan(run: Run, model_config: GPTConfig, task: "Task", tokenizer: Any) -> schedule.TrainPlan:
    """Batch and rates as the base model had them; the length that is asked for, or once through the mixture."""
    plan = run.plan(model_config)
    config = run.choose_batch(model_config, plan.total_batch_size // run.config.max_seq_len)
    check_batch(plan.total_batch_size, config.max_seq_len, config.device_batch_size, run.world_size)
    steps = run.steps(lambda: tokens_in(task, tokenizer, config.max_seq_len) / config.mixture_ratio / plan.total_batch_size)
    print0(f"mid: {len(task):,} conversations ({task}); {steps:,} steps of {plan.total_batch_size:,} tokens")
    return plan._replace(num_iterations=steps, tokens=steps * plan.total_batch_size)


def tokens_in(task: "Task", tokenizer: Any, max_tokens: int, sample: int = 512) -> float:
    """The tokens of all conversations, estimated from an even sample of them: the same on every rank, and at once."""
    count = min(sample, len(task))
    lengths = [len(tokenizer.render_conversation(task[i * len(task) // count], max_tokens=max_tokens)[0]) for i in range(count)]
    return len(task) * sum(lengths) / count


def make_stage(run: Run, plan: schedule.TrainPlan, task: "Task", tokenizer: Any) -> "Stage":
    from zangchat.training.trainer import Stage

    config = run.config
    multipliers = partial(
        schedule.finetune_multipliers,
        num_iterations=plan.num_iterations,
        init_lr_frac=config.init_lr_frac,
        warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac,
    )
    dataset = run.dataset() if config.mixture_ratio < 1 else None
    batches = run.packed(tokenizer, config.max_seq_len, plan.total_batch_size, dataset, task, config.mixture_ratio)
    return Stage("mid", batches, multipliers, make_hooks(run, tokenizer))


def make_hooks(run: Run, tokenizer: Any) -> list["Every"]:
    """Bits per byte of the answers in held-out conversations of the same mixture."""
    from zangchat.training import hooks

    config = run.config
    held_out = held_out_conversations(config.mixture, tokenizer=tokenizer, seed=config.seed) if config.eval_every > 0 else None
    if held_out is None:
        return []

    def batches() -> Iterator["Batch"]:
        examples = run.examples(held_out, tokenizer, 4 * config.device_batch_size * run.world_size, seed=0, num_epochs=1)
        return hooks.first_tokens(examples, config.eval_tokens, run.world_size)

    return [hooks.validation_bpb(config.eval_every, batches)]


if __name__ == "__main__":
    sys.exit(main())

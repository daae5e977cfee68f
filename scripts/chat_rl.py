"""Reinforcement learning: sample answers, learn from those that beat the mean of their prompt.

    python -m scripts.chat_rl                             GSM8K, from the finetuned model
    python -m scripts.chat_rl --task=spellingbee --num_samples=8 --max_new_tokens=48

Starts from <base>/chatsft_checkpoints/<model_tag>, and writes to chatrl_checkpoints;
--resume=latest continues.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import REGISTRY, load_task
from zangchat import configurator, schedule
from zangchat.errors import UserError
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig
from zangchat.training.settings import fitting_ranks

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.dataloader import Batch
    from zangchat.training.run import Run
    from zangchat.training.trainer import Stage


@dataclass
class Config(FinetuneConfig):
    source: str = "sft"  # sft | mid: the stage to start from
    task: str = "gsm8k"  # any task with a reward: gsm8k, spellingbee, arithmetic
    # length and batches
    num_epochs: int = 1  # times through the task's training examples
    num_iterations: int = -1  # optimizer steps; -1 = from --num_epochs
    examples_per_step: int = 16  # prompts, all ranks
    num_samples: int = 16  # answers per prompt
    max_new_tokens: int = 256  # per answer
    temperature: float = 1.0
    top_k: int = 50  # draw among the k most likely tokens; 0 = all
    task_size: int = 1000  # training examples of a generated task
    device_batch_size: BatchSize = 8
    """answers per rank in one training pass; auto = as many as fit the memory"""
    init_lr_frac: float = 0.05  # factor on all rates, which then fall to 0
    compile: bool | None = False  # torch.compile; its answers have a new length at each step
    # evaluation
    eval_every: int = 60  # steps between evaluations on held-out examples; -1 = none
    eval_examples: int = 400  # held-out examples
    eval_samples: int = 8  # answers per held-out example, for pass@1 .. pass@k


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    from zangchat.training.run import Run

    check(config)
    rows = config.examples_per_step * config.num_samples
    with Run.open("rl", config, source=config.source, rows=rows) as run:
        if run is None:
            return 0
        config, per_step = run.config, run.config.examples_per_step
        if per_step % run.world_size:
            problem = f"cannot be shared equally by {run.world_size} ranks"
            begun = f"; {fitting_ranks(per_step, run.world_size)}" if config.resume else ""
            raise UserError(f"--examples_per_step={per_step} {problem}: give a multiple{begun}")
        task, held_out = (load(config, split, run.tokenizer) for split in ("train", "val"))
        steps = run.steps(lambda: math.ceil(len(task) * config.num_epochs / per_step))
        answers = f"{per_step} prompts x {config.num_samples} answers"
        print0(f"rl: {task.name}, {steps:,} steps of {answers}")
        plan = run.plan._replace(num_iterations=steps)
        stage = make_stage(run, steps, task, held_out)
        return run.fit(stage, plan, "Chat RL")


def check(config: Config) -> None:
    """Refuse flags that are wrong in themselves, before anything is loaded."""
    if config.source not in ("sft", "mid"):
        raise UserError(f"--source={config.source} cannot be the start of RL: choose sft or mid")
    positive = ("num_epochs", "examples_per_step", "max_new_tokens", "task_size")
    configurator.check_range(1, config, *positive, "eval_examples", "eval_samples")
    if config.num_samples < 2:
        reason = "a sample is compared with others of its prompt, give 2 or more"
        raise UserError(f"--num_samples={config.num_samples} teaches nothing: {reason}")
    configurator.check_sampling(config)
    if flag := configurator.all_alike(config):
        raise UserError(f"{flag} teaches nothing, for samples have to differ: give more")


def load(config: Config, split: str, tokenizer: Any) -> "Task":
    """The task's training or held-out examples. Raises UserError for a task without a reward."""
    task = load_task(config.task, split)
    if not task.rewarded:
        rewarded = ", ".join(name for name in REGISTRY if load_task(name, "test").rewarded)
        problem = f"--task={config.task} has no reward to learn from"
        raise UserError(f"{problem}: choose one of {rewarded}")
    if not task.generated:
        return task
    size = config.task_size if split == "train" else config.eval_examples
    return load_task(config.task, split, size=size, seed=config.seed, tokenizer=tokenizer)


def make_stage(run: "Run", steps: int, task: "Task", held_out: "Task") -> "Stage":
    from zangchat.training import data, hooks
    from zangchat.training.rollout import Sampling, rollout_batches
    from zangchat.training.trainer import Stage

    config: Config = run.config
    top_k = config.top_k or None
    task = data.conversations(run, task)
    sampling = Sampling(config.num_samples, config.max_new_tokens, config.temperature, top_k)

    def batches(cursor: dict[str, Any] | None) -> Iterator["Batch"]:
        return rollout_batches(
            run.model,
            run.tokenizer,
            task,
            examples_per_step=config.examples_per_step,
            sampling=sampling,
            seed=config.seed,
            cursor=cursor,
        )

    multipliers = partial(
        schedule.finetune_multipliers,
        num_iterations=steps,
        init_lr_frac=config.init_lr_frac,
    )
    found = [hooks.rewards()]
    if config.eval_every > 0:
        evaluation = hooks.pass_at_k(
            config.eval_every,
            held_out,
            config.eval_samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=top_k,
            max_problems=config.eval_examples,
            seed=config.seed,
        )
        found.append(evaluation)
    return Stage("rl", batches, multipliers, found)


if __name__ == "__main__":
    sys.exit(main())

"""Reinforcement learning on a task with a reward: sample answers, learn from those that beat the average of their prompt.

    python -m scripts.chat_rl                                         GSM8K, from the finetuned model
    python -m scripts.chat_rl --task=spellingbee --num_samples=8 --max_new_tokens=48

Starts from <base>/chatsft_checkpoints/<model_tag> and writes <base>/chatrl_checkpoints/<model_tag>; --resume=latest goes on.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.registry import REGISTRY, load_task
from zangchat import configurator, schedule
from zangchat.runtime.logs import print0
from zangchat.training.flags import BatchSize, FinetuneConfig
from zangchat.training.run import open_run

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.dataloader import Batch
    from zangchat.training.trainer import Stage, Trainer


@dataclass
class Config(FinetuneConfig):
    source: str = "sft"  # sft | mid: the stage to start from
    task: str = "gsm8k"  # any task with a reward: gsm8k, spellingbee, arithmetic
    # how long, and in what batches
    num_epochs: int = 1  # times through the task's training examples
    num_iterations: int = -1  # optimizer steps; -1 = from --num_epochs
    examples_per_step: int = 16  # prompts, all ranks
    num_samples: int = 16  # answers per prompt
    max_new_tokens: int = 256  # per answer
    temperature: float = 1.0
    top_k: int = 50  # draw among the k most likely tokens; 0 = all
    task_size: int = 1000  # training examples of a generated task
    device_batch_size: BatchSize = 8  # answers per rank in one training pass; auto = what fits the memory
    init_lr_frac: float = 0.05  # factor on all rates, which then fall to 0
    # looking on
    eval_every: int = 60  # steps between evaluations on held-out examples; -1 = none
    eval_examples: int = 400  # held-out examples
    eval_samples: int = 8  # answers per held-out example, for pass@1 .. pass@k


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, train, argv)


def train(config: Config) -> int:
    check(config)
    with open_run("rl", config, source=config.source) as run:
        if run.finished:
            return 0
        run.start_from_source()
        tokenizer, model = run.tokenizer(), run.new_model()
        run.settle(model.config)
        config = run.choose_batch(model.config, run.config.examples_per_step * run.config.num_samples, even=False)
        if config.examples_per_step % run.world_size:
            raise configurator.UserError(
                f"--examples_per_step={config.examples_per_step} cannot be shared equally by {run.world_size} ranks: give a multiple"
            )
        task, held_out = load(config, "train", tokenizer), load(config, "val", tokenizer)
        steps = run.steps(lambda: math.ceil(len(task) * config.num_epochs / config.examples_per_step))
        print0(f"rl: {task.name}, {steps:,} steps of {config.examples_per_step} prompts x {config.num_samples} answers")
        plan = run.plan(model.config)._replace(num_iterations=steps)
        stage = make_stage(config, steps, model, tokenizer, task, held_out)
        trainer = run.trainer(model, stage, plan, tokenizer, keep_optimizer=False, compile=False)
        trainer.fit()
        if not trainer.exit_code:
            run.report("Chat RL", trainer, **(trainer.state.extra.get("held_out") or {}))
        return trainer.exit_code


def check(config: Config) -> None:
    """What can be seen to be wrong before anything is loaded."""
    if config.source not in ("sft", "mid"):
        raise configurator.UserError(f"--source={config.source} is no stage for RL to start from: choose sft or mid")
    configurator.check_range(1, config, "num_epochs", "examples_per_step", "max_new_tokens", "task_size", "eval_examples", "eval_samples")
    if config.num_samples < 2:
        raise configurator.UserError(
            f"--num_samples={config.num_samples} teaches nothing: a sample is compared with others of its prompt, give 2 or more"
        )
    configurator.check_sampling(config)
    if config.temperature == 0:
        raise configurator.UserError("--temperature=0 must be above 0, for samples have to differ: give 1, for example")


def load(config: Config, split: str, tokenizer: Any) -> "Task":
    """The task's training or held-out examples. Raises UserError for a task without a reward."""
    task = load_task(config.task, split)
    if not task.rewarded:
        rewarded = ", ".join(name for name in REGISTRY if load_task(name, "test").rewarded)
        raise configurator.UserError(f"--task={config.task} has no reward to learn from: choose one of {rewarded}")
    if task.generated:
        size = config.task_size if split == "train" else config.eval_examples
        task = load_task(config.task, split, size=size, seed=config.seed, tokenizer=tokenizer)
    return task


def make_stage(config: Config, steps: int, model: Any, tokenizer: Any, task: "Task", held_out: "Task") -> "Stage":
    from zangchat.training.rollout import Sampling, rollout_batches
    from zangchat.training.trainer import Every, Stage

    sampling = Sampling(config.num_samples, config.max_new_tokens, config.temperature, config.top_k or None)

    def batches(cursor: dict[str, Any] | None) -> Iterator["Batch"]:
        return rollout_batches(
            model, tokenizer, task, examples_per_step=config.examples_per_step, sampling=sampling, seed=config.seed, cursor=cursor
        )

    multipliers = partial(schedule.finetune_multipliers, num_iterations=steps, init_lr_frac=config.init_lr_frac)
    hooks = [Every(1, log_reward, name="reward")]
    if config.eval_every > 0:
        hooks.append(Every(config.eval_every, lambda trainer: evaluate(config, held_out, trainer), at_start=True, name="held out"))
    return Stage("rl", batches, multipliers, hooks)


def log_reward(trainer: "Trainer") -> None:
    """What the step's samples earned; it travels in the cursor, so that a resumed run logs what the uninterrupted one did."""
    told = {name: value for name, value in trainer.state.cursor.items() if name != "step"}
    if told:
        trainer.log(told)
        print0(
            f"rl step {trainer.state.step}: reward {told['reward']:.3f}, {told['solved']:.0%} of the prompts solved, "
            f"{told['sample_tokens']:.0f} tokens a sample"
        )


def evaluate(config: Config, held_out: "Task", trainer: "Trainer") -> None:
    """pass@1 .. pass@k on held-out examples, sampled as in training."""
    from zangchat.engine import Engine
    from zangchat.task_eval import evaluate_task

    result = evaluate_task(
        Engine(trainer.model, trainer.tokenizer),
        held_out,
        num_samples=config.eval_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        max_problems=config.eval_examples,
        seed=config.seed,
    )
    scores = {f"pass@{k}": result.pass_at(k) for k in sorted({1, config.eval_samples})}
    seen = trainer.state.extra.setdefault("held_out", {f"first {name}": value for name, value in scores.items()})
    seen.update({f"last {name}": value for name, value in scores.items()})
    trainer.log(scores)
    told = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
    print0(f"rl step {trainer.state.step}: held-out {held_out.name}: {told} ({len(result.items)} examples)")


if __name__ == "__main__":
    sys.exit(main())

"""Score a chat model on tasks: multiple choice by the letters' logits, the others by generating
answers.

    python -m scripts.chat_eval                                  all tasks of the finetuned model
    python -m scripts.chat_eval -i mid -a "GSM8K|ARC-Easy" -x 100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i rl -a gsm8k -n 8 -t 0.8

Each task leaves a file of prompts, completions and verdicts in <base>/chat_eval/, one JSON object
per problem.
"""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from tasks.common import MissingData
from tasks.registry import REGISTRY, load_task, scored_tasks
from zangchat import configurator, execution
from zangchat.config import CheckpointConfig
from zangchat.execution import SandboxLevel, SandboxRefused
from zangchat.report import checkpoint_name, get_report
from zangchat.runtime.logs import print0

if TYPE_CHECKING:
    from tasks.common import Task
    from zangchat.task_eval import TaskResult


@dataclass
class Config(CheckpointConfig):
    task_name: Annotated[str | None, tyro.conf.arg(aliases=["-a"])] = None
    """tasks separated by |; default: all"""
    all_tasks: bool = False
    """every task that can be scored, also those that ChatCORE does not count"""
    max_new_tokens: Annotated[int, tyro.conf.arg(aliases=["-m"])] = 512
    num_samples: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """answers per problem; one right answer is enough (pass@n)"""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 32
    """answers at a time, per rank; changes no result"""
    max_problems: Annotated[int | None, tyro.conf.arg(aliases=["-x"])] = None
    """per task; default: all"""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.0
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = all tokens
    seed: int = 42
    allow_unsafe_code: bool = False
    """run the programs of HumanEval's answers without a sandbox, if there is none"""


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, evaluate, argv)


def evaluate(config: Config) -> int:
    check(config)
    names = scored_tasks(config.task_name, every=config.all_tasks)
    from zangchat.engine import Engine, load_for_chat

    model, tokenizer, meta = load_for_chat(config)
    engine = Engine(model, tokenizer)
    model_name = checkpoint_name(meta)
    results: dict[str, TaskResult] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            results[name] = score(config, name, engine, model_name)
        except (MissingData, SandboxRefused) as error:
            if config.task_name:
                raise
            missing[name] = str(error)
            print0(f"{name}: not scored, {error}")
    if not results:
        raise configurator.UserError(nothing_scored(config, list(missing)))
    summary = scores(results, missing)
    for name, value in summary.items():
        print0(f"{name:<34} {value:.4f}")
    report(config, meta["stage"], model_name, results, summary, missing)
    return 0


def check(config: Config) -> None:
    if config.task_name and config.all_tasks:
        raise configurator.UserError(
            "--task_name and --all_tasks exclude each other: give one of them"
        )
    configurator.check_range(
        1, config, "max_new_tokens", "num_samples", "batch_size", "max_problems"
    )
    configurator.check_sampling(config)
    flag = configurator.all_alike(config)
    if config.num_samples > 1 and flag:
        raise configurator.UserError(
            f"--num_samples={config.num_samples} with {flag} gives the same answer each time: "
            f"add {'--top_k=50' if 'top_k' in flag else '--temperature=1'}"
        )


def ready(config: Config, name: str) -> "Task":
    """The task, with its data and sandbox checked before generating anything.

    Raises MissingData or SandboxRefused on all ranks if on one: the others would wait for it.
    """
    from zangchat.runtime import collectives

    options, problem = {}, None
    try:
        if name == "HumanEval":
            options["minimum_level"] = (
                SandboxLevel.NONE if config.allow_unsafe_code else SandboxLevel.FILTERED
            )
            execution.require_sandbox(options["minimum_level"])
        task = load_task(name, "test", **options)
        len(task)  # which fetches its data
    except (MissingData, SandboxRefused) as error:
        problem = error
    if any(collectives.max_over_ranks([problem is not None])):
        raise problem or MissingData("another rank lacks what it needs")
    return task


def score(config: Config, name: str, engine: Any, model_name: str) -> "TaskResult":
    from zangchat.task_eval import evaluate_task

    result = evaluate_task(
        engine,
        ready(config, name),
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        batch_size=config.batch_size,
        max_problems=config.max_problems,
        seed=config.seed,
        show_progress=True,
    )
    path = get_report().base_dir / "chat_eval" / f"{model_name}_{name}.jsonl"
    result.write(path)
    print0(
        f"{name}: {result.accuracy:.4f} ({sum(item.passed for item in result.items)} of "
        f"{len(result.items)}), see {path}"
    )
    return result


def nothing_scored(config: Config, missing: list[str]) -> str:
    """The error when no task has its data (the reasons are printed already), with the tasks that
    do.
    """
    able = []
    for name, entry in REGISTRY.items():
        if entry.test and not entry.small and name not in missing:
            with contextlib.suppress(configurator.UserError):
                ready(config, name)
                able.append(name)
    hint = f'; these have their data here: -a "{"|".join(able)}"' if able else ""
    return f"nothing was scored: {', '.join(missing)} lack what the lines above name{hint}"


def scores(results: dict[str, "TaskResult"], missing: dict[str, str]) -> dict[str, float]:
    """Accuracy per task, and ChatCORE: the mean of the centred accuracies of its tasks, named so
    that a part is not taken for the whole.
    """
    table = {name: result.accuracy for name, result in results.items()}
    counted: dict[str, float] = {
        name: entry.baseline for name, entry in REGISTRY.items() if entry.baseline is not None
    }
    there = [name for name in counted if name in table]
    absent = [name for name in counted if name not in table]
    if there and all(name in missing for name in absent):
        centred = [(table[name] - counted[name]) / (1 - counted[name]) for name in there]
        label = (
            f"ChatCORE ({len(there)}/{len(counted)}, no {', '.join(absent)})"
            if absent
            else "ChatCORE"
        )
        table[label] = sum(centred) / len(centred)
    return table


def report(
    config: Config,
    stage: str,
    model_name: str,
    results: dict[str, "TaskResult"],
    summary: dict[str, float],
    missing: dict[str, str],
) -> None:
    settings = {
        key: value for key, value in configurator.to_dict(config).items() if value is not None
    }
    sizes: dict[str, Any] = {
        f"{name} problems": len(result.items) for name, result in results.items()
    }
    if "HumanEval" in results:
        sizes["sandbox"] = str(execution.find_sandbox())
    samples = [
        {
            "messages": [
                {"role": "user", "content": item.prompt},
                {"role": "assistant", "content": item.completions[0]},
            ]
        }
        for result in results.values()
        for item in result.items[:1]
        if item.completions
    ]
    # a table of numbers only would count as scores: the sizes go with the model's name
    card: list[str | dict[str, Any]] = [
        summary,
        {"model": model_name, **settings, **sizes},
        *(f"Not scored: {name}. {why}" for name, why in missing.items()),
        *samples,
    ]
    get_report().log(f"Chat evaluation {stage}", card)


if __name__ == "__main__":
    sys.exit(main())

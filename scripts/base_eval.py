"""Score a base model on CORE: 22 tasks of DCLM, each with few-shot examples.

    python -m scripts.base_eval --max_per_task=500
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval

Data from <base>/eval_bundle, downloaded if missing. The scores go into the report and a CSV file.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zangchat import configurator
from zangchat.config import CheckpointConfig, SourceFlag
from zangchat.report import checkpoint_name, get_report
from zangchat.runtime.files import atomic_write
from zangchat.runtime.logs import print0
from zangchat.runtime.processes import get_dist_info


@dataclass
class Config(CheckpointConfig):
    source: SourceFlag = "base"  # base | mid | sft | rl
    max_per_task: int = -1  # questions per task; -1 = all


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, evaluate, argv)


def evaluate(config: Config) -> int:
    from zangchat import core_eval, engine

    if config.max_per_task < 1 and config.max_per_task != -1:
        raise configurator.UserError(
            f"--max_per_task={config.max_per_task} is not possible: give at least 1, or -1 for all"
        )
    model, tokenizer, meta = engine.load_for_chat(config)
    bundle = core_eval.find_bundle()
    start = time.monotonic()

    def print_task(label: str, accuracy: float, centred: float) -> None:
        print0(f"{label:<34} accuracy {accuracy:.4f}   centred {centred:+.4f}")

    result = core_eval.evaluate_core(
        model,
        tokenizer,
        bundle,
        max_per_task=config.max_per_task,
        on_task=print_task,
        show_progress=True,
    )
    minutes = (time.monotonic() - start) / 60
    print0(f"{result['name']}: {result['core_metric']:.4f} in {minutes:.1f} minutes")
    write(config, meta, result, minutes)
    return 0


def write(config: Config, meta: dict[str, Any], result: dict[str, Any], minutes: float) -> None:
    """The CSV file and the report card, by rank 0."""
    if get_dist_info()[1] != 0:
        return
    report = get_report()
    path = report.base_dir / "base_eval" / f"{checkpoint_name(meta)}.csv"
    rows = [
        f"{label},{accuracy:.6f},{result['centered_results'][label]:.6f}"
        for label, accuracy in result["results"].items()
    ]
    rows += [f"{label},," for label in result["missing"]]
    atomic_write(
        path,
        "\n".join(
            ["task,accuracy,centered", *rows, f'"{result["name"]}",,{result["core_metric"]:.6f}']
        )
        + "\n",
    )
    print0(f"written to {path}")
    facts = {
        "model": checkpoint_name(meta),
        "questions per task": "all" if config.max_per_task == -1 else config.max_per_task,
        "tasks missing": ", ".join(result["missing"]) or "none",
        "minutes": round(minutes, 2),
    }
    report.log(
        f"{meta['stage'].capitalize()} model evaluation",
        [facts, {result["name"]: result["core_metric"], **result["centered_results"]}],
    )


if __name__ == "__main__":
    sys.exit(main())

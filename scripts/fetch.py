"""Fetch the data of the stages after pretraining, so that no trained model waits for a download
that fails.

    python -m scripts.fetch                                            the data of all stages on
                                                                       their defaults
    python -m scripts.fetch --mid_mixture="smoltalk:1,me.jsonl:2" --rl_task=spellingbee --core=0

Datasets go to the cache of the hub's client, CORE's bundle to <base>/eval_bundle. Data that is
there already is only checked.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.common import MissingData
from tasks.customjson import is_file_name
from tasks.registry import MID_MIXTURE, SFT_MIXTURE, load_task, parse_mixture, scored_tasks
from zangchat import configurator
from zangchat.runtime.logs import print0


@dataclass
class Config:
    mid_mixture: str = MID_MIXTURE  # what mid_train is to train on
    sft_mixture: str = SFT_MIXTURE  # the same of chat_sft
    identity_data: str | None = None
    """a .jsonl file of conversations of your own: read, so that a mistake in it is found now"""
    rl_task: str = "gsm8k"  # what chat_rl is to train on; empty = nothing
    eval_tasks: str | None = None
    """of the chat evaluations, separated by |; default: every task that can be scored"""
    core: bool = True  # CORE's bundle as well


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, fetch, argv)


def fetch(config: Config) -> int:
    scored = scored_tasks(config.eval_tasks, every=True)
    trained = [
        name for spec in (config.mid_mixture, config.sft_mixture) for name, _ in parse_mixture(spec)
    ]
    trained += [name for name in (config.identity_data, config.rl_task) if name]
    looked_at: set[str] = set()
    for name in trained:
        look_at(name, "train", looked_at)
        if not is_file_name(name):
            look_at(name, "val", looked_at)
    for name in scored:
        try:
            look_at(name, "test", looked_at)
        except MissingData as error:  # the evaluation goes without it, too
            print0(f"{name} will not be scored: {error}")
    if config.core:
        from zangchat.core_eval import find_bundle, read_tasks

        tasks, missing = read_tasks(find_bundle())
        print0(f"CORE: {len(tasks)} tasks{', without ' + ', '.join(missing) if missing else ''}")
    return 0


def look_at(name: str, split: str, before: set[str]) -> None:
    """Load a task, which fetches its data, unless it was `before`; say what there is. Generated
    tasks need nothing.
    """
    task = load_task(name, split)
    label = f"{name if is_file_name(name) else task.name}, {getattr(task, 'file_split', split)}"
    if task.generated or label in before:
        return
    before.add(label)
    task[0]
    print0(f"{label}: {len(task):,} conversations")


if __name__ == "__main__":
    sys.exit(main())

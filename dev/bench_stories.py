"""How good the stories of a chat model are, judged by program. JSON.

    python -m dev.bench_stories                  100 held-out requests at temperature 0.8
    python -m dev.bench_stories -i sft -x 20 --show

Of the stories: how many name what was asked for, keep to their characters, thing and place, end
within a whole sentence, are all of that; the same of the requests with a word that no training
story has; how many share more than half of their sentences with one training story; and the share
of distinct 4-grams of words. Next to the last two are those of the grammar's own held-out stories,
which a perfect model would have.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from tasks.stories import Stories, judge_story, rare_words, words, world
from zangchat import configurator
from zangchat.config import CheckpointConfig
from zangchat.report import checkpoint_name


@dataclass
class Config(CheckpointConfig):
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.8
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50  # 0 = all tokens
    max_problems: Annotated[int, tyro.conf.arg(aliases=["-x"])] = 100
    max_new_tokens: int = 256
    seed: int = 42
    train_stories: int = 4000  # to compare with: those that dev/runcpu.sh mixes in
    show: bool = False  # the stories, too


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    configurator.check_range(1, config, "max_problems", "max_new_tokens", "train_stories")
    configurator.check_sampling(config)
    from zangchat.engine import Engine, load_for_chat
    from zangchat.task_eval import evaluate_task

    model, tokenizer, meta = load_for_chat(config)
    task = Stories(split="test")
    items = evaluate_task(
        Engine(model, tokenizer),
        task,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        max_problems=config.max_problems,
        seed=config.seed,
    ).items
    stories = [re.sub(r"<\|.*", "", item.completions[0], flags=re.DOTALL) for item in items]
    verdicts = [
        judge_story(story, task[item.index]["wanted"])
        for item, story in zip(items, stories, strict=True)
    ]
    trained = holders(config.train_stories)
    rare = {word for kind in world()["rare"] for word in rare_words(kind, "test")}
    unseen = [i for i, item in enumerate(items) if rare & set(task[item.index]["wanted"])]
    found = {
        "model": checkpoint_name(meta),
        "stories": len(stories),
        **{
            name: sum(getattr(verdict, name) for verdict in verdicts)
            for name in ("named", "consistent", "ended")
        },
        "all three": sum(map(all, verdicts)),
        "all three, with a word never seen": sum(all(verdicts[i]) for i in unseen),
        "requests with a word never seen": len(unseen),
        **compare(stories, trained),
        "of the grammar": compare(
            [task[item.index]["messages"][1]["content"] for item in items], trained
        ),
    }
    print(json.dumps(found | ({"texts": stories} if config.show else {}), indent=1))
    return 0


def holders(train_stories: int) -> dict[str, set[int]]:
    """The numbers of the training stories that have each sentence."""
    found: dict[str, set[int]] = {}
    task = Stories(size=train_stories)
    for number in range(train_stories):
        for sentence in sentences(task[number]["messages"][1]["content"]):
            found.setdefault(sentence, set()).add(number)
    return found


def compare(stories: Sequence[str], trained: Mapping[str, set[int]]) -> dict[str, float]:
    """How near the stories are to those of the training split, and to one another."""
    near = 0
    for story in stories:
        own = sentences(story)
        shared = Counter(number for each in own for number in trained.get(each, ()))
        near += max(shared.values(), default=0) > len(own) / 2
    grams = [tuple(said[i : i + 4]) for said in map(words, stories) for i in range(len(said) - 3)]
    return {
        "share more than half with a training story": near,
        "distinct 4-grams": round(len(set(grams)) / max(len(grams), 1), 3),
    }


def sentences(story: str) -> list[str]:
    """The words of each sentence."""
    return [" ".join(words(each)) for each in re.split(r'(?<=[.!?])"? ', story.strip())]


if __name__ == "__main__":
    sys.exit(main())

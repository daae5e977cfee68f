"""The tasks by name, and the mixtures of them: a new task is one file and one line in REGISTRY."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.common import Task, TaskMixture, check_split
from tasks.customjson import CustomJSON, is_file_name
from zangchat.errors import UserError
from zangchat.runtime.files import unpacked_name

# of a task in a mixture, as typed and with its epochs: just the order takes a hundred bytes a
# conversation
MAX_AMOUNT = 10_000_000
MAX_CONVERSATIONS = 100_000_000
MAX_HELDOUT = 1000  # generated examples per task in a held-out mixture


@dataclass(frozen=True)
class Entry:
    """The class of a task. `baseline` is the score of guessing; None = not part of ChatCORE."""

    module: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    baseline: float | None = None
    test: bool = True  # can be evaluated
    small: bool = False  # of a world that only small models are taught: evaluated by name only


REGISTRY: dict[str, Entry] = {
    "ARC-Easy": Entry("tasks.arc", "ARC", {"subset": "ARC-Easy"}, baseline=0.25),
    "ARC-Challenge": Entry("tasks.arc", "ARC", {"subset": "ARC-Challenge"}, baseline=0.25),
    "MMLU": Entry("tasks.mmlu", "MMLU", baseline=0.25),
    "GSM8K": Entry("tasks.gsm8k", "GSM8K", baseline=0.0),
    "HumanEval": Entry("tasks.humaneval", "HumanEval", baseline=0.0),
    "SpellingBee": Entry("tasks.spellingbee", "SpellingBee", baseline=0.0),
    "SimpleSpelling": Entry("tasks.spellingbee", "SimpleSpelling"),
    "Arithmetic": Entry("tasks.arithmetic", "Arithmetic"),
    "PyDocs": Entry("tasks.pydocs", "PyDocs"),
    "Identity": Entry("tasks.identity", "Identity"),
    "Stories": Entry("tasks.stories", "Stories", small=True),
    "StoryQuestions": Entry("tasks.stories", "StoryQuestions", small=True),
    "StoryFacts": Entry("tasks.stories", "StoryFacts", small=True),
    "StoriesAgain": Entry("tasks.stories", "StoriesAgain", small=True),
    "SmallTalk": Entry("tasks.smalltalk", "SmallTalk", small=True),
    "DontKnow": Entry("tasks.smalltalk", "DontKnow", small=True),
    "Medley": Entry("tasks.medley", "Medley", small=True),
    "SmolTalk": Entry("tasks.smoltalk", "SmolTalk", test=False),
}


def find_name(name: str) -> str:
    """The registry's spelling of a task's name; case, `-` and `_` do not matter. Raises
    UserError.
    """
    wanted = re.sub("[-_ ]", "", name).lower()
    for known in REGISTRY:
        if known.replace("-", "").lower() == wanted:
            return known
    raise UserError(
        f"unknown task {name!r}: known are {', '.join(REGISTRY)} (and the path of a .jsonl file of "
        "conversations)"
    )


def scored_tasks(names: str | None = None, *, every: bool = False) -> list[str]:
    """The registry's names of the tasks to score: those in `names`, separated by |; else all of
    ChatCORE's, or `every` one that is not of the small world.

    Raises UserError for a name that it does not know, or a task that has nothing to score.
    """
    if not names:
        return [
            name
            for name, entry in REGISTRY.items()
            if entry.test and (entry.baseline is not None or (every and not entry.small))
        ]
    chosen = list(
        dict.fromkeys(find_name(name.strip()) for name in names.split("|") if name.strip())
    )
    for name in chosen:
        if not REGISTRY[name].test:
            able = ", ".join(known for known, entry in REGISTRY.items() if entry.test)
            raise UserError(
                f"{name} is training data without right answers; tasks that can be scored: {able}"
            )
    return chosen


def load_task(name: str, split: str = "train", **options: Any) -> Task:
    """The task of that name, or CustomJSON for the path of a file of conversations.

    `options` go to the task's constructor (size=, stop=, ...).
    """
    if is_file_name(name):
        task: Task = CustomJSON(name, **options)
        task.name = unpacked_name(Path(name)).stem
        return task
    known = find_name(name)
    entry = REGISTRY[known]
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    task = cls(split=split, **{**entry.options, **options})
    task.name = known
    return task


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """`"pydocs:1,identity:4,spellingbee:4000"` -> [("pydocs", 1.0), ...]; without a number, 1.
    Raises UserError.
    """
    pairs = []
    for item in filter(None, (piece.strip() for piece in spec.split(","))):
        name, colon, amount = item.rpartition(":")
        if not colon or is_file_name(item):  # C:\data\chats.jsonl
            name, amount = item, "1"
        try:
            number = float(amount)
        except ValueError:
            number = -1.0
        if not 0 < number <= MAX_AMOUNT:
            raise UserError(
                f"--mixture: {item!r} is not NAME:NUMBER with a number above 0 and up to "
                f"{MAX_AMOUNT:,} (epochs; examples for "
                "generated tasks)"
            )
        pairs.append((name.strip(), number))
    return pairs


def build_mixture(
    spec: str | Sequence[tuple[str, float]],
    split: str = "train",
    *,
    tokenizer: Any = None,
    seed: int = 42,
    skip_bad_rows: bool = False,
) -> TaskMixture:
    """The mixture that `spec` describes. Its numbers mean epochs for finite data (fractions
    allowed) and examples for generated tasks.

    In a held-out split every finite task counts once at most and a generated one gives up to
    MAX_HELDOUT examples. A tokenizer lets the tasks that can use one (SpellingBee) draw training
    words from its vocabulary. A task whose data is missing is an error, never left out.
    """
    check_split(split)
    parts: list[Task] = []
    for name, amount in parse_mixture(spec) if isinstance(spec, str) else spec:
        options = {"skip_bad_rows": skip_bad_rows} if is_file_name(name) else {}
        task = load_task(name, split, **options)
        if task.generated:
            size = max(1, round(amount))
            size = size if split == "train" else min(size, MAX_HELDOUT)
            parts.append(load_task(name, split, size=size, seed=seed, tokenizer=tokenizer))
            continue
        epochs = amount if split == "train" else min(amount, 1.0)
        if epochs * len(task) > MAX_CONVERSATIONS:
            raise UserError(
                f"{name}:{amount:g} is {amount:,g} times its {len(task):,} conversations, and a "
                f"mixture holds up to {MAX_CONVERSATIONS:,} of a task: for a part of them write a "
                f"fraction, as {name}:0.5"
            )
        whole = int(epochs)
        parts += [task] * whole
        rest = round((epochs - whole) * len(task))
        if rest or not whole:  # at least one, as of a generated task
            rest = max(rest, 1)
            parts.append(task[:rest])
    if not parts:
        raise UserError('--mixture is empty: write it as "pydocs:1,identity:4,spellingbee:4000"')
    return TaskMixture(parts, seed=seed)


# 460k general conversations, 100k questions of multiple choice, 8k sums with the calculator (each
# once); who the model is (twice); 280k generated exercises in spelling and counting letters. About
# 850k conversations.
MID_MIXTURE = "smoltalk:1,mmlu:1,gsm8k:1,identity:2,simplespelling:200000,spellingbee:80000"
# Few but good: 3.4k questions of multiple choice, 8k sums with the calculator, 10k of the 460k
# general conversations, who the model is, and a reminder of spelling and counting. About 23k
# conversations.
SFT_MIXTURE = (
    "arc-easy:1,arc-challenge:1,gsm8k:1,smoltalk:0.0217,identity:1,"
    "simplespelling:300,spellingbee:300"
)


def training_conversations(
    spec: str,
    own_file: str | None = None,
    own_epochs: int = 1,
    *,
    tokenizer: Any,
    seed: int,
    skip_bad_rows: bool = False,
) -> TaskMixture:
    """The conversations of `--mixture` and `--identity_data`. Raises UserError for an unknown task,
    or one whose data is missing.
    """
    if own_file and not is_file_name(own_file):
        raise UserError(f"--identity_data={own_file} is not a .jsonl file of conversations")
    own = [(own_file, float(own_epochs))] if own_file else []
    return build_mixture(
        [*parse_mixture(spec), *own],
        "train",
        tokenizer=tokenizer,
        seed=seed,
        skip_bad_rows=skip_bad_rows,
    )


def held_out_conversations(config: Any, tokenizer: Any) -> TaskMixture | None:
    """The held-out split of the mixture that a run is trained on.

    None if --eval_every switches validation off, or if the mixture holds only files of your own,
    which have no such split.
    """
    parts = parse_mixture(config.mixture) if config.eval_every > 0 else []
    parts = [(name, amount) for name, amount in parts if not is_file_name(name)]
    if not parts:
        return None
    return build_mixture(parts, "val", tokenizer=tokenizer, seed=config.seed)

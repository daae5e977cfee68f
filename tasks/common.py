"""The protocol of tasks, their mixtures, and the data that they come from.

A task is a sequence of conversations (zangchat.conversation has the format) that can judge an
answer. `completion` below is plain text or, better, the parts of an assistant message, which tell a
real tool call from text that looks like one. A new task is one file and one line in registry.py.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from zangchat.conversation import Content, Conversation, OrderError, tool_used, turns, visible_text
from zangchat.errors import UserError, disk_error, explain
from zangchat.runtime.files import PACKED, get_base_dir, read_jsonl, unpacked, unpacked_name
from zangchat.runtime.seeds import derive_seed

SPLITS = ("train", "val", "test")
DEFAULT_SIZE = 1000  # examples of a generated task by default
DEFINE = "must define num_examples and get_example (see README.md, Adding a task)"


class MissingData(UserError):
    """A task's data is neither in <base>/tasks nor to be had from the hub."""


class Task:
    """A sequence of conversations, seen through start:stop:step. Slices compose: task[10:20][::2].

    Subclasses define `num_examples` and `get_example`; for scores, `eval_type` with `evaluate` (and
    `reward` for RL).
    """

    # or "categorical": the answer is one of conversation["letters"]
    eval_type: ClassVar[str] = "generative"
    generated: ClassVar[bool] = False  # on demand: has a size, not epochs
    rewarded: ClassVar[bool] = False  # has a reward, for RL
    needs_tool: ClassVar[bool] = False  # only for answers that came from a tool
    fingerprinted: ClassVar[int] = 4096  # examples, spread evenly, that the fingerprint reads
    name: str = ""  # how the registry spells it
    _view: slice = slice(None)  # all, for a subclass that does not call __init__
    _indices: range | None = None

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or (stop is not None and stop < start) or step < 1:
            raise ValueError(f"not a range of examples: start={start} stop={stop} step={step}")
        self._view = slice(start, stop, step)

    def num_examples(self) -> int:
        """How many there are before slicing."""
        raise NotImplementedError(f"{type(self).__name__} {DEFINE}")

    def get_example(self, index: int) -> Conversation:
        """Example `index` of num_examples(); the same on every call and every machine."""
        raise NotImplementedError(f"{type(self).__name__} {DEFINE}")

    def evaluate(self, conversation: Conversation, completion: Content) -> bool:
        """Whether the completion answers the conversation's last user message: of a categorical
        task, is the letter of its answer.
        """
        if self.eval_type != "categorical":
            raise TypeError(
                f"{type(self).__name__} has no right or wrong answers: it is training data"
            )
        return visible_text(completion).strip() == conversation["messages"][-1]["content"]

    def reward(self, conversation: Conversation, completion: Content) -> float:
        """What RL maximises; by default 1 for a right answer."""
        return float(
            self.evaluate(conversation, completion)
            and (tool_used(completion) or not self.needs_tool)
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with the number of examples, and with those that are read."""
        digest = hashlib.sha256(str(len(self)).encode())
        for index in range(0, len(self), -(-len(self) // self.fingerprinted) or 1):
            digest.update(json.dumps(self[index]["messages"], sort_keys=True).encode())
        return digest.hexdigest()[:16]

    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each task in it, by name."""
        return {self.name or type(self).__name__: self.fingerprint()}

    def skipped_rows(self) -> dict[str, int]:
        """How many rows --skip_bad_rows left out, by task."""
        return {}

    @property
    def indices(self) -> range:
        if self._indices is None:
            self._indices = range(self.num_examples())[self._view]
        return self._indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            view = copy.copy(self)
            view._indices = self.indices[index]
            return view
        return self.get_example(self.indices[index])


class TaskMixture(Task):
    """All examples of several tasks in one fixed, shuffled order. A task listed twice is seen
    twice.
    """

    def __init__(self, tasks: Sequence[Task], seed: int = 42, **view: int) -> None:
        super().__init__(**view)
        self.tasks = list(tasks)
        self._order = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]
        random.Random(derive_seed(seed, "mixture")).shuffle(self._order)

    def __str__(self) -> str:
        """How many examples there are of what: "SmolTalk 460,341, GSM8K 7,473"."""
        counts: dict[str, int] = {}
        for task in self.tasks:
            name = task.name or type(task).__name__
            counts[name] = counts.get(name, 0) + len(task)
        return ", ".join(f"{name} {count:,}" for name, count in counts.items())

    def fingerprints(self) -> dict[str, str]:
        """A task that is listed several times has those of all its parts."""
        distinct = {id(task): task for task in self.tasks}  # another epoch is the same object
        parts = {key: task.fingerprints() for key, task in distinct.items()}
        found: dict[str, str] = {}
        for task in self.tasks:
            for name, digest in parts[id(task)].items():
                found[name] = f"{found[name]} {digest}" if name in found else digest
        return found

    def skipped_rows(self) -> dict[str, int]:
        return {name: n for task in self.tasks for name, n in task.skipped_rows().items()}

    def num_examples(self) -> int:
        return len(self._order)

    def get_example(self, index: int) -> Conversation:
        task, position = self._order[index]
        return self.tasks[task][position]


class TaskSequence(Task):
    """Several tasks one after the other: a curriculum."""

    def __init__(self, tasks: Sequence[Task], **view: int) -> None:
        super().__init__(**view)
        self.tasks = list(tasks)

    def num_examples(self) -> int:
        return sum(len(task) for task in self.tasks)

    def get_example(self, index: int) -> Conversation:
        for task in self.tasks:
            if index < len(task):
                return task[index]
            index -= len(task)
        raise IndexError(index)


# ---- conversations -------------------------------------------------------------------------------


def chat(user: str, assistant: Content, **extra: Any) -> Conversation:
    """A one-turn conversation; `extra` is data that the task needs to judge answers."""
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        **extra,
    }


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def tool_parts(call: str, output: str) -> list[dict[str, str]]:
    return [{"type": "python", "text": call}, {"type": "python_output", "text": output}]


def check_conversation(messages: Any, where: str) -> None:
    """Raises UserError, beginning with `where`, unless the messages can be rendered and learned
    from.
    """
    try:
        check_messages(messages)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def check_messages(messages: Any) -> None:
    """The same as ValueError, or OrderError if only the order of the roles is wrong."""
    found = list(turns({"messages": messages}))
    if found[-1].role != "assistant":
        raise OrderError("the last message must be the assistant's, for it is what is learned")
    if not any(turn.weight for turn in found):
        raise ValueError(
            "each of the assistant's messages has weight 0, so there is nothing to learn"
        )


def training_messages(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the keys that training reads: role, content, and the weight if they have
    one.
    """
    kept = ("role", "content", "weight")
    return [
        {key: message[key] for key in kept if message.get(key) is not None} for message in messages
    ]


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number in a text: thousands separators allowed, a final full stop is not a decimal
    point.
    """
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question as the user asks it.

    Each letter stands at the start of its line: there every split pattern makes it a token of its
    own, the very token that the answer is.
    """
    if len(letters) != len(choices):
        raise ValueError(f"{len(letters)} letters for {len(choices)} choices")
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer with the letter alone."])


# ---- train and held-out --------------------------------------------------------------------------


def split_of(*key: object) -> str:
    """The split of generated data: 80 % train, 10 % val, 10 % test, determined only by its key."""
    return ("val", "test", *("train",) * 8)[derive_seed("split", *key) % 10]


def plain(question: str) -> str:
    """Only letters and digits, in lower case: `What's that?` and `whats that` are one question."""
    return "".join(char for char in question.lower() if char.isalnum())


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def variants(question: str, openings: Sequence[str], openings_zh: Sequence[str]) -> Iterator[str]:
    """The question as written, as hurried people type it, and after one of the openings of its
    language, such as "Hey, {q}" (chosen by the question).
    """
    yield question
    hurried = question.rstrip("?.!。？！")
    if is_chinese(question):
        yield hurried
        yield question.replace("？", "?")
    else:
        yield hurried.lower()
    choices = openings_zh if is_chinese(question) else openings
    opening = choices[derive_seed("opening", question) % len(choices)]
    whole = opening.endswith((". {q}", "! {q}", ": {q}")) or re.match(r"I\b|zangchat", question)
    yield opening.format(q=question if whole else question[0].lower() + question[1:])


def check_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    return split


# ---- data from outside ---------------------------------------------------------------------------


class TableRows(Sequence[dict[str, Any]]):
    """Rows of a parquet file as dicts, made one at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        problem, remedy = f"{path} cannot be read as parquet", "delete it or copy it again"
        with explain(problem, remedy, pyarrow.ArrowException, OSError):
            self._table = pyarrow.parquet.read_table(path)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def load_rows(
    folder: str, config: str, split: str, *, hub: str, fields: Iterable[str]
) -> Sequence[dict[str, Any]]:
    """The rows of <base>/tasks/<folder>/[<config>/]<split>.parquet|jsonl[.gz|.zst|.bz2], else those
    from the hub.

    An empty `config` means none. Raises MissingData if neither can be had, UserError for a file
    without the expected fields.
    """
    home = get_base_dir() / "tasks" / folder / config
    names = [f"{split}{kind}" for kind in (".parquet", ".jsonl")]
    paths = (home / f"{name}{packed}" for packed in ("", *PACKED) for name in names)
    local = next((path for path in paths if path.is_file()), None)
    if local is None:
        rows, source = _from_hub(hub, config, split, home), f"{hub} on the hub"
    elif unpacked_name(local).suffix == ".parquet":
        rows, source = TableRows(unpacked(local)), str(local)
    else:
        rows, source = [row for _, row in read_jsonl(local)], str(local)
    if not len(rows):
        raise UserError(f"{source} is empty: delete it or copy it again")
    missing = sorted(set(fields) - set(rows[0]))
    if missing:
        found = f"it has {', '.join(rows[0])}"
        problem = f"{source} has no field {', '.join(missing)} ({found})"
        raise UserError(f"{problem}: it is not the dataset {hub}")
    return rows


def _from_hub(repo: str, config: str, split: str, home: Path) -> Any:
    import datasets

    from zangchat.dataset import hub

    wanted = f"{repo} ({f'{config}, ' if config else ''}split {split})"
    try:
        if not datasets.config.HF_HUB_OFFLINE and (problem := hub.unreachable(hub.endpoint())):
            raise ConnectionError(f"{problem} (HF_HUB_OFFLINE=1 uses what is in its cache)")
        return hub.fetch_table(repo, config, split)
    except UserError:
        raise
    except Exception as error:  # offline, refused, no such split: clients differ
        if disk_error(error):
            raise
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingData(
            f"no {home}/{split}.parquet or .jsonl, and the hub did not give {wanted}: {cause}; "
            "run this again later, or download it to that path"
        ) from error


class RowsTask(Task):
    """A task over the rows of a downloaded dataset, in one fixed shuffled order (so that the first
    N are a fair sample).

    It has no val split of its own: `val` reads the test rows.
    """

    folder: ClassVar[str]
    hub: ClassVar[str]
    fields: ClassVar[tuple[str, ...]]

    def __init__(self, config: str, split: str, **view: int) -> None:
        super().__init__(**view)
        self.config, self.split = config, check_split(split)

    @property
    def file_split(self) -> str:
        """The dataset's own name of the split."""
        return "train" if self.split == "train" else "test"

    @functools.cached_property
    def rows(self) -> Sequence[dict[str, Any]]:
        return load_rows(
            self.folder, self.config, self.file_split, hub=self.hub, fields=self.fields
        )

    @functools.cached_property
    def order(self) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(derive_seed("rows", self.folder, self.config, self.file_split)).shuffle(order)
        return order

    def num_examples(self) -> int:
        return len(self.order)

    def get_example(self, index: int) -> Conversation:
        return self.conversation(self.rows[self.order[index]])

    def conversation(self, row: dict[str, Any]) -> Conversation:
        raise NotImplementedError(f"{type(self).__name__} must define conversation")


class GeneratedTask(Task):
    """A task that generates example i of a split from (seed, name, split, i), `size` of them.

    The model's tokenizer is for tasks that depend on its tokens.
    """

    generated = True

    def __init__(
        self,
        size: int = DEFAULT_SIZE,
        split: str = "train",
        seed: int = 42,
        *,
        tokenizer: Any = None,
        **view: int,
    ) -> None:
        super().__init__(**view)
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        self.size, self.split, self.seed, self.tokenizer = size, check_split(split), seed, tokenizer

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        return self.make(
            random.Random(derive_seed(self.seed, type(self).__name__, self.split, index))
        )

    def make(self, rng: random.Random) -> Conversation:
        raise NotImplementedError(f"{type(self).__name__} must define make")

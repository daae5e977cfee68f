"""CustomJSON: your own conversations from a JSONL file, one on each line, in one of these shapes:

    OpenAI     {"messages": [{"role": "user", "content": "..."},
                             {"role": "assistant", "content": "..."}]}
    ShareGPT   {"conversations": [{"from": "human", "value": "..."},
                                  {"from": "gpt", "value": "..."}]}
    Alpaca     {"instruction": "...", "input": "...", "output": "...", "system": "...",
                "history": [["q", "a"]]}
    TRL        {"prompt": "...", "completion": "..."}

A line may also be a bare list of messages. Messages may be of either kind, {role, content} or
{from, value}, in both lists. Of Alpaca's keys all but instruction and output are optional; a
ShareGPT line may have a system key. A prompt may be a list of messages, and so may a completion, as
in TRL. Texts are taken as they are: a leading space stays. A message with "weight": 0 is context,
and not learned. A .json file holds the same as one JSON array.

A conversation in which user and assistant do not take turns, or which does not end with an answer,
is left out; a warning has the number. Any other mistake is an error that names the line, unless
--skip_bad_rows leaves the line out. The file may be compressed (.gz, .zst, .bz2).
"""

import json
import logging
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.common import Conversation, Task, check_messages, training_messages
from zangchat.conversation import OrderError, all_text, is_text, messages_of
from zangchat.errors import UserError, explain
from zangchat.runtime.files import (
    LeftOut,
    converted,
    expand_home,
    read_jsonl,
    unpacked,
    unpacked_name,
)

logger = logging.getLogger(__name__)

FORMATS = (".jsonl", ".ndjson", ".json")
SHAPES = "messages, conversations, instruction and output, or prompt and completion"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "system",  # by the name that OpenAI's newer models give it
}


def is_file_name(name: str) -> bool:
    """Whether a task's name is the path of a file of conversations."""
    return unpacked_name(Path(name)).suffix.lower() in FORMATS


class OutOfOrder(UserError):
    """A conversation that is well formed, but that cannot be rendered in the order it has."""


class CustomJSON(Task):
    """All conversations of a file. Every line is checked at the first use.

    A UserError names file and line of one that cannot be read.
    """

    fingerprinted = sys.maxsize  # people edit such files: all examples

    def __init__(
        self,
        filepath: str | Path,
        split: str = "train",
        *,
        skip_bad_rows: bool = False,
        **view: int,
    ) -> None:
        super().__init__(**view)
        self.path = expand_home(filepath)
        self.bad_rows = LeftOut() if skip_bad_rows else None
        self.split = split  # not used: the caller decides on the purpose of a file

    @cached_property
    def conversations(self) -> list[Conversation]:
        left_out: list[OutOfOrder] = []

        def convert(row: Any, where: str) -> Conversation | None:
            try:
                return conversation_of(row, where)
            except OutOfOrder as error:
                left_out.append(error)
                return None

        rows = converted(_read_rows(self.path, self.bad_rows), convert, self.bad_rows)
        found = [conversation for _, conversation in rows if conversation is not None]
        if not found and (left_out or self.bad_rows):
            raise left_out[0] if left_out else UserError(str(self.bad_rows and self.bad_rows.first))
        if not found:
            raise UserError(f"{self.path} is empty: it must hold one conversation a line")
        if left_out:
            counts = f"{len(left_out)} of {len(found) + len(left_out)} conversations"
            logger.warning("%s: left out %s, the first: %s", self.path, counts, left_out[0])
        if self.bad_rows:
            rows_left = f"{len(self.bad_rows)} rows that cannot be read"
            logger.warning(
                "%s: left out %s, the first: %s", self.path, rows_left, self.bad_rows.first
            )
        return found

    def skipped_rows(self) -> dict[str, int]:
        return {self.name: len(self.bad_rows)} if self.conversations and self.bad_rows else {}

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def _read_rows(path: Path, bad_rows: LeftOut | None) -> Iterator[tuple[str, Any]]:
    """(place, row) of each line, or of each item of a .json file that is one array."""
    if not path.exists():
        remedy = "give the path of a .jsonl file with one conversation a line"
        raise UserError(f"no file {path}: {remedy}")
    remedy = "it must be a UTF-8 text file with one conversation a line"
    with explain(f"{path} cannot be read", remedy, OSError):
        if (rows := _json_array(path)) is not None:
            yield from ((f"{path}, item {number}", row) for number, row in enumerate(rows, 1))
        else:
            yield from read_jsonl(path, (dict, list), left_out=bad_rows)


def _json_array(path: Path) -> list[Any] | None:
    """The items of a .json file that is one array; None for JSON Lines, as some .json files are."""
    if unpacked_name(path).suffix.lower() != ".json":
        return None
    try:
        value = json.loads(unpacked(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):  # the reader of lines names the place
        return None
    return value if isinstance(value, list) else None


def conversation_of(row: Any, where: str) -> Conversation:
    """A row's JSON as a conversation.

    Raises UserError, beginning with `where`; OutOfOrder if only the order of the roles is wrong.
    """
    try:
        messages = [_normalized(message) for message in _messages_of(row)]
        check_messages(messages)
    except OrderError as error:
        raise OutOfOrder(f"{where}: {error}") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return {"messages": training_messages(messages)}


def _messages_of(row: dict[str, Any] | list[Any]) -> list[Any]:
    """The messages of a row of any shape, in its own words. Raises ValueError."""
    if isinstance(row, list):
        if row and all(
            isinstance(item, dict) and not {"role", "from"} & item.keys() for item in row
        ):
            raise ValueError("it is an array of rows: put each on a line, or name the file .json")
        return row
    if not isinstance(row, dict):
        raise ValueError(f"it is a JSON {type(row).__name__}: expected {SHAPES}")
    if "messages" in row:
        return messages_of(row)
    if "conversations" in row:
        return [*_system(row), *_conversations(row["conversations"])]
    if "instruction" in row and "output" in row:
        return [*_system(row), *_alpaca(row)]
    if "prompt" in row and "completion" in row:
        return [*_as_messages(row["prompt"], "user"), *_as_messages(row["completion"], "assistant")]
    raise ValueError(f"it has {', '.join(row) or 'nothing'}: expected {SHAPES}")


def _normalized(message: Any) -> Any:
    """{from, value} as {role, content}; roles by our names; the text parts of a user as a
    string.
    """
    if not isinstance(message, dict):
        return message
    if "role" not in message and "from" in message:
        if str(message["from"]) not in ROLES:
            known = ", ".join(ROLES)
            raise ValueError(
                f"the sender {message['from']!r} is not known: `from` is one of {known}"
            )
        message = {**message, "role": message["from"], "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    role = ROLES.get(role, role) if isinstance(role, str) else role
    if role != "assistant" and isinstance(content, list) and content and all(map(is_text, content)):
        content = all_text(content)
    return {**message, "role": role, "content": content}


def _conversations(messages: Any) -> list[Any]:
    shapes = ({"from", "value"}, {"role", "content"})
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and any(shape <= message.keys() for shape in shapes)
        for message in messages
    ):
        raise ValueError("conversations must be a list of {from, value} or {role, content}")
    return messages


def _alpaca(row: dict[str, Any]) -> list[dict[str, Any]]:
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(p, list) and len(p) == 2 for p in history)
    if not pairs:
        raise ValueError("history must be a list of [question, answer] pairs")
    if not all(
        isinstance(row.get(key) or "", str) for key in ("instruction", "input", "output", "system")
    ):
        raise ValueError("instruction, input, output and system must be texts")
    question = "\n\n".join(text for text in (row["instruction"], row.get("input")) if text)
    messages = []
    for asked, answered in [*history, [question, row["output"]]]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _as_messages(value: Any, role: str) -> list[Any]:
    """A list of messages as it is; anything else is the content of one message."""
    if isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    return [{"role": role, "content": value}]

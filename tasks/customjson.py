"""CustomJSON: your own conversations from a JSONL file, one per line, each in one of these shapes:

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}        OpenAI (and a bare list of messages)
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}            ShareGPT
{"instruction": "...", "input": "...", "output": "...", "system": "...", "history": [["q", "a"]]}  Alpaca
{"prompt": "...", "completion": "..."}                                                             a question and its answer

Of Alpaca's keys all but instruction and output are optional; a ShareGPT line may have a system key.
A prompt may also be a list of messages, and so may a completion, as in TRL. Texts are taken as they
are: a space at their beginning stays. A message with "weight": 0 is context, and not learned.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from tasks.common import Conversation, Task, check_conversation, training_messages
from zangchat.errors import UserError
from zangchat.runtime.files import expand_home, read_jsonl

SHAPES = "messages, conversations, instruction and output, or prompt and completion"
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
}


class CustomJSON(Task):
    """All conversations of a file. Every line is checked at the first use: a UserError names file and line of what cannot be read."""

    def __init__(self, filepath: str | Path, split: str = "train", **view: int) -> None:
        super().__init__(**view)
        self.path = expand_home(filepath)
        self.split = split  # a file is what it is: the caller decides what it is for

    @cached_property
    def conversations(self) -> list[Conversation]:
        try:
            found = [conversation_of(row, where) for where, row in read_jsonl(self.path, (dict, list))]
        except FileNotFoundError as error:
            raise UserError(f"no file {self.path}: give the path of a .jsonl file with one conversation a line") from error
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read ({error}): it must be a UTF-8 text file with one conversation a line") from error
        if not found:
            raise UserError(f"{self.path} is empty: it must hold one conversation a line")
        return found

    def num_examples(self) -> int:
        return len(self.conversations)

    def get_example(self, index: int) -> Conversation:
        return self.conversations[index]


def conversation_of(row: dict[str, Any] | list[Any], where: str) -> Conversation:
    """One line's JSON as a conversation; UserError, beginning with `where`, for anything else."""
    if isinstance(row, list):
        messages = row
    elif "messages" in row:
        messages = row["messages"]
    elif "conversations" in row:
        messages = _sharegpt(row, where)
    elif "instruction" in row and "output" in row:
        messages = _alpaca(row, where)
    elif "prompt" in row and "completion" in row:
        messages = [*_as_messages(row["prompt"], "user"), *_as_messages(row["completion"], "assistant")]
    else:
        keys = ", ".join(row) or "nothing"
        raise UserError(f"{where} has {keys}: expected {SHAPES}")
    check_conversation(messages, where)
    return {"messages": training_messages(messages)}


def _sharegpt(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn and "value" in turn for turn in turns):
        raise UserError(f"{where}: conversations must be a list of {{from, value}}")
    unknown = {str(turn["from"]) for turn in turns} - set(SHAREGPT_ROLES)
    if unknown:
        raise UserError(f"{where}: nobody is called {', '.join(sorted(unknown))}: `from` is one of {', '.join(SHAREGPT_ROLES)}")
    messages = [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    return [{"role": "system", "content": row["system"]}, *messages] if row.get("system") else messages


def _alpaca(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{where}: history must be a list of [question, answer] pairs")
    if not all(isinstance(row.get(key) or "", str) for key in ("instruction", "input", "output", "system")):
        raise UserError(f"{where}: instruction, input, output and system must be texts")
    question = row["instruction"] + ("\n\n" + row["input"] if row.get("input") else "")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for asked, answered in [*history, [question, row["output"]]]:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


def _as_messages(value: Any, role: str) -> list[Any]:
    """A list of messages as it is; anything else is the content of one message."""
    if isinstance(value, list) and all(isinstance(item, dict) and "role" in item for item in value):
        return value
    return [{"role": role, "content": value}]

"""The chat format: roles, turns, and the parts of a message.

    {"messages": [{"role": "user" | "assistant" | "system", "content": str | [part, ...]}, ...]}

A part is {"type": "text" | "python" | "python_output", "text": str}; only an assistant calls tools.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

Conversation = dict[str, Any]
Content = str | list[dict[str, str]]

PART_TYPES = ("text", "python", "python_output")
ROLES = ("system", "user", "assistant")


class OrderError(ValueError):
    """The messages are well formed, but user and assistant do not take turns."""


class Turn(NamedTuple):
    role: str  # user or assistant
    parts: list[tuple[str, str]]  # (type, text)
    weight: int  # 1 = learned, 0 = context


def turns(conversation: Conversation) -> Iterator[Turn]:
    """The turns of user and assistant; a system message becomes the head of the first user message.

    Raises ValueError, naming the message, for a malformed one, and OrderError if the roles do not
    alternate, beginning with the user.
    """
    messages = messages_of(conversation)
    system, first = "", 0
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system, first = _text_of(messages[0], 0), 1
    if len(messages) == first:
        raise OrderError("the conversation has no message of a user")
    for index, message in enumerate(messages[first:], start=first):
        expected = "assistant" if (index - first) % 2 else "user"
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            kind = OrderError if role in ROLES else ValueError
            problem = f"message {index} has the role {role!r}, but it is the turn of the {expected}"
            raise kind(problem)
        weight = message.get("weight")
        if weight not in (None, 0, 1):
            possible = "0 (context) and 1 (learned) are possible"
            raise ValueError(f"message {index} has the weight {weight!r}: {possible}")
        if role == "assistant":
            yield Turn(role, _parts_of(message, index), 1 if weight is None else int(weight))
        else:
            text = _text_of(message, index)
            if system and index == first:  # an empty one says nothing
                text = f"{system}\n\n{text}"
            yield Turn(role, [("text", text)], 0)


def messages_of(conversation: Conversation) -> list[Any]:
    """Its messages, unchecked. Raises ValueError if there is no list of them."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)):
        raise ValueError('a conversation is {"messages": [{"role": ..., "content": ...}, ...]}')
    return list(messages)


def visible_text(content: Content) -> str:
    """The words of an answer, without tool calls and their output."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def all_text(content: Content) -> str:
    """The text of all parts, tool calls and their output included."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def tool_used(content: Content) -> bool:
    """Whether a tool call was made and answered. Plain text never counts."""
    if isinstance(content, str):
        return False
    return any(part["type"] == "python_output" for part in content)


def _text_of(message: dict[str, Any], index: int) -> str:
    """The text of a user or system message."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and content and all(map(is_text, content)):
        return all_text(list(content))
    expected = "needs a string as content, or text parts"
    raise ValueError(
        f"message {index} ({message['role']}) {expected}, not {type(content).__name__}"
    )


def _parts_of(message: dict[str, Any], index: int) -> list[tuple[str, str]]:
    """(type, text) of each part of an assistant's message."""
    content = message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, (list, tuple)):
        expected = "needs a string or a list of parts as content"
        raise ValueError(f"message {index} (assistant) {expected}, not {type(content).__name__}")
    if not all(map(_is_part, content)):
        shape = '{"type": "text" | "python" | "python_output", "text": ...}'
        raise ValueError(f"message {index} has a part that is not {shape}")
    return [(part["type"], part["text"]) for part in content]


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in PART_TYPES and isinstance(part.get("text"), str)


def is_text(part: Any) -> bool:
    return _is_part(part) and part["type"] == "text"

"""The messages of a chat: as clients send them, and as the model was trained to read them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

MAX_MESSAGES = 500  # of a chat, and parts of a message
SEPARATOR = "\n\n"  # between messages that are joined
# roles that the model does not know -> the role whose place they take
ROLES = {"developer": "system", "tool": "user", "function": "user"}
# types of other clients' parts -> the field that holds their text
TEXT_FIELDS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}


def check_surrogates(text: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can express and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is not a character") from None
    return text


def _or_empty(content: Any) -> Any:
    return "" if content is None else content


Text = Annotated[str, AfterValidator(check_surrogates)]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, part: Any) -> Any:
        field = TEXT_FIELDS.get(str(part.get("type"))) if isinstance(part, dict) else None
        return {"type": "text", "text": part.get(field)} if field else part


Content = Text | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_MESSAGES)]


class ChatMessage(BaseModel):
    """One message. An assistant's may lack content: OpenAI's format then has tool calls."""

    role: Role
    content: Annotated[Content | None, BeforeValidator(_or_empty)]

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, message: Any) -> Any:
        if isinstance(message, dict) and message.get("role") == "assistant":
            return {"content": None, **message}
        return message

    def parts(self) -> list[dict[str, str]]:
        """Its parts that are not empty; only the assistant's have types other than text."""
        if isinstance(self.content, list):
            parts = [part.model_dump() for part in self.content if part.text]
            return [part for part in parts if self.role == "assistant" or part["type"] == "text"]
        return [{"type": "text", "text": self.content}] if self.content else []


Messages = Annotated[
    list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)
]


def conversation_of(
    messages: Sequence[ChatMessage],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(conversation that waits for the assistant, parts with which its reply begins).

    The model knows an optional system message and turns of user and assistant. Neighbours of one
    role are joined. A later system message and a tool's result belong to the user's turn. An
    assistant's message without text is dropped; before one that comes first there is an empty turn
    of the user. An assistant's message at the end is the beginning of the reply.
    """
    turns: list[tuple[str, list[dict[str, str]]]] = []
    for message in messages:
        role, parts = ROLES.get(message.role, message.role), message.parts()
        if role == "system" and turns and turns[-1][0] != "system":
            role = "user"
        if not parts and role != "user":
            continue
        if turns and turns[-1][0] == role:
            turns[-1] = (role, _joined(turns[-1][1], parts))
            continue
        if role == "assistant" and (not turns or turns[-1][0] == "system"):
            turns.append(("user", []))
        turns.append((role, parts))
    if not turns or [role for role, _ in turns] == ["system"]:
        turns = [("user", turns[0][1] if turns else [])]
    opening = turns.pop()[1] if turns[-1][0] == "assistant" else []
    return [{"role": role, "content": _content(role, parts)} for role, parts in turns], opening


def _joined(first: list[dict[str, str]], second: list[dict[str, str]]) -> list[dict[str, str]]:
    between = [{"type": "text", "text": SEPARATOR}] if first and second else []
    return [*first, *between, *second]


def _content(role: str, parts: list[dict[str, str]]) -> str | list[dict[str, str]]:
    if role == "assistant" and any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)

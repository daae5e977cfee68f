"""The state of one server, as the routes receive it: settings, worker pool, prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
from fastapi import Depends
from starlette.requests import HTTPConnection

from zangchat.conversation import turns
from zangchat.engine.replies import REPLY_SHARE, fit_conversation
from zangchat.server.pool import Pool
from zangchat.server.protocol import ApiError, ChatMessage, Settings


class Prompter:
    """Checked messages -> prompt tokens that fit the model. Stateless: any thread may call it."""

    def __init__(self, tokenizer: Any, context: int, settings: Settings) -> None:
        self.tokenizer, self.context, self.settings = tokenizer, context, settings

    def chat(
        self, messages: list[ChatMessage], max_tokens: int | None, truncate: bool
    ) -> tuple[list[int], int]:
        """(prompt, number of messages left out).

        Raises ApiError for an impossible order of roles and for a chat that is too long.
        """
        conversation = [message.for_tokenizer() for message in messages]
        check_roles(conversation)
        reply = min(max_tokens or self.settings.max_tokens, self.context // REPLY_SHARE)
        room = self.context - max(1, reply) if truncate else 1 << 62
        prompt, left_out = fit_conversation(self.tokenizer, conversation, room)
        remedy = "shorten it or start a new chat"
        if not truncate:
            remedy = "shorten it, or set truncate to drop the oldest turns"
        self._check_length(prompt, remedy)
        return prompt, left_out

    def completion(self, prompt: str | list[int], limit: int | None) -> list[int]:
        """A text after <|bos|>, or tokens as they are. With limit 0 it may fill the context."""
        bos, vocab_size = self.tokenizer.get_bos_token_id(), self.tokenizer.get_vocab_size()
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            bounds = f"each between 0 and {vocab_size - 1}"
            raise ApiError(400, f"a prompt of tokens needs at least one, {bounds}")
        self._check_length(tokens, "shorten it", 0 if limit == 0 else 1)
        return tokens

    def _check_length(self, prompt: list[int], remedy: str, reply: int = 1) -> None:
        over = len(prompt) - (self.context - reply)
        if over > 0:
            excess = f"{over} more than the context of {self.context} leaves room for"
            message = f"the prompt has {len(prompt)} tokens, {excess}: {remedy}"
            raise ApiError(400, message, "context_length_exceeded")


def check_roles(messages: Sequence[dict[str, Any]]) -> None:
    """An optional system message, then user and assistant in turn, the user last.

    Raises ApiError that names the wrong message.
    """
    for index, message in enumerate(messages):
        if message["role"] == "user" and not message["content"].strip():
            raise ApiError(400, f"message {index}, of the user, is empty", "empty_message")
    try:
        *_, (role, _, _) = turns({"messages": messages})
    except ValueError as error:
        rule = "after an optional system message, user and assistant take turns"
        raise ApiError(400, f"{error}: {rule}", "role_order") from None
    if role != "user":
        rule = "the last message must be of role 'user': it is what the model answers"
        raise ApiError(400, rule, "role_order")


@dataclass(frozen=True)
class Service:
    """One server. Routes receive it as a parameter of type `CurrentService`."""

    settings: Settings
    tokenizer: Any
    context: int  # tokens of a prompt and its reply
    pool: Pool
    prompter: Prompter
    page: str  # HTML of the chat page
    started: float = field(default_factory=time.time)  # seconds since the epoch
    # threads that render the page's replies: one, since they all need the interpreter's lock
    rendering: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))


def current_service(connection: HTTPConnection) -> Service:
    service: Service = connection.app.state.service
    return service


CurrentService = Annotated[Service, Depends(current_service)]

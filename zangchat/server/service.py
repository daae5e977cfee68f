"""The state of one server, as the routes receive it: settings, worker pool, prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import anyio
from fastapi import Depends
from starlette.requests import HTTPConnection

from zangchat.engine.replies import REPLY_SHARE, fit_conversation
from zangchat.server.messages import ChatMessage, conversation_of
from zangchat.server.pool import Pool
from zangchat.server.protocol import ApiError, Settings


class Prompter:
    """Checked messages -> prompt tokens that fit the model. Stateless: any thread may call it."""

    def __init__(self, tokenizer: Any, context: int, settings: Settings) -> None:
        self.tokenizer, self.context, self.settings = tokenizer, context, settings

    def chat(
        self, messages: Sequence[ChatMessage], max_tokens: int | None, truncate: bool | None
    ) -> tuple[list[int], int]:
        """(prompt, number of messages left out). Raises ApiError for a chat that is too long."""
        truncate = self.settings.truncate if truncate is None else truncate
        conversation, parts = conversation_of(messages)
        opening = self._opening(parts) if parts else []
        reply = min(max_tokens or self.settings.max_tokens, self.context // REPLY_SHARE)
        room = self.context - max(1, reply) - len(opening) if truncate else 1 << 62
        prompt, left_out = fit_conversation(self.tokenizer, conversation, room)
        remedy = "shorten it or start a new chat"
        if not truncate:
            remedy = "shorten it, or set truncate to drop the oldest turns"
        self._check_length([*prompt, *opening], remedy, "messages")
        return [*prompt, *opening], left_out

    def _opening(self, parts: list[dict[str, str]]) -> list[int]:
        """The tokens of a reply that begins with these parts."""
        question = {"role": "user", "content": ""}
        reply = {"role": "assistant", "content": parts}
        before = self.tokenizer.render_for_completion({"messages": [question]})
        whole, _ = self.tokenizer.render_conversation({"messages": [question, reply]})
        return whole[len(before) : -1]

    def completion(self, prompt: str | list[int], limit: int | None) -> list[int]:
        """A text after <|bos|>, or tokens as they are. With limit 0 it may fill the context."""
        bos, vocab_size = self.tokenizer.get_bos_token_id(), self.tokenizer.get_vocab_size()
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            bounds = f"each between 0 and {vocab_size - 1}"
            message = f"a prompt of tokens needs at least one, {bounds}"
            raise ApiError(400, message, "invalid_request", param="prompt")
        self._check_length(tokens, "shorten it", "prompt", 0 if limit == 0 else 1)
        return tokens

    def _check_length(self, prompt: list[int], remedy: str, param: str, reply: int = 1) -> None:
        over = len(prompt) - (self.context - reply)
        if over > 0:
            excess = f"{over} more than the context of {self.context} leaves room for"
            message = f"the prompt has {len(prompt)} tokens, {excess}: {remedy}"
            # OpenAI's words, by which clients recognise the case
            message += f" (this model's maximum context length is {self.context} tokens)"
            raise ApiError(400, message, "context_length_exceeded", param=param)


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

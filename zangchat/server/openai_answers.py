"""The answers of OpenAI's API: choices, log-probabilities, whole responses and chunks."""

import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from zangchat.engine import Request, Sequence
from zangchat.engine.replies import Reply, StreamDecoder
from zangchat.engine.sampling import Logprob
from zangchat.server.http import from_pool
from zangchat.server.pool import PoolError, Stream, Token
from zangchat.server.protocol import ApiError, event, join_pieces

REASONS = {"stop": "stop", "timeout": "timeout"}  # of the pool -> OpenAI's; all others: "length"

# -- one choice ------------------------------------------------------------------------------------


class Choice:
    """One continuation: its text, and its log-probabilities if they were requested."""

    def __init__(
        self,
        tokenizer: Any,
        request: Request,
        is_chat: bool,
        echo: str | None = None,
        skipped: int = 0,
    ) -> None:
        self.tokenizer, self.request, self.is_chat = tokenizer, request, is_chat
        self.reply = Reply()
        self.echo = echo  # the prompt's text, to be returned before the continuation's
        self.skipped = skipped  # leading prompt tokens that the client did not send: <|bos|>
        self.reason = ""
        self._length = len(echo or "")  # characters so far
        self._pending: list[tuple[int, int, Logprob | None]] = []  # token, offset, log-probability

    def feed(self, item: Token) -> list[tuple[str, str]]:
        """The (kind, text) pieces that a step adds."""
        pieces = self.reply.add(item.pieces)
        offset = self._length
        if item.stop_reason is not None:
            self.reason = REASONS.get(item.stop_reason, "length")
        self._length += sum(len(text) for kind, text in pieces if kind == "text")
        token = item.token
        if token is None and not self.is_chat:  # OpenAI's chat format leaves the end token out
            token = item.stop_token
        if item.logprob is None or token is None:
            return pieces
        if not self.is_chat or item.says:
            self._pending.append((token, offset, item.logprob))
        return pieces

    def add_prompt(self, logprobs: Iterable[Logprob]) -> None:
        """Put the prompt's log-probabilities first; its very first token has none."""
        decoder, offset, prompt = StreamDecoder(self.tokenizer), 0, []
        scored = list(zip(self.request.tokens, [None, *logprobs], strict=True))
        for token, logprob in scored[self.skipped :]:
            prompt.append((token, offset, logprob))
            offset += len(decoder.feed(token))
        self._pending = prompt + self._pending

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those added since the last call, in the format of chat or of completions.

        None if they were not requested.
        """
        pending, self._pending = self._pending, []
        if self.request.logprobs is None or (self.is_chat and not pending):
            return None
        if self.is_chat:
            content = [self._chat_entry(token, value) for token, _, value in pending if value]
            return {"content": content, "refusal": None}
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _, _ in pending],
            "token_logprobs": [logprob and logprob.value for _, _, logprob in pending],
            "top_logprobs": [value and self._top(token, value) for token, _, value in pending],
            "text_offset": [offset for _, offset, _ in pending],
        }

    def _chat_entry(self, token: int, logprob: Logprob) -> dict[str, Any]:
        top = [self._named(other, value) for other, value in logprob.top]
        return {**self._named(token, logprob.value), "top_logprobs": top}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        text, data = token_text(self.tokenizer, token), self.tokenizer.decode_bytes([token])
        return {"token": text, "logprob": value, "bytes": list(data)}

    def _top(self, token: int, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens, and this one, which OpenAI adds if it is not among them."""
        found: dict[str, float] = {}
        for other, value in [*logprob.top, (token, logprob.value)]:
            found.setdefault(token_text(self.tokenizer, other), value)
        return found


def token_text(tokenizer: Any, token: int) -> str:
    """A token's text; if it is not whole characters, its bytes as OpenAI writes them."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


# -- responses -------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A response under construction, whole or in chunks."""

    kind: Literal["chat.completion", "text_completion"]
    model: str
    choices: list[Choice]
    prompt_tokens: int
    left_out: int = 0  # oldest messages that did not fit
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def feed(self, item: Token) -> list[tuple[str, str]]:
        self.completion_tokens += item.token is not None
        return self.choices[item.choice].feed(item)

    def envelope(
        self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any
    ) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.id}",
            "object": f"{self.kind}.chunk" if chunk and self.is_chat else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **({"left_out": self.left_out} if self.left_out else {}),
            **more,
        }

    async def whole(self, stream: Stream) -> dict[str, Any]:
        async for items in stream:
            for item in items:
                self.feed(item)
        if any(choice.reason == "timeout" for choice in self.choices):
            raise timed_out(stream)
        for choice, generation in zip(self.choices, stream.generations, strict=True):
            if generation.request.prompt_logprobs:
                choice.add_prompt(generation.prompt_logprobs)
        choices = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        return self.envelope(choices, usage=self.usage())

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs, text = choice.take_logprobs(), choice.reply.text()
        shown = {"index": index, "finish_reason": choice.reason, "logprobs": logprobs}
        if not self.is_chat:
            return {**shown, "text": (choice.echo or "") + text}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if any(part["type"] != "text" for part in choice.reply.parts):
            message["parts"] = choice.reply.parts  # tool calls, which OpenAI's format lacks
        return {**shown, "message": message}

    async def chunks(self, stream: Stream, include_usage: bool) -> AsyncIterator[bytes]:
        self._more = {"usage": None} if include_usage else {}
        self._unopened = set(range(len(self.choices)))
        try:
            async for items in stream:
                for chunk in self._arrived(stream, items):
                    yield chunk
            if include_usage:
                yield event(self.envelope([], chunk=True, usage=self.usage()))
        except PoolError as error:
            yield event(from_pool(error).body())
        except ApiError as error:
            yield event(error.body())
        yield b"data: [DONE]\n\n"

    def _arrived(self, stream: Stream, items: list[Token]) -> Iterable[bytes]:
        """Raises ApiError if the time of the request is over."""

        def choice_of(item: Token) -> int:
            return item.choice

        for index, group in itertools.groupby(sorted(items, key=choice_of), key=choice_of):
            if index in self._unopened:
                self._unopened.remove(index)
                yield from self._opening(index, stream.generations[index])
            yield from self._steps(index, list(group))
            if self.choices[index].reason == "timeout":
                raise timed_out(stream)

    def _opening(self, index: int, generation: Sequence) -> Iterable[bytes]:
        choice = self.choices[index]
        if self.is_chat:
            yield self._chunk(index, delta={"role": "assistant", "content": ""})
        elif choice.echo is not None:
            if generation.request.prompt_logprobs:
                choice.add_prompt(generation.prompt_logprobs)
            yield self._chunk(index, text=choice.echo)

    def _steps(self, index: int, items: list[Token]) -> Iterable[bytes]:
        for kind, text in join_pieces(piece for item in items for piece in self.feed(item)):
            if self.is_chat:
                tool = {} if kind == "text" else {"part": {"type": kind, "text": text}}
                yield self._chunk(index, delta={"content": text if kind == "text" else "", **tool})
            elif kind == "text":
                yield self._chunk(index, text=text)
        if self.choices[index].reason not in ("", "timeout"):
            end: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            yield self._chunk(index, self.choices[index].reason, **end)

    def _chunk(self, index: int, reason: str | None = None, **body: Any) -> bytes:
        logprobs = self.choices[index].take_logprobs()
        choice = {"index": index, **body, "finish_reason": reason, "logprobs": logprobs}
        return event(self.envelope([choice], chunk=True, **self._more))


def timed_out(stream: Stream) -> ApiError:
    """The end of a request that took too long, which must not look like a reply's."""
    seconds = f"{stream.pool.request_seconds:g} seconds"
    message = f"the reply was not complete after {seconds}, waiting for a free row included"
    remedy = "ask for fewer tokens, or start the server with a longer --request_timeout"
    # OpenAI's clients would repeat the request
    return ApiError(504, f"{message}: {remedy}", "timeout", {"x-should-retry": "false"})

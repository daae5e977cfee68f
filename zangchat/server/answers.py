"""What clients get: the page's events, with markdown rendered and cleaned here, and OpenAI's responses, whole or in chunks."""

import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import nh3
from markdown_it import MarkdownIt

from zangchat.engine import Generation
from zangchat.engine.replies import ReplyDecoder, StreamDecoder
from zangchat.engine.sampling import Logprob
from zangchat.engine.sampling import Request as Continuation
from zangchat.server.pool import Stream, Token
from zangchat.server.protocol import ApiError

RENDER_SECONDS = 0.1  # between two renderings of a reply for the page

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "del", "a", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_markdown = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")


def render_markdown(text: str) -> str:
    """Markdown -> HTML that is safe to insert: no raw HTML, no images, no schemes other than http(s) and mailto."""
    return nh3.clean(
        _markdown.render(text),
        tags=TAGS,
        attributes={"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},  # the chat stays where it is
    )


def rendered_parts(parts: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    return [{**part, "html": render_markdown(part["text"])} if part["type"] == "text" else dict(part) for part in parts]


def event(value: Any) -> bytes:
    """A server-sent event."""
    return f"data: {_as_json(value)}\n\n".encode()


def joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind made one."""
    return [(kind, "".join(text for _, text in group)) for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0])]


async def page_events(stream: Stream, decoder: ReplyDecoder, render: bool, left_out: int) -> AsyncIterator[bytes]:
    """nanochat's events {"token", "gpu"} ... {"done": true}; pieces of tool calls are {"tool", "text"}, {"queued"} how many wait before
    this one. With `render`, instead, the whole reply so far as {"parts"}, at most ten times a second and less often where rendering
    takes long."""
    gpu = stream.worker.number
    next_render, stop_reason = 0.0, ""
    if left_out:
        yield event({"left_out": left_out})
    if stream.before:
        yield event({"queued": stream.before})
    try:
        async for items in stream:
            pieces = joined(piece for item in items if item.token is not None for piece in decoder.feed(item.token))
            if items[-1].stop_reason is not None:
                stop_reason = items[-1].stop_reason
                pieces += decoder.flush()
            if not render:
                for kind, text in pieces:
                    yield event({"token": text, "gpu": gpu} if kind == "text" else {"tool": kind, "text": text, "gpu": gpu})
            elif time.monotonic() >= next_render:
                start = time.monotonic()
                parts = rendered_parts(decoder.parts)
                now = time.monotonic()
                next_render = now + max(RENDER_SECONDS, 20 * (now - start))
                yield event({"parts": parts, "gpu": gpu})
        if render:
            yield event({"parts": rendered_parts(decoder.parts), "gpu": gpu})
        yield event({"done": True, "finish_reason": stop_reason})
    except ApiError as error:
        yield event({"error": str(error), "done": True})


class Choice:
    """One continuation on its way into an OpenAI response: its text, and the log-probabilities that were asked for."""

    def __init__(self, tokenizer: Any, request: Continuation, is_chat: bool, echo: str | None = None, skipped: int = 0) -> None:
        self.tokenizer, self.request, self.is_chat = tokenizer, request, is_chat
        self.decoder = ReplyDecoder(tokenizer, request.stop)
        self.echo = echo  # the prompt's text, to be put in front
        self.skipped = skipped  # tokens of the prompt that the client did not send: <|bos|>
        self.reason = ""
        self._length = len(echo or "")  # characters so far
        self._noted: list[tuple[int, int, Logprob | None]] = []  # (token, place in the text, log-probability)

    def feed(self, item: Token) -> list[tuple[str, str]]:
        pieces = [] if item.token is None else self.decoder.feed(item.token)
        place = self._length
        if item.stop_reason is not None:
            pieces = pieces + self.decoder.flush()
            self.reason = "stop" if item.stop_reason == "stop" else "length"
        self._length += sum(len(text) for kind, text in pieces if kind == "text")
        token = item.stop_token if item.token is None and not self.is_chat else item.token  # OpenAI's chat format leaves the end out
        if item.logprob is not None and token is not None and (not self.is_chat or self.decoder.says(token)):
            self._noted.append((token, place, item.logprob))
        return pieces

    def note_prompt(self, logprobs: Sequence[Logprob]) -> None:
        """The prompt's log-probabilities in front of all others; its very first token has none."""
        decoder, place, noted = StreamDecoder(self.tokenizer), 0, []
        for token, logprob in list(zip(self.request.tokens, [None, *logprobs], strict=True))[self.skipped :]:
            noted.append((token, place, logprob))
            place += len(decoder.feed(token))
        self._noted = noted + self._noted

    def take_logprobs(self) -> dict[str, Any] | None:
        """Those noted since the last time, in the format of chat or of completions; None where nobody asked."""
        noted, self._noted = self._noted, []
        if self.request.logprobs is None or (self.is_chat and not noted):
            return None
        if self.is_chat:
            return {
                "content": [{**self._named(t, lp.value), "top_logprobs": [self._named(*top) for top in lp.top]} for t, _, lp in noted if lp]
            }
        return {
            "tokens": [token_text(self.tokenizer, token) for token, _, _ in noted],
            "token_logprobs": [logprob and logprob.value for _, _, logprob in noted],
            "top_logprobs": [logprob and self._top(token, logprob) for token, _, logprob in noted],
            "text_offset": [place for _, place, _ in noted],
        }

    def _named(self, token: int, value: float) -> dict[str, Any]:
        return {"token": token_text(self.tokenizer, token), "logprob": value, "bytes": list(self.tokenizer.decode_bytes([token]))}

    def _top(self, token: int, logprob: Logprob) -> dict[str, float]:
        """The likeliest tokens and the one at hand, which OpenAI adds where it is not among them."""
        found: dict[str, float] = {}
        for other, value in [*logprob.top, (token, logprob.value)]:
            found.setdefault(token_text(self.tokenizer, other), value)
        return found


def token_text(tokenizer: Any, token: int) -> str:
    """A token by its text, or, where that is no whole character, by its bytes in OpenAI's spelling."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass
class Answer:
    """An OpenAI response in the making."""

    kind: Literal["chat.completion", "text_completion"]
    model: str
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}

    def feed(self, item: Token) -> list[tuple[str, str]]:
        self.completion_tokens += item.token is not None
        return self.choices[item.choice].feed(item)

    def envelope(self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any) -> dict[str, Any]:
        name = f"{self.kind}.chunk" if chunk and self.is_chat else self.kind
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model, "choices": choices, **more}

    async def whole(self, stream: Stream) -> dict[str, Any]:
        async for items in stream:
            for item in items:
                self.feed(item)
        for choice, generation in zip(self.choices, stream.generations, strict=True):
            if generation.request.prompt_logprobs:
                choice.note_prompt(generation.prompt_logprobs)
        return self.envelope([self._choice(i, choice) for i, choice in enumerate(self.choices)], usage=self.usage())

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        shown: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": choice.take_logprobs()}
        if not self.is_chat:
            return {**shown, "text": (choice.echo or "") + choice.decoder.text()}
        message: dict[str, Any] = {"role": "assistant", "content": choice.decoder.text()}
        if any(part["type"] != "text" for part in choice.decoder.parts):
            message["parts"] = choice.decoder.parts  # tool calls, which OpenAI's format has no place for
        return {**shown, "message": message}

    async def chunks(self, stream: Stream, include_usage: bool) -> AsyncIterator[bytes]:
        unopened = set(range(len(self.choices)))
        try:
            async for items in stream:
                for index, group in itertools.groupby(sorted(items, key=lambda item: item.choice), key=lambda item: item.choice):
                    if index in unopened:
                        unopened.remove(index)
                        for chunk in self._opening(index, stream.generations[index]):
                            yield chunk
                    for chunk in self._steps(index, list(group)):
                        yield chunk
            if include_usage:
                yield event(self.envelope([], chunk=True, usage=self.usage()))
        except ApiError as error:
            yield event({"error": {"message": str(error), "type": "server_error", "code": error.code}})
        yield b"data: [DONE]\n\n"

    def _opening(self, index: int, generation: Generation) -> Iterable[bytes]:
        choice = self.choices[index]
        if self.is_chat:
            yield self._chunk(index, delta={"role": "assistant", "content": ""})
        elif choice.echo is not None:
            if generation.request.prompt_logprobs:
                choice.note_prompt(generation.prompt_logprobs)
            yield self._chunk(index, text=choice.echo)

    def _steps(self, index: int, items: list[Token]) -> Iterable[bytes]:
        for kind, text in joined(piece for item in items for piece in self.feed(item)):
            if self.is_chat:
                tool = {} if kind == "text" else {"part": {"type": kind, "text": text}}
                yield self._chunk(index, delta={"content": text if kind == "text" else "", **tool})
            elif kind == "text":
                yield self._chunk(index, text=text)
        if items[-1].stop_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            yield self._chunk(index, self.choices[index].reason, **end)

    def _chunk(self, index: int, reason: str | None = None, **body: Any) -> bytes:
        logprobs = self.choices[index].take_logprobs()
        return event(self.envelope([{"index": index, **body, "finish_reason": reason, "logprobs": logprobs}], chunk=True))

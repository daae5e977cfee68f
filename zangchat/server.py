"""The web server: the chat page, nanochat's event stream, and OpenAI's API, all fed by the engine's running batch.

One worker thread per device owns a RunningBatch; requests join and leave it between two tokens, so the event loop never waits for the
model. A request is checked whole (bytes, shape, roles, tokens, room in the queue) before any work is done for it, and its place in the
batch is given back however it ends: finished, refused, disconnected, timed out.

Nothing of a conversation is logged.
"""

import asyncio
import base64
import hashlib
import html
import itertools
import json
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import nh3
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from markdown_it import MarkdownIt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zangchat.engine import Engine, Event, Generation, RunningBatch
from zangchat.replies import ReplyDecoder, StreamDecoder, fit_conversation
from zangchat.sampling import MAX_LOGPROBS, Logprob
from zangchat.sampling import Request as Continuation

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 256 * 1024  # bytes of a request
BODY_SECONDS = 30.0  # the longest pause of a client within its request
SEND_SECONDS = 30.0  # the longest that a client may take to accept a piece of a stream
MAX_MESSAGES = 500
MAX_CHOICES = 64  # continuations that one request may ask for
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
REPLY_SHARE = 4  # a chat that is trimmed leaves at least 1/4 of the context to the reply, or max_tokens if that is less
RENDER_SECONDS = 0.1  # between two renderings of a reply for the page
OPEN_PATHS = {"/", "/logo.svg", "/health"}  # reachable without the API key
LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}


@dataclass(frozen=True)
class Settings:
    """What the operator chose; the sampling settings hold where a request names none."""

    model_name: str = "zangchat"
    temperature: float = 0.8
    top_k: int = 50
    max_tokens: int = 512
    max_batch: int = 64  # rows of each running batch
    queue: int = 64  # requests that may wait, all devices together
    request_seconds: float = 300.0  # wall-clock limit of one request, waiting included
    api_key: str | None = None
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS)  # names under which the server may be addressed; None: any


class ApiError(Exception):
    """A request that is refused, with the reason for the client."""

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers, self.param = status, code, headers, param

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


# ---- the worker thread ----------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """One step of one choice, as it reaches the event loop. A stop_reason ends the choice; "error" means that the engine failed."""

    choice: int
    token: int | None  # None where it ended without another one
    stop_reason: str | None
    stop_token: int | None = None
    logprob: Logprob | None = None


class Stream:
    """The tokens of one API request (one or more choices) on the event loop. Whoever opens it closes it, whatever happens."""

    def __init__(self, pool: "Pool", worker: "Worker", requests: Sequence[Continuation]) -> None:
        self.pool, self.worker, self.requests = pool, worker, requests
        self.generations: list[Generation] = []  # the worker's own
        self.deadline = time.monotonic() + pool.settings.request_seconds
        self._tokens: asyncio.Queue[list[Token]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open = len(requests)  # choices that have not ended
        self._closed = False

    def deliver(self, tokens: list[Token]) -> None:
        """Called by the worker thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, tokens)

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        """What has arrived since: one step's tokens, or several steps' where the reader is slower than the engine."""
        while self._open:
            tokens = await self._tokens.get()
            while not self._tokens.empty():
                tokens = tokens + self._tokens.get_nowait()
            if any(token.stop_reason == "error" for token in tokens):
                raise ApiError(500, "the engine failed on this request; the server's log has the reason", "engine_error")
            self._open -= sum(token.stop_reason is not None for token in tokens)
            yield tokens

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.pool.load -= len(self.requests)
            self.worker.load -= len(self.requests)
            self.worker.post("leave", self)


class Worker(threading.Thread):
    """Owns one engine's running batch. Other threads only post to its inbox."""

    def __init__(self, engine: Engine, number: int, max_rows: int) -> None:
        super().__init__(name=f"engine-{number}", daemon=True)
        self.engine, self.number, self.max_rows = engine, number, max_rows
        self.load = 0  # choices given to this worker and not closed; the event loop's own count
        self.tokens = 0  # generated since the start
        self.rows = self.waiting = 0  # of the batch, for others to read
        self.batch = self._new_batch()
        self._inbox: deque[tuple[Literal["join", "leave"], Stream]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._streams: dict[int, tuple[Stream, int]] = {}  # id of a live generation -> its stream and choice

    def post(self, what: Literal["join", "leave"], stream: Stream) -> None:
        with self._wake:
            self._inbox.append((what, stream))
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._stopping or self.batch.busy)
                if self._stopping:
                    return
                posted = list(self._inbox)
                self._inbox.clear()
            try:
                for what, stream in posted:
                    self._join(stream) if what == "join" else self._leave(stream)
                self._end_overdue()
                self._deliver(self.batch.step())
                self.rows, self.waiting = self.batch.num_rows, len(self.batch.waiting)
            except Exception:  # whatever the engine raised must not end the thread that serves everybody
                logger.exception("the engine failed; the requests in its batch are given up")
                self._give_up()
                self.batch = self._new_batch()

    def _new_batch(self) -> RunningBatch:
        return RunningBatch(self.engine.model, self.engine.tokenizer, self.max_rows)

    def _join(self, stream: Stream) -> None:
        for choice, request in enumerate(stream.requests):
            generation = self.batch.submit(request)
            stream.generations.append(generation)
            self._streams[id(generation)] = (stream, choice)

    def _leave(self, stream: Stream) -> None:
        for generation in stream.generations:
            self.batch.cancel(generation)
            self._streams.pop(id(generation), None)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for generation in self.batch.live():
            stream, choice = self._streams[id(generation)]
            if now > stream.deadline:
                self.batch.cancel(generation)
                del self._streams[id(generation)]
                stream.deliver([Token(choice, None, "timeout")])

    def _deliver(self, events: list[Event]) -> None:
        outgoing: dict[int, tuple[Stream, list[Token]]] = {}
        for generation, token, _, logprob in events:
            stream, choice = self._streams[id(generation)]
            if generation.stop_reason is not None:
                del self._streams[id(generation)]
            outgoing.setdefault(id(stream), (stream, []))[1].append(
                Token(choice, token, generation.stop_reason, generation.stop_token, logprob)
            )
            self.tokens += token is not None
        for stream, tokens in outgoing.values():
            stream.deliver(tokens)

    def _give_up(self) -> None:
        for stream, choice in self._streams.values():
            stream.deliver([Token(choice, None, "error")])
        self._streams.clear()


@dataclass
class Pool:
    """All workers, and the bound on what they may have in hand. Used from the event loop only."""

    engines: Sequence[Engine]
    settings: Settings
    workers: list[Worker] = field(default_factory=list)
    load: int = 0  # choices in hand
    served: int = 0
    refused: int = 0

    def start(self) -> None:
        self.workers = [Worker(engine, number, self.settings.max_batch) for number, engine in enumerate(self.engines)]
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join(timeout=10)

    @property
    def healthy(self) -> bool:
        return bool(self.workers) and all(worker.is_alive() for worker in self.workers)

    def open(self, requests: Sequence[Continuation]) -> Stream:
        """Hand requests to the least loaded worker. Raises ApiError 429 when too many are waiting already."""
        capacity = self.settings.max_batch * len(self.workers) + self.settings.queue
        if self.load + len(requests) > capacity:
            self.refused += 1
            raise ApiError(
                429, f"the server is busy: {self.load} continuations are in hand; try again soon", "queue_full", {"Retry-After": "2"}
            )
        worker = min(self.workers, key=lambda w: w.load)
        stream = Stream(self, worker, requests)
        self.load += len(requests)
        worker.load += len(requests)
        self.served += 1
        worker.post("join", stream)
        return stream


# ---- what clients send ----------------------------------------------------------------------------------------------


def whole_characters(text: str) -> str:
    """Raises ValueError for lone surrogates, which JSON can spell and UTF-8 cannot."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair is not a character")
    return text


Text = Annotated[str, AfterValidator(whole_characters)]


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: Text


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: Text | list[Part]

    def plain(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content if part.type == "text")

    def for_tokenizer(self) -> dict[str, Any]:
        structured = self.role == "assistant" and not isinstance(self.content, str)
        return {"role": self.role, "content": [part.model_dump() for part in self.content] if structured else self.plain()}  # type: ignore[union-attr]


StopText = Annotated[str, AfterValidator(whole_characters), Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class Sampling(BaseModel):
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None

    def requests(self, prompt: list[int], n: int, settings: Settings, **more: Any) -> list[Continuation]:
        """`n` continuations of one prompt; `more` are further fields of theirs."""
        fields: dict[str, Any] = {
            "max_tokens": settings.max_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": settings.temperature if self.temperature is None else self.temperature,
            "top_k": settings.top_k if self.top_k is None else self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty or 1.0,
            "seed": secrets.randbits(32) if self.seed is None else self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
        }
        return [Continuation(prompt, **{**fields, **more}, sample_index=i) for i in range(n)]


class PageChat(Sampling):
    """nanochat's chat request; `render` asks for HTML along the stream, `truncate` drops the oldest turns that do not fit."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    render: bool = False
    truncate: bool = False


class StreamOptions(BaseModel):
    include_usage: bool = False


# Parameters of OpenAI's API that change nothing here: they are about OpenAI's accounts, caches and service.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "stream_obfuscation"),
}
# Those that would change the answer are refused, unless they have the value that means "off".
OFF: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


class OpenAIRequest(Sampling):
    model_config = ConfigDict(extra="allow")

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, settings: Settings) -> None:
        """Raises ApiError for another model, and for parameters that would silently change nothing."""
        if self.model not in (None, "zangchat", settings.model_name):
            message = f"there is no model {self.model!r} here; this server has {settings.model_name!r}"
            raise ApiError(404, message, "model_not_found", param="model")
        more = {name: value for name, value in (self.model_extra or {}).items() if name not in IGNORED and value is not None}
        unsupported = [name for name, value in more.items() if value not in OFF.get(name, ())]
        if unsupported:
            message = f"this server does not support {', '.join(unsupported)[:200]}"
            raise ApiError(400, message, "unsupported_parameter", param=unsupported[0][:100])


class OpenAIChat(OpenAIRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncate: bool = False

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def check(self, settings: Settings) -> None:
        super().check(settings)
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", "invalid_request", param="top_logprobs")


class OpenAICompletion(OpenAIRequest):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=0, le=1_000_000)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


# ---- prompts --------------------------------------------------------------------------------------------------------


class Prompter:
    """Checked messages -> prompt tokens that fit the model. Pure, so that it may run in any thread."""

    def __init__(self, tokenizer: Any, context: int, settings: Settings) -> None:
        self.tokenizer, self.context, self.settings = tokenizer, context, settings

    def chat(self, messages: list[ChatMessage], max_tokens: int | None, truncate: bool) -> tuple[list[int], int]:
        """(prompt, messages left out). Raises ApiError for an impossible order of roles and for a chat that is too long."""
        check_roles(messages)
        reply = min(max_tokens or self.settings.max_tokens, self.context // REPLY_SHARE)
        room = self.context - max(1, reply) if truncate else 1 << 62
        prompt, left_out = fit_conversation(self.tokenizer, [message.for_tokenizer() for message in messages], room)
        self._check_length(prompt, "shorten it or start a new chat" if truncate else "shorten it, or set truncate to drop the oldest turns")
        return prompt, left_out

    def completion(self, prompt: str | list[int], limit: int | None) -> list[int]:
        """A text behind <|bos|>, or tokens as they are. With limit 0, nothing to generate, the prompt may fill the context."""
        bos, vocab_size = self.tokenizer.get_bos_token_id(), self.tokenizer.get_vocab_size()
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            raise ApiError(400, f"a prompt of tokens needs at least one, each between 0 and {vocab_size - 1}")
        self._check_length(tokens, "shorten it", 0 if limit == 0 else 1)
        return tokens

    def _check_length(self, prompt: list[int], remedy: str, reply: int = 1) -> None:
        over = len(prompt) - (self.context - reply)
        if over > 0:
            message = f"the prompt has {len(prompt)} tokens, {over} more than the context of {self.context} leaves room for: {remedy}"
            raise ApiError(400, message, "context_length_exceeded")


def check_roles(messages: Sequence[ChatMessage]) -> None:
    """An optional system message, then user and assistant in turn, the user last. Raises ApiError saying which message is wrong."""
    turns = list(messages)
    if turns[0].role == "system":
        turns = turns[1:]
    offset = len(messages) - len(turns) + 1
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message.role != expected:
            where = f"message {i + offset} is of role {message.role!r} where {expected!r} was expected"
            raise ApiError(400, f"{where}: after an optional system message, user and assistant take turns", "role_order")
        if message.role == "user" and not message.plain().strip():
            raise ApiError(400, f"message {i + offset} of the user is empty", "empty_message")
    if len(turns) % 2 == 0:
        raise ApiError(400, "the last message must be of role 'user': it is what the model answers", "role_order")


# ---- what clients get -----------------------------------------------------------------------------------------------

TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "del", "a", "code", "pre", "blockquote", "ul", "ol", "li"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
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


def finish_reason(stop_reason: str) -> str:
    return "stop" if stop_reason == "stop" else "length"


class StreamResponse(EventSourceResponse):
    """Server-sent events that close their stream even if the client left before the first one."""

    def __init__(self, stream: Stream, events: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(events, sep="\n", send_timeout=SEND_SECONDS)
        self._source = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._source.close()


def event(value: Any) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False)}


def joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one kind made one."""
    return [(kind, "".join(text for _, text in group)) for kind, group in itertools.groupby(pieces, key=lambda piece: piece[0])]


async def page_events(stream: Stream, decoder: ReplyDecoder, render: bool, left_out: int) -> AsyncIterator[dict[str, str]]:
    """nanochat's events {"token", "gpu"} ... {"done": true}; pieces of tool calls are {"tool", "text"}; with `render`, instead, the
    whole reply so far as {"parts"}, at most ten times a second and less often where rendering takes long."""
    gpu = stream.worker.number
    next_render, stop_reason = 0.0, ""
    if left_out:
        yield event({"left_out": left_out})
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

    async def chunks(self, stream: Stream, include_usage: bool) -> AsyncIterator[dict[str, str]]:
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
        yield {"data": "[DONE]"}

    def _opening(self, index: int, generation: Generation) -> Iterable[dict[str, str]]:
        choice = self.choices[index]
        if self.is_chat:
            yield self._chunk(index, delta={"role": "assistant", "content": ""})
        elif choice.echo is not None:
            if generation.request.prompt_logprobs:
                choice.note_prompt(generation.prompt_logprobs)
            yield self._chunk(index, text=choice.echo)

    def _steps(self, index: int, items: list[Token]) -> Iterable[dict[str, str]]:
        for kind, text in joined(piece for item in items for piece in self.feed(item)):
            if self.is_chat:
                tool = {} if kind == "text" else {"part": {"type": kind, "text": text}}
                yield self._chunk(index, delta={"content": text if kind == "text" else "", **tool})
            elif kind == "text":
                yield self._chunk(index, text=text)
        if items[-1].stop_reason is not None:
            end: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
            yield self._chunk(index, self.choices[index].reason, **end)

    def _chunk(self, index: int, reason: str | None = None, **body: Any) -> dict[str, str]:
        logprobs = self.choices[index].take_logprobs()
        return event(self.envelope([{"index": index, **body, "finish_reason": reason, "logprobs": logprobs}], chunk=True))


# ---- in front of every request --------------------------------------------------------------------------------------


class Guard:
    """Host and origin checks, API key, a bound on the body, security headers: before the application sees a request."""

    def __init__(self, app: ASGIApp, settings: Settings, page_policy: str) -> None:
        self.app, self.settings = app, settings
        self.headers = [
            (b"content-security-policy", page_policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", b"same-origin"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.headers]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal.response()(scope, receive, send_guarded)
        else:
            await self.app(scope, self._bounded(receive), send_guarded)

    def _refusal(self, path: str, headers: dict[str, str]) -> ApiError | None:
        host = headers.get("host", "")
        if self.settings.hosts is not None and re.sub(r":\d*$", "", host).lower() not in self.settings.hosts:
            return ApiError(400, "this server is not known under that host name", "bad_host")  # DNS rebinding
        origin = headers.get("origin")
        if origin is not None and re.sub(r"^https?://", "", origin) != host:
            return ApiError(403, "requests from other sites' pages are not served", "bad_origin")
        if self.settings.api_key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not secrets.compare_digest(given, self.settings.api_key.encode()):
                return ApiError(
                    401, "send the server's API key as `Authorization: Bearer KEY`", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
                )
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MAX_BODY:
            return ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")
        return None

    def _bounded(self, receive: Receive) -> Receive:
        size, complete = 0, False

        async def bounded() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > MAX_BODY:
                raise HTTPException(413, f"the request is larger than {MAX_BODY} bytes")
            return message

        return bounded


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`, or None, with the work cancelled, if the client leaves first."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def error_handlers(app: FastAPI) -> None:
    """Every refusal in the one format that OpenAI's clients read."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"][1:]) or "the request"
        reason = first.get("ctx", {}).get("error") or first["msg"] if first["type"] == "json_invalid" else first["msg"]
        return ApiError(400, f"{where}: {reason}", "invalid_request").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request; its log has the reason").response()


# ---- the application ------------------------------------------------------------------------------------------------


def load_page(settings: Settings, context: int) -> tuple[str, str]:
    """(HTML of the chat page, content security policy that admits exactly its own script and style)."""
    page = resources.files("zangchat").joinpath("ui.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in found)

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    facts = {
        "model": settings.model_name,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "max_tokens": settings.max_tokens,
        "context": context,
        "needs_key": settings.api_key is not None,
    }
    return page.replace("{{facts}}", html.escape(json.dumps(facts), quote=True)), policy


def exposition(pool: Pool) -> str:
    """The pool's numbers in the text format of Prometheus, version 0.0.4."""
    lines = []

    def metric(kind: str, name: str, meaning: str, *values: tuple[str, float]) -> None:
        lines.extend([f"# HELP zangchat_{name} {meaning}", f"# TYPE zangchat_{name} {kind}"])
        lines.extend(
            f"zangchat_{name}{labels} {value:g}" if value < 1e6 else f"zangchat_{name}{labels} {value:.0f}" for labels, value in values
        )

    def per_worker(value: Callable[[Worker], float]) -> list[tuple[str, float]]:
        return [(f'{{gpu="{worker.number}"}}', value(worker)) for worker in pool.workers]

    metric("counter", "requests_total", "Requests taken on.", ("", pool.served))
    metric("counter", "refused_total", "Requests refused because the queue was full.", ("", pool.refused))
    metric("gauge", "in_hand", "Continuations taken on and not yet delivered.", ("", pool.load))
    metric("counter", "tokens_total", "Tokens generated.", *per_worker(lambda worker: worker.tokens))
    metric("gauge", "rows_running", "Rows of the running batch in use.", *per_worker(lambda worker: worker.rows))
    metric("gauge", "requests_waiting", "Continuations that wait for a row.", *per_worker(lambda worker: worker.waiting))
    return "\n".join(lines) + "\n"


def create_app(engine_list: Sequence[Engine], settings: Settings | None = None) -> FastAPI:
    """The application over one engine per device. Its worker threads live as long as its lifespan."""
    settings = settings or Settings()
    tokenizer, config = engine_list[0].tokenizer, engine_list[0].model.config
    pool, prompter = Pool(engine_list, settings), Prompter(tokenizer, config.sequence_len, settings)
    page, policy = load_page(settings, config.sequence_len)
    started = time.time()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        pool.start()
        try:
            yield
        finally:
            await run_in_threadpool(pool.stop)

    refusals: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
    either: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {}}, "description": "JSON, or events with stream=true"}
    }
    app = FastAPI(title="zangchat", lifespan=lifespan, docs_url=None, redoc_url=None, responses=refusals)
    app.state.pool = pool
    app.add_middleware(Guard, settings=settings, page_policy=policy)
    error_handlers(app)

    async def answer(body: OpenAIRequest, request: Request, answer: Answer, requests: list[Continuation]) -> Response:
        stream = pool.open(requests)
        if body.stream:
            return StreamResponse(stream, answer.chunks(stream, body.include_usage))
        try:
            whole = await unless_disconnected(request, answer.whole(stream))
        finally:
            stream.close()
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    @app.get("/logo.svg", include_in_schema=False)
    async def logo() -> Response:
        return Response(resources.files("zangchat").joinpath("logo.svg").read_bytes(), media_type="image/svg+xml")

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok" if pool.healthy else "failed"}, 200 if pool.healthy else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return exposition(pool)

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        workers = [{"gpu": w.number, "running": w.rows, "waiting": w.waiting, "tokens": w.tokens} for w in pool.workers]
        totals = {"in_hand": pool.load, "served": pool.served, "refused": pool.refused, "tokens": sum(w.tokens for w in pool.workers)}
        return {"model": settings.model_name, "uptime_seconds": round(time.time() - started), **totals, "workers": workers}

    @app.post("/chat/completions", responses={200: {"content": {"text/event-stream": {}}}}, response_class=Response)
    async def page_chat(body: PageChat) -> Response:
        prompt, left_out = await run_in_threadpool(prompter.chat, body.messages, body.max_tokens, body.truncate)
        stream = pool.open(body.requests(prompt, 1, settings))
        decoder = ReplyDecoder(tokenizer, stream.requests[0].stop)
        return StreamResponse(stream, page_events(stream, decoder, body.render, left_out))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": settings.model_name, "object": "model", "created": int(started), "owned_by": "zangchat"}
        return {"object": "list", "data": [{**model, "context_length": config.sequence_len}]}

    @app.post("/v1/chat/completions", responses=either)
    async def openai_chat(body: OpenAIChat, request: Request) -> Response:
        body.check(settings)
        prompt, _ = await run_in_threadpool(prompter.chat, body.messages, body.limit, body.truncate)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = body.requests(prompt, body.n, settings, logprobs=logprobs, max_tokens=body.limit or settings.max_tokens)
        choices = [Choice(tokenizer, one, is_chat=True) for one in requests]
        return await answer(body, request, Answer("chat.completion", settings.model_name, choices, len(prompt)), requests)

    @app.post("/v1/completions", responses=either)
    async def openai_completion(body: OpenAICompletion, request: Request) -> Response:
        body.check(settings)
        given = body.prompts()
        if len(given) * body.n > MAX_CHOICES:
            raise ApiError(400, f"{len(given)} prompts x n={body.n} are more than the {MAX_CHOICES} continuations of one request")
        prompts = await run_in_threadpool(lambda: [prompter.completion(prompt, body.max_tokens) for prompt in given])
        more = {"logprobs": body.logprobs, "prompt_logprobs": body.echo and body.logprobs is not None}
        requests, choices = [], []
        for asked, prompt in zip(given, prompts, strict=True):
            echo = None if not body.echo else asked if isinstance(asked, str) else tokenizer.decode(asked)
            for one in body.requests(prompt, body.n, settings, **more):
                requests.append(one)
                choices.append(Choice(tokenizer, one, is_chat=False, echo=echo, skipped=int(isinstance(asked, str))))
        return await answer(body, request, Answer("text_completion", settings.model_name, choices, sum(map(len, prompts))), requests)

    return app

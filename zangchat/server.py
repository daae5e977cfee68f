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
import json
import logging
import re
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import nh3
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from markdown_it import MarkdownIt
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zangchat.engine import Engine, Event, Generation, ReplyDecoder, RunningBatch, fit_conversation
from zangchat.engine import Request as Continuation

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_BODY = 256 * 1024  # bytes of a request
BODY_SECONDS = 30.0  # the longest pause of a client within its request
MAX_MESSAGES = 500
MAX_CHOICES = 64  # continuations that one request may ask for
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
    max_batch: int = 16  # rows of each running batch
    queue: int = 64  # requests that may wait, all devices together
    request_seconds: float = 300.0  # wall-clock limit of one request, waiting included
    api_key: str | None = None
    hosts: frozenset[str] | None = frozenset(LOCAL_HOSTS)  # names under which the server may be addressed; None: any


class ApiError(Exception):
    """A request that is refused, with the reason for the client."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status, self.headers)


# ---- the worker thread ----------------------------------------------------------------------------------------------


class Token(NamedTuple):
    """One step of one choice, as it reaches the event loop. A stop_reason ends the choice; "error" means that the engine failed."""

    choice: int
    token: int | None
    stop_reason: str | None


class Stream:
    """The tokens of one API request (one or more choices) on the event loop. Whoever opens it closes it, whatever happens."""

    def __init__(self, pool: "Pool", worker: "Worker", requests: Sequence[Continuation]) -> None:
        self.pool, self.worker, self.requests = pool, worker, requests
        self.generations: list[Generation] = []  # the worker's own
        self.deadline = time.monotonic() + pool.settings.request_seconds
        self._tokens: asyncio.Queue[Token] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open = len(requests)  # choices that have not ended
        self._closed = False

    def deliver(self, tokens: list[Token]) -> None:
        """Called by the worker thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, tokens)

    def _put(self, tokens: list[Token]) -> None:
        for token in tokens:
            self._tokens.put_nowait(token)

    async def __aiter__(self) -> AsyncIterator[Token]:
        while self._open:
            token = await self._tokens.get()
            if token.stop_reason == "error":
                raise ApiError(500, "the engine failed on this request; the server's log has the reason", "engine_error")
            self._open -= token.stop_reason is not None
            yield token

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
        for generation, token, _, _ in events:
            stream, choice = self._streams[id(generation)]
            if generation.stop_reason is not None:
                del self._streams[id(generation)]
            outgoing.setdefault(id(stream), (stream, []))[1].append(Token(choice, token, generation.stop_reason))
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


class Sampling(BaseModel):
    temperature: float | None = Field(None, ge=0, le=10, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)

    def requests(self, prompt: list[int], n: int, settings: Settings) -> list[Continuation]:
        seed = secrets.randbits(32) if self.seed is None else self.seed
        return [
            Continuation(
                prompt,
                settings.max_tokens if self.max_tokens is None else self.max_tokens,
                settings.temperature if self.temperature is None else self.temperature,
                settings.top_k if self.top_k is None else self.top_k,
                self.top_p,
                seed,
                sample_index=i,
            )
            for i in range(n)
        ]


class PageChat(Sampling):
    """nanochat's chat request; `render` asks for HTML along the stream, `truncate` drops the oldest turns that do not fit."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    render: bool = False
    truncate: bool = False


class StreamOptions(BaseModel):
    include_usage: bool = False


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
        """Raises ApiError for another model, and for settings that would silently change nothing."""
        if self.model not in (None, "zangchat", settings.model_name):
            raise ApiError(404, f"there is no model {self.model!r} here; this server has {settings.model_name!r}", "model_not_found")
        ignored = [name for name in UNSUPPORTED if (self.model_extra or {}).get(name) not in (None, False, 0, [], {}, {"type": "text"})]
        if ignored:
            raise ApiError(400, f"this server does not support {', '.join(ignored)}", "unsupported_parameter")


UNSUPPORTED = (
    *("stop", "tools", "functions", "response_format", "logit_bias", "logprobs", "top_logprobs", "prompt_logprobs", "best_of", "suffix"),
    *("presence_penalty", "frequency_penalty", "audio"),
)


class OpenAIChat(OpenAIRequest):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    truncate: bool = False

    def requests(self, prompt: list[int], n: int, settings: Settings) -> list[Continuation]:
        newer = self.model_copy(update={"max_tokens": self.max_completion_tokens or self.max_tokens})
        return Sampling.requests(newer, prompt, n, settings)


class OpenAICompletion(OpenAIRequest):
    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1, le=1_000_000)
    echo: bool = False

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

    def completion(self, prompt: str | list[int]) -> list[int]:
        """A text behind <|bos|>, or tokens as they are."""
        bos, vocab_size = self.tokenizer.get_bos_token_id(), self.tokenizer.get_vocab_size()
        tokens = [bos, *self.tokenizer.encode(prompt)] if isinstance(prompt, str) else list(prompt)
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            raise ApiError(400, f"a prompt of tokens needs at least one, each between 0 and {vocab_size - 1}")
        self._check_length(tokens, "shorten it")
        return tokens

    def _check_length(self, prompt: list[int], remedy: str) -> None:
        over = len(prompt) - (self.context - 1)
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
        super().__init__(events, sep="\n")
        self._source = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._source.close()


def event(value: Any) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False)}


async def page_events(stream: Stream, decoder: ReplyDecoder, render: bool, left_out: int) -> AsyncIterator[dict[str, str]]:
    """nanochat's events {"token", "gpu"} ... {"done": true}; pieces of tool calls are {"tool", "text"}; with `render`, instead, the
    whole reply so far as {"parts"}, at most ten times a second and less often where rendering takes long."""
    gpu = stream.worker.number
    next_render, stop_reason = 0.0, ""
    if left_out:
        yield event({"left_out": left_out})
    try:
        async for item in stream:
            pieces = decoder.flush() if item.token is None else decoder.feed(item.token)
            if item.stop_reason is not None:
                stop_reason = item.stop_reason
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


@dataclass
class Answer:
    """An OpenAI response in the making: one decoder per choice."""

    kind: Literal["chat.completion", "text_completion"]
    model: str
    decoders: list[ReplyDecoder]
    prefixes: list[str]  # what `echo` puts in front of each choice
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
        decoder = self.decoders[item.choice]
        self.completion_tokens += item.token is not None
        pieces = [] if item.token is None else decoder.feed(item.token)
        return pieces + (decoder.flush() if item.stop_reason is not None else [])

    def envelope(self, choices: list[dict[str, Any]], chunk: bool = False, **more: Any) -> dict[str, Any]:
        name = f"{self.kind}.chunk" if chunk and self.is_chat else self.kind
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model, "choices": choices, **more}

    async def whole(self, stream: Stream) -> dict[str, Any]:
        reasons: dict[int, str] = {}
        async for item in stream:
            self.feed(item)
            if item.stop_reason is not None:
                reasons[item.choice] = finish_reason(item.stop_reason)
        return self.envelope([self._choice(i, reasons[i]) for i in range(len(self.decoders))], usage=self.usage())

    def _choice(self, index: int, reason: str) -> dict[str, Any]:
        decoder = self.decoders[index]
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": None}
        if not self.is_chat:
            return {**choice, "text": self.prefixes[index] + decoder.text()}
        message: dict[str, Any] = {"role": "assistant", "content": decoder.text()}
        if any(part["type"] != "text" for part in decoder.parts):
            message["parts"] = decoder.parts  # tool calls, which OpenAI's format has no place for
        return {**choice, "message": message}

    async def chunks(self, stream: Stream, include_usage: bool) -> AsyncIterator[dict[str, str]]:
        for index in range(len(self.decoders)):
            if self.is_chat:
                yield self._chunk(index, delta={"role": "assistant", "content": ""})
            elif self.prefixes[index]:
                yield self._chunk(index, text=self.prefixes[index])
        try:
            async for item in stream:
                for kind, text in self.feed(item):
                    said = text if kind == "text" else ""
                    tool = {} if kind == "text" else {"part": {"type": kind, "text": text}}
                    if self.is_chat:
                        yield self._chunk(item.choice, delta={"content": said, **tool})
                    elif said:
                        yield self._chunk(item.choice, text=said)
                if item.stop_reason is not None:
                    end: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
                    yield self._chunk(item.choice, finish_reason(item.stop_reason), **end)
            if include_usage:
                yield event(self.envelope([], chunk=True, usage=self.usage()))
        except ApiError as error:
            yield event({"error": {"message": str(error), "type": "server_error", "code": error.code}})
        yield {"data": "[DONE]"}

    def _chunk(self, index: int, reason: str | None = None, **body: Any) -> dict[str, str]:
        return event(self.envelope([{"index": index, **body, "finish_reason": reason, "logprobs": None}], chunk=True))


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

    app = FastAPI(title="zangchat", lifespan=lifespan, docs_url=None, redoc_url=None)
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

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        workers = [
            {"gpu": w.number, "running": len(w.batch.running), "waiting": len(w.batch.waiting), "tokens": w.tokens} for w in pool.workers
        ]
        totals = {"in_hand": pool.load, "served": pool.served, "refused": pool.refused, "tokens": sum(w.tokens for w in pool.workers)}
        return {"model": settings.model_name, "uptime_seconds": round(time.time() - started), **totals, "workers": workers}

    @app.post("/chat/completions")
    async def page_chat(body: PageChat) -> Response:
        prompt, left_out = await run_in_threadpool(prompter.chat, body.messages, body.max_tokens, body.truncate)
        stream = pool.open(body.requests(prompt, 1, settings))
        return StreamResponse(stream, page_events(stream, ReplyDecoder(tokenizer), body.render, left_out))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": settings.model_name, "object": "model", "created": int(started), "owned_by": "zangchat"}
        return {"object": "list", "data": [{**model, "context_length": config.sequence_len}]}

    @app.post("/v1/chat/completions")
    async def openai_chat(body: OpenAIChat, request: Request) -> Response:
        body.check(settings)
        limit = body.max_completion_tokens or body.max_tokens
        prompt, _ = await run_in_threadpool(prompter.chat, body.messages, limit, body.truncate)
        decoders = [ReplyDecoder(tokenizer) for _ in range(body.n)]
        reply = Answer("chat.completion", settings.model_name, decoders, [""] * body.n, len(prompt))
        return await answer(body, request, reply, body.requests(prompt, body.n, settings))

    @app.post("/v1/completions")
    async def openai_completion(body: OpenAICompletion, request: Request) -> Response:
        body.check(settings)
        if len(body.prompts()) * body.n > MAX_CHOICES:
            raise ApiError(400, f"{len(body.prompts())} prompts x n={body.n} are more than the {MAX_CHOICES} continuations of one request")
        prompts = await run_in_threadpool(lambda: [prompter.completion(prompt) for prompt in body.prompts()])
        requests = [r for prompt in prompts for r in body.requests(prompt, body.n, settings)]
        echoes = [p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompts()] if body.echo else [""] * len(prompts)
        decoders = [ReplyDecoder(tokenizer) for _ in requests]
        reply = Answer("text_completion", settings.model_name, decoders, [e for e in echoes for _ in range(body.n)], sum(map(len, prompts)))
        return await answer(body, request, reply, requests)

    return app

"""The web server: the chat page, nanochat's event stream, and OpenAI's API, all fed by the engine's running batch.

What is here is in front of and behind a request: the guard, the routes, errors in one format. What may be asked is in protocol.py, who is
served when in scheduler.py, what comes back in answers.py. Nothing of a conversation is logged.
"""

import asyncio
import base64
import hashlib
import html
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from importlib import resources
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from zangchat.answers import Answer, Choice, page_events
from zangchat.engine import Engine
from zangchat.protocol import (
    MAX_CHOICES,
    ApiError,
    ErrorBody,
    OpenAIChat,
    OpenAICompletion,
    OpenAIRequest,
    PageChat,
    Prompter,
    Settings,
)
from zangchat.replies import ReplyDecoder
from zangchat.sampling import Request as Continuation
from zangchat.scheduler import Pool, Stream, Worker

T = TypeVar("T")

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
MAX_BODY = 256 * 1024  # bytes of a request's body
HEAD_SECONDS = 10.0  # until a request's headers must be there, counted from the connection or from the reply before
BODY_SECONDS = 30.0  # until its body must be there, counted from its headers
SEND_SECONDS = 30.0  # the longest that a client may take to accept a piece of a stream
PREPARING = 4  # requests that are read, checked and tokenized at the same time
PING_SECONDS = 15.0  # between two comments in a stream, for proxies that close what seems dead
OPEN_PATHS = {"/", "/logo.svg", "/health"}  # reachable without the API key


# ---- in front of every request --------------------------------------------------------------------------------------


class Guard:
    """Host and origin checks, API key, a bound on the body, security headers: before the application sees a request."""

    def __init__(self, app: ASGIApp, settings: Settings, page_policy: str) -> None:
        self.app, self.settings = app, settings
        self.preparing = asyncio.Semaphore(PREPARING)
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

        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, message["headers"] = True, [*message["headers"], *self.headers]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope["path"], headers)
            if scope["method"] == "HEAD":  # whoever asks whether the server lives; uvicorn leaves out the body
                scope = {**scope, "method": "GET"}
            await (self._in_turn if scope["method"] == "POST" else self.app)(scope, receive, send_guarded)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send_guarded)
        except asyncio.CancelledError:  # the server stops and this took too long
            if started:
                await send({"type": "http.response.body"})
            else:
                await ApiError(503, "the server is stopping").response()(scope, receive, send_guarded)

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A burst of requests is let in a few at a time once they are whole, so that what else the event loop has to do comes between."""
        try:
            body: bytes | None = await asyncio.wait_for(read_body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:.0f} seconds") from None

        async def receive_whole() -> Message:
            nonlocal body
            if body is None:  # nothing is left to do but to wait for the engine, or for the client to leave
                turn.close()
                return await receive()
            whole, body = body, None
            return {"type": "http.request", "body": whole}

        await self.preparing.acquire()
        with ExitStack() as turn:
            turn.callback(self.preparing.release)
            await self.app(scope, receive_whole, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if self.settings.hosts is not None and re.sub(r":\d*$", "", host).lower() not in self.settings.hosts:
            raise ApiError(400, "this server is not known under that host name", "bad_host")  # DNS rebinding
        origin = headers.get("origin")
        if origin is not None and re.sub(r"^https?://", "", origin) != host:
            raise ApiError(403, "requests from other sites' pages are not served", "bad_origin")
        if self.settings.api_key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not secrets.compare_digest(given, self.settings.api_key.encode()):
                raise ApiError(
                    401, "send the server's API key as `Authorization: Bearer KEY`", "invalid_api_key", {"WWW-Authenticate": "Bearer"}
                )
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")


async def read_body(receive: Receive) -> bytes:
    """Raises ApiError for one that is too large. What a client that left did not send is missing."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")
    return body


async def unless_disconnected(receive: Receive, work: Awaitable[T], *beside: Awaitable[None]) -> T | None:
    """The result of `work`, or None, with the work cancelled, if the client leaves first. What goes on `beside` it ends with it."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(one) for one in (work, disconnected(), *beside)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() and not tasks[0].cancelled() else None  # type: ignore[return-value]
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
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of what was tried, what came furthest
        where, reason = ".".join(str(step) for step in first["loc"][1:] if "[" not in str(step)) or "the request", first["msg"]
        if first["type"] == "json_invalid":
            where, reason = "the body is not JSON", f"{first['ctx']['error']} at character {where}"
        elif "json" not in request.headers.get("content-type", ""):
            where, reason = "the body is not read as JSON", "send the header `Content-Type: application/json`"
        return ApiError(400, f"{where}: {reason}", "invalid_request").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server failed on this request; its log has the reason").response()


# ---- the application ------------------------------------------------------------------------------------------------


class StreamResponse(StreamingResponse):
    """Server-sent events. Closes its stream however it ends, also if the client left before the first one."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._source = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()

        async def send_in_time(message: Message) -> None:
            patience = loop.call_later(SEND_SECONDS, writing.cancel)
            try:
                await send(message)
            finally:
                patience.cancel()

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(PING_SECONDS)
                await send_in_time({"type": "http.response.body", "body": b": still here\n\n", "more_body": True})

        writing = asyncio.ensure_future(self.stream_response(send_in_time))
        try:
            await unless_disconnected(receive, writing, keep_alive())
        finally:
            self._source.close()


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
        "top_p": settings.top_p,
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
            whole = await unless_disconnected(request.receive, answer.whole(stream))
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
        return {"object": "list", "data": [await one_model(settings.model_name)]}

    @app.get("/v1/models/{name}", responses={404: {"model": ErrorBody}})
    async def one_model(name: str) -> dict[str, Any]:
        settings.check_model(name)
        facts = {"created": int(started), "owned_by": "zangchat", "context_length": config.sequence_len}
        return {"id": settings.model_name, "object": "model", **facts}

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


# ---- below the application ------------------------------------------------------------------------------------------


class PatientProtocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it, but for headers that never end or never come: uvicorn would wait and store them for ever."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_size += len(data)
        if self._awaits_head and self._head_size > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"the headers of a request are larger than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        self._awaits_head = False
        self._patience.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else another request came on its heels
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._awaits_head, self._head_size = True, 0
        self._patience = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def http_server(app: FastAPI, grace: int = 3, **address: Any) -> uvicorn.Server:
    """A server for the application, which lets requests go on for `grace` seconds when it is stopped. There is no access log: who talked
    when is nobody's business."""
    config = uvicorn.Config(
        app, http=PatientProtocol, ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=grace, **address
    )
    return uvicorn.Server(config)

"""HTTP around the application: request guards, errors in one format, event streams, time limits."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from zangchat.server.pool import PoolError, QueueFull, Stream
from zangchat.server.protocol import ApiError, Settings

T = TypeVar("T")
MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
MAX_BODY = 256 * 1024  # bytes of a request's body
HEAD_SECONDS = 10.0  # for a request's headers, from the connection or from the previous response
BODY_SECONDS = 30.0  # for its body, from its headers
SEND_SECONDS = 30.0  # for a client to accept a piece of a stream
PREPARING = 4  # requests that are read, checked and tokenized at the same time
PING_SECONDS = 15.0  # between two comments in a stream, for proxies that close idle connections
OPEN_PATHS = {"/", "/logo.svg", "/health"}  # reachable without the API key


# -- request guards --------------------------------------------------------------------------------


class Guard:
    """Middleware: host and origin checks, API key, a bound on the body, security headers."""

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

        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        try:
            self._check(scope["path"], headers)
            if scope["method"] == "HEAD":  # for monitors; uvicorn leaves the body out
                scope = {**scope, "method": "GET"}
            app = self._in_turn if scope["method"] == "POST" else self.app
            await app(scope, receive, send_guarded)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send_guarded)
        except asyncio.CancelledError:  # the server stops and the grace period is over
            if started:
                await send({"type": "http.response.body"})
            else:
                stopping = ApiError(503, "the server is stopping")
                await stopping.response()(scope, receive, send_guarded)

    async def _in_turn(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit a burst of complete requests a few at a time, so that the event loop stays free."""
        try:
            body: bytes | None = await asyncio.wait_for(read_body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the request did not arrive within {BODY_SECONDS:.0f} seconds"
            raise ApiError(408, message) from None

        async def receive_body() -> Message:
            nonlocal body
            if body is None:  # all that remains is to wait for the engine or for a disconnect
                turn.close()
                return await receive()
            content, body = body, None
            return {"type": "http.request", "body": content}

        await self.preparing.acquire()
        with ExitStack() as turn:
            turn.callback(self.preparing.release)
            await self.app(scope, receive_body, send)

    def _check(self, path: str, headers: dict[str, str]) -> None:
        host, hosts = headers.get("host", ""), self.settings.hosts
        if hosts is not None and re.sub(r":\d*$", "", host).lower() not in hosts:
            # DNS rebinding
            raise ApiError(400, "this server is not known under that host name", "bad_host")
        origin = headers.get("origin")
        if origin is not None and re.sub(r"^https?://", "", origin) != host:
            raise ApiError(403, "requests from other sites' pages are not served", "bad_origin")
        key = self.settings.api_key
        if key is not None and path not in OPEN_PATHS:
            sent = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not secrets.compare_digest(sent, key.encode()):
                message = "send the server's API key as `Authorization: Bearer KEY`"
                raise ApiError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")


async def read_body(receive: Receive) -> bytes:
    """Raises ApiError if the body is too large. Incomplete if the client disconnects."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")
    return body


# -- errors, in the format that OpenAI's clients read ----------------------------------------------


def from_pool(error: PoolError) -> ApiError:
    """An error of the pool as a response."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "queue_full", {"Retry-After": "2"})
    return ApiError(500, str(error), "engine_error")


async def _api_error(_: Request, error: Any) -> Response:
    refusal: ApiError = error
    return refusal.response()


async def _pool_error(_: Request, error: Any) -> Response:
    return from_pool(error).response()


async def _http_error(_: Request, error: Any) -> Response:
    headers = dict(error.headers or {})
    return ApiError(error.status_code, str(error.detail), headers=headers).response()


async def _invalid_request(request: Request, error: Any) -> Response:
    # of a union's attempts, report the one that came furthest
    deepest = max(error.errors(), key=lambda one: len(one["loc"]))
    path = ".".join(str(step) for step in deepest["loc"][1:] if "[" not in str(step))
    where, reason = path or "the request", deepest["msg"]
    if deepest["type"] == "json_invalid":
        reason = f"{deepest['ctx']['error']} at character {where}"
        where = "the body is not JSON"
    elif "json" not in request.headers.get("content-type", ""):
        where = "the body is not read as JSON"
        reason = "send the header `Content-Type: application/json`"
    return ApiError(400, f"{where}: {reason}", "invalid_request").response()


async def _server_error(_: Request, _error: Any) -> Response:
    message = "the server failed on this request; its log has the reason"
    return ApiError(500, message).response()


ERROR_HANDLERS: dict[Any, Any] = {
    ApiError: _api_error,
    PoolError: _pool_error,
    HTTPException: _http_error,
    RequestValidationError: _invalid_request,
    Exception: _server_error,
}


# -- responses -------------------------------------------------------------------------------------


def _receive_of(request: Request) -> Receive:
    return request.receive


Incoming = Annotated[Receive, Depends(_receive_of)]  # the connection's messages, for a route


async def unless_disconnected(
    receive: Receive, work: Awaitable[T], *background: Awaitable[None]
) -> T | None:
    """The result of `work`; None, with the work cancelled, if the client disconnects first.

    `background` runs until then.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(one) for one in (work, disconnected(), *background)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        working: asyncio.Future[Any] = tasks[0]
        return working.result() if working.done() and not working.cancelled() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events. Closes its tokens however it ends, also without any event sent.

    sse-starlette would do the same in four times the processor time per event.
    """

    media_type = "text/event-stream"

    def __init__(self, tokens: Stream, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        loop = asyncio.get_running_loop()

        async def send_in_time(message: Message) -> None:
            timeout = loop.call_later(SEND_SECONDS, writing.cancel)
            try:
                await send(message)
            finally:
                timeout.cancel()

        async def ping() -> None:
            while True:
                await asyncio.sleep(PING_SECONDS)
                comment = b": still here\n\n"
                await send_in_time(
                    {"type": "http.response.body", "body": comment, "more_body": True}
                )

        writing = asyncio.ensure_future(self.stream_response(send_in_time))
        try:
            await unless_disconnected(receive, writing, ping())
        finally:
            self._tokens.close()


# -- the server ------------------------------------------------------------------------------------


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on a request's headers, in bytes and in time.

    uvicorn itself would wait for headers, and store them, without limit.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._head_size += len(data)
        too_large = self._awaits_head and self._head_size > MAX_HEAD
        if too_large and not self.transport.is_closing():
            self.send_400_response(f"the headers of a request are larger than {MAX_HEAD} bytes")

    def on_headers_complete(self) -> None:
        self._awaits_head = False
        self._timeout.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else a pipelined request has begun
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timeout.cancel()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._awaits_head, self._head_size = True, 0
        self._timeout = self.loop.call_later(HEAD_SECONDS, self.transport.close)


def http_server(app: FastAPI, grace: int = 3, **address: Any) -> uvicorn.Server:
    """A server that, when it is stopped, lets requests continue for `grace` seconds.

    Access logging is off for privacy.
    """
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=grace,
        **address,
    )
    return uvicorn.Server(config)

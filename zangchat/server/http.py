"""HTTP around the application: request guards, errors in one format, event streams, time limits."""

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from zangchat.server.pool import Stream
from zangchat.server.protocol import ApiError, Settings

T = TypeVar("T")
MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
MAX_BODY = 256 * 1024  # bytes of a request's body
HEAD_SECONDS = 10.0  # until a request's headers must be there, counted from the connection or from the reply before
BODY_SECONDS = 30.0  # until its body must be there, counted from its headers
SEND_SECONDS = 30.0  # the longest that a client may take to accept a piece of a stream
PREPARING = 4  # requests that are read, checked and tokenized at the same time
PING_SECONDS = 15.0  # between two comments in a stream, for proxies that close what seems dead
OPEN_PATHS = {"/", "/logo.svg", "/health"}  # reachable without the API key


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

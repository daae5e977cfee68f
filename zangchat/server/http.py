"""Responses: errors in one format, event streams, the end of a connection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from zangchat.server.pool import PoolError, QueueFull, Stream
from zangchat.server.protocol import ApiError

T = TypeVar("T")
SEND_SECONDS = 30.0  # for a client to accept a piece of a stream
PING_SECONDS = 15.0  # between two comments in a stream, for proxies that close idle connections


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


async def _http_error(request: Request, error: Any) -> Response:
    """An unknown path or method: the answer lists the known ones."""
    path, paths = request.scope["path"], request.app.openapi()["paths"]
    message, code = str(error.detail), None
    if error.status_code == 404:
        known = ", ".join(f"{'/'.join(methods).upper()} {one}" for one, methods in paths.items())
        message, code = f"there is no {path[:100]} here; this server has {known}", "unknown_url"
    elif error.status_code == 405:
        methods = "/".join(paths.get(path) or paths.get(f"/v1{path}") or ["get"]).upper()
        message, code = f"{path} takes {methods}, not {request.method}", "method_not_allowed"
    headers = dict(error.headers or {})
    return ApiError(error.status_code, message, code, headers).response()


async def _invalid_request(request: Request, error: Any) -> Response:
    # of a union's attempts, report the one that came furthest
    deepest = max(error.errors(), key=lambda one: len(one["loc"]))
    path = ".".join(str(step) for step in deepest["loc"][1:] if "[" not in str(step))
    where, reason, param = path or "the request", deepest["msg"], path or None
    if deepest["type"] == "json_invalid":
        reason = f"{deepest['ctx']['error']} at character {where}"
        where, param = "the body is not JSON", None
    elif "json" not in request.headers.get("content-type", ""):
        where = "the body is not read as JSON"
        reason = "send the header `Content-Type: application/json`"
    return ApiError(400, f"{where}: {reason}", "invalid_request", param=param).response()


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

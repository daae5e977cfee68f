"""Checks before the application: host, origin, API key, size and time of a body."""

import asyncio
import inspect
import ipaddress
import re
import secrets
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zangchat.server.exposure import LOCAL_HOSTS, host_name, is_among
from zangchat.server.protocol import ApiError, Settings

MAX_BODY = 256 * 1024  # bytes of a request's body
BODY_SECONDS = 30.0  # for a request's body, from its headers
PREPARING = 4  # requests that are read, checked and tokenized at the same time
OPEN_PATHS = {"/", "/logo.svg", "/health"}  # reachable without the API key


def add_guard(app: FastAPI, settings: Settings, page_policy: str) -> None:
    app.add_middleware(Guard, settings=settings, page_policy=page_policy)
    if settings.origins:
        # browsers ask for it if the server is on the reader's own machine or network
        local: dict[str, Any] = {"allow_private_network": True}
        if not local.keys() <= inspect.signature(CORSMiddleware).parameters.keys():
            local = {}  # an older Starlette
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(settings.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            **local,
        )


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

        try:
            scope = self._local(scope)
            self._check(scope)
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

    def _local(self, scope: Scope) -> Scope:
        """The request as the application knows it.

        Its path has no prefix of a proxy, no doubled and no last slash, as bases and paths that are
        put together have. HEAD, for monitors, is GET; uvicorn leaves the body out.
        """
        path, prefix = re.sub("/+", "/", scope["path"]), self.settings.root_path
        if prefix and f"{path}/".startswith(f"{prefix}/"):
            path = path.removeprefix(prefix)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        return {**scope, "path": path.rstrip("/") or "/", "method": method}

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

    def _check(self, scope: Scope) -> None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1")
            for name, value in scope["headers"]
        }
        self._check_host(headers.get("host", ""))
        if "origin" in headers:
            self._check_origin(headers["origin"], headers.get("host", ""))
        key = self.settings.api_key
        if key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, sent = headers.get("authorization", "").partition(" ")
            right = secrets.compare_digest(sent.strip().encode(), key.encode())
            if scheme.lower() != "bearer" or not right:
                message = "send the server's API key as `Authorization: Bearer KEY`"
                raise ApiError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > MAX_BODY:
            raise ApiError(413, f"the request is larger than {MAX_BODY} bytes", "too_large")

    def _check_host(self, host: str) -> None:
        """Against DNS rebinding, which needs a name: an address is always admitted."""
        hosts, name = self.settings.hosts, host_name(host)
        if hosts is not None and not is_address(name) and not is_among(name, hosts):
            message = f"this server is not known under the host name {name[:100]!r}"
            remedy = f"start it with --allowed_hosts={name[:100]}"
            raise ApiError(400, f"{message}: {remedy}", "bad_host")

    def _check_origin(self, origin: str, host: str) -> None:
        """Pages of this server itself, also through a proxy that changes the Host header, and
        pages of the origins that are allowed.
        """
        address, origins = re.sub(r"^https?://", "", origin), self.settings.origins
        own_names = (self.settings.hosts or frozenset()) - LOCAL_HOSTS
        own = address == host or is_among(host_name(address), own_names)
        if not own and origin not in origins and "*" not in origins:
            message = f"pages of {origin[:100]} may not use this server"
            remedy = f"start it with --allowed_origins={origin[:100]}"
            raise ApiError(403, f"{message}: {remedy}", "bad_origin")


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


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

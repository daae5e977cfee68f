"""The HTTP server: uvicorn, with bounds on its connections and on the headers of requests."""

import functools
import itertools
import logging
import math
import time
from contextlib import suppress
from typing import Any

import httptools
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers
HEAD_SECONDS = 10.0  # for a request's headers, from the connection or from the previous response
OWN_FILES = 64  # open files besides the connections: the model, logs, the engine
WARNING_SECONDS = 60.0  # between two warnings that there are too many connections
OFFERS = {b"upgrade", b"http2-settings"}  # headers of a client that offers another protocol


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 with bounds on a request's headers, in bytes and in time.

    uvicorn itself would wait for headers, and store them, without limit. It would also lose the
    body of a request that offers another protocol, as each POST of the JDK's HttpClient does.
    """

    last_warning = -math.inf  # of the class
    turns = itertools.count()  # of the class; the loop's clock is equal for what comes at once

    def __init__(self, *args: Any, most_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.most_connections = most_connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.most_connections:
            self._make_room([one for one in self.connections if not one.transport.is_closing()])

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._chunk = len(data)
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        self._head_size += len(data)
        too_large = self._awaits_head and self._head_size > MAX_HEAD
        if too_large and not self.transport.is_closing():
            if self._replies:
                self.transport.close()  # a second response cannot be sent within the first
            else:
                message = f"the headers of a request are larger than {MAX_HEAD} bytes"
                self.send_400_response(message)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            # the parser now takes the rest for the other protocol; a new one reads the request
            # without the offer, which a server is free to pass over (RFC 9110, 7.8)
            head = self._without_offer()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
            self._parse(head + data[offer.args[0] :])

    def _without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() not in OFFERS)
            if name not in OFFERS:
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._awaits_head = True
        self._head_size = -self._chunk  # of the chunk in which it begins, the size is unknown

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise httptools.HttpParserError("this server is not a proxy")
            return
        self._awaits_head = False
        self._timeout.cancel()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete:  # else a pipelined request has begun
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timeout.cancel()
        super().connection_lost(exc)

    @property
    def _replies(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._awaits_head, self._head_size = True, 0
        self._idle_since = next(self.turns)
        self._timeout = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _make_room(self, open_ones: list[Any]) -> None:
        """Close the connection that has been idle for longest: it may be this one."""
        if len(open_ones) <= self.most_connections:
            return
        idle = [one for one in open_ones if not one._replies]
        min(idle, key=lambda one: one._idle_since).transport.close()
        if time.monotonic() > PatientProtocol.last_warning + WARNING_SECONDS:
            PatientProtocol.last_warning = time.monotonic()
            limit = f"the limit on open files leaves room for {self.most_connections}"
            logger.warning("idle connections are being closed: %s (see `ulimit -n`)", limit)


def most_connections() -> int:
    """The connections for which there are file descriptors. Raises the soft limit on them first."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return 2**14
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**14 if hard == resource.RLIM_INFINITY else min(hard, 2**14)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a further limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**14 if soft == resource.RLIM_INFINITY else max(1, min(soft, 2**14) - OWN_FILES)


def http_server(app: FastAPI, grace: int = 3, **address: Any) -> uvicorn.Server:
    """A server that, when it is stopped, lets requests continue for `grace` seconds.

    Access logging is off for privacy.
    """
    config = uvicorn.Config(
        app,
        http=functools.partial(PatientProtocol, most_connections=most_connections()),  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=grace,
        **address,
    )
    return uvicorn.Server(config)

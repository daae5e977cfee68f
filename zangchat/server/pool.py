"""Who is served when: one worker thread per device owns a RunningBatch; requests join and leave it between two tokens.

The event loop only posts to a worker's inbox and reads streams of tokens, so it never waits for the model. Whoever opens a stream
closes it; its place in the batch is free at the next token, however the request ended.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from zangchat.engine import Engine, Event, Generation, RunningBatch
from zangchat.engine.sampling import Logprob
from zangchat.engine.sampling import Request as Continuation
from zangchat.server.protocol import ApiError, Settings

logger = logging.getLogger(__name__)

PIECES_PER_SECOND = 1000  # that a worker hands to the event loop; where rows make more tokens, several travel in one piece


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
        self.before = max(0, worker.load - worker.max_rows + 1)  # continuations that must end before this one begins
        self.deadline = time.monotonic() + pool.settings.request_seconds
        self.loop = asyncio.get_running_loop()
        self._arrived: list[Token] = []
        self._news = asyncio.Event()
        self._open = len(requests)  # choices that have not ended
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        """What has arrived since: one step's tokens, or several steps' where the reader is slower than the engine."""
        while self._open:
            await self._news.wait()
            self._news.clear()
            tokens, self._arrived = self._arrived, []
            if any(token.stop_reason == "error" for token in tokens):
                raise ApiError(500, "the engine failed on this request; the server's log has the reason", "engine_error")
            self._open -= sum(token.stop_reason is not None for token in tokens)
            yield tokens

    def feed(self, tokens: list[Token]) -> None:
        """On the event loop, by the worker's order."""
        self._arrived += tokens
        self._news.set()

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
        self._outgoing: dict[int, tuple[Stream, list[Token]]] = {}  # id of a stream -> what it gets next
        self._next_delivery = 0.0

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
                self._collect(self.batch.step())
                self.rows, self.waiting = self.batch.num_rows, len(self.batch.waiting)
            except Exception:  # whatever the engine raised must not end the thread that serves everybody
                logger.exception("the engine failed; the requests in its batch are given up")
                self._give_up()
                self.batch = self._new_batch()
            self._deliver()

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
                self._send(stream, Token(choice, None, "timeout"))

    def _collect(self, events: list[Event]) -> None:
        for generation, token, _, logprob in events:
            stream, choice = self._streams[id(generation)]
            if generation.stop_reason is not None:
                del self._streams[id(generation)]
            self._send(stream, Token(choice, token, generation.stop_reason, generation.stop_token, logprob))
            self.tokens += token is not None

    def _give_up(self) -> None:
        for stream, choice in self._streams.values():
            self._send(stream, Token(choice, None, "error"))
        self._streams.clear()

    def _send(self, stream: Stream, token: Token) -> None:
        self._outgoing.setdefault(id(stream), (stream, []))[1].append(token)

    def _deliver(self) -> None:
        """Hand over what there is, all streams in one call: each call and each piece makes the event loop compete with this thread."""
        now = time.monotonic()
        if not self._outgoing or (now < self._next_delivery and self.batch.busy):
            return
        self._next_delivery = now + len(self._outgoing) / PIECES_PER_SECOND
        outgoing, self._outgoing = list(self._outgoing.values()), {}
        loop = outgoing[0][0].loop
        if not loop.is_closed():
            loop.call_soon_threadsafe(_hand_out, outgoing)


def _hand_out(outgoing: list[tuple[Stream, list[Token]]]) -> None:
    for stream, tokens in outgoing:
        stream.feed(tokens)


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

"""Worker pool: one thread per device owns a RunningBatch; requests come and go between tokens.

The event loop only posts to a worker's inbox and reads token streams, so it never waits for the
model. The code that opens a stream closes it, which frees its rows at the next token. Knows nothing
of HTTP.
"""

import asyncio
import collections.abc
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from zangchat.engine import Engine, Event, Request, RunningBatch, Sequence
from zangchat.engine.sampling import Logprob
from zangchat.errors import UserError

logger = logging.getLogger(__name__)

# A worker hands at most this many pieces to the event loop; above, a piece holds several tokens.
PIECES_PER_SECOND = 1000
ENGINE_FAILED = "the engine failed on this request; the server's log has the reason"
Pieces = collections.abc.Sequence[tuple[str, str]]


class PoolError(Exception):
    """The pool cannot serve a request; the message is for the client."""


class QueueFull(PoolError):
    """Too many continuations are in the pool already; a later attempt may succeed."""


class EngineFailed(PoolError):
    """The engine raised an exception while it computed this request."""


class Token(NamedTuple):
    """One step of a choice. A stop_reason ends the choice: "stop", "length", "timeout" (the
    request's time is up, queueing included), or "error" (the engine failed).
    """

    choice: int
    token: int | None  # None if the choice ended without a further token
    stop_reason: str | None
    stop_token: int | None = None
    logprob: Logprob | None = None
    mask: int = 1  # 0 for tool output: a "python_output" piece of mask 1 was made up by the model
    pieces: Pieces = ()  # (type of part, text) that became certain
    says: bool = False  # the token belongs to the text, not to a tool call or its markup
    message: str = ENGINE_FAILED  # for the client, of an "error"


class Stream:
    """The tokens of one API request (one or more choices), on the event loop. Must be closed."""

    def __init__(self, pool: "Pool", worker: "Worker", requests: list[Request]) -> None:
        self.pool, self.worker, self.requests = pool, worker, requests
        self.generations: list[Sequence] = []  # filled by the worker
        self.before = max(0, worker.load - worker.max_rows + 1)  # continuations ahead in the queue
        self.deadline = time.monotonic() + pool.request_seconds
        self.loop = asyncio.get_running_loop()
        self._arrived: list[Token] = []
        self._has_arrived = asyncio.Event()
        self._open = len(requests)  # choices that have not ended
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[list[Token]]:
        """The tokens of one step, or of several if the reader is slower than the engine.

        Raises EngineFailed.
        """
        while self._open:
            await self._has_arrived.wait()
            self._has_arrived.clear()
            tokens, self._arrived = self._arrived, []
            for token in tokens:
                if token.stop_reason == "error":
                    raise EngineFailed(token.message)
            self._open -= sum(token.stop_reason is not None for token in tokens)
            yield tokens

    def feed(self, tokens: list[Token]) -> None:
        """Called on the event loop, by the worker's order."""
        self._arrived += tokens
        self._has_arrived.set()

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
        self.load = 0  # choices given to this worker and not closed; only the event loop changes it
        self.tokens = 0  # generated since the start
        self.rows = self.waiting = 0  # of the batch, for other threads to read
        self.batch = self._new_batch()
        self._inbox: deque[tuple[Literal["join", "leave"], Stream]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._streams: dict[int, tuple[Stream, int]] = {}  # id of a generation -> stream, choice
        self._outgoing: dict[int, tuple[Stream, list[Token]]] = {}  # id of a stream -> next piece
        self._next_delivery = 0.0

    def post(self, action: Literal["join", "leave"], stream: Stream) -> None:
        with self._wake:
            self._inbox.append((action, stream))
            self._wake.notify()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()

    def run(self) -> None:
        device = self.engine.model.get_device()
        if device.type == "cuda":  # a new thread starts on GPU 0
            torch.cuda.set_device(device)
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._stopping or self.batch.busy)
                if self._stopping:
                    return
            if not self._step():
                del self.batch  # the new one counts the memory that is free
                self.batch = self._new_batch()
            self.rows, self.waiting = self.batch.num_rows, len(self.batch.waiting)
            self._deliver()

    def _step(self) -> bool:
        """False if the engine failed; by then nothing but `batch` holds its memory."""
        try:
            while self._inbox:
                action, stream = self._inbox.popleft()
                self._join(stream) if action == "join" else self._leave(stream)
            self._end_overdue()
            self._collect(self.batch.step())
        except Exception:  # must not end the thread that serves all requests
            logger.exception("the engine failed; the requests in its batch are given up")
            self._give_up()
            return False
        return True

    def _new_batch(self) -> RunningBatch:
        return RunningBatch(self.engine.model, self.engine.tokenizer, self.max_rows)

    def _join(self, stream: Stream) -> None:
        for choice, request in enumerate(stream.requests):
            try:
                generation = self.batch.submit(request, owner=stream, text=True)
            except ValueError as error:
                self._send(stream, Token(choice, None, "error", message=str(error)))
                return  # the stream ends, and leaves
            stream.generations.append(generation)
            self._streams[id(generation)] = (stream, choice)

    def _leave(self, stream: Stream) -> None:
        for generation in stream.generations:
            self.batch.cancel(generation)
            self._streams.pop(id(generation), None)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for generation in self.batch.live():
            if now > self._streams[id(generation)][0].deadline:
                self._collect(self.batch.cancel(generation, "timeout"))

    def _collect(self, events: list[Event]) -> None:
        for generation, token, mask, logprob, pieces, says in events:
            stream, choice = self._streams[id(generation)]
            reason, message = generation.stop_reason, ENGINE_FAILED
            if reason is not None:
                del self._streams[id(generation)]
            if isinstance(generation.error, UserError):
                message = str(generation.error)
            elif generation.error is not None:
                logger.error("the engine failed on one request", exc_info=generation.error)
            step = Token(choice, token, reason, generation.stop_token, logprob, mask, pieces, says)
            self._send(stream, step._replace(message=message))
            self.tokens += token is not None

    def _give_up(self) -> None:
        for stream, choice in self._streams.values():
            self._send(stream, Token(choice, None, "error"))
        self._streams.clear()

    def _send(self, stream: Stream, token: Token) -> None:
        self._outgoing.setdefault(id(stream), (stream, []))[1].append(token)

    def _deliver(self) -> None:
        """Hand over the pieces of all streams in one call.

        Each call and each piece makes the event loop compete with this thread for the interpreter.
        """
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
    """All workers, and the bound on the continuations in them. Used from the event loop only."""

    engines: collections.abc.Sequence[Engine]
    max_batch: int  # rows of each running batch
    queue: int  # continuations that may wait, all devices together
    request_seconds: float  # wall-clock limit of one request, waiting included
    workers: list[Worker] = field(default_factory=list)
    load: int = 0  # choices that have not been closed
    served: int = 0
    refused: int = 0

    def start(self) -> None:
        self.workers = [
            Worker(engine, number, self.max_batch) for number, engine in enumerate(self.engines)
        ]
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

    def open(self, requests: list[Request]) -> Stream:
        """Give requests to the least loaded worker. Raises QueueFull if too many are waiting."""
        capacity = self.max_batch * len(self.workers) + self.queue
        if self.load + len(requests) > capacity:
            self.refused += 1
            raise QueueFull(
                f"the server is busy: {self.load} continuations are in hand; try again soon"
            )
        worker = min(self.workers, key=lambda w: w.load)
        stream = Stream(self, worker, requests)
        self.load += len(requests)
        worker.load += len(requests)
        self.served += 1
        worker.post("join", stream)
        return stream

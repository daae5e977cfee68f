"""Measure a chat server under many clients: tokens per second, latency, errors, leaks. JSON.

    python -m dev.bench_serve -i sft                      the model in the base directory, served by
                                                          scripts.chat_web
    python -m dev.bench_serve -i sft --requests=2000      long enough to see a leak
    python -m dev.bench_serve -i sft --kinds=page         only requests of the chat page

Requests of mixed lengths and kinds (the chat page's, whose replies are rendered, nanochat's and
OpenAI's) first come one at a time, then over `--streams` connections at once. Some
clients leave in the middle of a reply, some send requests that are refused. /health is polled
throughout. The clients use processor time of the same machine.
"""

import asyncio
import http.client
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from dev.bench_common import machine
from zangchat import configurator
from zangchat.config import CheckpointConfig

try:
    from uvloop import run  # the clients share the machine with the server, so they must be cheap
except ImportError:  # on Windows
    from asyncio import run  # type: ignore[assignment]

QUESTIONS = (
    "Who are you?",
    "How many r are in strawberry?",
    "What is 12 * 34?",
    "What does json.dumps do?",
    "Tell me about words. " * 12,
)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # -> address, further fields
    "page": ("/chat/completions", {"render": True, "truncate": True}),
    "nanochat": ("/chat/completions", {}),
    "openai": ("/v1/chat/completions", {"model": "zangchat", "stream": True}),
}


@dataclass
class Config(CheckpointConfig):
    streams: int = 64  # clients at the same time
    requests: int = 512  # in all, by these clients
    alone: int = 24  # of the same mixture, one after the other
    leaving: float = 0.1  # share of clients that leave in the middle of a reply
    refused: float = 0.05  # share of requests that are refused: an unknown role
    longest: int = 96  # tokens of the longest reply requested
    kinds: str = "page,nanochat,openai"  # of the requests, in turn
    quantize: str = ""
    busy: bool = False  # measure even if the machine is busy; the output records it


@dataclass
class Measurements:
    """Measurements of the clients, in seconds."""

    # from the question to the first piece of the reply
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)  # from piece to piece
    health: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    replies: int = 0
    left: int = 0
    refused: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    return configurator.run(Config, bench, argv)


def bench(config: Config) -> int:
    configurator.check_range(1, config, "streams", "requests", "alone")
    if unknown := set(config.kinds.split(",")) - set(KINDS):
        possible = f"there are {','.join(KINDS)}"
        raise configurator.UserError(f"--kinds={config.kinds} has {min(unknown)!r}: {possible}")
    where = machine(config.busy)
    flags = [
        f"--{name}={value}"
        for name in ("source", "model_tag", "step", "quantize", "device_type", "dtype")
        if (value := getattr(config, name))
    ]
    command = [
        sys.executable,
        "-m",
        "scripts.chat_web",
        "--port=0",
        f"--queue={config.streams}",
        *flags,
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", server.stdout.readline())
            if not found:
                raise configurator.UserError("the server did not start; its error is printed above")
            result = run(measure(config, int(found[1]), server.pid))
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    print(
        json.dumps(
            {
                "machine": where,
                "streams": config.streams,
                "requests": config.requests,
                "kinds": config.kinds,
                **result,
            },
            indent=1,
        )
    )
    return 0


def make_plan(config: Config) -> list[dict[str, Any]]:
    """The requests, with their kind and the number of pieces after which the client disconnects."""
    number, kinds = random.Random(1), config.kinds.split(",")
    plan = []
    for i in range(config.requests):
        role = "robot" if number.random() < config.refused else "user"
        question = {
            "messages": [{"role": role, "content": number.choice(QUESTIONS)}],
            "max_tokens": number.randint(config.longest // 8, config.longest),
            "seed": i,
        }
        leaves = number.random() < config.leaving
        leaves_after = number.randint(0, 12) if leaves else None
        plan.append({**question, "kind": kinds[i % len(kinds)], "leaves_after": leaves_after})
    return plan


async def measure(config: Config, port: int, pid: int) -> dict[str, Any]:
    plan = make_plan(config)
    await ask(port, {**plan[0], "leaves_after": None}, Measurements())  # the first pass allocates
    alone_measured, alone = await phase(port, plan[: config.alone], 1)
    server = psutil.Process(pid)
    memory, before = [resident_mib(server)], processor_seconds(server)
    tokens = await generated(port)
    measured, rates = Measurements(), []
    third = -(-len(plan) // 3)
    for part in range(0, len(plan), third):
        _, rate = await phase(port, plan[part : part + third], config.streams, measured)
        rates.append(rate)
        memory.append(resident_mib(server))
    tokens = await generated(port) - tokens
    spent = zip(processor_seconds(server), before, strict=True)
    loop, engine = (round((now - then) / tokens * 1e3, 3) for now, then in spent)
    stats = json.loads(await get(port, "/stats"))
    pending = sum(worker["running"] + worker["waiting"] for worker in stats["workers"])
    together = statistics.median(rates)
    return {
        "one_at_a_time_tok_per_sec": round(alone, 1),
        "tok_per_sec": round(together, 1),
        "speedup": round(together / alone, 2),
        "first_piece_ms": quantiles(measured.first),
        "between_pieces_ms": quantiles(measured.between),
        "alone_between_pieces_ms": quantiles(alone_measured.between),
        "health_ms": quantiles(measured.health),
        "replies": measured.replies,
        "left": measured.left,
        "refused": measured.refused,
        "errors": len(measured.errors),
        "error_examples": sorted(set(measured.errors))[:3],
        "left_in_hand": stats["in_hand"] + pending,
        "processor_ms_per_token": {"event_loop": loop, "other_threads": engine},
        "server_memory_mib": memory,  # before, and after each third of the requests
    }


async def phase(
    port: int, plan: list[dict[str, Any]], streams: int, measured: Measurements | None = None
) -> tuple[Measurements, float]:
    """Send the requests of a plan from `streams` clients.

    Returns (measurements, tokens per second by the server's own count while all clients were busy).
    """
    measured, waiting = measured or Measurements(), list(reversed(plan))
    before, start, rates = await generated(port), time.perf_counter(), []

    async def client() -> None:
        while waiting:
            await ask(port, waiting.pop(), measured)
        rates.append((await generated(port) - before) / (time.perf_counter() - start))

    over = threading.Event()
    examining = asyncio.create_task(asyncio.to_thread(examine, port, measured, over))
    await asyncio.gather(*(client() for _ in range(streams)))
    over.set()
    await examining
    while json.loads(await get(port, "/stats"))["in_hand"]:
        await asyncio.sleep(0.02)
    return measured, rates[0]


def examine(port: int, measured: Measurements, over: threading.Event) -> None:
    """Poll /health twenty times a second, in a thread: delays of the event loop do not count."""
    while not over.wait(0.05):
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        measured.health.append(time.perf_counter() - start)


async def ask(port: int, question: dict[str, Any], measured: Measurements) -> None:
    """Send one request over its own connection, as nanochat's page does."""
    address, more = KINDS[question["kind"]]
    fields = {name: question[name] for name in ("messages", "max_tokens", "seed")}
    body = json.dumps({**fields, **more}).encode()
    start = last = time.perf_counter()
    pieces = 0
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = f"POST {address} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            head += "Content-Type: application/json\r\nConnection: close\r\n"
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            status = int((await reader.readline()).split()[1])
            if status == 400 and question["messages"][0]["role"] == "robot":
                measured.refused += 1
                return
            if status != 200:
                raise ValueError(f"status {status}")
            while line := await reader.readline():
                if not line.startswith(b"data:"):
                    continue
                is_piece, is_end = read_event(line[5:].strip())
                if is_end:
                    measured.replies += 1
                    return
                if not is_piece:
                    continue
                now = time.perf_counter()
                (measured.between if pieces else measured.first).append(now - last)
                pieces, last = pieces + 1, now
                if question["leaves_after"] is not None and pieces > question["leaves_after"]:
                    measured.left += 1
                    return
            raise ValueError("the stream broke off")
        finally:
            writer.close()
    except (OSError, ValueError) as error:
        seconds = time.perf_counter() - start
        measured.errors.append(f"{type(error).__name__} after {seconds:.1f} s: {error}")


def read_event(data: bytes) -> tuple[bool, bool]:
    """(it has a piece of a reply, it is the end), of either API. Raises ValueError for an error."""
    if data == b"[DONE]":
        return False, True
    event = json.loads(data)
    if "error" in event:
        raise ValueError(event["error"])
    if "choices" in event:
        return any(choice["delta"].get("content") for choice in event["choices"]), False
    return "queued" not in event, bool(event.get("done"))


async def generated(port: int) -> int:
    return json.loads(await get(port, "/stats"))["tokens"]


async def get(port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode())
    answer = await reader.read()
    writer.close()
    return answer.split(b"\r\n\r\n", 1)[1]


def quantiles(times: Sequence[float]) -> dict[str, float]:
    ordered = sorted(times) or [float("nan")]
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    places = {name: min(last, int(share * len(ordered))) for name, share in shares.items()}
    return {name: round(ordered[place] * 1e3, 2) for name, place in places.items()}


def resident_mib(process: psutil.Process) -> int:
    return process.memory_info().rss // 2**20


def processor_seconds(process: psutil.Process) -> tuple[float, float]:
    """(of the main thread, which runs the event loop; of all other threads, the engine's included).

    Only Linux reports threads separately.
    """
    spent = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
    loop = spent.get(process.pid, 0.0)
    return loop, sum(spent.values()) - loop


if __name__ == "__main__":
    sys.exit(main())

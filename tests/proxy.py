"""A reverse proxy for tests, as nginx, a tunnel or a notebook server would stand before ours."""

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def proxied(url: str, prefix: str, strips: bool, host: str | None) -> Iterator[str]:
    """A reverse proxy that serves `url` under a prefix, with a Host header of its own or not."""
    port = int(url.rpartition(":")[2])
    loop, ready, addresses = asyncio.new_event_loop(), threading.Event(), []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int((re.search(r"content-length: (\d+)", head, re.IGNORECASE) or [0, 0])[1])
            method, target, rest = head.split(" ", 2)
            if not target.startswith(prefix + "/"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            else:
                target = target.removeprefix(prefix) if strips else target
                rest = re.sub("connection: .*\r\n", "", rest, flags=re.IGNORECASE)
                if host is not None:
                    rest = re.sub(r"host: [^\r]*", f"Host: {host}", rest, flags=re.IGNORECASE)
                rest = rest.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
                upstream, out = await asyncio.open_connection("127.0.0.1", port)
                out.write(f"{method} {target} {rest}".encode() + await reader.readexactly(length))
                while data := await upstream.read(65536):
                    writer.write(data)
                    await writer.drain()
                out.close()
            writer.close()

    async def start() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        addresses.append(server.sockets[0].getsockname()[1])
        ready.set()

    async def cancel_all() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    loop.create_task(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{addresses[0]}{prefix}"
    finally:
        asyncio.run_coroutine_threadsafe(cancel_all(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)

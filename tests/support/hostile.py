"""Receivers that do what they should not, on loopback, and a process whose time and memory they may try to take.

Each behaviour serves one connection. Run as a program, this is the sender: it
reads what to post from its standard input, a line of JSON each, and answers with
what it cost.
"""

import asyncio
import gc
import gzip
import json
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from app.utils import guard, pinned, webhook

Hostile = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
BOMB = gzip.compress(bytes(200_000_000), 9)
"""194 kB that become 200 MB."""
CHUNKED = b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def serving(behaviour: Hostile, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that does `behaviour` on each connection; yields its port and leaves no task behind."""
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await behaviour(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass  # the client hung up, or the test is over
        finally:
            writer.transport.abort()

    # Small buffers, so that a receiver that does not read is felt at once.
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    server = await asyncio.start_server(handle, sock=listening, ssl=tls)
    try:
        yield listening.getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def head(reader: asyncio.StreamReader) -> None:
    await reader.readuntil(b"\r\n\r\n")


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def deaf(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    await asyncio.Event().wait()


async def drip(writer: asyncio.StreamWriter, piece: bytes, pause_seconds: float) -> None:
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_seconds)


def saying(answer: bytes) -> Hostile:
    """Says this once, and waits until the client hangs up."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(answer)
        await writer.drain()
        await reader.read()

    return say


def hanging_up_after(answer: bytes) -> Hostile:
    """Reads the request, says this, and resets the connection."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        start = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(start.lower().partition(b"content-length:")[2].split()[0]))
        writer.write(answer)
        await writer.drain()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return say


def dripping(start: bytes, piece: bytes, pause_seconds: float = 0.02) -> Hostile:
    """Says how it starts, then a piece again and again."""

    async def say(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(start)
        await drip(writer, piece, pause_seconds)

    return say


dripped_header = dripping(b"HTTP/1.1 200 OK\r\nx-slow: ", b"a")
dripped_success = dripping(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b"b")
huge_header = saying(b"HTTP/1.1 200 OK\r\nx-huge: " + b"d" * 360_000 + b"\r\n\r\n")
reset_mid_body = hanging_up_after(b"HTTP/1.1 502 No\r\ncontent-length: 100\r\n\r\npartial")


async def huge_body(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await head(reader)
    writer.write(b"HTTP/1.1 500 No\r\ncontent-length: 130000000\r\n\r\n")
    for _ in range(1984):
        writer.write(b"e" * 65536)
        await writer.drain()
    await reader.read()


async def redirecting_to_itself(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await head(reader)
    port = writer.get_extra_info("sockname")[1]
    writer.write(b"HTTP/1.1 307 Again\r\nlocation: http://127.0.0.1:%d/\r\ncontent-length: 0\r\n\r\n" % port)
    await writer.drain()
    await reader.read()


BEHAVIOURS: dict[str, tuple[Hostile, str, int | None]] = {
    "says nothing": (silent, "timeout", None),
    "reads nothing": (deaf, "timeout", None),
    "resets at once": (hanging_up_after(b""), "connect_error", None),
    "speaks no HTTP": (hanging_up_after(b"220 smtp.example ESMTP\r\n"), "connect_error", None),
    "drips a header": (dripped_header, "timeout", None),
    "drips headers": (dripping(b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n"), "timeout", None),
    "sends 360 kB of header": (huge_header, "connect_error", None),
    "sends 360 kB of headers": (
        saying(b"HTTP/1.1 200 OK\r\n" + b"x-a: b\r\n" * 45_000 + b"\r\n"), "connect_error", None,
    ),
    "floods with hints": (
        dripping(b"", b"HTTP/1.1 103 Early Hints\r\nlink: </>\r\n\r\n" * 100, 0.001), "timeout", None,
    ),
    "switches protocols": (
        dripping(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", b"e"),
        "connect_error", None,
    ),
    "drips a body": (dripping(b"HTTP/1.1 500 No\r\ncontent-length: 100000\r\n\r\n", b"b"), "http_5xx", 500),
    "drips a body of success": (dripped_success, "success", 200),
    "drips chunks": (dripping(CHUNKED, b"1\r\nb\r\n"), "http_5xx", 500),
    "never ends a chunk's size": (dripping(CHUNKED, b"0" * 4096, 0.0), "http_5xx", 500),
    "sends a body without end": (dripping(b"HTTP/1.1 500 No\r\n\r\n", b"c" * 65536, 0.0), "http_5xx", 500),
    "sends a success without end": (dripping(b"HTTP/1.1 200 OK\r\n\r\n", b"c" * 65536, 0.0), "success", 200),
    "sends 130 MB": (huge_body, "http_5xx", 500),
    "sends a gzip bomb": (
        saying(b"HTTP/1.1 500 No\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(BOMB) + BOMB),
        "http_5xx", 500,
    ),
    "resets in the middle of a body": (reset_mid_body, "http_5xx", 502),
    "redirects to itself": (redirecting_to_itself, "http_3xx", 307),
    "answers 204": (saying(b"HTTP/1.1 204 No Content\r\n\r\n"), "success", 204),
    "answers 410": (saying(b"HTTP/1.1 410 Gone\r\ncontent-length: 0\r\n\r\n"), "http_4xx", 410),
}  # fmt: skip
"""What a receiver does, and what comes of it: the outcome, and the status if there is one."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one POST came to, in a process of its own.

    Attributes:
        seconds: from the call to its end, without the time in which other processes had the processor.
        grown_bytes: by how much the process's memory rose above what it was, at its highest.
    """

    outcome: str
    status_code: int | None
    retry_after_seconds: float | None
    excerpt: str
    seconds: float
    grown_bytes: int


class Poster:
    """A process that posts, and measures itself (Linux). A context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hostile"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    async def post(self, url: str, deadline_seconds: float, trusted: Path | None = None) -> Cost:
        """One POST of 1 MiB to a URL whose host is on loopback."""
        asked = {"url": url, "deadline_seconds": deadline_seconds, "trusted": str(trusted) if trusted else None}
        return await asyncio.to_thread(self._ask, asked)

    def _ask(self, asked: dict[str, Any]) -> Cost:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return Cost(**json.loads(self._process.stdout.readline()))


def _resident_bytes(which: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{which}:")[2].split()[0]) * 1024


def _forget_high_water() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def _seconds_in_line() -> float:
    """How long this thread was ready to run while others had the processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


async def _posted(url: str, deadline_seconds: float, trusted: str | None) -> Cost:
    context = ssl.create_default_context(cafile=trusted) if trusted else None
    body = bytes(1 << 20)
    rules = guard.EgressRules(allow_private=True)
    resolver = pinned.Resolver(lambda _host, _port: ["127.0.0.1"])
    async with webhook.Sender(
        rules, [b"k" * 32], deadline_seconds=deadline_seconds, resolver=resolver, ssl_context=context
    ) as sender:
        _forget_high_water()
        memory, started, in_line = _resident_bytes("VmRSS"), time.monotonic(), _seconds_in_line()
        receipt = await sender.post(url, webhook_id="id", body=body, traceparent=None, timestamp_seconds=1)
        seconds = time.monotonic() - started - (_seconds_in_line() - in_line)
        grown = _resident_bytes("VmHWM") - memory
    return Cost(
        outcome=str(receipt.outcome),
        status_code=receipt.status_code,
        retry_after_seconds=receipt.retry_after_seconds,
        excerpt=receipt.excerpt,
        seconds=seconds,
        grown_bytes=grown,
    )


async def _posting() -> None:
    async with serving(saying(b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n")) as port:
        await _posted(f"http://127.0.0.1:{port}/", 5.0, None)  # what is imported and made once is not a cost
    while line := sys.stdin.readline():
        cost = await _posted(**json.loads(line))
        sys.stdout.write(json.dumps(asdict(cost)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_posting())

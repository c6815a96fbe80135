"""A client that costs little: it shares the machine's cores with what it measures.

    python -m benchmarks.suite.load

It is a process of its own, which reads one job a line from its standard input
and writes what it found as one line: JSON both. A job sends requests that were
written beforehand over so many connections, on each the next one as soon as the
last is answered, for so many seconds, or longer where hardly any are answered.
An answer is whole once as many bytes are there as its Content-Length says.
"""

import asyncio
import contextlib
import gc
import itertools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, TypedDict

import uvloop

from app.dev import linux, ports
from benchmarks.suite import figures

PATIENCE_SECONDS = 30.0
"""How long an answer may take."""


class Found(TypedDict):
    """What a job found.

    Attributes:
        sent: requests that were answered, those of the warm-up included.
        rate: answers a second, without the warm-up.
        p50: of the times from request to answer, in milliseconds; so the others.
    """

    sent: int
    rate: float
    p50: float
    p99: float


class Job:
    """One job: what is to be sent, and what came of it."""

    def __init__(
        self, requests: Sequence[bytes], *, expect: int, warm_up: float, seconds: float, least: int = 1
    ) -> None:
        self.requests: Iterator[bytes] = itertools.cycle(requests)
        self.expected = f"HTTP/1.1 {expect}".encode()
        self.begins = time.perf_counter() + warm_up
        self.ends = self.begins + seconds
        self.least = least
        self.ended: float | None = None
        self.sent = 0
        self.took: list[float] = []
        self.failed: str | None = None

    def answered(self, now: float, took: float, answer: bytes) -> None:
        """Note an answer. The job ends in time, but not before there are enough of them."""
        self.sent += 1
        if not answer.startswith(self.expected):
            self.failed = self.failed or answer[:300].decode(errors="replace")
        elif self.begins <= now and self.ended is None:
            self.took.append(took)
            if now >= self.ends and len(self.took) >= self.least:
                self.ended = now

    def found(self) -> Found:
        """The figures of it. Raises RuntimeError if an answer was not the expected one."""
        if self.failed is not None:
            raise RuntimeError(self.failed)
        if self.ended is None:
            raise RuntimeError("too little was answered in time")
        return {
            "sent": self.sent,
            "rate": len(self.took) / (self.ended - self.begins),
            "p50": figures.percentile(self.took, 0.50) * 1e3,
            "p99": figures.percentile(self.took, 0.99) * 1e3,
        }


class Connection(asyncio.Protocol):
    """Sends one request after another."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._seen = b""
        self._asked = 0.0
        self._transport: asyncio.Transport | None = None
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = transport  # type: ignore[assignment]  # it is a stream
        self._ask(time.perf_counter())

    def _ask(self, now: float) -> None:
        assert self._transport is not None  # noqa: S101  # a connection is made before it has data
        self._asked = now
        self._transport.write(next(self._job.requests))

    def data_received(self, data: bytes) -> None:
        """Note the answer once it is whole, and ask again while there is time."""
        if self._seen:
            data = self._seen + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _length(data[:end]):
            self._seen = data
            return
        self._seen = b""
        now, job = time.perf_counter(), self._job
        job.answered(now, now - self._asked, data)
        if job.ended is None and job.failed is None:
            self._ask(now)
        elif self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say so."""
        if self._job.ended is None:
            self._job.failed = self._job.failed or f"a connection was lost: {exc}"
        if not self.over.done():
            self.over.set_result(None)


def _length(head: bytes) -> int:
    _, named, rest = head.lower().partition(b"\r\ncontent-length:")
    return int(rest.partition(b"\r\n")[0]) if named else 0


async def run(port: int, requests: Sequence[str], connections: int, **options: Any) -> Found:
    """Do one job. Raises RuntimeError if anything but the expected answer came."""
    loop = asyncio.get_running_loop()
    job = Job([text.encode() for text in requests], least=2 * connections, **options)
    made = [await loop.create_connection(lambda: Connection(job), ports.ADDRESS, port) for _ in range(connections)]
    async with asyncio.timeout(options["warm_up"] + options["seconds"] + PATIENCE_SECONDS):
        await asyncio.gather(*(connection.over for _, connection in made))
    return job.found()


class Load:
    """The process that sends, as its parent has it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def __call__(
        self,
        port: int,
        requests: Sequence[str],
        *,
        connections: int,
        seconds: float,
        warm_up: float = 0.1,
        expect: int = 200,
    ) -> Found:
        """Have requests sent to this port of the loopback.

        Args:
            port: of the loopback.
            requests: as `request` writes them; one after another, and again from the first.
            connections: at once.
            seconds: that count.
            warm_up: seconds before them.
            expect: the HTTP status of every answer.

        Raises:
            RuntimeError: if any other answer came, or none.
        """
        job = {
            "port": port,
            "requests": requests,
            "connections": connections,
            "seconds": seconds,
            "warm_up": warm_up,
            "expect": expect,
        }
        assert self._process.stdin is not None  # noqa: S101  # both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        answer = json.loads(await self._process.stdout.readline() or '{"failed": "the load generator ended"}')
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        found: Found = answer
        return found


def request(method: str, path: str, body: object = None) -> str:
    """One request over HTTP/1.1, whose connection stays."""
    text = "" if body is None else json.dumps(body)
    length = len(text.encode())
    about = f"content-type: application/json\r\ncontent-length: {length}\r\n" if body is not None else ""
    return f"{method} {path} HTTP/1.1\r\nhost: api\r\n{about}\r\n{text}"


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Load]:
    """A load generator, ended with the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=2**24,
        preexec_fn=linux.before_exec(parent_death_signal=signal.SIGKILL),
    )
    try:
        yield Load(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def main() -> None:
    """Do the jobs that come, until no more do."""
    gc.disable()  # nothing here makes cycles
    for line in sys.stdin:
        try:
            answer: object = uvloop.run(run(**json.loads(line)))
        except (RuntimeError, OSError) as failed:
            answer = {"failed": str(failed) or type(failed).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        gc.collect()


if __name__ == "__main__":
    main()

"""Whether a black hole slows a thousand healthy receivers: webhooks at a steady rate, with and without it.

    python -m benchmarks.fairness [--rounds N] [--seconds N] [--rate N] [--receivers N] [--holes N] [--json FILE]

It starts a durable Postgres, a Redis and, for each round, a relay of its own, so that every round begins as after a
deploy: nothing is known of any receiver. The healthy receivers are ports of one process, each an origin of its own,
and get one webhook after another. A black hole takes connections and says nothing; thousands of its webhooks have been
due for an hour. Rounds with and without it take turns; what counts is the ratio of the medians of their 95th
percentiles, from an event's `created_at` to the arrival of its POST.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import asyncpg

from app import migrations
from app.core.config import Settings
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running
from benchmarks.webhooks import ANSWER

TARGET = 1.2
DEAD = 5_000
"""Webhooks of each black hole."""
TICK_SECONDS = 0.05
WARM_SECONDS = 1.0
"""What the start of a relay may take is not measured."""
LATE_SECONDS = 60.0
START_SECONDS = 30.0

# `$1` are the origins, in turn from the `$2`-th on.
DUE = """
WITH t AS (
    INSERT INTO task (id, name, queue, args, kwargs, status, attempt, result, finished_at)
    SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', 'SUCCESS', 1, '1', now()
      FROM generate_series(1, $3::int) RETURNING id
)
INSERT INTO webhook_delivery (id, task_id, event, sequence, url, origin, facts, next_at)
SELECT gen_random_uuid(), id, 'task.succeeded', 1, origin || '/hook', origin, '{}', now() - $4::float8 * interval '1 s'
  FROM (SELECT id, ($1::text[])[1 + ($2::int + row_number() OVER ()) % cardinality($1)] AS origin FROM t) AS one
RETURNING id::text AS id, extract(epoch FROM created_at)::float8 AS created_at
"""


class Healthy(asyncio.Protocol):
    """Answers each request once it is whole, and notes when it came."""

    def __init__(self, arrived: dict[str, float]) -> None:
        self._arrived = arrived
        self._seen = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way back."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer what is whole; every body is `{}`, as long as its header says."""
        self._seen += data
        head, blank, body = self._seen.partition(b"\r\n\r\n")
        if not blank or len(body) < int(_header(head, b"content-length")):
            return
        self._seen = b""
        self._arrived.setdefault(_header(head, b"webhook-id").decode(), time.time())
        self._transport.write(ANSWER)


def _header(head: bytes, name: bytes) -> bytes:
    return head.lower().partition(b"\r\n" + name + b":")[2].partition(b"\r\n")[0].strip()


def receive(count: int, asked: Connection) -> None:
    """Serve so many ports, send them, and whenever something is said, send what came since and when."""

    async def serve() -> None:
        arrived: dict[str, float] = {}

        def tell() -> None:
            asked.recv()
            asked.send(dict(arrived))
            arrived.clear()

        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(lambda: Healthy(arrived), "127.0.0.1", 0) for _ in range(count)]
        asked.send([server.sockets[0].getsockname()[1] for server in servers])
        loop.add_reader(asked.fileno(), tell)
        await asyncio.Event().wait()

    asyncio.run(serve())


@contextlib.contextmanager
def receivers(count: int) -> Iterator[tuple[list[str], Connection]]:
    """The origins of so many healthy receivers, and the way to ask what came."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=receive, args=(count, there), daemon=True)
    process.start()
    try:
        yield [f"http://127.0.0.1:{port}" for port in here.recv()], here
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def black_holes(count: int) -> Iterator[list[str]]:
    """The origins of so many ports whose connections nobody takes from the system's hands."""
    with contextlib.ExitStack() as stack:
        listening = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024)) for _ in range(count)]
        yield [f"http://127.0.0.1:{one.getsockname()[1]}" for one in listening]


@contextlib.contextmanager
def relaying(environment: dict[str, str]) -> Iterator[None]:
    """A relay that works, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="taskqueue-benchmark-") as home:
        process = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "relay"],
            env={**os.environ, **environment, "TASKQUEUE_DATA_DIR": home},
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (Path(home) / "run" / "relay.beat").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the relay did not start")
                time.sleep(TICK_SECONDS)
            yield
        finally:
            process.kill()
            process.wait()


async def latencies(url: str, origins: Sequence[str], asked: Connection, given: argparse.Namespace) -> list[float]:
    """Seconds from event to POST, of events at the rate that was asked for."""
    connection = await asyncpg.connect(url)
    created: dict[str, float] = {}
    began, made = time.monotonic(), 0
    while (since := time.monotonic() - began) < WARM_SECONDS + given.seconds:
        wanted = int(since * given.rate)
        for row in await connection.fetch(DUE, origins, made, wanted - made, 0.0):
            if since >= WARM_SECONDS:
                created[row["id"]] = row["created_at"]
        made = wanted
        await asyncio.sleep(TICK_SECONDS)
    await connection.close()
    arrived: dict[str, float] = {}
    while not created.keys() <= arrived.keys():
        if time.monotonic() > began + WARM_SECONDS + given.seconds + LATE_SECONDS:
            raise RuntimeError(f"{len(created.keys() - arrived.keys())} webhooks did not arrive")
        await asyncio.sleep(TICK_SECONDS)
        asked.send(None)
        arrived |= asked.recv()
    return [arrived[one] - created[one] for one in created]


async def emptied(url: str, holes: Sequence[str]) -> None:
    """Take away what a round before has left, and make thousands of webhooks due to each black hole."""
    connection = await asyncpg.connect(url)
    await connection.execute("TRUNCATE task CASCADE")
    if holes:
        await connection.execute(DUE, holes, 0, DEAD * len(holes), 3600.0)
        # They have their place among the events since then, too.
        await connection.execute("UPDATE webhook_delivery SET position = nextval('event_position')")
    await connection.execute("VACUUM ANALYZE webhook_delivery")
    await connection.close()


def measured(environment: dict[str, str], given: argparse.Namespace) -> dict[str, list[list[float]]]:
    """The latencies of every round, without and with black holes."""
    url = environment["DATABASE_URL"]
    found: dict[str, list[list[float]]] = {"without": [], "with": []}
    with receivers(given.receivers) as (origins, asked):
        for number in range(given.rounds):
            for name in sorted(found, reverse=bool(number % 2)):
                # New ones for each round: their connections are nobody's.
                with black_holes(given.holes if name == "with" else 0) as holes:
                    asyncio.run(emptied(url, holes))
                    with relaying(environment):
                        found[name].append(asyncio.run(latencies(url, origins, asked, given)))
                one = found[name][-1]
                print(
                    f"round {number + 1}, {name:<8} p50 {percentile(one, 50) * 1e3:6.1f} ms, p95"
                    f" {percentile(one, 95) * 1e3:6.1f} ms, longest {max(one) * 1e3:6.1f} ms, {len(one)} webhooks",
                    flush=True,
                )
    return found


def percentile(values: Sequence[float], which: int) -> float:
    """The so-manieth percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[which - 1]


def main() -> int:
    """Measure, print, and say with the exit code whether the target is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6, help="with and without, each")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each round")
    parser.add_argument(
        "--rate", type=float, default=100.0, help="webhooks a second, to all healthy receivers together"
    )
    parser.add_argument("--receivers", type=int, default=1000)
    parser.add_argument("--holes", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the latencies there, too")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskqueue-benchmark-")))
        environment = {
            "DATABASE_URL": stack.enter_context(running(EmbeddedPostgres(home / "postgres"))).url,
            "REDIS_URL": stack.enter_context(running(EmbeddedRedis(home / "redis"))).url,
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
            "TASKQUEUE_METRICS_PORT": "0",
        }
        migrations.migrate(Settings.model_validate(environment))
        found = measured(environment, given)
    p95 = {name: [percentile(one, 95) for one in each] for name, each in found.items()}
    middle = {name: statistics.median(each) for name, each in p95.items()}
    ratio = middle["with"] / middle["without"]
    pairs = [one / other for one, other in zip(p95["with"], p95["without"], strict=True)]
    print(
        f"p95 of {given.receivers} healthy receivers {middle['without'] * 1e3:.1f} ms, with {given.holes} black holes"
        f" {middle['with'] * 1e3:.1f} ms; ratio {ratio:.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
    )
    if ratio > TARGET:
        print(f"over {TARGET}")
    if given.json:
        given.json.write_text(json.dumps({"seconds": found, "ratio": ratio}))
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())

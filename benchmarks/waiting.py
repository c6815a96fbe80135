"""How soon a long poll is answered, and what a thousand of them cost a submit.

    python -m benchmarks.waiting [--tasks N] [--waiters N] [--rounds N] [--submits N] [--json FILE]

It starts a Postgres, a Redis, an API and a worker of its own. First one task
after another is submitted and waited for; what counts is the time from its end,
as its row has it, to the answer. Then tasks are submitted one after another,
while nobody waits and while a thousand do, in turns, so that the machine's drift
meets both alike; what counts is the median of the ratios of the medians.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import redis.asyncio

from app import migrations
from app.core.config import Settings
from app.dev import ports
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running

TARGET_SECONDS = 0.050
TARGET_RATIO = 1.10
START_SECONDS = 60.0
NOT_YET = b'{"detail":"Result not available yet"}'


@contextlib.contextmanager
def process(command: str, environment: Mapping[str, str], log: Path) -> Iterator[int]:
    """One `taskqueue` command, ended with the block; its process id."""
    with log.open("wb") as output:
        one = subprocess.Popen(
            [sys.executable, "-m", "app.cli", command],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield one.pid
    finally:
        one.terminate()
        one.wait(30)


async def started(client: httpx.AsyncClient) -> None:
    """Return once the API is ready."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if (await client.get("/readyz")).is_success:
                return
        await asyncio.sleep(0.1)
    raise TimeoutError("the API did not start")


async def submit(client: httpx.AsyncClient, **fields: Any) -> str:
    """Submit a task; returns its id."""
    answer = await client.post("/api/tasks/submit", json=fields)
    answer.raise_for_status()
    return str(answer.json()["task_id"])


async def answered(client: httpx.AsyncClient, tasks: int) -> list[float]:
    """Seconds from the end of each of so many tasks to the answer of who waits for it."""
    took = []
    for _ in range(tasks):
        task_id = await submit(client, task="sample.sleep", args=[0.05])
        answer = await client.get(f"/api/tasks/{task_id}/result", params={"wait": 25})
        at = time.time()
        answer.raise_for_status()
        view = (await client.get(f"/api/tasks/{task_id}")).json()
        took.append(at - datetime.fromisoformat(view["finished_at"]).timestamp())
    return took


class Waiter(asyncio.Protocol):
    """Waits for a task over a connection of its own, and again as soon as it is answered."""

    def __init__(self, task_id: str) -> None:
        self._request = f"GET /api/tasks/{task_id}/result?wait=25 HTTP/1.1\r\nhost: api\r\n\r\n".encode()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = transport  # type: ignore[assignment]  # it is a stream
        self.data_received(NOT_YET)

    def data_received(self, data: bytes) -> None:
        """Ask again. The head and the body of an answer may come apart; the body ends it."""
        assert self._transport is not None  # noqa: S101  # a connection is made before it has data
        if data.endswith(NOT_YET):
            self._transport.write(self._request)


@contextlib.asynccontextmanager
async def waiters(port: int, task_ids: list[str], bell: "redis.asyncio.Redis") -> AsyncIterator[None]:
    """Requests that wait for these tasks while the block runs."""
    loop = asyncio.get_running_loop()
    transports = [
        (await loop.create_connection(lambda task_id=task_id: Waiter(task_id), "127.0.0.1", port))[0]  # type: ignore[misc]
        for task_id in task_ids
    ]
    try:
        await _listens(bell, len(task_ids))
        yield
    finally:
        for transport in transports:
            transport.close()
        await _listens(bell, 0)


async def _listens(bell: "redis.asyncio.Redis", tasks: int) -> None:
    """Return once the API listens for so many tasks, or nearly: some may be asking again."""
    async with asyncio.timeout(START_SECONDS):
        while abs(len(await bell.pubsub_channels("celery-task-meta-*")) - tasks) > tasks // 50:  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.05)


async def submits(client: httpx.AsyncClient, count: int) -> float:
    """The median of seconds that a submit takes, one after another."""
    took = []
    for _ in range(count):
        began = time.perf_counter()
        await submit(client, task="sample.echo", args=[1], countdown=3600)
        took.append(time.perf_counter() - began)
    return statistics.median(took)


async def measured(options: argparse.Namespace, port: int, redis_url: str) -> dict[str, list[float]]:
    """Seconds to each answer, and the medians of submits, round by round."""
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=60) as client, redis.asyncio.Redis.from_url(redis_url) as bell:
        await started(client)
        await answered(client, 5)  # warms up
        found = {"answered": await answered(client, options.tasks), "alone": [], "among waiters": []}
        task_ids = [await submit(client, task="sample.echo", args=[1], countdown=3600) for _ in range(options.waiters)]
        for number in range(options.rounds + 1):
            for name in sorted(("alone", "among waiters"), reverse=bool(number % 2)):
                async with waiters(port, [] if name == "alone" else task_ids, bell):
                    one = await submits(client, options.submits)
                if number:  # the first round warms up
                    found[name].append(one)
        return found


def main() -> int:
    """Measure, print, and say with the exit code whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--waiters", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--submits", type=int, default=300, help="in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(running(EmbeddedPostgres(home / "postgres")))
        bell = stack.enter_context(running(EmbeddedRedis(home / "redis")))
        [port] = ports.free_ports(1)
        environment = {
            "DATABASE_URL": postgres.url,
            "REDIS_URL": bell.url,
            "PORT": str(port),
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_METRICS_PORT": "0",
            "TASKQUEUE_CONCURRENCY": "2",
            "TASKQUEUE_DATA_DIR": str(home),
        }
        migrations.migrate(Settings.model_validate({**environment, "TASKQUEUE_METRICS_PORT": 0}))
        for command in ("api", "worker"):
            stack.enter_context(process(command, environment, home / f"{command}.log"))
        found = asyncio.run(measured(options, port, bell.url))
    answered_in = sorted(found["answered"])
    median, late = statistics.median(answered_in), answered_in[int(len(answered_in) * 0.95)]
    print(f"from the end of a task to the answer: median {median * 1e3:.1f} ms, 95 % within {late * 1e3:.1f} ms")
    ratios = [one / other for one, other in zip(found["among waiters"], found["alone"], strict=True)]
    ratio = statistics.median(ratios)
    alone, among = (statistics.median(found[name]) * 1e3 for name in ("alone", "among waiters"))
    print(
        f"a submit: alone {alone:.2f} ms, among {options.waiters} waiters {among:.2f} ms; "
        f"ratio {ratio:.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0 if median <= TARGET_SECONDS and ratio <= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())

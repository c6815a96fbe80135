"""What the metrics cost a submit and a worker, and how long a look at them takes.

    python -m benchmarks.metrics [--rounds N] [--submits N] [--tasks N] [--names N] [--json FILE]

It starts a Postgres and a Redis of its own, and of the API and the worker two
each: one that shows its metrics, and is looked at every second, and one that has
no port for them and counts nothing. Both sides are measured in turns, so that the
machine's drift meets both alike: so many submits, one after another, and so many
tasks that do nothing. What counts is the median of the ratios of the CPU time
that the API, and the worker with all its processes, took for them: a busy machine
changes it least, and Postgres and Redis, which do the same for both, don't dilute
it. The times on the clock are shown beside it. A look is measured in this process,
with a hundred tasks of which each has succeeded, failed and been retried.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import asyncpg
import httpx
import psutil

from app import migrations
from app.core import metrics
from app.core.config import Settings
from app.dev import ports
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running
from benchmarks.clocks import cpu_seconds, turns
from benchmarks.waiting import process, started, submits

TARGET_RATIO = 1.10
TARGET_LOOK_SECONDS = 0.050
LOOKS = 21
BATCH = 1000
SIDES = ("with", "without")
"""Metrics; also the names of their queues."""
_TOOK = "SELECT extract(epoch FROM max(finished_at) - min(started_at))::float8 FROM task WHERE queue = $1"
_LEFT = "SELECT count(*) FROM task WHERE finished_at IS NULL"


async def worked_off(
    client: httpx.AsyncClient, database: "asyncpg.Connection[asyncpg.Record]", side: str, tasks: int
) -> float:
    """Seconds in which the worker of a side works off so many tasks, from the first start to the last end."""
    await database.execute("TRUNCATE task CASCADE")
    for first in range(0, tasks, BATCH):
        wanted = [{"task": "sample.echo", "args": [1], "queue": side}] * min(BATCH, tasks - first)
        answer = await client.post("/api/tasks/batch", json={"tasks": wanted})
        answer.raise_for_status()
    while await database.fetchval(_LEFT):  # noqa: ASYNC110  # nothing tells of it
        await asyncio.sleep(0.1)
    took: float = await database.fetchval(_TOOK, side)
    return took


@contextlib.asynccontextmanager
async def looked_at(shown: Sequence[int]) -> AsyncIterator[None]:
    """Look at these ports every second while the block runs."""

    async def look() -> None:
        async with httpx.AsyncClient() as client:
            while True:
                for port in shown:
                    with contextlib.suppress(httpx.TransportError):
                        await client.get(f"http://{ports.ADDRESS}:{port}/metrics")
                await asyncio.sleep(1.0)

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def spent(pid: int) -> float:
    """Processor time (seconds) that a process and all that it has started have taken so far."""
    return cpu_seconds(psutil.Process(pid), *psutil.Process(pid).children(recursive=True))


async def measured(
    options: argparse.Namespace,
    apis: dict[str, int],
    pids: dict[tuple[str, str], int],
    shown: Sequence[int],
    database_url: str,
) -> dict[str, list[float]]:
    """Seconds of a submit and of a task, on the clock and of CPU, round by round."""
    kinds = [f"{what}{of} {side}" for what in ("submit", "task") for of in ("", " cpu") for side in SIDES]
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for side, port in apis.items():
            client = httpx.AsyncClient(base_url=f"http://{ports.ADDRESS}:{port}", timeout=60)
            clients[side] = await stack.enter_async_context(client)
            await started(client)
        database = await asyncpg.connect(database_url)
        stack.push_async_callback(database.close)
        await stack.enter_async_context(looked_at(shown))
        for number, order in enumerate(turns(list(SIDES), options.rounds + 1)):
            for side in order:
                api, worker = pids["api", side], pids["worker", side]
                before = spent(api)
                submit = await submits(clients[side], options.submits)
                submit_cpu = (spent(api) - before) / options.submits
                before = spent(worker)
                task = await worked_off(clients["without"], database, side, options.tasks) / options.tasks
                task_cpu = (spent(worker) - before) / options.tasks
                if number:  # the first round warms up
                    for what, seconds in (
                        ("submit", submit),
                        ("submit cpu", submit_cpu),
                        ("task", task),
                        ("task cpu", task_cpu),
                    ):
                        found[f"{what} {side}"].append(seconds)
    return found


def looks(names: int, times: int = LOOKS) -> list[float]:
    """Seconds of CPU that each of so many looks at the metrics of a worker with so many tasks takes."""
    for name in (f"reports.render_{number:04d}" for number in range(names)):
        metrics.expect_runs(name, "default", None)
        for outcome, exception in (("succeeded", None), ("failed", "ValueError"), ("retried", "OSError")):
            metrics.attempt_started(name, "default", 0.1)
            metrics.attempt_ended(name, "default", outcome, exception, 0.2)
        for outcome in ("succeeded", "failed"):
            metrics.task_finished(name, "default", outcome, 1.0)
    [port] = ports.free_ports(1)
    close = metrics.serve(port, "worker")
    took = []
    with httpx.Client() as client:
        for _ in range(times):
            # Of this whole process: who looks is in it, too.
            began = time.process_time()
            client.get(f"http://{ports.ADDRESS}:{port}/metrics").raise_for_status()
            took.append(time.process_time() - began)
    close()
    return took


def main() -> int:
    """Measure, print, and say with the exit code whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--submits", type=int, default=150, help="in each round, of each side")
    parser.add_argument("--tasks", type=int, default=500, help="in each round, of each side")
    parser.add_argument("--names", type=int, default=100, help="tasks that a worker is looked at with")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {"look": looks(options.names)}
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(running(EmbeddedPostgres(home / "postgres")))
        redis = stack.enter_context(running(EmbeddedRedis(home / "redis")))
        given = {
            "DATABASE_URL": postgres.url,
            "REDIS_URL": redis.url,
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_CONCURRENCY": "2",
            "TASKQUEUE_METRICS_PORT": "0",
        }
        migrations.migrate(Settings.model_validate(given))
        *apis, api_metrics, worker_metrics = ports.free_ports(4)
        metrics_ports = {("api", "with"): api_metrics, ("worker", "with"): worker_metrics}
        pids: dict[tuple[str, str], int] = {}
        for side, port in zip(SIDES, apis, strict=True):
            for command in ("api", "worker"):
                own = {
                    "PORT": str(port),
                    "TASKQUEUE_QUEUES": side if command == "worker" else ",".join(SIDES),
                    "TASKQUEUE_DATA_DIR": str(home / side),
                    "TASKQUEUE_METRICS_PORT": str(metrics_ports.get((command, side), 0)),
                }
                log = home / f"{command}-{side}.log"
                pids[command, side] = stack.enter_context(process(command, given | own, log))
        by_side = dict(zip(SIDES, apis, strict=True))
        found |= asyncio.run(measured(options, by_side, pids, (api_metrics, worker_metrics), postgres.url))
    return report(options, found)


def report(options: argparse.Namespace, found: dict[str, list[float]]) -> int:
    """Print what was found; returns 0 if the targets are met."""
    look = statistics.median(found["look"])
    met = look <= TARGET_LOOK_SECONDS
    print(
        f"a look at {options.names} tasks: median {look * 1e3:.1f} ms of CPU; "
        f"target {TARGET_LOOK_SECONDS * 1e3:.0f} ms, {_verdict(met)}"
    )
    for what in ("submit cpu", "task cpu", "submit", "task"):
        ratios = [one / other for one, other in zip(found[f"{what} with"], found[f"{what} without"], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        one, other = (statistics.median(found[f"{what} {side}"]) * 1e3 for side in SIDES)
        counts = what.endswith(" cpu")
        print(
            f"a {what}: with metrics {one:.3f} ms, without {other:.3f} ms; "
            f"ratio {ratio:.3f} (half of the rounds: {low:.2f} to {high:.2f})"
            + (f"; target {TARGET_RATIO:.2f}, {_verdict(ratio <= TARGET_RATIO)}" if counts else "")
        )
        met = met and (not counts or ratio <= TARGET_RATIO)
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0 if met else 1


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    sys.exit(main())

"""How many tasks that do nothing a worker works off in a second, and what CPU time each costs.

Every side has two processes for them, or as many threads and coroutines as its
documentation advises for two cores. The queue is filled first; the time runs
from then, or from the first end where workers look for work now and then only,
to the last end.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from app.dev import ports
from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.stage import PEERS, PYTHON, Process, Stage

CELERY, CELERY_RESULTS = "celery, no results", "celery, results in Redis"
PROCRASTINATE, ARQ, TASKIQ, DRAMATIQ = "procrastinate", "arq", "taskiq", "dramatiq"
BARE, COMMITS = "a bare Redis loop", "Postgres's commits"

POLL_SECONDS = 0.02
PATIENCE_SECONDS = 60.0
BATCH = 1000
PILOT = 300
"""Tasks by which a side warms up, and that tell how many make a round."""
MOST = 20_000

_RESULTS = "return #redis.call('keys', ARGV[1])"

_TARGETS: dict[str, Target] = {
    CELERY: Target(at_least=1.0, moonshot=2.5),
    PROCRASTINATE: Target(at_least=2.0, moonshot=4.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One system: its databases, its worker, how its queue is filled, and how to see what was done.

    Attributes:
        database: the side of the stage whose databases it uses.
        worker: arguments of Python, with spaces between them.
        filler: a module that is given a count; None: our own API.
        statement: counts what was done; or
        keys: the pattern of the keys of Redis that do; or
        emptied: the list that is empty when all is done.
        table: what is emptied before each round.
        environment: of its worker and its filler.
    """

    database: str
    worker: str
    filler: str | None = None
    statement: str = ""
    keys: str = ""
    emptied: str = ""
    table: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_peer(self) -> bool:
        """Whether it lives in the peers' environment."""
        return self.filler is not None and ".peers." in self.filler

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return PEERS if self.is_peer else PYTHON


def _celery(side: str, results: str) -> Side:
    return Side(
        database=side,
        worker="-m celery -A benchmarks.suite.stock worker -c 2 --loglevel WARNING",
        filler="benchmarks.suite.stock",
        keys="celery-task-meta-*" if results == "true" else "",
        emptied="" if results == "true" else "celery",
        environment={"STOCK_RESULTS": results},
    )


_PEER = "benchmarks.suite.peers.with_"
SIDES = {
    OURS: Side(
        database="ours",
        worker="-m app.cli worker",
        statement="SELECT count(*) FROM task WHERE finished_at IS NOT NULL",
        table="task",
    ),
    CELERY: _celery("celery", "false"),
    CELERY_RESULTS: _celery("celery-results", "true"),
    PROCRASTINATE: Side(
        database="procrastinate",
        worker=f"-m procrastinate --log-level warning --app {_PEER}procrastinate.app worker --concurrency 10",
        filler=f"{_PEER}procrastinate",
        statement="SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'",
        table="procrastinate_jobs",
    ),
    ARQ: Side(
        database="arq",
        worker=f"-m arq {_PEER}arq.WorkerSettings --custom-log-dict {_PEER}arq.LOGS",
        filler=f"{_PEER}arq",
        keys="arq:result:*",
    ),
    TASKIQ: Side(
        database="taskiq",
        worker=f"-m taskiq worker {_PEER}taskiq:broker --workers 2 --log-level WARNING",
        filler=f"{_PEER}taskiq",
        keys="result:*",
    ),
    DRAMATIQ: Side(
        database="dramatiq",
        worker=f"-m dramatiq {_PEER}dramatiq --processes 2 --threads 8",
        filler=f"{_PEER}dramatiq",
        keys="?" * 32,  # it hashes their names
    ),
}


async def measure(stage: Stage) -> list[Measure]:
    """No-op tasks, by us and everybody else, in turns; and what Redis and Postgres could do at best."""
    api = await stage.api()
    await stage.relay()
    runs = {name: Run(stage, side, api) for name, side in SIDES.items() if not side.is_peer or stage.has_peers()}
    await asyncio.gather(*(one.start() for one in runs.values()))
    found: dict[str, dict[str, list[float]]] = {"rate": {}, "cpu": {}, "all cpu": {}}
    counts = dict.fromkeys(runs, PILOT)
    for turn in ("starts", "warms up"):
        for name, one in list(runs.items()):
            try:
                rate = (await one.worked_off(PILOT))["rate"]
            except (TimeoutError, RuntimeError) as failed:
                stage.skipped[name] = str(failed) or f"it did not end {PILOT} tasks in {PATIENCE_SECONDS:g} s"
                stage.say(f"{name} is left out: {stage.skipped[name]}")
                del runs[name]
            else:
                stage.say(f"{name} {turn}: {rate:.0f} tasks/s")
                counts[name] = min(MOST, max(PILOT, int(rate * stage.plan.seconds * 1.5)))
    for _, names in stage.plan.turns([*runs, BARE, COMMITS]):
        for name in names:
            if name in runs:
                figures = await runs[name].worked_off(counts[name])
            else:
                figures = {"rate": await _limit(stage, "redis" if name == BARE else "commits")}
            for what, figure in figures.items():
                found[what].setdefault(name, []).append(figure)
    peers = [Comparison(side=name, kind="peer", target=_TARGETS.get(name)) for name in SIDES if name != OURS]
    limits = [Comparison(side=name, kind="limit") for name in (BARE, COMMITS)]
    return [
        Measure(name="no-op tasks", unit="1/s", figures=found["rate"], comparisons=[*peers, *limits]),
        Measure(
            name="no-op task, CPU of its worker",
            unit="µs",
            figures=found["cpu"],
            comparisons=[Comparison(side=one.side, kind=one.kind) for one in peers],
        ),
        Measure(
            name="… and of Postgres and Redis",
            unit="µs",
            figures=found["all cpu"],
            comparisons=[Comparison(side=one.side, kind=one.kind) for one in peers],
        ),
    ]


class Run:
    """One side, at work."""

    def __init__(self, stage: Stage, side: Side, api: Process) -> None:
        self._stage = stage
        self._side = side
        self._api = api
        self._worker = Process(pid=0)

    async def start(self) -> None:
        """Start its worker."""
        side = self._side
        if side.filler == SIDES[PROCRASTINATE].filler:
            await self._fill(0)
        self._worker = await self._stage.process(
            side.worker.split(), side.database, side.environment, python=side.python
        )

    async def worked_off(self, count: int) -> dict[str, float]:
        """Tasks a second, and CPU time of each in microseconds: of the worker, and with Postgres and Redis.

        Raises:
            TimeoutError: if they were not worked off in time.
            RuntimeError: if the queue could not be filled.
        """
        await self._stage.cleared(self._side.database, *([self._side.table] if self._side.table else []))
        cpu = self._worker.cpu_seconds()
        await self._fill(count)
        filled, of_servers = time.perf_counter(), self._servers_cpu_seconds()
        async with asyncio.timeout(PATIENCE_SECONDS), self._done(count) as done:
            while not (first := await done()):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(POLL_SECONDS)
            began = time.perf_counter()
            while await done() < count:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(POLL_SECONDS)
            now = time.perf_counter()
        worker, servers = self._worker.cpu_seconds() - cpu, self._servers_cpu_seconds() - of_servers
        return {
            # If most was done at the first look, the time runs from when the queue was full.
            "rate": (count - first) / (now - began) if first < count / 2 else count / (now - filled),
            "cpu": worker / count * 1e6,
            "all cpu": (worker + servers) / count * 1e6,
        }

    def _servers_cpu_seconds(self) -> float:
        return sum(one.cpu_seconds() for one in self._stage.servers)

    async def _fill(self, count: int) -> None:
        if self._side.filler is None:
            await submitted(self._api.port, count)
            return
        await self._stage.done(
            ["-m", self._side.filler, str(count)],
            self._side.database,
            self._side.environment,
            python=self._side.python,
        )

    @contextlib.asynccontextmanager
    async def _done(self, count: int) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        """A function that says how many are done."""
        side = self._side
        async with self._stage.connection(side.database) as database, self._stage.broker(side.database) as broker:

            async def done() -> int:
                if side.statement:
                    return int(await database.fetchval(side.statement))
                if side.keys:
                    return int(await broker.eval(_RESULTS, 0, side.keys))
                return count - int(await broker.llen(side.emptied)) - int(await broker.hlen("unacked"))

            yield done


async def submitted(port: int, count: int) -> None:
    """Have so many tasks submitted to our API on this port, a thousand at once."""
    async with httpx.AsyncClient(base_url=f"http://{ports.ADDRESS}:{port}", timeout=60) as client:
        for first in range(0, count, BATCH):
            wanted = [{"task": "sample.echo", "args": [1]}] * min(BATCH, count - first)
            answer = await client.post("/api/tasks/batch", json={"tasks": wanted})
            answer.raise_for_status()


async def _limit(stage: Stage, name: str) -> float:
    return float(await stage.done(["-m", "benchmarks.suite.limits", name, str(stage.plan.seconds)], "bare"))

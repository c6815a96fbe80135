"""What all sides share in a run: one durable Postgres, one Redis, and the processes that are started beside them.

Every side has a database and a Redis database of its own on the same servers.
All processes end with the run, and should it be killed, with it.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import psutil
import redis.asyncio

from app import migrations
from app.core.config import Settings
from app.dev import linux, ports
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running
from benchmarks.suite.load import Load, request, started

START_SECONDS = 60.0
STOP_SECONDS = 30.0
SIDES = ("ours", "tutorial", "celery", "celery-results", "procrastinate", "arq", "taskiq", "dramatiq", "bare")
"""Who has databases here; the place of each is the number of its Redis database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, with all that it has started."""

    pid: int
    port: int = 0

    def family(self) -> list[psutil.Process]:
        """It, and all that it has started."""
        one = psutil.Process(self.pid)
        return [one, *one.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time that they have taken so far."""
        spent = 0.0
        for one in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                spent += times.user + times.system
        return spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        quick: whether the run is to take three minutes at most.
        rounds: of every measure.
        seconds: of each load.
    """

    quick: bool
    rounds: int
    seconds: float

    def turns(self, sides: Sequence[str]) -> list[tuple[int, Sequence[str]]]:
        """The rounds, with the order of the sides in each: this way round and the other."""
        return [(number, sides if number % 2 == 0 else sides[::-1]) for number in range(self.rounds)]


@dataclass(slots=True, kw_only=True)
class Stage:
    """The servers of a run, and who is started on them."""

    home: Path
    plan: Plan
    load: Load
    postgres_url: str
    redis_url: str
    _stack: contextlib.AsyncExitStack
    _started: dict[str, Process] = field(default_factory=dict)

    def database_url(self, side: str) -> str:
        """The side's own database, as libpq spells it."""
        return urlunsplit(urlsplit(self.postgres_url)._replace(path=f"/{_database(side)}"))

    def broker_url(self, side: str) -> str:
        """The side's own Redis database."""
        return urlunsplit(urlsplit(self.redis_url)._replace(path=f"/{SIDES.index(side)}"))

    def environment(self, side: str, **more: str) -> dict[str, str]:
        """What a process of a side finds there. Nothing is authenticated, traced or counted unless `more` says so."""
        telemetry = {name for name in os.environ if name.startswith("OTEL_")}
        return {name: value for name, value in os.environ.items() if name not in telemetry} | {
            "DATABASE_URL": self.database_url(side),
            "REDIS_URL": self.broker_url(side),
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_METRICS_PORT": "0",
            "TASKQUEUE_CONCURRENCY": "2",
            "TASKQUEUE_DATA_DIR": str(self.home),
            "TASKQUEUE_LOG_LEVEL": "WARNING",
            "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    async def api(self, **more: str) -> Process:
        """Our API, once it is ready."""
        return await self._server("api", ["-m", "app.cli", "api"], "ours", "/readyz", **more)

    async def serve(self, side: str, application: str) -> Process:
        """Another application, served as our API is, once it answers."""
        return await self._server(application, ["-m", "benchmarks.suite.serve", application], side, "/openapi.json")

    async def process(self, name: str, arguments: Sequence[str], side: str, **more: str) -> Process:
        """A Python process, started once in a run; asked for again, it is the one that is there."""
        key = f"{name} {sorted(more.items())}"
        if key not in self._started:
            env = self.environment(side, **more)
            log = self.home / f"{len(self._started)}.log"
            context = _process([sys.executable, *arguments], env, log)
            one = await self._stack.enter_async_context(context)
            self._started[key] = Process(pid=one.pid, port=int(more.get("PORT", 0)))
        return self._started[key]

    async def _server(self, name: str, arguments: Sequence[str], side: str, path: str, **more: str) -> Process:
        if (key := f"{name} {sorted(more.items())}") not in self._started:
            [port] = ports.free_ports(1)
            self._started[key] = await self.process(name, arguments, side, PORT=str(port), **more)
            await _answers(port, path, START_SECONDS)
        return self._started[key]

    async def migrate(self) -> None:
        """Make the tables of our side; may be repeated."""
        settings = Settings.model_validate({**self.environment("ours"), "TASKQUEUE_METRICS_PORT": 0})
        await asyncio.to_thread(migrations.migrate, settings)

    @contextlib.asynccontextmanager
    async def connection(self, side: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
        """A connection to the side's database."""
        connection = await asyncpg.connect(self.database_url(side))
        try:
            yield connection
        finally:
            await connection.close()

    async def cleared(self, side: str, *tables: str) -> None:
        """Empty these tables and the Redis database of the side, so that each load finds the same."""
        async with redis.asyncio.Redis.from_url(self.broker_url(side)) as broker:
            await broker.flushdb()
        if tables:
            async with self.connection(side) as connection:
                await connection.execute(f"TRUNCATE {', '.join(tables)} CASCADE")


def _database(side: str) -> str:
    return "taskqueue" if side == "ours" else side.replace("-", "_")


@contextlib.asynccontextmanager
async def _process(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> AsyncIterator["subprocess.Popen[bytes]"]:
    with log.open("wb") as output:
        one = subprocess.Popen(  # noqa: ASYNC220  # it does not wait
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=linux.before_exec(parent_death_signal=signal.SIGTERM),  # noqa: PLW1509  # plain system calls only
        )
    try:
        yield one
    finally:
        one.terminate()
        try:
            await asyncio.to_thread(one.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            one.kill()


async def _answers(port: int, path: str, seconds: float) -> None:
    """Return once a server answers this request well."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(ports.ADDRESS, port)
            writer.write(request("GET", path).encode())
            status = await reader.readline()
            writer.close()
            if status.startswith(b"HTTP/1.1 200"):
                return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"{path} was not answered well within {seconds:g} s")


@contextlib.asynccontextmanager
async def stage(home: Path, plan: Plan) -> AsyncIterator[Stage]:
    """Everything that a run needs, ended with the block."""
    async with contextlib.AsyncExitStack() as stack:
        postgres = stack.enter_context(running(EmbeddedPostgres(home / "postgres", max_connections=200)))
        broker = stack.enter_context(running(EmbeddedRedis(home / "redis")))
        load = await stack.enter_async_context(started())
        connection = await asyncpg.connect(postgres.url)
        for side in SIDES[1:]:
            await connection.execute(f"CREATE DATABASE {_database(side)}")
        await connection.close()
        one = Stage(home=home, plan=plan, load=load, postgres_url=postgres.url, redis_url=broker.url, _stack=stack)
        await one.migrate()
        yield one

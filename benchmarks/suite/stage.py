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
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
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

PYTHON = Path(sys.executable)
PEERS = Path(sys.prefix) / "peers" / "bin" / "python"
"""The interpreter of the peers' environment."""
START_SECONDS = 60.0
STOP_SECONDS = 10.0
CLEAR_TRIES = 5
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
    servers: Sequence[Process]
    skipped: dict[str, str] = field(default_factory=dict)
    _started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def one_measure(self) -> AsyncIterator[None]:
        """End with the block what is started in it."""
        try:
            yield
        finally:
            await _ended(self._started)
            self._started.clear()

    def database_url(self, side: str) -> str:
        """The side's own database, as libpq spells it."""
        return urlunsplit(urlsplit(self.postgres_url)._replace(path=f"/{_database(side)}"))

    def broker_url(self, side: str) -> str:
        """The side's own Redis database."""
        return urlunsplit(urlsplit(self.redis_url)._replace(path=f"/{SIDES.index(side)}"))

    def environment(self, side: str, more: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
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
            "TASKQUEUE_WEBHOOK_SECRET": "whsec_" + "QUFB" * 11,
            "PYTHONUNBUFFERED": "1",
            **more,
        }

    async def api(self, more: Mapping[str, str] = MappingProxyType({})) -> Process:
        """Our API, once it is ready."""
        return await self._server(["-m", "app.cli", "api"], "ours", "/readyz", more)

    async def serve(self, side: str, application: str) -> Process:
        """Another application, served as our API is, once it answers."""
        return await self._server(["-m", "benchmarks.suite.serve", application], side, "/openapi.json")

    async def worker(self, more: Mapping[str, str] = MappingProxyType({})) -> Process:
        """Our worker, with two pool children. It may take a while until it works."""
        return await self.process(["-m", "app.cli", "worker"], "ours", more)

    async def relay(self, more: Mapping[str, str] = MappingProxyType({})) -> Process:
        """Our relay. It may take a while until it works."""
        return await self.process(["-m", "app.cli", "relay"], "ours", more)

    async def process(
        self,
        arguments: Sequence[str],
        side: str,
        more: Mapping[str, str] = MappingProxyType({}),
        *,
        python: Path = PYTHON,
        port: int = 0,
    ) -> Process:
        """A Python process with these arguments, ended with the measure. `port` is where it will listen."""
        command = [str(python), *arguments]
        with (self.home / "log").open("ab") as log:
            one = subprocess.Popen(  # noqa: ASYNC220  # it does not wait
                command,
                env=self.environment(side, more),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=linux.before_exec(parent_death_signal=signal.SIGTERM),  # noqa: PLW1509  # plain system calls
            )
        self._started.append(one)
        return Process(pid=one.pid, port=port)

    async def ended(self, process: Process) -> None:
        """End a process before the measure ends."""
        one = next(each for each in self._started if each.pid == process.pid)
        self._started.remove(one)
        await _ended([one])

    async def done(
        self,
        arguments: Sequence[str],
        side: str,
        more: Mapping[str, str] = MappingProxyType({}),
        *,
        python: Path = PYTHON,
        well: Collection[int] = (0,),
    ) -> str:
        """What a Python process with these arguments prints, once it has ended with one of these exit codes.

        Raises:
            RuntimeError: if it failed; with its last line.
        """
        process = await asyncio.create_subprocess_exec(
            python,
            *arguments,
            env=self.environment(side, more),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=linux.before_exec(parent_death_signal=signal.SIGKILL),
        )
        printed, said = await process.communicate()
        if process.returncode not in well:
            raise RuntimeError((said.decode(errors="replace").strip().splitlines() or ["it failed"])[-1][:200])
        return printed.decode()

    async def _server(
        self, arguments: Sequence[str], side: str, path: str, more: Mapping[str, str] = MappingProxyType({})
    ) -> Process:
        [port] = ports.free_ports(1)
        one = await self.process(arguments, side, {**more, "PORT": str(port)}, port=port)
        await _answers(port, path, START_SECONDS)
        return one

    def say(self, line: str) -> None:
        """Tell who watches how far it is."""
        sys.stderr.write(f"{line}\n")

    def has_peers(self) -> bool:
        """Whether the peers' environment is there. If it is not, that is noted."""
        if not PEERS.exists():
            self.skipped["peers"] = "their environment is not there: `make .venv/.bench`"
        return PEERS.exists()

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

    def broker(self, side: str) -> "redis.asyncio.Redis":
        """A client of the side's Redis database."""
        client: redis.asyncio.Redis = redis.asyncio.Redis.from_url(self.broker_url(side))
        return client

    async def cleared(self, side: str, *tables: str) -> None:
        """Empty these tables and the Redis database of the side, so that each load finds the same."""
        async with self.broker(side) as broker:
            await broker.flushdb()
        if tables:
            async with self.connection(side) as connection:
                for left in reversed(range(CLEAR_TRIES)):
                    try:
                        await connection.execute(f"TRUNCATE {', '.join(tables)} CASCADE")
                    except asyncpg.DeadlockDetectedError:
                        # A process of the side looks at the same tables, in another order.
                        if not left:
                            raise
                    else:
                        break


def _database(side: str) -> str:
    return "taskqueue" if side == "ours" else side.replace("-", "_")


async def _ended(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End them all well, and kill what is left of them and of what they have started."""
    families: list[psutil.Process] = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            families += Process(pid=one.pid).family()
        one.terminate()
    _, left = await asyncio.to_thread(psutil.wait_procs, families, STOP_SECONDS)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    for one in processes:
        await asyncio.to_thread(one.wait)


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
        one = Stage(
            home=home,
            plan=plan,
            load=load,
            postgres_url=postgres.url,
            redis_url=broker.url,
            servers=[Process(pid=server.pid) for server in (postgres, broker) if server.pid is not None],
        )
        await one.migrate()
        yield one

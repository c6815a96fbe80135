"""One Redis and one Postgres for a whole test session, and a place of its own in them for each test.

The pytest process that holds no tests of its own (xdist's controller, or the
only one) starts the servers and tells the others where they are.
"""

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import redis

from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running

REDIS_DATABASES = 512
REDIS_DATABASES_EACH = 8
"""Per xdist worker, used in turn: what a test left running does not write into the next test's database."""

POSTGRES_CONNECTIONS = 400

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Servers:
    """Where the session's servers are, as URLs with passwords."""

    postgres: str
    redis: str


class SessionServers:
    """Starts the servers when they are first asked for; `close` ends them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._servers: Servers | None = None

    def started(self) -> Servers:
        """The servers, running."""
        if self._servers is None:
            home = Path(tempfile.mkdtemp(prefix="taskqueue-tests-"))
            self._stack.callback(shutil.rmtree, home, ignore_errors=True)
            postgres = EmbeddedPostgres(home / "postgres", max_connections=POSTGRES_CONNECTIONS, durable=False)
            redis_server = EmbeddedRedis(home / "redis", databases=REDIS_DATABASES)
            self._servers = Servers(
                postgres=self._stack.enter_context(running(postgres)).url,
                redis=self._stack.enter_context(running(redis_server)).url,
            )
        return self._servers

    def close(self) -> None:
        """End them and forget their data."""
        self._servers = None
        self._stack.close()


def with_database(url: str, name: str | int) -> str:
    """The same server's URL, with another database."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@contextlib.contextmanager
def database(server: str, *, template: str = "template0") -> Iterator[str]:
    """The URL of a fresh database, made of `template` and dropped afterwards whoever still uses it."""
    name = f"test_{uuid.uuid4().hex}"
    execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield with_database(server, name)
    finally:
        execute(server, f"DROP DATABASE {name} WITH (FORCE)")


def execute(url: str, *statements: str) -> None:
    """Run statements, each in its own transaction."""

    async def run() -> None:
        connection = await asyncpg.connect(url, timeout=30)
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    apart(lambda: _complete(run()))


def apart(work: Callable[[], T]) -> T:
    """Do something in a thread of its own, where no event loop of a test is in the way."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def _complete(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def redis_databases(server: str, worker_number: int) -> Iterator[str]:
    """URLs of empty Redis databases, without end; each is emptied when it is handed out."""
    first = worker_number * REDIS_DATABASES_EACH % REDIS_DATABASES
    for offset in itertools.cycle(range(REDIS_DATABASES_EACH)):
        url = with_database(server, first + offset)
        with redis.Redis.from_url(url) as client:
            client.flushdb()
        yield url

"""The way to Postgres: a small pool, a deadline on everything, and one error when it is away.

Statements live in `lifecycle` and `delivery`; this module only carries them.
They go over asyncpg directly, prepared once per connection, because one round
trip is all that a claim or a settle may cost. The tables themselves are
SQLModel's (`models`), and Alembic compares the two.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import asyncpg

from app.core import backoff, errors

CONNECT_TIMEOUT_SECONDS = 5.0
STATEMENT_TIMEOUT_SECONDS = 10.0
REVISION_POLL_SECONDS = 1.0

PLANNER = {
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
}
"""Every statement here has its index, and walks from row to row through one. So it is planned once for each
connection, and the plan must be the right one whatever waits: with statistics from before a backlog came or went,
the planner would rather read, or hash, the whole table, for each submit."""

Record = asyncpg.Record
T = TypeVar("T")

log = logging.getLogger(__name__)

_AWAY = (
    OSError,  # refused, reset, no route; TimeoutError is one too
    asyncpg.InterfaceError,  # the connection closed under the statement
    asyncpg.InternalClientError,  # the server's farewell was read just before the statement began
    asyncpg.PostgresError,  # all but those that `_refused` knows: starting up, full, cancelled, failed over, …
)
_REFUSALS = ("22", "23", "42")
"""Classes of SQLSTATE that blame the statement or its data: trying again would not help (PostgreSQL, appendix A)."""


_NOT_MIGRATED = ("42P01", "42703")
"""Undefined table and column: the migrations of this release have yet to run."""


def _refused(error: BaseException) -> bool:
    state = (error.sqlstate or "") if isinstance(error, asyncpg.PostgresError) else ""
    return state.startswith(_REFUSALS) and state not in _NOT_MIGRATED


async def _keep_as_it_is(_: Any) -> None:
    """Statements here change no state of their session, so a connection needs no reset, which is a round trip."""


class Database:
    """A pool of connections to one Postgres. Connections are made on demand and replaced when they break.

    `patience_seconds` is how long a statement may take, and how long a connection is waited for.
    """

    def __init__(
        self,
        dsn: str,
        *,
        max_connections: int,
        application_name: str,
        patience_seconds: float = STATEMENT_TIMEOUT_SECONDS,
    ) -> None:
        self._dsn = dsn
        self._patience = patience_seconds
        self._max_connections = max_connections
        self._application_name = application_name
        self._pool: asyncpg.Pool[Record] | None = None
        self._opening = asyncio.Lock()

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """All rows of one statement.

        Raises:
            DatabaseUnavailable: if Postgres can't be reached, can't serve now, or does not answer in time.
                The statement may have been applied all the same.
            StatementRefused: if it breaks a constraint, or its data can't be stored. Nothing was applied.
        """
        async with self._connection() as connection:
            return list(await connection.fetch(sql, *args, timeout=self._patience))

    async def fetchrow(self, sql: str, *args: object) -> Record | None:
        """The first row of one statement, or None. Raises as `fetch`."""
        async with self._connection() as connection:
            row: Record | None = await connection.fetchrow(sql, *args, timeout=self._patience)
            return row

    async def fetchval(self, sql: str, *args: object) -> Any:
        """The first column of the first row, or None. Raises as `fetch`."""
        async with self._connection() as connection:
            return await connection.fetchval(sql, *args, timeout=self._patience)

    async def execute(self, sql: str, *args: object) -> str:
        """Run one statement for its effect; returns the command tag. Raises as `fetch`."""
        async with self._connection() as connection:
            return str(await connection.execute(sql, *args, timeout=self._patience))

    async def ping(self) -> None:
        """One round trip. Raises as `fetch`."""
        await self.fetchval("SELECT 1")

    def connections(self) -> tuple[int, int]:
        """How many connections are in use, and how many are idle. May be asked from any thread."""
        pool = self._pool
        if pool is None:
            return 0, 0
        idle = pool.get_idle_size()
        return pool.get_size() - idle, idle

    async def close(self) -> None:
        """Close every connection at once; statements in flight are abandoned."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[Any]:
        try:
            pool = self._pool or await self._opened()
            connection = await pool.acquire(timeout=self._patience)
        except _AWAY as away:
            raise errors.DatabaseUnavailable(f"Postgres is unreachable ({type(away).__name__})") from away
        try:
            yield connection
        except _AWAY as failed:
            if _refused(failed):
                raise errors.StatementRefused(
                    f"Postgres refused a statement ({type(failed).__name__})",
                    constraint=getattr(failed, "constraint_name", None),
                ) from failed
            # Whatever state the connection is in, nobody should get it next. The pool may have it back already.
            with contextlib.suppress(asyncpg.InterfaceError):
                connection.terminate()
            if getattr(failed, "sqlstate", None) in _NOT_MIGRATED:
                raise errors.DatabaseUnavailable(
                    f"Postgres has not the tables of this release: run taskqueue migrate ({type(failed).__name__})"
                ) from failed
            if isinstance(failed, TimeoutError):
                # Silence is of the network as a rule: the idle connections went the same way, and each of them
                # would cost a timeout of its own.
                await pool.expire_connections()
            raise errors.DatabaseUnavailable(f"Postgres did not answer ({type(failed).__name__})") from failed
        finally:
            with contextlib.suppress(*_AWAY):
                await pool.release(connection, timeout=self._patience)

    async def _opened(self) -> "asyncpg.Pool[Record]":
        async with self._opening:
            if self._pool is None:
                self._pool = await asyncpg.create_pool(
                    self._dsn,
                    min_size=0,
                    max_size=self._max_connections,
                    max_inactive_connection_lifetime=0,
                    timeout=min(CONNECT_TIMEOUT_SECONDS, self._patience),
                    reset=_keep_as_it_is,
                    server_settings={"application_name": self._application_name, **PLANNER},
                )
            return self._pool


async def insist(operation: Callable[[], Awaitable[T]], *, what: str) -> T:
    """Repeat `operation` until Postgres answers, for as long as this process lives.

    A claim, a renewal or a settle must not be given up because Postgres is being
    restarted: the task would be billed for a fault of ours. `operation` must be
    safe to repeat, since a lost answer may hide a statement that was applied.

    Raises:
        StatementRefused: at once; trying again would not help.
    """
    failures = 0
    while True:
        try:
            return await operation()
        except errors.DatabaseUnavailable as away:
            failures += 1
            if failures == 1 or failures % 20 == 0:
                log.warning("%s waits for Postgres: %s", what, away)
            await asyncio.sleep(backoff.reconnect_wait(failures))


async def revision(database: Database) -> str | None:
    """The revision of the tables; None if they were never migrated. Raises as `Database.fetch`."""
    if await database.fetchval("SELECT to_regclass('alembic_version')") is None:
        return None
    found = await database.fetchval("SELECT version_num FROM alembic_version")
    return None if found is None else str(found)


def needed_revision() -> str:
    """The revision of the tables that this release needs.

    Revisions are numbered, and their files with them. Alembic would say the same, but takes long to load.
    """
    versions = Path(__file__).parent / "migrations" / "versions"
    return max(path.name.partition("_")[0] for path in versions.glob("[0-9]*.py"))


async def wait_for_tables(dsn: str) -> None:
    """Wait until the tables are at the needed revision, or a later one.

    A newer release may be started before its migration: what it took from a queue would wait in it, while a worker
    of the release before could run it. With Postgres away this does not wait, since every statement will.
    """
    database = Database(dsn, max_connections=1, application_name="taskqueue-start")
    needed = needed_revision()
    told = False
    try:
        while (found := await revision(database)) is None or found < needed:
            if not told:
                log.warning(
                    "waiting: the tables are at %s, not at %s: run taskqueue migrate", found or "nothing", needed
                )
            told = True
            await asyncio.sleep(REVISION_POLL_SECONDS)
    except errors.DatabaseUnavailable:
        return
    finally:
        await database.close()


_FACTS = """
SELECT name, setting FROM pg_settings
 WHERE name IN ('server_version', 'server_version_num', 'fsync', 'full_page_writes', 'synchronous_commit',
                'synchronous_standby_names', 'max_connections')
UNION ALL SELECT 'in_recovery', CASE WHEN pg_is_in_recovery() THEN 'on' ELSE 'off' END
UNION ALL SELECT 'followers', count(*)::text FROM pg_stat_replication
"""


async def facts(database: Database) -> dict[str, str]:
    """What the server says of itself that the promises depend on. Raises as `Database.fetch`."""
    found = {row["name"]: str(row["setting"]) for row in await database.fetch(_FACTS)}
    return found | {"revision": await revision(database) or ""}

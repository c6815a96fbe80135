"""The way to Postgres: a few connections, a deadline on everything, and one error when it is away.

Statements live in `lifecycle` and `delivery`; this module only carries them.
They go over asyncpg directly, prepared once per connection, because one round
trip is all that a claim or a settle may cost. The tables themselves are
SQLModel's (`models`), and Alembic compares the two.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import asyncpg

from app.core import backoff, errors

CONNECT_TIMEOUT_SECONDS = 5.0
STATEMENT_TIMEOUT_SECONDS = 10.0
LOCK_TIMEOUT = "200ms"
"""How long a statement for which others wait does so for a row that somebody has locked."""
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

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]

log = logging.getLogger(__name__)

_AWAY = (
    OSError,  # refused, reset, no route; TimeoutError is one too
    asyncpg.InterfaceError,  # the connection closed under the statement
    asyncpg.InternalClientError,  # the server's farewell was read just before the statement began
    asyncpg.PostgresError,  # all but those that `_refused` knows: starting up, full, cancelled, failed over, …
)
_DATA_REFUSALS = ("22", "23")
_REFUSALS = (*_DATA_REFUSALS, "42")
"""Classes of SQLSTATE that blame the statement or its data: trying again would not help (PostgreSQL, appendix A)."""
_LOCKED = "55P03"
"""A lock was not to be had in time. Nothing is wrong with the connection."""


_NOT_MIGRATED = ("42P01", "42703")
"""Undefined table and column: the migrations of this release have yet to run."""


def _state(error: BaseException) -> str:
    return (error.sqlstate or "") if isinstance(error, asyncpg.PostgresError) else ""


def _refused(error: BaseException) -> bool:
    state = _state(error)
    return state.startswith(_REFUSALS) and state not in _NOT_MIGRATED


class Database:
    """A few connections to one Postgres. They are made on demand and replaced when they break.

    `patience_seconds` is how long a statement may take, and how long a connection is waited for.

    They are kept here and not in asyncpg's pool, which takes twice the time of a statement to lend a connection and
    to take it back: statements here change no state of their session, so there is nothing to reset.
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
        self._application_name = application_name
        self._free = max_connections
        self._idle: list[Connection] = []
        self._used: set[Connection] = set()
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """All rows of one statement.

        Raises:
            DatabaseUnavailable: if Postgres can't be reached, can't serve now, or does not answer in time.
                The statement may have been applied all the same, but for `Locked`.
            StatementRefused: if it breaks a constraint, or its data can't be stored. Nothing was applied.
        """
        rows: list[Record] = await self._ask("fetch", sql, args)
        return rows

    async def fetchrow(self, sql: str, *args: object) -> Record | None:
        """The first row of one statement, or None. Raises as `fetch`."""
        row: Record | None = await self._ask("fetchrow", sql, args)
        return row

    async def fetchval(self, sql: str, *args: object) -> Any:
        """The first column of the first row, or None. Raises as `fetch`."""
        return await self._ask("fetchval", sql, args)

    async def execute(self, sql: str, *args: object) -> str:
        """Run one statement for its effect; returns the command tag. Raises as `fetch`."""
        return str(await self._ask("execute", sql, args))

    async def ping(self) -> None:
        """One round trip. Raises as `fetch`."""
        await self.fetchval("SELECT 1")

    def connections(self) -> tuple[int, int]:
        """How many connections are in use, and how many are idle. May be asked from any thread."""
        return len(self._used), len(self._idle)

    async def close(self) -> None:
        """Close every connection at once; statements in flight are abandoned."""
        self._expire()
        for connection in tuple(self._used):
            connection.terminate()

    async def _ask(self, how: str, sql: str, args: Sequence[object]) -> Any:
        connection = await self._lent()
        answered = False
        try:
            answer = await getattr(connection, how)(sql, *args, timeout=self._patience)
            answered = True
        except _AWAY as failed:
            if _refused(failed):
                answered = True
                raise errors.StatementRefused(
                    f"Postgres refused a statement ({type(failed).__name__})",
                    constraint=getattr(failed, "constraint_name", None),
                    of_data=_state(failed).startswith(_DATA_REFUSALS),
                ) from failed
            if _state(failed) == _LOCKED:
                answered = True
                raise errors.Locked("Postgres did not give a lock in time") from failed
            if _state(failed) in _NOT_MIGRATED:
                raise errors.DatabaseUnavailable(
                    f"Postgres has not the tables of this release: run taskqueue migrate ({type(failed).__name__})"
                ) from failed
            if isinstance(failed, TimeoutError):
                # Silence is of the network as a rule: the idle connections went the same way, and each of them
                # would cost a timeout of its own.
                self._expire()
            raise errors.DatabaseUnavailable(f"Postgres did not answer ({type(failed).__name__})") from failed
        else:
            return answer
        finally:
            # Whatever state it is in without an answer, nobody should get it next.
            self._take_back(connection, broken=not answered)

    async def _lent(self) -> "Connection":
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                self._used.add(connection)
                return connection
            self._free += 1
        if not self._free:
            given = await self._handed_over()
            if given is not None:
                return given
        else:
            self._free -= 1
        return await self._connected()

    async def _handed_over(self) -> "Connection | None":
        """A connection that somebody gives back; None: there is room for another."""
        place: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(self._patience):
                return await place
        except BaseException as left:
            if place.done() and not place.cancelled():
                self._take_back(place.result(), broken=False)
            else:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(place)
            if isinstance(left, TimeoutError):
                raise errors.DatabaseUnavailable("No connection to Postgres was free in time") from left
            raise

    async def _connected(self) -> "Connection":
        """A new connection, for which there is room."""
        try:
            connection: Connection = await asyncpg.connect(
                self._dsn,
                timeout=min(CONNECT_TIMEOUT_SECONDS, self._patience),
                server_settings={
                    "application_name": self._application_name,
                    # What nobody waits for any more ends in Postgres, too: each try would leave a backend at work.
                    "statement_timeout": f"{self._patience * 1000:.0f}",
                    **PLANNER,
                },
            )
        except BaseException as failed:
            self._take_back(None, broken=True)
            if isinstance(failed, _AWAY):
                raise errors.DatabaseUnavailable(f"Postgres is unreachable ({type(failed).__name__})") from failed
            raise
        self._used.add(connection)
        return connection

    def _take_back(self, connection: "Connection | None", *, broken: bool) -> None:
        """Have a connection back, or the room for one."""
        if connection is not None and (broken or connection.is_closed()):
            connection.terminate()
            self._used.discard(connection)
            connection = None
        if self._hand_over(connection):
            return
        if connection is None:
            self._free += 1
        else:
            self._used.discard(connection)
            self._idle.append(connection)

    def _hand_over(self, connection: "Connection | None") -> bool:
        """Give a connection, or the room for one, to who has waited longest. Returns whether somebody waits."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(connection)
                return True
        return False

    def _expire(self) -> None:
        """Close what is idle."""
        for connection in self._idle:
            connection.terminate()
        self._free += len(self._idle)
        self._idle.clear()


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

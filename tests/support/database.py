"""The database of a test, and rows to put into it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar
from uuid import UUID, uuid4

from app import lifecycle
from app.core import ids
from app.core.config import Settings
from app.db import Database, Record

D = TypeVar("D", bound=Database)


class Counting(Database):
    """Counts the questions that ask for rows."""

    asked = 0

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        self.asked += 1
        return await super().fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: object) -> Record | None:
        self.asked += 1
        return await super().fetchrow(sql, *args)


@contextlib.asynccontextmanager
async def counting(settings: Settings) -> AsyncIterator[Counting]:
    async with _opened(Counting, settings) as database:
        yield database


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Database]:
    async with _opened(Database, settings) as database:
        yield database


@contextlib.asynccontextmanager
async def _opened(kind: type[D], settings: Settings) -> AsyncIterator[D]:
    database = kind(settings.postgres_dsn, max_connections=4, application_name="test")
    try:
        yield database
    finally:
        await database.close()


async def submitted(database: Database, **changes: Any) -> UUID:
    """A task as the API inserts it."""
    new = lifecycle.NewTask(**{"id": ids.uuid7(), "name": "sample.echo", "queue": "default", **changes})
    await lifecycle.submit(database, new)
    return new.id


async def started(
    database: Database, task_id: UUID, *, lease_seconds: float = 30.0, name: str = "sample.echo"
) -> lifecycle.Claimed:
    """The next attempt of a waiting task, claimed."""
    attempt = await database.fetchval("SELECT attempt FROM task WHERE id = $1", task_id)
    claimed = await lifecycle.claim(
        database,
        lifecycle.Claim(task_id, attempt + 1, uuid4()),
        name=name,
        worker="test",
        lease_seconds=lease_seconds,
    )
    assert claimed is not None
    return claimed


async def row(database: Database, task_id: UUID) -> Record:
    found = await database.fetchrow("SELECT * FROM task WHERE id = $1", task_id)
    assert found is not None
    return found


async def events(database: Database, task_id: UUID) -> list[str]:
    """The events that somebody is to hear of, in order."""
    rows = await database.fetch("SELECT event FROM webhook_delivery WHERE task_id = $1 ORDER BY sequence", task_id)
    return [row["event"] for row in rows]

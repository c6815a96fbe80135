"""What waits costs nothing: no statement touches more pages of a long backlog than of a short one.

Pages are counted, not time, by the server itself, of the product's own calls.
"""

import statistics
from collections.abc import AsyncIterator

import asyncpg
import pytest

from app.core.config import Settings
from benchmarks import rows
from benchmarks.calls import Side, measured, opened
from benchmarks.rows import Connection

SHORT = 200
LONG = 6_000
RUNNING = 12_000
OPERATIONS = 20
UNUSED = ["webhook_delivery_due"]
"""Webhooks that are due are counted by it, now and then; that is none of the calls here."""
TABLES = ("task", "task_tombstone", "webhook_delivery", "webhook_attempt")


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[Connection]:
    """Without a vacuum, so that nothing but the calls is counted, and statistics are what the test makes them."""
    opened = await asyncpg.connect(settings.postgres_dsn)
    for table in TABLES:
        await opened.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    yield opened
    await opened.close()


async def blocks(side: Side) -> dict[str, float]:
    """Pages touched by each call."""
    side.blocks.clear()
    await measured([side], rounds=0, operations=OPERATIONS)
    return {what: statistics.median(counts) for what, counts in side.blocks.items()}


def grown(short: dict[str, float], long: dict[str, float]) -> dict[str, tuple[float, float]]:
    """The calls that touch more pages than taller indexes explain."""
    assert short.keys() == long.keys()
    return {what: (short[what], long[what]) for what in short if long[what] > 1.5 * short[what] + 15}


async def fill_short(connection: Connection) -> None:
    await rows.fill(connection, waiting=SHORT, ended=5 * SHORT, running=0, undelivered=0)


async def fill_long(connection: Connection) -> None:
    await rows.fill(connection, waiting=LONG, ended=LONG, running=0, undelivered=LONG // 4)


async def run(connection: Connection) -> None:
    await rows.wait(connection, rows.OTHER, RUNNING)
    await rows.run(connection, RUNNING)


async def test_a_long_backlog_costs_no_more_pages_than_a_short_one(settings: Settings, connection: Connection) -> None:
    async with opened(settings.postgres_dsn) as early:
        await fill_short(connection)
        short = await blocks(early)
        await fill_long(connection)

        assert grown(short, await blocks(early)) == {}, "planned when nothing waited"

    async with opened(settings.postgres_dsn) as late:
        assert grown(short, await blocks(late)) == {}, "planned without statistics"
        await connection.execute("VACUUM ANALYZE")
        assert grown(short, await blocks(late)) == {}, "planned with statistics"
        await run(connection)
        assert grown(short, await blocks(late)) == {}, "planned when nothing ran"


@pytest.mark.slow
async def test_without_any_one_of_the_indexes_some_call_reads_the_backlog(
    settings: Settings, connection: Connection
) -> None:
    async with opened(settings.postgres_dsn) as side:
        await fill_short(connection)
        short = await blocks(side)
        await fill_long(connection)
        await run(connection)
        useless = []
        for index in await _indexes(connection):
            await connection.execute(f"DROP INDEX {index['name']}")
            if not grown(short, await blocks(side)):
                useless.append(index["name"])
            await connection.execute(index["definition"])
    assert useless == UNUSED


async def _indexes(connection: Connection) -> list[asyncpg.Record]:
    return await connection.fetch(
        "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index"
        " WHERE indrelid::regclass::text = ANY($1) AND NOT indisprimary",
        list(TABLES),
    )

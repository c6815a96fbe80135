from collections.abc import AsyncIterator

import asyncpg
import pytest

from app import lifecycle
from app.backlog import Backlog
from app.core import errors
from app.core.config import Settings
from benchmarks import rows
from benchmarks.calls import Side, blocks_touched, opened
from benchmarks.rows import Connection, Place

WAITING = 3000


@pytest.fixture
async def side(settings: Settings) -> AsyncIterator[Side]:
    async with opened(settings.postgres_dsn) as opened_side:
        yield opened_side


@pytest.fixture
async def connection(settings: Settings) -> AsyncIterator[Connection]:
    opened_connection = await asyncpg.connect(settings.postgres_dsn)
    yield opened_connection
    await opened_connection.close()


async def test_the_indexes_can_hold_no_fewer_than_what_waits(side: Side, connection: Connection) -> None:
    assert await lifecycle.most_waiting(side.db) < 1000, "an empty index has a page or two"

    places: tuple[Place, ...] = ("published", "held back", "later")
    for place in places:
        await rows.wait(connection, rows.LINE, WAITING, place=place)
        waiting = await lifecycle.count_waiting(side.db, limit=10 * WAITING)
        assert waiting <= await lifecycle.most_waiting(side.db) <= 5 * waiting


async def test_a_backlog_far_from_the_cap_is_not_counted(side: Side, connection: Connection) -> None:
    await rows.wait(connection, rows.LINE, WAITING)
    backlog = Backlog(side.db, cap=100 * WAITING)
    await backlog.recount()
    before = await blocks_touched(side.db)
    await backlog.recount()

    assert await blocks_touched(side.db) == before
    backlog.admit(50 * WAITING)


async def test_a_backlog_near_the_cap_is_counted_row_by_row(side: Side, connection: Connection) -> None:
    await rows.wait(connection, rows.LINE, WAITING - 1)
    backlog = Backlog(side.db, cap=WAITING)
    await backlog.recount()

    backlog.admit()
    with pytest.raises(errors.ServiceUnavailable):
        backlog.admit(2)

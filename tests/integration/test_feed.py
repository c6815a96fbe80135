"""The line of events: whoever asks on from the last one misses none, however their transactions commit."""

import asyncio
import json
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from app import delivery, lifecycle
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Budgets, Succeeded, decide
from tests.support.database import opened, started, submitted

HOOK = "https://example.com/hook"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def rival(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A session whose transactions take their time."""
    connection = await asyncpg.connect(settings.postgres_dsn)
    yield connection
    await connection.close()


async def happened(db: Database, result: str = '"done"') -> UUID:
    task_id = await submitted(db, webhook_url=HOOK)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded(result)))
    return task_id


async def read(db: Database, after: int = 0) -> tuple[list[str], int]:
    """The tasks that are told of behind a place, and where to go on."""
    found = await delivery.events(db, after=after, limit=1000)
    tasks = [json.loads(delivery.body(one, "full"))["data"]["task_id"] for one in found]
    return tasks, found[-1].position if found else after


async def test_events_are_read_in_the_order_in_which_they_happened(db: Database) -> None:
    tasks = [str(await happened(db)) for _ in range(5)]
    assert await read(db) == ([], 0), "they have no place yet"
    assert await delivery.number(db, limit=3) == 3
    assert await delivery.number(db, limit=3) == 2
    assert await delivery.number(db, limit=3) == 0
    assert (await read(db))[0] == tasks


async def test_an_event_that_is_committed_late_does_not_appear_before_a_reader(
    db: Database, rival: asyncpg.Connection
) -> None:
    late = await submitted(db, webhook_url=HOOK)
    async with rival.transaction():
        await rival.execute(
            "INSERT INTO webhook_delivery (id, task_id, event, sequence, url, facts)"
            " SELECT gen_random_uuid(), id, 'task.started', 1, webhook_url,"
            f' \'{{"data": {{"task_id": "{late}"}}}}\' FROM task WHERE id = $1',
            late,
        )
        early = await happened(db)
        assert await delivery.number(db, limit=10) == 1
        seen, place = await read(db)
        assert seen == [str(early)]
    assert await delivery.number(db, limit=10) == 1
    assert (await read(db, place))[0] == [str(late)]


async def test_nobody_gives_a_number_while_another_s_are_not_committed(db: Database, rival: asyncpg.Connection) -> None:
    for _ in range(4):
        await happened(db)
    async with rival.transaction():
        assert len(await rival.fetch(delivery.feed._NUMBER, 2)) == 2
        assert await delivery.number(db, limit=10) == 0, "these would be seen first"
        assert await read(db) == ([], 0)
    assert await delivery.number(db, limit=10) == 2
    assert len((await read(db))[0]) == 4


async def test_relays_that_number_at_once_give_each_event_one_number(db: Database) -> None:
    tasks = {str(await happened(db)) for _ in range(30)}

    async def relay() -> None:
        for _ in range(30):
            await delivery.number(db, limit=3)

    seen: list[str] = []

    async def reader() -> None:
        place = 0
        while len(seen) < len(tasks):
            new, place = await read(db, place)
            seen.extend(new)

    async with asyncio.timeout(30):
        await asyncio.gather(reader(), *(relay() for _ in range(3)))
    assert len(seen) == len(set(seen))
    assert set(seen) == tasks


async def test_what_is_sent_again_keeps_its_place(db: Database) -> None:
    task_id = await happened(db)
    await delivery.number(db, limit=10)
    before = await read(db)
    await delivery.redeliver(db, task_id)
    assert await delivery.number(db, limit=10) == 0
    assert await read(db) == before


async def test_an_event_of_an_earlier_release_is_shown_to_nobody_but_the_owner_of_its_task(db: Database) -> None:
    theirs, nobodys = await happened(db), await happened(db)
    await db.execute("UPDATE task SET owner = 'acme' WHERE id = $1", theirs)
    await delivery.number(db, limit=10)
    assert (await read(db))[0] == [str(nobodys)]

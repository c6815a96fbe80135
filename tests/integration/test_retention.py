from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from app import lifecycle
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Budgets, Succeeded, decide
from tests.support.database import opened, started, submitted

DAY = 86_400.0


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


async def ended(db: Database, *, days_ago: float, webhook: str | None = None) -> UUID:
    """A task that ended then; its webhook, if it has one, is in that state."""
    task_id = await submitted(db, webhook_url="https://example.com/" if webhook else None)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded("1")))
    await db.execute(
        "UPDATE task SET finished_at = now() - make_interval(secs => $2) WHERE id = $1", task_id, days_ago * DAY
    )
    if webhook:
        await db.execute(
            "UPDATE webhook_delivery SET status = $2, lease_until = CASE WHEN $2 = 'delivering' THEN now() END,"
            " delivered_at = CASE WHEN $2 = 'delivered' THEN now() END WHERE task_id = $1",
            task_id,
            webhook,
        )
    return task_id


async def prune(db: Database, limit: int = 10) -> int:
    return await lifecycle.prune(db, older_than_seconds=30 * DAY, limit=limit)


async def test_what_is_past_its_retention_goes_and_is_remembered(db: Database) -> None:
    old, young = await ended(db, days_ago=31), await ended(db, days_ago=29)
    waiting = await submitted(db)

    assert await prune(db) == 1
    assert await lifecycle.status(db, old) is None
    assert await lifecycle.was_pruned(db, old)
    for task_id in (young, waiting):
        assert await lifecycle.status(db, task_id) is not None
        assert not await lifecycle.was_pruned(db, task_id)


async def test_a_task_stays_until_its_webhook_has_ended(db: Database) -> None:
    under_way = [await ended(db, days_ago=31, webhook=status) for status in ("pending", "delivering")]
    for status in ("delivered", "exhausted"):
        await ended(db, days_ago=31, webhook=status)

    assert await prune(db) == 2
    for task_id in under_way:
        assert await lifecycle.status(db, task_id) is not None
    assert await db.fetchval("SELECT count(*) FROM webhook_delivery") == 2


async def test_the_oldest_go_first_a_batch_at_a_time(db: Database) -> None:
    tasks = [await ended(db, days_ago=days) for days in (33, 31, 32)]

    assert await prune(db, limit=1) == 1
    assert await lifecycle.was_pruned(db, tasks[0])
    assert [await prune(db, limit=1) for _ in range(3)] == [1, 1, 0]


async def test_an_id_that_comes_again_is_pruned_again(db: Database) -> None:
    """A caller from Python may choose an id, such as one for each day."""
    again = await ended(db, days_ago=31)
    await prune(db)
    await submitted(db, id=again)
    assert [breach for breach in await lifecycle.breaches(db, overdue_seconds=60) if breach.rows] == []
    await lifecycle.settle(db, (await started(db, again)).claim, decide(Budgets(), Succeeded("1")))
    await db.execute("UPDATE task SET finished_at = now() - interval '31 days' WHERE id = $1", again)

    assert await prune(db) == 1
    assert await lifecycle.was_pruned(db, again)


async def test_a_tombstone_is_forgotten_in_its_time(db: Database) -> None:
    old = await ended(db, days_ago=31)
    await prune(db)

    assert await lifecycle.forget(db, older_than_seconds=30 * DAY, limit=10) == 0
    await db.execute("UPDATE task_tombstone SET pruned_at = now() - interval '31 days'")
    assert await lifecycle.forget(db, older_than_seconds=30 * DAY, limit=10) == 1
    assert not await lifecycle.was_pruned(db, old)

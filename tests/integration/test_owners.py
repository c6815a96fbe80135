"""Nobody's tasks exist for anybody else: each read and each write that a caller can ask for, in the data layer."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from uuid import UUID

import pytest

from app import delivery, lifecycle
from app.core.config import Settings
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.lifecycle import Budgets, Succeeded, decide
from app.utils.webhook import Outcome, Receipt
from tests.support.database import opened, row, started, submitted

HOOK = "https://example.com/hook"
OWNERS = ("ada", "bob", "")
BROKEN = Receipt(outcome=Outcome.HTTP_5XX, status_code=503, duration_seconds=0.1, excerpt="down")

Ask = Callable[[Database, UUID, str], Awaitable[object]]
READS: dict[str, Ask] = {
    "status": lambda db, task_id, owner: lifecycle.status(db, task_id, owner=owner),
    "result": lambda db, task_id, owner: lifecycle.result(db, task_id, owner=owner),
    "view": lambda db, task_id, owner: lifecycle.view(db, task_id, owner=owner),
    "state_of": lambda db, task_id, owner: delivery.state_of(db, task_id, owner=owner),
    "attempts": lambda db, task_id, owner: delivery.attempts(db, task_id, owner=owner, limit=10),
}


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


async def told(db: Database, owner: str) -> UUID:
    """A task of `owner` that has ended, and whose webhook was tried once and given up."""
    task_id = await submitted(db, owner=owner, webhook_url=HOOK)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded('"mine"')))
    [claimed] = await delivery.claim_due(db, limit=1, lease_seconds=30.0)
    assert await delivery.settle(db, claimed, BROKEN, delivery.Verdict(DeliveryStatus.EXHAUSTED))
    return task_id


async def test_a_read_finds_nothing_of_another_s(db: Database) -> None:
    task_id = await told(db, "ada")
    for name, ask in READS.items():
        assert await ask(db, task_id, "ada"), name
        assert not await ask(db, task_id, "bob"), name
        assert not await ask(db, task_id, ""), name


async def test_who_names_no_owner_sees_what_is_nobody_s(db: Database) -> None:
    assert await lifecycle.status(db, await told(db, "")) is not None
    assert await lifecycle.status(db, await told(db, "ada")) is None


async def test_nobody_ends_another_s_task(db: Database) -> None:
    task_id = await submitted(db, owner="ada")
    assert await lifecycle.cancel(db, task_id, owner="bob") is None
    assert await lifecycle.cancel(db, task_id) is None
    assert (await row(db, task_id))["cancel_requested"] is False
    assert await lifecycle.cancel(db, task_id, owner="ada") is not None


async def test_nobody_takes_another_s_task_out_of_its_line(db: Database) -> None:
    await lifecycle.pause_queue(db, "default")
    task_id = await submitted(db, owner="ada")
    assert await lifecycle.cancel(db, task_id, owner="bob") is None
    await lifecycle.resume_queue(db, "default")
    assert [bell.task_id for bell in await lifecycle.let_go(db, "default", limit=5)] == [task_id]


async def test_nobody_has_another_s_webhook_sent_again(db: Database) -> None:
    task_id = await told(db, "ada")
    assert await delivery.redeliver(db, task_id, owner="bob") is delivery.Redelivery.NOTHING
    assert await delivery.count_due(db) == 0
    assert await delivery.redeliver(db, task_id, owner="ada") is delivery.Redelivery.DUE
    assert await delivery.count_due(db) == 1


async def test_many_webhooks_sent_again_are_one_owner_s_only(db: Database) -> None:
    tasks = {owner: await told(db, owner) for owner in OWNERS for _ in range(3)}
    since = await lifecycle.clock(db) - timedelta(hours=1)
    step = await delivery.redeliver_batch(
        db, owner="bob", since=since, until=None, statuses=(DeliveryStatus.EXHAUSTED,), after=None, limit=3
    )
    assert step.redelivered == 3
    again = await db.fetch("SELECT DISTINCT owner FROM webhook_delivery WHERE status = 'pending'")
    assert [one["owner"] for one in again] == ["bob"]
    # The place at which it ends is one of their own, so that it tells of nobody else's.
    assert step.end is not None
    end = await delivery.state_of(db, tasks["bob"], owner="bob")
    assert end is not None
    assert step.end.id == end.id


async def test_each_owner_reads_their_own_line_of_events(db: Database) -> None:
    ids = {owner: [await told(db, owner) for _ in range(2)] for owner in OWNERS}
    await delivery.number(db, limit=100)
    for owner in OWNERS:
        found = await delivery.events(db, owner=owner, after=0, limit=100)
        assert len(found) == 2
        assert all(str(task_id) in "".join(one.facts for one in found) for task_id in ids[owner])
        assert not await delivery.events(db, owner=owner, after=found[-1].position, limit=100)


async def test_that_a_task_was_removed_is_told_to_its_owner_only(db: Database) -> None:
    task_id = await told(db, "ada")
    assert await lifecycle.prune(db, older_than_seconds=-1.0, limit=10) == 1
    assert await lifecycle.was_pruned(db, task_id, owner="ada")
    assert not await lifecycle.was_pruned(db, task_id, owner="bob")
    assert not await lifecycle.was_pruned(db, task_id)

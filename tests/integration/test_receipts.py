"""Receipts that share statements: each counts for itself, and only once it is durable."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import uuid4

import asyncpg
import pytest

from app import delivery
from app.core import errors
from app.core.config import Settings
from app.core.statuses import DeliveryStatus
from app.delivery import Settling
from app.receipts import LANES, Receipts
from app.utils.webhook import Outcome, Receipt
from tests.integration.test_delivery import BROKEN, DELIVERED, EXHAUSTED, OK, ended
from tests.support.database import Counting, counting

TIMEOUT_SECONDS = 20.0
AGAIN = delivery.Verdict(DeliveryStatus.PENDING, 3600.0)
GIVEN_BACK = delivery.Verdict(DeliveryStatus.PENDING, 3600.0, spends=False)


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Counting]:
    async with counting(settings) as database:
        yield database


async def claimed(db: Counting, count: int) -> list[delivery.Claimed]:
    for _ in range(count):
        await ended(db)
    found = await delivery.claim_due(db, limit=count, lease_seconds=30.0)
    assert len(found) == count
    db.asked = 0
    return found


async def settled(receipts: Receipts, some: list[Settling]) -> list[BaseException | None]:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        answers = (receipts.settle(one, age_seconds=0.0) for one in some)
        return await asyncio.gather(*answers, return_exceptions=True)


async def test_receipts_that_come_together_share_a_statement_and_each_has_its_own_end(db: Counting) -> None:
    ways = [(OK, DELIVERED), (BROKEN, AGAIN), (BROKEN, EXHAUSTED), (Receipt(outcome=Outcome.LOCAL_FAULT), GIVEN_BACK)]
    held = await claimed(db, 40)
    some = [Settling(one, *ways[number % len(ways)]) for number, one in enumerate(held)]
    assert await settled(Receipts(db), some) == [None] * 40
    assert db.asked == LANES + 1  # The first had their lanes alone; the others came while they were written.
    rows = {
        row["id"]: tuple(row)[1:]
        for row in await db.fetch(
            "SELECT d.id, status, attempt, last_status_code, last_error, next_at > now() + interval '59 min' AS later,"
            "       lease_until IS NULL AND token IS NULL AS is_free, delivered_at IS NOT NULL AS dated, a.error,"
            "       a.status_code, a.number"
            "  FROM webhook_delivery d LEFT JOIN webhook_attempt a ON a.delivery_id = d.id"
        )
    }
    expected = [
        ("delivered", 1, 200, None, False, True, True, None, 200, 1),
        ("pending", 1, 503, "http_5xx", True, True, False, "http_5xx", 503, 1),
        ("exhausted", 1, 503, "http_5xx", False, True, False, "http_5xx", 503, 1),
        ("pending", 0, None, "local_fault", True, True, False, None, None, None),
    ]
    assert [rows[one.id] for one in held] == [expected[number % len(ways)] for number in range(40)]


async def test_one_that_is_not_this_relays_any_more_says_so_and_keeps_no_other_back(db: Counting) -> None:
    held = await claimed(db, 10)
    stolen = [replace(one, token=uuid4()) if number == 4 else one for number, one in enumerate(held)]
    found = await delivery.settle_batch(db, [Settling(one, OK, DELIVERED) for one in stolen])
    assert found == [number != 4 for number in range(10)]
    states = {row["id"]: row["status"] for row in await db.fetch("SELECT id, status FROM webhook_delivery")}
    assert [states[one.id] for one in held] == ["delivering" if n == 4 else "delivered" for n in range(10)]


async def test_a_row_that_somebody_has_locked_holds_up_no_other(db: Counting, postgres_url: str) -> None:
    held = await claimed(db, 10)
    other = await asyncpg.connect(postgres_url)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        async with other.transaction():
            await other.fetch("SELECT FROM webhook_delivery WHERE id = $1 FOR UPDATE", held[0].id)
            receipts = Receipts(db)
            stuck, *free = [
                asyncio.create_task(receipts.settle(Settling(one, OK, DELIVERED), age_seconds=0.0)) for one in held
            ]
            await asyncio.gather(*free)
            assert not stuck.done()
        await stuck
    await other.close()
    assert await db.fetchval("SELECT count(*) FROM webhook_delivery WHERE status = 'delivered'") == 10


async def test_one_that_can_t_be_stored_keeps_no_other_out(db: Counting) -> None:
    held = await claimed(db, 10)
    odd = Receipt(outcome=Outcome.HTTP_5XX, status_code=40_000)
    some = [Settling(one, odd if number == 4 else OK, DELIVERED) for number, one in enumerate(held)]
    found = await settled(Receipts(db), some)
    assert isinstance(found[4], errors.StatementRefused)
    assert [one for number, one in enumerate(found) if number != 4] == [None] * 9
    assert await db.fetchval("SELECT count(*) FROM webhook_delivery WHERE status = 'delivered'") == 9

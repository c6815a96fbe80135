"""The product's calls, timed and counted, on one database or on several in turns.

`blocks` are the pages of tables and indexes that a call touches: unlike times,
they are the same on every machine.
"""

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from app import delivery, lifecycle
from app.core import ids
from app.core.statuses import DeliveryStatus
from app.db import Database, Record
from app.utils.webhook import Outcome, Receipt
from benchmarks import rows

LEASE_SECONDS = 30.0
DEAD = delivery.Receiver("", rows.DEAD)
RETENTION_SECONDS = 30 * 86_400.0
SUCCESS = lifecycle.decide(lifecycle.Budgets(), lifecycle.Succeeded('"something to say"'))
NOTHING_OLD = 1e9

Call = Callable[[], Awaitable[object]]


class Recorder(Database):
    """A Database that remembers the newest statement and its arguments."""

    newest: tuple[str, tuple[object, ...]] = ("", ())

    async def fetch(self, sql: str, *args: object) -> list[Record]:
        """As `Database.fetch`."""
        self.newest = (sql, args)
        return await super().fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: object) -> Record | None:
        """As `Database.fetchrow`."""
        self.newest = (sql, args)
        return await super().fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: object) -> Any:
        """As `Database.fetchval`."""
        self.newest = (sql, args)
        return await super().fetchval(sql, *args)


@dataclass(slots=True)
class Side:
    """One of the two databases, and what was measured in it."""

    db: Recorder
    url: str
    claims: list[lifecycle.Claim] = field(default_factory=list)
    deliveries: list[delivery.Claimed] = field(default_factory=list)
    bells: list[lifecycle.Bell] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    statements: dict[str, tuple[str, tuple[object, ...]]] = field(default_factory=dict)

    async def measure(self, what: str, call: Call) -> None:
        """Time one call."""
        began = time.perf_counter()
        await call()
        self.seconds.setdefault(what, []).append(time.perf_counter() - began)
        self.statements[what] = self.db.newest

    async def count_blocks(self, what: str, call: Call) -> None:
        """Make one call, and see which pages it touched."""
        before = await blocks_touched(self.db)
        await call()
        self.blocks.setdefault(what, []).append(await blocks_touched(self.db) - before)


async def blocks_touched(db: Database) -> int:
    """Pages of tables and indexes that were touched so far in this database. `db` has one connection only."""
    await db.execute("SELECT pg_stat_force_next_flush()")
    touched: int = await db.fetchval(
        "SELECT sum(heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read)::bigint FROM pg_statio_user_tables"
    )
    return touched


Calls = AsyncIterator[tuple[str, Call]]
"""Names and calls of one side. Both sides make the same ones, in the same order."""


async def _calls(side: Side, operations: int) -> Calls:
    for part in (_lives, _sweeps, _webhooks, _reads):
        async for what, call in part(side, operations):
            yield what, call


async def _lives(side: Side, operations: int) -> Calls:
    """Tasks from submit to their end, those at the head of the line."""
    db = side.db
    for _ in range(operations):
        yield "submit", lambda: lifecycle.submit(db, _new(rows.LINE))
    for _ in range(operations // 4):
        yield "submit, others held back", lambda: lifecycle.submit(db, _new(rows.HELD))
    heads = await db.fetch(
        "SELECT id, attempt FROM task WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL"
        " ORDER BY queue, position LIMIT $2",
        rows.LINE,
        operations,
    )
    side.claims = [lifecycle.Claim(row["id"], row["attempt"] + 1, uuid4()) for row in heads]
    for wanted in side.claims:
        yield (
            "claim",
            lambda wanted=wanted: lifecycle.claim(  # type: ignore[misc]  # mypy types no defaults of a lambda
                db, wanted, name="sample.echo", worker="worker-1", lease_seconds=10.0
            ),
        )
    for first in range(0, operations, 8):
        some = side.claims[first : first + 8]
        yield "renew 8", lambda some=some: lifecycle.renew(db, some, lease_seconds=LEASE_SECONDS)  # type: ignore[misc]
    for _ in range(_some(operations, 10)):
        yield "expired_leases", lambda: lifecycle.expired_leases(db, rows.LINE, lease_seconds=0.0, limit=500)
    for held in side.claims:
        yield "settle", lambda held=held: lifecycle.settle(db, held, SUCCESS)  # type: ignore[misc]


async def _sweeps(side: Side, operations: int) -> Calls:
    db = side.db
    head: int = await db.fetchval(
        "SELECT position FROM task WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL"
        " ORDER BY queue, position LIMIT 1",
        rows.LINE,
    )
    now = await lifecycle.clock(db)
    for _ in range(_some(operations, 10)):
        yield (
            "take_lost, none",
            lambda: lifecycle.take_lost(db, rows.LINE, below_position=head, published_before=now, limit=500),
        )
    for _ in range(_some(operations, 10)):
        yield "take_lost, 100", lambda: _take_lost(db, head + 1000)
    for _ in range(_some(operations, 10)):
        yield "take_due, 100", lambda: _take_due(side)
        yield "unpublish, 100", lambda: lifecycle.unpublish(db, side.bells)
    for _ in range(_some(operations, 10)):
        yield "take_due, none", lambda: lifecycle.take_due(db, rows.LINE, limit=500)
        yield "expire, none", lambda: lifecycle.expire(db, rows.LINE, limit=500)
    for _ in range(_some(operations, 20)):
        yield "prune 100", lambda: lifecycle.prune(db, older_than_seconds=RETENTION_SECONDS, limit=100)
        yield "prune, none", lambda: lifecycle.prune(db, older_than_seconds=NOTHING_OLD, limit=500)
        yield "forget 100", lambda: lifecycle.forget(db, older_than_seconds=RETENTION_SECONDS, limit=100)
        yield "forget, none", lambda: lifecycle.forget(db, older_than_seconds=NOTHING_OLD, limit=500)
        yield "look for strays", lambda: lifecycle.unfinished_queues(db)


async def _take_lost(db: Database, below: int) -> None:
    now = await lifecycle.clock(db)
    await lifecycle.take_lost(db, rows.LINE, below_position=below, published_before=now, limit=100)


async def _take_due(side: Side) -> None:
    side.bells = await lifecycle.take_due(side.db, rows.HELD, limit=100)


async def _webhooks(side: Side, operations: int) -> Calls:
    """The deliveries of the tasks that have just ended."""
    db = side.db
    for _ in range(operations // 20):
        yield "claim webhooks, 20", lambda: _claim_20(side)
        for nth in range(20):
            yield (
                "settle webhook",
                lambda nth=nth: delivery.settle(  # type: ignore[misc]
                    db,
                    side.deliveries[nth],
                    Receipt(outcome=Outcome.SUCCESS, status_code=200),
                    delivery.Verdict(DeliveryStatus.DELIVERED),
                ),
            )
    for _ in range(_some(operations, 20)):
        yield "number 2", lambda: delivery.number(db, limit=2)
        yield "events 10", lambda: delivery.events(db, after=0, limit=10)
    since = await lifecycle.clock(db) - timedelta(days=365)
    for _ in range(_some(operations, 20)):
        yield "redeliver, 10 looked at", lambda: _redeliver(db, since)
    for _ in range(_some(operations, 20)):
        yield "claim webhooks, none", lambda: _claim_webhooks(db, 100)
        yield (
            "give up webhooks, 10 looked at",
            lambda: delivery.give_up(db, [DEAD], older_than_seconds=NOTHING_OLD, limit=10),
        )


async def _claim_20(side: Side) -> None:
    side.deliveries = await _claim_webhooks(side.db, 20)


async def _claim_webhooks(db: Database, limit: int) -> list[delivery.Claimed]:
    due = await delivery.claim_by_receiver(db, limit=limit, lease_seconds=LEASE_SECONDS, room=limit, rooms={DEAD: 0})
    return due.claimed


async def _redeliver(db: Database, since: datetime) -> None:
    await delivery.redeliver_batch(
        db, since=since, until=None, statuses=(DeliveryStatus.EXHAUSTED,), after=None, limit=10
    )


async def _reads(side: Side, operations: int) -> Calls:
    """And what ends or moves a task that waits, which needs to know some."""
    db = side.db
    found = await db.fetch(
        "SELECT id, position FROM task WHERE queue = $1 AND status = 'PENDING' ORDER BY id LIMIT $2",
        rows.OTHER,
        operations,
    )
    known: list[UUID] = [row["id"] for row in found]
    for task_id in known:
        yield "status", lambda task_id=task_id: lifecycle.status(db, task_id)  # type: ignore[misc]
    now = await lifecycle.clock(db)
    lists = {
        "page of 10": ("", lifecycle.Filter()),
        "page of 10, by end": ("", lifecycle.Filter(finished_before=now)),
        "page of 10, somebody else": ("nobody", lifecycle.Filter(finished_before=now)),
        "page of 10, by error": ("", lifecycle.Filter(error_type="Nobody")),
    }
    for what, (owner, wanted) in lists.items():
        for _ in range(_some(operations, 10)):
            yield (
                what,
                lambda owner=owner, wanted=wanted: lifecycle.page(db, owner, wanted, limit=10),  # type: ignore[misc]
            )
    for _ in range(_some(operations, 10)):
        yield "places 10", lambda: lifecycle.places(db, known[:10])
    for row in found[: _some(operations, 10)]:
        yield (
            "refuse",
            lambda row=row: lifecycle.refuse(  # type: ignore[misc]
                db, row["id"], attempt=0, name="sample.echo", position=row["position"]
            ),
        )
    for task_id in known[: _some(operations, 10)]:
        yield "cancel", lambda task_id=task_id: lifecycle.cancel(db, task_id)  # type: ignore[misc]


def _some(operations: int, part: int) -> int:
    """A part of them, but enough for a median: the first call may find what the calls before it left behind."""
    return max(5, operations // part)


def _new(queue: str) -> lifecycle.NewTask:
    return lifecycle.NewTask(
        id=ids.uuid7(),
        name="sample.echo",
        queue=queue,
        kwargs='{"value": "something to say"}',
        webhook_url="https://receiver.example/hook",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


async def measured(sides: Sequence[Side], *, rounds: int, operations: int) -> None:
    """Make every call on each side in turn, in `rounds` rounds and one more that counts pages."""
    for number in range(rounds + 1):
        streams = [_calls(side, operations) for side in sides]
        with contextlib.suppress(StopAsyncIteration):
            for turn in range(sys.maxsize):
                pending = [await anext(stream) for stream in streams]
                pairs = list(zip(sides, pending, strict=True))
                for side, (what, call) in pairs if turn % 2 else reversed(pairs):
                    await (side.measure if number < rounds else side.count_blocks)(what, call)


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Side]:
    """A side with one connection."""
    db = Recorder(url, max_connections=1, application_name="benchmark", patience_seconds=600.0)
    try:
        yield Side(db, url)
    finally:
        await db.close()

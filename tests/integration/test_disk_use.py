"""Disk use levels off under steady load: as much goes as comes, and its room is used again."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest

from app import delivery, lifecycle, migrations
from app.core import ids
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.dev.embedded import EmbeddedPostgres
from app.dev.running import running
from app.lifecycle import Budgets, Claim, NewTask, Succeeded, decide
from app.utils.webhook import Outcome, Receipt
from tests.conftest import settings_for
from tests.support.servers import apart, execute
from tests.support.waiting import until

SECONDS = 60.0
TICK_SECONDS = 0.25
TASKS_PER_TICK = 25
RETENTION_SECONDS = 5.0
"""After that a task goes, and after that again its tombstone."""

SUCCESS = decide(Budgets(), Succeeded('"something to say"'))
DELIVERED = (Receipt(outcome=Outcome.SUCCESS, status_code=200), delivery.Verdict(DeliveryStatus.DELIVERED))


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    """A server of its own that vacuums when it should every second: with a retention of days, a minute is as often."""
    with running(EmbeddedPostgres(tmp_path / "postgres", durable=False)) as server:
        execute(server.url, "ALTER SYSTEM SET autovacuum_naptime = '1s'", "SELECT pg_reload_conf()")
        apart(lambda: migrations.migrate(settings_for(server.url, "redis://127.0.0.1:1/0")))
        database = Database(server.url, max_connections=8, application_name="test")
        yield database
        await database.close()


async def one_task(db: Database) -> None:
    """From submit to its end; it is renewed once, and somebody is to hear of it."""
    new = NewTask(id=ids.uuid7(), name="sample.echo", queue="default", webhook_url="https://example.com/")
    await lifecycle.submit(db, new)
    claim = Claim(new.id, 1, uuid4())
    assert await lifecycle.claim(db, claim, name=new.name, worker="test", lease_seconds=1.0)
    await lifecycle.renew(db, [claim], lease_seconds=30.0)
    assert await lifecycle.settle(db, claim, SUCCESS)


async def one_tick(db: Database) -> None:
    await asyncio.gather(*(one_task(db) for _ in range(TASKS_PER_TICK)))
    for claimed in await delivery.claim_due(db, limit=100, lease_seconds=60.0):
        await delivery.settle(db, claimed, *DELIVERED)
    await lifecycle.prune(db, older_than_seconds=RETENTION_SECONDS, limit=500)
    await lifecycle.forget(db, older_than_seconds=RETENTION_SECONDS, limit=500)


async def bytes_used(db: Database) -> int:
    """By all tables, with all that belongs to them."""
    used: int = await db.fetchval(
        "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    )
    return used


@pytest.mark.slow
async def test_disk_use_levels_off_under_steady_load(db: Database) -> None:
    began = time.monotonic()
    samples = []
    tasks = 0
    while (now := time.monotonic()) < began + SECONDS:
        await one_tick(db)
        tasks += TASKS_PER_TICK
        samples.append((now - began, await bytes_used(db)))
        await until(lambda now=now: time.monotonic() >= now + TICK_SECONDS, what="the next tick")  # type: ignore[misc]

    # Vacuums come when they come, so highs are compared: what the last third took beyond all that was there before.
    before, after = (max(used for at, used in samples if (at >= SECONDS * 2 / 3) is late) for late in (False, True))
    growth = after / before - 1
    print(  # noqa: T201  # pytest shows it with a failure only
        f"{tasks} tasks; growth over the last third {growth:.1%}",
        *(f"{at:5.1f} s {used / 1024:8,.0f} KiB" for at, used in samples[:: len(samples) // 12]),
        sep="\n",
    )
    assert await db.fetchval("SELECT count(*) FROM task") < tasks / 2, "nothing was pruned"
    assert await db.fetchval("SELECT count(*) FROM task_tombstone") < tasks / 2, "no tombstone was pruned"
    assert growth <= 0.05

from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from app import doctor, lifecycle
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Budgets, Succeeded, decide
from tests.conftest import settings_for
from tests.support.database import opened, started, submitted

HOOK = "https://example.com/hook"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


async def test_the_servers_of_a_test_are_examined(settings: Settings) -> None:
    found = await doctor.examine(settings)

    about = {one.about for one in found}
    assert about == {"Settings", "Postgres", "Redis"}
    assert [one.level for one in found if one.about == "Redis"] == ["ok"], "it told its configuration"
    bad = [one.sentence for one in found if one.level == "bad"]
    assert all("fsync" in sentence or "full_page_writes" in sentence or "synchronous" in sentence for sentence in bad)


async def test_a_database_without_tables_and_a_stray_queue_are_bad(
    settings: Settings, db: Database, empty_postgres_url: str, redis_url: str
) -> None:
    await submitted(db, queue="forgotten")
    found = await doctor.examine(settings)
    assert ("bad", "Queues") in {(one.level, one.about) for one in found}

    empty = await doctor.examine(settings_for(empty_postgres_url, redis_url))
    assert any("run taskqueue migrate" in one.sentence for one in empty)


async def test_servers_that_are_away_are_bad_and_no_traceback() -> None:
    away = settings_for("postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1/0")

    found = await doctor.examine(away)

    assert {one.about for one in found if one.level == "bad"} == {"Postgres", "Redis"}


async def ended(db: Database) -> UUID:
    task_id = await submitted(db, webhook_url=HOOK)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded("1")))
    return task_id


async def test_a_sound_database_breaks_nothing(db: Database) -> None:
    await ended(db)
    await started(db, await submitted(db))
    await submitted(db, delay_seconds=60.0, expires_in_seconds=120.0)

    assert await lifecycle.breaches(db, overdue_seconds=60.0) == []


@pytest.mark.parametrize(
    ("breaking", "word"),
    [
        ("DELETE FROM webhook_delivery", "has its webhook"),
        ("UPDATE webhook_delivery SET event = 'task.failed'", "the end that it had"),
        ("UPDATE webhook_delivery SET next_at = now() - interval '1 h'", "that is due is sent"),
        (
            "UPDATE webhook_delivery SET status = 'delivering', lease_until = now() - interval '1 h'",
            "is being sent",
        ),
        ("INSERT INTO task_tombstone (id) SELECT id FROM task", "what was removed"),
    ],
)
async def test_an_end_that_nobody_hears_of_is_a_breach(db: Database, breaking: str, word: str) -> None:
    await ended(db)
    await db.execute(breaking)

    [breach] = await lifecycle.breaches(db, overdue_seconds=60.0)
    assert word in breach.invariant
    assert (breach.rows, len(breach.sample)) == (1, 1)


@pytest.mark.parametrize(
    ("breaking", "word"),
    [
        ("UPDATE task SET cancel_requested = true", "cancelled"),
        ("UPDATE task SET expires_at = now() - interval '1 h'", "expired"),
        ("UPDATE task SET published_at = NULL, run_at = now() - interval '1 h'", "has a message"),
    ],
)
async def test_a_task_that_waits_for_nothing_is_a_breach(db: Database, breaking: str, word: str) -> None:
    await submitted(db)
    await db.execute(breaking)

    [breach] = await lifecycle.breaches(db, overdue_seconds=60.0)
    assert word in breach.invariant


@pytest.mark.parametrize(
    ("breaking", "word"),
    [
        ("DELETE FROM held_task", "stands in a line"),
        ("UPDATE held_task SET let_go_at = now()", "stands in a line"),
        (
            "UPDATE held_task SET run_at = now() - interval '1 h'; DELETE FROM queue_setting",
            "waits for a pause",
        ),
    ],
)
async def test_a_task_that_is_held_for_nothing_is_a_breach(
    db: Database, settings: Settings, breaking: str, word: str
) -> None:
    await lifecycle.pause_queue(db, "default")
    await submitted(db)
    assert await lifecycle.breaches(db, overdue_seconds=60.0) == []
    connection = await asyncpg.connect(settings.postgres_dsn)
    await connection.execute(breaking)
    await connection.close()

    [breach] = await lifecycle.breaches(db, overdue_seconds=60.0)
    assert word in breach.invariant


async def test_a_lease_that_nobody_reaps_is_a_breach(db: Database) -> None:
    await started(db, await submitted(db))
    await db.execute("UPDATE task SET lease_until = now() - interval '1 h'")

    [breach] = await lifecycle.breaches(db, overdue_seconds=60.0)
    assert "lease" in breach.invariant

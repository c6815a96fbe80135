"""What children ask for and report, and who writes it when something dies or waits."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest

from app import lifecycle
from app.core import ids
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Claim, Claimed, Error, Unclaimed, Wanted
from app.worker.desk import Desk
from app.worker.line import Line
from app.worker.spool import Report
from tests.support import database
from tests.support.keepers import alone, occupy
from tests.support.service import Service
from tests.support.waiting import until


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with database.opened(settings) as opened:
        yield opened


def report(claimed: Claimed, outcome: lifecycle.Outcome | None = None) -> Report:
    return Report(
        claim=claimed.claim,
        name=claimed.name,
        queue=claimed.queue,
        budgets=claimed.budgets,
        traceparent=None,
        limited_with=None,
        outcome=outcome or lifecycle.Succeeded('"done"'),
        log=None,
        run_seconds=0.1,
    )


async def test_a_keeper_writes_what_the_one_before_it_has_left(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    assert desk.spool.put(0, report(claimed).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        await until(lambda: not desk.spool.places(), what="an empty spool")

    row = await database.row(db, claimed.claim.task_id)
    assert (row["status"], row["result"]) == ("SUCCESS", '"done"')


@pytest.fixture
def gone() -> int:
    """The id of a process that is dead."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


async def test_what_a_child_has_reported_does_not_die_with_it(
    settings: Settings, desk: Desk, db: Database, gone: int, tmp_path: Path
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    # It had no time to show that it has done with the attempt.
    occupy(desk, gone, claimed.claim, limit_seconds=0.0)
    assert desk.spool.put(0, report(claimed).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        await until(lambda: not desk.slots.all(), what="the burial")

    row = await database.row(db, claimed.claim.task_id)
    assert (row["status"], row["crashes"]) == ("SUCCESS", 0)


async def test_a_slot_whose_report_was_overwritten_is_free_again(
    settings: Settings, desk: Desk, db: Database, gone: int, tmp_path: Path
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    occupy(desk, gone, claimed.claim, limit_seconds=0.0)
    place = desk.spool.put(0, report(claimed).encode())
    assert place is not None
    at = desk.spool._offset(*place) + 20
    desk.spool._memory[at : at + 1] = b"\xff"

    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        await until(lambda: not (desk.slots.all() or desk.spool.places()), what="the burial")

    assert (await database.row(db, claimed.claim.task_id))["crashes"] == 1


async def test_a_child_asks_and_reports_whichever_keeper_is_there(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    line = Line(desk.door, desk.spool, desk.slots.occupy())
    first, second = await database.submitted(db), await database.submitted(db, name="sample.sleep")
    unknown = Wanted(Claim(ids.uuid7(), 1, uuid4()), "sample.echo", "test")

    def wanted(task_id: UUID, name: str) -> Wanted:
        return Wanted(Claim(task_id, 1, uuid4()), name, "test")

    # It is asked before it is there.
    asked = asyncio.create_task(asyncio.to_thread(line.claim, wanted(first, "sample.echo")))
    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        claimed = await asked
        assert isinstance(claimed, Claimed)
        assert (claimed.name, claimed.queue, claimed.args) == ("sample.echo", "default", "[]")
        assert await asyncio.to_thread(line.claim, unknown) is Unclaimed.STALE
    # Another one takes over, and the child notices by itself.
    asked = asyncio.create_task(asyncio.to_thread(line.claim, wanted(second, "sample.sleep")))
    with alone(settings, desk, os.getpid(), tmp_path / "another"):
        other = await asked
        assert isinstance(other, Claimed)
        assert await asyncio.to_thread(line.report, report(claimed), wait=True) == "SUCCESS"
        assert await asyncio.to_thread(line.report, report(claimed), wait=True) == "SUCCESS", "it is its own hand"
        forged = replace(report(claimed), claim=Claim(first, 1, uuid4()))
        assert await asyncio.to_thread(line.report, forged, wait=True) is None
        assert line.report(report(other), wait=False) is None
        await until(lambda: not desk.spool.places(), what="an empty spool")
    line.hang_up()
    assert (await database.row(db, second))["status"] == "SUCCESS"


async def test_one_report_that_postgres_refuses_keeps_no_other(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    task_ids = [await database.submitted(db) for _ in range(3)]
    claimed = [await database.started(db, task_id) for task_id in task_ids]
    for one, result in zip(claimed, ("1", "no JSON", "3"), strict=True):
        assert desk.spool.put(0, report(one, lifecycle.Succeeded(result)).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        await until(lambda: not desk.spool.places(), what="an empty spool")

    rows = [await database.row(db, task_id) for task_id in task_ids]
    assert [(row["status"], row["error_type"]) for row in rows] == [
        ("SUCCESS", None),
        ("FAILURE", "ResultNotSerializable"),
        ("SUCCESS", None),
    ]


REFUSE_ENDS = (
    """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        RAISE EXCEPTION 'no end' USING ERRCODE = 'check_violation';
    END $$
    """,
    """
    CREATE TRIGGER refuse BEFORE UPDATE ON task FOR EACH ROW
    WHEN (OLD.name = 'sample.sleep' AND NEW.finished_at IS NOT NULL) EXECUTE FUNCTION refuse()
    """,
)


async def test_a_report_that_postgres_refuses_whatever_it_says_ends_no_keeper(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    refused = await database.started(db, await database.submitted(db, name="sample.sleep"), name="sample.sleep")
    claimed = await database.started(db, await database.submitted(db))
    for statement in REFUSE_ENDS:
        await db.execute(statement)
    for one in (refused, claimed):
        assert desk.spool.put(0, report(one).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log") as keeper:
        await until(lambda: not desk.spool.places(), what="an empty spool")
        assert keeper.poll() is None

    assert (await database.row(db, claimed.claim.task_id))["status"] == "SUCCESS"
    assert (await database.row(db, refused.claim.task_id))["status"] == "STARTED"


async def test_attempts_that_end_together_are_told_of_each_as_its_own(db: Database) -> None:
    hook = "https://example.com/hook"
    claimed = [await database.started(db, await database.submitted(db, webhook_url=hook)) for _ in range(3)]
    error = Error(type="OSError", message="no")
    outcomes: list[lifecycle.Outcome] = [
        lifecycle.Succeeded("1"),
        lifecycle.Failed(error),
        lifecycle.RetryAsked(error, 60.0),
    ]
    done = [
        lifecycle.Done(one.claim, lifecycle.decide(one.budgets, outcome))
        for one, outcome in zip(claimed, outcomes, strict=True)
    ]
    stranger = lifecycle.Done(Claim(claimed[0].claim.task_id, 1, uuid4()), done[0].transition)

    settled = await lifecycle.settle_all(db, [done[2], stranger, done[1], done[0]])

    assert [one and str(one.status) for one in settled] == ["RETRY", None, "FAILURE", "SUCCESS"]
    ids_of = [one.claim.task_id for one in claimed]
    assert [await database.events(db, task_id) for task_id in ids_of] == [["task.succeeded"], ["task.failed"], []]
    kept = await db.fetch("SELECT task_id FROM task_attempt WHERE task_id = ANY ($1)", ids_of)
    assert {row["task_id"] for row in kept} == set(ids_of[1:]), "a plain success is known from its row"


async def test_claims_that_come_together_are_each_its_own(db: Database) -> None:
    plain, other = await database.submitted(db), await database.submitted(db)
    told = await database.submitted(
        db, webhook_url="https://example.com/hook", webhook_events=("task.started", "task.succeeded")
    )
    wanted = [Wanted(Claim(one, 1, uuid4()), "sample.echo", "test") for one in (other, plain, plain, told)]

    found = await lifecycle.claim_plain(db, wanted, lease_seconds=30.0)

    assert found[0] is not None
    assert found[0].claim == wanted[0].claim
    assert [one for one in found[1:3] if one is not None] != [], "one of two for the same task"
    assert None in found[1:3]
    assert found[3] is None, "somebody wants to hear of its start"
    assert isinstance(await lifecycle.claim_with_care(db, wanted[3], lease_seconds=30.0), Claimed)


async def test_a_worker_that_stops_waits_until_its_reports_are_written(running: Service) -> None:
    """Where it is the first process of a container, its end is that of the keeper."""
    worker = running.process("worker")
    task_id = await asyncio.to_thread(running.submit, "sample.sleep", 0.5)
    await asyncio.to_thread(running.reaches, task_id, "STARTED")
    rival = await asyncpg.connect(running.environment["DATABASE_URL"])
    try:
        async with rival.transaction():
            await rival.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", task_id)
            children = worker.children()
            worker.signal(signal.SIGTERM)
            await until(lambda: not any(child.is_running() for child in children), what="the end of the pool")
            assert worker.running()
        await until(lambda: not worker.running(), what="the end of the worker")
        # Whoever waited for the worker finds the end, without waiting for the keeper.
        row = await rival.fetchrow("SELECT status, attempt FROM task WHERE id = $1", task_id)
        assert row is not None
        assert tuple(row) == ("SUCCESS", 1)
    finally:
        await rival.close()
        await asyncio.to_thread(running.start_worker)

"""What children ask for and report, and who writes it when something dies or waits."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app import lifecycle
from app.core import ids
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Claim, Claimed, Error, Unclaimed, Wanted
from app.worker.desk import Desk
from app.worker.line import SETTLED, SPOOLED, UNKNOWN, WHERE, Line, frame
from app.worker.spool import Report
from tests.support import database
from tests.support.keepers import alone, occupy
from tests.support.service import Service
from tests.support.waiting import aside, until


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
    asked = aside(line.claim, wanted(first, "sample.echo"))
    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        claimed = await asked
        assert isinstance(claimed, Claimed)
        assert (claimed.name, claimed.queue, claimed.args) == ("sample.echo", "default", "[]")
        assert await aside(line.claim, unknown) is Unclaimed.STALE
    # Another one takes over, and the child notices by itself.
    asked = aside(line.claim, wanted(second, "sample.sleep"))
    with alone(settings, desk, os.getpid(), tmp_path / "another"):
        other = await asked
        assert isinstance(other, Claimed)
        assert await aside(line.report, report(claimed), wait=True) == "SUCCESS"
        assert await aside(line.report, report(claimed), wait=True) == "SUCCESS", "it is its own hand"
        forged = replace(report(claimed), claim=Claim(first, 1, uuid4()))
        assert await aside(line.report, forged, wait=True) is None
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


async def test_an_end_that_postgres_refuses_for_want_of_a_right_is_written_when_it_has_it(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    for statement in REFUSE_ENDS:
        sql = statement.replace("check_violation", "insufficient_privilege").replace("sample.sleep", "sample.echo")
        await db.execute(sql)
    assert desk.spool.put(0, report(claimed).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        log = tmp_path / "log"
        await until(lambda: "a settle waits for Postgres" in log.read_text(), what="the first refusal")
        assert desk.spool.places()
        await db.execute("DROP TRIGGER refuse ON task")
        await until(lambda: not desk.spool.places(), what="an empty spool")

    row = await database.row(db, claimed.claim.task_id)
    assert (row["status"], row["result"], row["attempt"]) == ("SUCCESS", '"done"', 1)


async def test_a_locked_row_of_an_earlier_task_of_a_dead_child_keeps_its_present_one_from_nothing(
    settings: Settings, desk: Desk, db: Database, gone: int, tmp_path: Path
) -> None:
    before, present = [await database.started(db, await database.submitted(db)) for _ in range(2)]
    rival = await asyncpg.connect(settings.postgres_dsn)
    try:
        async with rival.transaction():
            await rival.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", before.claim.task_id)
            assert desk.spool.put(0, report(before).encode()) is not None
            occupy(desk, gone, present.claim, limit_seconds=0.0)
            with alone(settings, desk, os.getpid(), tmp_path / "log"):
                await until(lambda: not desk.slots.all(), what="the burial")
                assert (await database.row(db, present.claim.task_id))["crashes"] == 1
                assert desk.spool.places()
                await rival.execute("ROLLBACK")
                await until(lambda: not desk.spool.places(), what="the end of the one before")
    finally:
        await rival.close()
    assert (await database.row(db, before.claim.task_id))["status"] == "SUCCESS"


async def test_claims_of_a_limited_queue_do_not_wait_for_ends_that_have_to(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    ended = [await database.started(db, await database.submitted(db)) for _ in range(10)]
    told = replace(report(await database.started(db, await database.submitted(db))), limited_with="")
    for queue in ("default", "limited"):
        await lifecycle.limit_queue(db, queue, lifecycle.Limits(concurrency=50))
    tasks = [await database.submitted(db, queue="limited") for _ in range(5)]
    line = Line(desk.door, desk.spool, desk.slots.occupy())
    rival = await asyncpg.connect(settings.postgres_dsn)
    try:
        async with rival.transaction():
            await rival.fetch("SELECT FROM task WHERE id = ANY ($1) FOR UPDATE", [one.claim.task_id for one in ended])
            # Whoever lets the next ones go of a queue that a task has left waits for this, too.
            await rival.execute("SELECT pg_advisory_xact_lock(hashtextextended('taskqueue held default', 0))")
            with alone(settings, desk, os.getpid(), tmp_path / "log"):
                for one in (told, *map(report, ended)):
                    assert desk.spool.put(0, one.encode()) is not None
                await until(lambda: len(desk.spool.places()) == len(ended), what="the one that is not locked")
                async with asyncio.timeout(5):
                    for task_id in tasks:
                        wanted = Wanted(Claim(task_id, 1, uuid4()), "sample.echo", "test")
                        assert isinstance(await aside(line.claim, wanted), Claimed)
                await rival.execute("ROLLBACK")
                await until(lambda: not desk.spool.places(), 20, what="the last end")
    finally:
        await rival.close()
        line.hang_up()


async def test_rows_that_somebody_has_locked_keep_no_other_waiting(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    ended = [(await database.started(db, await database.submitted(db))) for _ in range(6)]
    tasks = [await database.submitted(db) for _ in range(4)]
    lines = [Line(desk.door, desk.spool, desk.slots.occupy()) for _ in tasks]
    # As many as there are connections for those that have to wait, and one more.
    locked = [ended[0].claim.task_id, *tasks[:2]]
    rival = await asyncpg.connect(settings.postgres_dsn)
    try:
        async with rival.transaction():
            await rival.fetch("SELECT FROM task WHERE id = ANY ($1) FOR UPDATE", locked)
            with alone(settings, desk, os.getpid(), tmp_path / "log"):
                asked = [
                    aside(line.claim, Wanted(Claim(task_id, 1, uuid4()), "sample.echo", "test"))
                    for line, task_id in zip(lines, tasks, strict=True)
                ]
                assert isinstance(await asked[2], Claimed)
                assert isinstance(await asked[3], Claimed)
                for one in ended:
                    assert desk.spool.put(0, report(one).encode()) is not None
                await until(lambda: len(desk.spool.places()) == 1, 8, "all ends but one")
                assert not any(one.done() for one in asked[:2])
                await rival.execute("ROLLBACK")
                assert isinstance(await asked[0], Claimed)
                assert isinstance(await asked[1], Claimed)
                await until(lambda: not desk.spool.places(), what="the last end")
    finally:
        await rival.close()
        for line in lines:
            line.hang_up()
    assert (await database.row(db, locked[0]))["status"] == "SUCCESS"


async def test_a_report_that_means_nothing_ends_its_own_task_only(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    odd, plain = [await database.started(db, await database.submitted(db)) for _ in range(2)]
    error = Error(type="KeyError", message="no")
    most: Any = "5"
    for one, outcome in ((odd, lifecycle.RetryAsked(error, 1.0, most)), (plain, None)):
        assert desk.spool.put(0, report(one, outcome).encode()) is not None

    with alone(settings, desk, os.getpid(), tmp_path / "log") as keeper:
        await until(lambda: not desk.spool.places(), what="an empty spool")
        assert keeper.poll() is None

    row = await database.row(db, odd.claim.task_id)
    assert (row["status"], row["error_type"]) == ("FAILURE", "OutcomeNotStorable")
    assert (await database.row(db, plain.claim.task_id))["status"] == "SUCCESS"


async def test_a_claim_that_postgres_refuses_is_answered(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    task_id = await database.submitted(db)
    await lifecycle.limit_queue(db, "default", lifecycle.Limits(concurrency=5))
    await db.execute("ALTER FUNCTION queue_load RENAME TO another")
    line = Line(desk.door, desk.spool, desk.slots.occupy())
    wanted = Wanted(Claim(task_id, 1, uuid4()), "sample.echo", "test")
    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        assert await aside(line.claim, wanted) is Unclaimed.STALE
        await db.execute("ALTER FUNCTION another RENAME TO queue_load")
        assert isinstance(await aside(line.claim, wanted), Claimed)
    line.hang_up()


async def test_a_child_that_waits_for_a_report_that_is_written_already_goes_on(
    settings: Settings, desk: Desk, db: Database, tmp_path: Path
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    slot = desk.slots.occupy()
    line = Line(desk.door, desk.spool, slot)
    with alone(settings, desk, os.getpid(), tmp_path / "log"):
        place = desk.spool.put(slot, report(claimed).encode())
        assert place is not None
        await until(lambda: not desk.spool.places(), what="a look of the keeper's")
        # Only now it comes to say so.
        line._send(frame(SPOOLED, WHERE.pack(*place, True)))  # as `report` does
        assert await aside(line._answer, SETTLED) == UNKNOWN
    line.hang_up()


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


HOLD_ENDS = (
    """
    CREATE FUNCTION hold_end() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock_shared(77);
        RETURN NEW;
    END $$
    """,
    """
    CREATE TRIGGER hold_end BEFORE UPDATE ON task FOR EACH ROW
    WHEN (OLD.name = 'sample.large' AND NEW.finished_at IS NOT NULL) EXECUTE FUNCTION hold_end()
    """,
)


async def test_a_task_whose_report_waits_for_room_is_not_past_its_limit(running: Service) -> None:
    rival = await asyncpg.connect(running.environment["DATABASE_URL"])
    started = "SELECT count(*) = 3 FROM task WHERE name = 'sample.large' AND status = 'STARTED'"
    try:
        for statement in HOLD_ENDS:
            await rival.execute(statement)
        await rival.execute("SELECT pg_advisory_lock(77)")
        # Of what is large, a child's spool holds one: with two children, one of them has no room for its second.
        submitted = [await asyncio.to_thread(_submit_large, running) for _ in range(3)]
        await until(lambda: rival.fetchval(started), what="all of them")
        began = time.monotonic()
        await until(lambda: time.monotonic() - began > 2.5, what="more than their limit")
        await rival.execute("SELECT pg_advisory_unlock(77)")
        views = [await asyncio.to_thread(running.ends, task_id) for task_id in submitted]
    finally:
        await rival.execute("DROP TRIGGER IF EXISTS hold_end ON task; DROP FUNCTION IF EXISTS hold_end")
        await rival.close()
    assert [(view["status"], view["attempt"]) for view in views] == [("SUCCESS", 1)] * 3


def _submit_large(running: Service) -> UUID:
    return running.submit("sample.large", 100_000, time_limit=1.0)

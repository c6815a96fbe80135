"""Schedules against Postgres: each time is fired once, whoever tries, and no schedule is in another's way."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from app import catalog, lifecycle, schedules
from app.core.config import Settings
from app.core.statuses import CatchUp, Overlap
from app.db import Database
from app.scheduler import Scheduler
from app.schedules import Definition, Schedule, Timing
from tests.support.database import opened, row, started

OWNER = "alice"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
def scheduler(settings: Settings, db: Database) -> Scheduler:
    return Scheduler(settings, db)


async def put(db: Database, name: str = "s", *, late_seconds: float = 0.0, **changes: Any) -> Schedule:
    """A schedule that was due so long ago."""
    now = await lifecycle.clock(db)
    timing = Timing(
        cron=changes.pop("cron", None),
        time_zone="UTC",
        every_seconds=changes.pop("every", 3600.0),
        anchor=now - timedelta(seconds=late_seconds),
        start_at=None,
        end_at=changes.pop("end", None),
        jitter_seconds=changes.pop("jitter", 0.0),
    )
    submit = {"task": "sample.echo", "args": [1], **changes.pop("submit", {})}
    fields = {"catch_up": CatchUp.ONE, "overlap": Overlap.ALLOW, "paused": False, **changes}
    definition = Definition(timing=timing, task=submit["task"], submit=json.dumps(submit), **fields)
    written = await schedules.put(db, OWNER, name, definition, timing.anchor, over=None)
    assert written is not None
    return written


async def read(db: Database, name: str = "s") -> Schedule:
    found = await schedules.get(db, OWNER, name)
    assert found is not None
    return found


async def tasks_of(db: Database, name: str = "s") -> list[dict[str, Any]]:
    rows = await db.fetch("SELECT * FROM task WHERE schedule = $1 ORDER BY scheduled_for", name)
    return [dict(one) for one in rows]


async def test_a_time_that_has_come_is_fired_once_with_all_that_is_to_be_submitted(
    db: Database, scheduler: Scheduler
) -> None:
    submit = {
        "args": [{"é": "😀"}],
        "queue": "default",
        "concurrency_key": "customer-7",
        "max_retries": 7,
        "time_limit": 2.5,
        "expires": 60,
        "tags": ["nightly"],
        "webhook_url": "https://example.com/hook",
        "webhook_events": ["task.failed"],
    }
    before = await put(db, submit=submit)
    assert await scheduler.fire_due(limit=10) == 1
    assert await scheduler.fire_due(limit=10) == 0

    [task] = await tasks_of(db)
    assert task["scheduled_for"] == before.next_run
    assert (task["owner"], task["name"], task["queue"], task["status"]) == (OWNER, "sample.echo", "default", "PENDING")
    assert json.loads(task["args"]) == [{"é": "😀"}]
    assert (task["max_retries"], task["time_limit"], task["tags"]) == (7, 2.5, ["nightly"])
    assert (task["webhook_url"], task["webhook_events"]) == ("https://example.com/hook", ["task.failed"])
    view = await lifecycle.view(db, task["id"], owner=OWNER)
    assert view is not None
    assert view.concurrency_key == "customer-7"
    assert task["expires_at"] - task["created_at"] == timedelta(seconds=60)
    assert task["traceparent"].startswith("00-")
    after = await read(db)
    assert before.next_run is not None
    assert after.next_run == before.next_run + timedelta(hours=1)
    assert (after.last_run, after.last_task_id, after.fired) == (before.next_run, task["id"], 1)


async def test_the_feed_pushes_what_was_fired(db: Database, scheduler: Scheduler) -> None:
    await put(db)
    await scheduler.fire_due(limit=10)
    [task] = await tasks_of(db)
    assert [bell.task_id for bell in await lifecycle.take_due(db, "default", limit=10)] == [task["id"]]


async def test_what_was_not_said_is_the_task_s_own_when_it_is_fired(db: Database, scheduler: Scheduler) -> None:
    await put(db, submit={"task": "sample.flaky", "args": [0]})
    await scheduler.fire_due(limit=10)
    [task] = await tasks_of(db)
    assert task["max_retries"] == catalog.lookup("sample.flaky").max_retries


async def test_of_two_that_decided_about_the_same_time_one_fires(db: Database, settings: Settings) -> None:
    for n in range(20):
        await put(db, f"s{n}")
    racing = [Scheduler(settings, db) for _ in range(4)]
    await asyncio.gather(*(one.fire_due(limit=100) for one in racing))
    rows = await db.fetch("SELECT schedule, count(*) FROM task GROUP BY 1")
    assert sorted(one["count"] for one in rows) == [1] * 20
    assert [one.fired for one in await schedules.page(db, OWNER, after="", limit=100)] == [1] * 20


async def test_a_statement_that_is_repeated_after_a_lost_answer_does_nothing(db: Database) -> None:
    before = await put(db)
    assert before.next_run is not None
    decided = schedules.Due((before.next_run,), before.next_run + timedelta(hours=1), missed=False)
    tasks = [lifecycle.NewTask(id=_uuid(n), name="sample.echo", queue="default") for n in range(2)]
    assert await schedules.fire(db, before, decided, tasks[:1]) == schedules.Fired(1, skipped=False)
    assert await schedules.fire(db, before, decided, tasks[1:]) is None
    assert [task["id"] for task in await tasks_of(db)] == [_uuid(0)]


async def test_a_time_has_one_task_even_for_a_schedule_that_was_made_anew(db: Database, scheduler: Scheduler) -> None:
    before = await put(db)
    await scheduler.fire_due(limit=10)
    assert await schedules.delete(db, OWNER, "s")
    again = await schedules.put(db, OWNER, "s", before.definition, before.next_run, over=None)
    assert again is not None
    assert await scheduler.fire_due(limit=10) == 1
    assert len(await tasks_of(db)) == 1


async def test_what_is_replaced_meanwhile_is_not_fired_as_it_was(db: Database) -> None:
    before = await put(db)
    assert before.next_run is not None
    replaced = await schedules.put(
        db, OWNER, "s", dataclasses.replace(before.definition, paused=True), None, over=before
    )
    assert replaced is not None
    decided = schedules.Due((before.next_run,), None, missed=False)
    task = lifecycle.NewTask(id=_uuid(0), name="sample.echo", queue="default")
    assert await schedules.fire(db, before, decided, [task]) is None
    assert await schedules.put(db, OWNER, "s", before.definition, before.next_run, over=before) is None
    assert await tasks_of(db) == []


@pytest.mark.parametrize(("catch_up", "fired"), [("none", 0), ("one", 1), ("all", 6)])
async def test_times_that_were_missed_follow_the_policy(
    db: Database, scheduler: Scheduler, catch_up: str, fired: int
) -> None:
    await put(db, late_seconds=5 * 3600 + 120, catch_up=CatchUp(catch_up))
    assert await scheduler.fire_due(limit=10) == 1
    assert await scheduler.fire_due(limit=10) == 0
    tasks = await tasks_of(db)
    assert len(tasks) == fired
    after = await read(db)
    assert after.next_run is not None
    assert after.next_run > await lifecycle.clock(db)
    assert after.last_run == (tasks[-1]["scheduled_for"] if tasks else None)


async def test_what_must_not_overlap_waits_for_the_end_of_the_last_task(db: Database, scheduler: Scheduler) -> None:
    await put(db, overlap=Overlap.SKIP)
    for n in range(3):
        await _make_due(db)
        assert await scheduler.fire_due(limit=10) == 1
        assert len(await tasks_of(db)) == 1, n
    after = await read(db)
    assert (after.fired, after.skipped) == (1, 2)
    [task] = await tasks_of(db)
    assert (after.last_task_id, after.last_run) == (task["id"], task["scheduled_for"])

    await lifecycle.cancel(db, task["id"], owner=OWNER)
    await _make_due(db)
    await scheduler.fire_due(limit=10)
    assert len(await tasks_of(db)) == 2


async def test_what_may_overlap_is_fired_while_the_last_task_runs(db: Database, scheduler: Scheduler) -> None:
    await put(db)
    await scheduler.fire_due(limit=10)
    [first] = await tasks_of(db)
    await started(db, first["id"])
    await _make_due(db)
    await scheduler.fire_due(limit=10)
    assert len(await tasks_of(db)) == 2


async def test_a_task_that_is_gone_is_told_and_is_in_nobody_s_way(
    db: Database, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await put(db, "gone", late_seconds=50, submit={"task": "sample.gone"})
    await put(db, "good", late_seconds=10)
    assert await scheduler.fire_due(limit=10) == 2
    assert len(await tasks_of(db, "good")) == 1
    failing = await read(db, "gone")
    assert failing.last_error == "/submit/task: No task of this name is registered"
    assert failing.failing_since is not None
    assert "schedule gone can't be fired" in caplog.text
    assert await scheduler.fire_due(limit=10) == 0, "it is tried again, but not at once"

    caplog.clear()
    await _try_again(db)
    assert await scheduler.fire_due(limit=10) == 1
    assert (await read(db, "gone")).failing_since == failing.failing_since
    assert "can't be fired" not in caplog.text, "the same is said once"

    monkeypatch.setitem(catalog._registry, "sample.gone", catalog.lookup("sample.echo"))
    await _try_again(db)
    await scheduler.fire_due(limit=10)
    mended = await read(db, "gone")
    [task] = await tasks_of(db, "gone")
    assert task["scheduled_for"] == failing.next_run, "no time was lost meanwhile"
    assert (mended.last_error, mended.failing_since, mended.fired) == (None, None, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"submit": {"args": []}}, "/submit/kwargs/value: Required"),
        ({"submit": {"queue": "gone"}}, "/submit/queue: No worker consumes a queue of this name"),
        ({"submit": {"webhook_url": "http://127.0.0.1/"}}, "/submit/webhook_url: "),
        ({"submit": {"of_a_later_release": 1}}, "/submit: this release can't read it"),
    ],
)
async def test_what_can_t_be_submitted_any_more_is_told(
    db: Database, scheduler: Scheduler, change: dict[str, Any], told: str
) -> None:
    await put(db, **change)
    await scheduler.fire_due(limit=10)
    failing = await read(db)
    assert (failing.last_error or "").startswith(told)
    assert await tasks_of(db) == []


async def test_an_expression_that_this_release_can_t_read_is_told(db: Database, scheduler: Scheduler) -> None:
    await put(db, cron="0 0 L * *", every=None)
    await scheduler.fire_due(limit=10)
    assert "day of the month" in ((await read(db)).last_error or "")


async def test_a_module_that_can_t_be_imported_is_told(db: Database, settings: Settings) -> None:
    await put(db)
    broken = settings.model_copy(update={"task_modules": ("no_such_module",)})
    await Scheduler(broken, db).fire_due(limit=10)
    assert (await read(db)).last_error == "The relay can't import the tasks of TASKQUEUE_TASK_MODULES"
    await _try_again(db)
    await Scheduler(settings, db).fire_due(limit=10)
    assert len(await tasks_of(db)) == 1, "another relay can"


async def test_a_time_is_put_off_by_its_jitter_and_is_still_that_time(db: Database, scheduler: Scheduler) -> None:
    for n in range(20):
        await put(db, f"s{n}", jitter=1000.0, late_seconds=500)
    rows = await db.fetch("SELECT extract(epoch FROM due_at - next_run)::float8 AS off FROM schedule")
    off = sorted(one["off"] for one in rows)
    assert off[0] < 500 < off[-1] < 1000
    due = sum(one < 500 for one in off)
    assert await scheduler.fire_due(limit=100) == due
    times = await db.fetch("SELECT schedule, scheduled_for FROM task")
    assert len(times) == due
    next_runs = {one.name: one for one in await schedules.page(db, OWNER, after="", limit=100)}
    for one in times:
        anchor = next_runs[one["schedule"]].definition.timing.anchor
        assert one["scheduled_for"] == anchor


async def test_after_the_last_time_nothing_is_due(db: Database, scheduler: Scheduler) -> None:
    await put(db, end=datetime.now(UTC) + timedelta(minutes=1))
    assert await scheduler.fire_due(limit=10) == 1
    assert (await read(db)).next_run is None
    assert await db.fetchval("SELECT count(*) FROM schedule WHERE due_at IS NOT NULL") == 0


async def test_one_owner_s_schedules_are_limited(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.schedules.table.SCHEDULES_LIMIT", 2)
    first = await put(db, "a")
    await put(db, "b")
    assert await schedules.put(db, OWNER, "c", first.definition, None, over=None) is None
    assert await schedules.put(db, "bob", "c", first.definition, None, over=None) is not None
    assert await schedules.put(db, OWNER, "a", first.definition, None, over=first) is not None


async def test_a_schedule_that_nobody_fires_breaks_an_invariant(db: Database) -> None:
    await put(db, late_seconds=120)
    [breach] = await lifecycle.breaches(db, overdue_seconds=60)
    assert breach.sample == ("alice/s",)
    assert await lifecycle.breaches(db, overdue_seconds=180) == []


async def test_what_keeps_a_time_from_being_fired_again_is_forgotten(db: Database, scheduler: Scheduler) -> None:
    for name in "abc":
        await put(db, name)
    await scheduler.fire_due(limit=10)
    await db.execute("UPDATE schedule_run SET fired_at = now() - interval '2 h' WHERE schedule <> 'c'")
    assert await schedules.forget(db, older_than_seconds=3600, limit=1) == 1
    assert await schedules.forget(db, older_than_seconds=3600, limit=10) == 1
    assert await schedules.forget(db, older_than_seconds=3600, limit=10) == 0
    assert await db.fetchval("SELECT schedule FROM schedule_run") == "c"


async def test_the_tasks_that_a_schedule_submitted_outlive_it(db: Database, scheduler: Scheduler) -> None:
    await put(db)
    await scheduler.fire_due(limit=10)
    [task] = await tasks_of(db)
    assert await schedules.delete(db, OWNER, "s")
    assert not await schedules.delete(db, OWNER, "s")
    assert (await row(db, task["id"]))["schedule"] == "s"


async def _make_due(db: Database) -> None:
    """Let the next time have come just now."""
    await db.execute("UPDATE schedule SET version = version + 1, anchor = now(), next_run = now(), due_at = now()")


async def _try_again(db: Database) -> None:
    """Let the next try after an error have come."""
    await db.execute("UPDATE schedule SET version = version + 1, due_at = next_run WHERE last_error IS NOT NULL")


def _uuid(n: int) -> UUID:
    return UUID(int=n + (7 << 76) + (1 << 63))

"""Every statement on `schedule`.

Whoever decides about a schedule has read it, and writes under the version that
was read; zero rows means that somebody else was first, and nothing was written.
"""

import random
from collections.abc import Sequence
from datetime import datetime, timedelta

from app import lifecycle
from app.core.statuses import CatchUp, Overlap
from app.db import Database, Record
from app.schedules.timing import Timing
from app.schedules.values import Definition, Due, Fired, Schedule

SCHEDULES_LIMIT = 1000
"""Schedules of one owner."""


_COLUMNS = """owner, name, task, submit, cron, time_zone, every_seconds, anchor, start_at, end_at, jitter_seconds,
       catch_up, overlap, paused, version, next_run, last_run, last_task_id, fired, skipped, last_error,
       failing_since, created_at, updated_at"""


def _schedule(row: Record) -> Schedule:
    timing = Timing(
        cron=row["cron"],
        time_zone=row["time_zone"],
        every_seconds=row["every_seconds"],
        anchor=row["anchor"],
        start_at=row["start_at"],
        end_at=row["end_at"],
        jitter_seconds=row["jitter_seconds"],
    )
    definition = Definition(
        timing=timing,
        catch_up=CatchUp(row["catch_up"]),
        overlap=Overlap(row["overlap"]),
        paused=row["paused"],
        task=row["task"],
        submit=row["submit"],
    )
    return Schedule(
        owner=row["owner"],
        name=row["name"],
        definition=definition,
        version=row["version"],
        next_run=row["next_run"],
        last_run=row["last_run"],
        last_task_id=row["last_task_id"],
        fired=row["fired"],
        skipped=row["skipped"],
        last_error=row["last_error"],
        failing_since=row["failing_since"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
    )


async def get(db: Database, owner: str, name: str) -> Schedule | None:
    """One schedule of an owner; None if there is none of this name."""
    row = await db.fetchrow(f"SELECT {_COLUMNS} FROM schedule WHERE owner = $1 AND name = $2", owner, name)
    return None if row is None else _schedule(row)


_PAGE = f"SELECT {_COLUMNS} FROM schedule WHERE owner = $1 AND name > $2 ORDER BY name LIMIT $3"


async def page(db: Database, owner: str, *, after: str, limit: int) -> list[Schedule]:
    """An owner's schedules by name, from the one behind `after` on."""
    return [_schedule(row) for row in await db.fetch(_PAGE, owner, after, limit)]


async def count_live(db: Database, owner: str) -> int:
    """How many schedules of an owner have a time to come."""
    sql = "SELECT count(*) FROM schedule WHERE owner = $1 AND next_run IS NOT NULL"
    return int(await db.fetchval(sql, owner))


_CREATE = f"""
INSERT INTO schedule (owner, name, task, submit, cron, time_zone, every_seconds, anchor, start_at, end_at,
                      jitter_seconds, catch_up, overlap, paused, next_run, due_at)
SELECT $1, $2, $3, $4::json, $5, $6, $7::float8, $8::timestamptz, $9::timestamptz, $10::timestamptz,
       $11::float8, $12, $13, $14::bool, $15::timestamptz, $16::timestamptz
 WHERE (SELECT count(*) FROM (SELECT FROM schedule WHERE owner = $1 LIMIT $17) AS those) < $17
ON CONFLICT (owner, name) DO NOTHING
RETURNING {_COLUMNS}
"""
_REPLACE = f"""
UPDATE schedule
   SET task = $3, submit = $4::json, cron = $5, time_zone = $6, every_seconds = $7::float8,
       anchor = $8::timestamptz, start_at = $9::timestamptz, end_at = $10::timestamptz, jitter_seconds = $11::float8,
       catch_up = $12, overlap = $13, paused = $14::bool, next_run = $15::timestamptz, due_at = $16::timestamptz,
       version = version + 1, last_error = NULL, failing_since = NULL, updated_at = now()
 WHERE owner = $1 AND name = $2 AND version = $17
RETURNING {_COLUMNS}
"""


async def put(
    db: Database, owner: str, name: str, definition: Definition, next_run: datetime | None, *, over: Schedule | None
) -> Schedule | None:
    """Write what a schedule is to be.

    Args:
        db: where.
        owner: whose it is.
        name: its name.
        definition: what it is to do.
        next_run: its next time (`rules.planned`).
        over: what was there when that was decided; None for a new one.

    Returns:
        What is there now; None if something else was there than `over`, or the owner has `SCHEDULES_LIMIT`.
    """
    timing = definition.timing
    row = await db.fetchrow(
        _CREATE if over is None else _REPLACE,
        owner,
        name,
        definition.task,
        definition.submit,
        timing.cron,
        timing.time_zone,
        timing.every_seconds,
        timing.anchor,
        timing.start_at,
        timing.end_at,
        timing.jitter_seconds,
        str(definition.catch_up),
        str(definition.overlap),
        definition.paused,
        next_run,
        _put_off(next_run, timing),
        SCHEDULES_LIMIT if over is None else over.version,
    )
    return None if row is None else _schedule(row)


def _put_off(next_run: datetime | None, timing: Timing) -> datetime | None:
    if next_run is None:
        return None
    seconds = random.uniform(0.0, timing.jitter_seconds)  # noqa: S311  # jitter is no secret
    return next_run + timedelta(seconds=seconds)


async def delete(db: Database, owner: str, name: str) -> bool:
    """Remove a schedule; its tasks stay. Returns whether there was one."""
    return await db.execute("DELETE FROM schedule WHERE owner = $1 AND name = $2", owner, name) == "DELETE 1"


_DUE = f"SELECT {_COLUMNS}, now() AS now FROM schedule WHERE due_at <= now() ORDER BY due_at LIMIT $1"


async def due(db: Database, *, limit: int) -> list[tuple[Schedule, datetime]]:
    """Schedules about which something is to be decided, the longest due first, each with Postgres's time."""
    return [(_schedule(row), row["now"]) for row in await db.fetch(_DUE, limit)]


# The one statement that fires: it moves the schedule on from the time that was decided about, and submits the tasks.
# Of two that decided about the same time, the second waits for the row, and finds that it has moved. Should an answer
# be lost, it has moved, too: what is asked again comes to nothing. A time that was fired before, by a schedule of the
# same name or before a clock was set back, is passed over.
_FIRE = f"""
WITH busy AS (
    SELECT EXISTS (SELECT FROM schedule s JOIN task t ON t.id = s.last_task_id
                    WHERE s.owner = $1 AND s.name = $2 AND s.overlap = 'skip' AND t.finished_at IS NULL) AS still
), moved AS (
    UPDATE schedule s
       SET next_run = $5::timestamptz, due_at = $6::timestamptz, version = version + 1,
           last_error = NULL, failing_since = NULL,
           fired = fired + CASE WHEN busy.still THEN 0 ELSE cardinality($7::uuid[]) END,
           skipped = skipped + CASE WHEN busy.still THEN cardinality($7) ELSE 0 END,
           last_run = CASE WHEN busy.still OR cardinality($7) = 0 THEN last_run
                           ELSE ($8::timestamptz[])[cardinality($7)] END,
           last_task_id = CASE WHEN busy.still OR cardinality($7) = 0 THEN last_task_id
                               ELSE $7[cardinality($7)] END
      FROM busy
     WHERE s.owner = $1 AND s.name = $2 AND s.version = $3 AND s.next_run = $4::timestamptz
    RETURNING s.owner, s.name AS schedule, busy.still
), wanted AS (
    SELECT moved.owner, moved.schedule, w.id, w.scheduled_for, w.traceparent,
           $10::text AS name, $11::text AS queue, $12::json AS args, $13::json AS kwargs, $14::text[] AS tags,
           $15::text AS webhook_url, $16::text[] AS webhook_events, $17::int AS max_retries,
           $18::float8 AS time_limit, $19::float8 AS expires_seconds, COALESCE($20::text, '') AS concurrency_key
      FROM moved, unnest($7::uuid[], $8::timestamptz[], $9::text[]) AS w (id, scheduled_for, traceparent)
     WHERE NOT moved.still
), noted AS (
    INSERT INTO schedule_run (owner, schedule, scheduled_for, task_id)
    SELECT owner, schedule, scheduled_for, id FROM wanted
    ON CONFLICT (owner, schedule, scheduled_for) DO NOTHING
    RETURNING task_id
), fresh AS (
    SELECT wanted.* FROM wanted JOIN noted ON noted.task_id = wanted.id
), submitted AS ({lifecycle.insert_fired("fresh")})
SELECT still, (SELECT count(*) FROM submitted) AS submitted FROM moved
"""


async def fire(db: Database, schedule: Schedule, decided: Due, tasks: Sequence[lifecycle.NewTask]) -> Fired | None:
    """Submit a task for each of the times that were decided on, and move the schedule on. Safe to repeat.

    Args:
        db: where.
        schedule: as it was when that was decided.
        decided: what is to be done.
        tasks: one for each of its times. They differ in their ids and traces only.

    Returns:
        What came of it; None if the schedule has moved or changed, and nothing was written.
    """
    one = tasks[0] if tasks else None
    row = await db.fetchrow(
        _FIRE,
        schedule.owner,
        schedule.name,
        schedule.version,
        schedule.next_run,
        decided.next_run,
        _put_off(decided.next_run, schedule.definition.timing),
        [task.id for task in tasks],
        list(decided.times),
        [task.traceparent for task in tasks],
        one and one.name,
        one and one.queue,
        one and one.args,
        one and one.kwargs,
        one and list(one.tags),
        one and one.webhook_url,
        one and one.webhook_events and list(one.webhook_events),
        one and one.max_retries,
        one and one.time_limit,
        one and one.expires_in_seconds,
        one and one.stored_key,
    )
    return None if row is None else Fired(row["submitted"], row["still"] and bool(tasks))


_FAIL = """
UPDATE schedule
   SET last_error = $4, failing_since = COALESCE(failing_since, now()), version = version + 1,
       due_at = GREATEST(next_run, now() + make_interval(secs => $5))
 WHERE owner = $1 AND name = $2 AND version = $3 AND due_at IS NOT NULL
"""


async def fail(db: Database, schedule: Schedule, reason: str, *, again_in_seconds: float) -> None:
    """Say why a schedule could not be fired, and have it tried again: none of its times is lost by that."""
    await db.execute(_FAIL, schedule.owner, schedule.name, schedule.version, reason, again_in_seconds)


_FORGET = """
WITH old AS (
    SELECT owner, schedule, scheduled_for FROM schedule_run
     WHERE fired_at < now() - make_interval(secs => $1) ORDER BY fired_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM schedule_run r USING old
 WHERE (r.owner, r.schedule, r.scheduled_for) = (old.owner, old.schedule, old.scheduled_for)
RETURNING r.task_id
"""


async def forget(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove what keeps a time from being fired again, of times that nobody would. Returns how much was removed."""
    return len(await db.fetch(_FORGET, older_than_seconds, limit))

"""Acting on many tasks: cancel, or run again, every task that passes a filter.

A job is a row, and any relay takes its steps. A step finds a page of tasks and
acts on it; what it did, and where the next one goes on, are one statement. So a
relay that is killed leaves a job that another goes on with, and no task is
counted, or run again, twice. It concerns the tasks that were there when it
began: those that it makes are not among them.

Owners take turns, and each has a few jobs at most: how long a job takes depends
on how many owners have any, not on how many somebody else has begun.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum, auto
from typing import Any
from uuid import UUID, uuid4

from app import delivery
from app.core import ids
from app.core.statuses import TERMINAL, JobKind, JobStatus, TaskStatus
from app.db import Database, Record
from app.lifecycle import listing
from app.lifecycle.listing import Filter, Mark
from app.lifecycle.values import Ended, SubmitKey, settled_of
from app.lifecycle.waiting import CANCEL

STEP = 500
"""Tasks that one step acts on."""
WALK = 10_000
"""Tasks that one step looks at: nobody waits for its answer, and the next one has to wait for its turn."""
LEASE_SECONDS = 30.0
"""How long a step may take before another relay takes it."""
JOBS_AT_ONCE = 10
"""Jobs of one owner that may be under way."""

ELIGIBLE = {JobKind.CANCEL: frozenset(TaskStatus) - TERMINAL, JobKind.RERUN: TERMINAL}
"""The statuses of tasks that a job can act on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """How far a job has come.

    Attributes:
        acted: tasks that it was done to so far.
        passed_over: tasks that were found, and had moved on before it could be done to them.
    """

    id: UUID
    kind: JobKind
    status: JobStatus
    acted: int
    passed_over: int
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step of a job that this relay may take.

    Attributes:
        job_id: of which job.
        token: fences it.
        wanted: which tasks.
        after: where it goes on.
    """

    job_id: UUID
    owner: str
    kind: JobKind
    token: UUID
    wanted: Filter
    after: Mark | None


class NotBegun(Enum):
    """Why a job was not begun."""

    FULL = auto()
    """The owner has `JOBS_AT_ONCE` under way."""
    OVERTAKEN = auto()
    """Another request has the key, or was faster to take the place. It is committed."""


# A place is free whose job does not run, whoever ended it. Of two that see the same one free, the second waits for the
# row, and finds another job in it than it saw. The place comes before the key: then one with the same key, which waits
# for the key and makes no job, has at worst put the id of none into a place, and left it free.
_BEGIN = f"""
WITH free AS MATERIALIZED (
    SELECT number AS slot, p.job_id AS holder
      FROM generate_series(1, {JOBS_AT_ONCE}) AS number LEFT JOIN job_place p ON p.owner = $2 AND p.slot = number
     WHERE (SELECT status FROM job WHERE id = p.job_id) IS DISTINCT FROM 'running'
     ORDER BY number LIMIT 1
), taken AS (
    INSERT INTO job_place (owner, slot, job_id) SELECT $2, slot, $1::uuid FROM free
    ON CONFLICT (owner, slot) DO UPDATE SET job_id = excluded.job_id
     WHERE job_place.job_id = (SELECT holder FROM free)
    RETURNING true
), kept AS (
    INSERT INTO idempotency_key (owner, route, key, fingerprint, task_ids)
    SELECT $2, $6, $7::text, $8::bytea, ARRAY[$1] FROM taken WHERE $7 IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING true
), begun AS (
    INSERT INTO job (id, owner, kind, filter, traceparent)
    SELECT $1, $2, $3, $4::json, $5 FROM taken WHERE $7 IS NULL OR EXISTS (SELECT FROM kept)
    RETURNING id
)
SELECT (SELECT id FROM begun) AS job_id, EXISTS (SELECT FROM free) AS has_room
"""


async def begin_job(
    db: Database, owner: str, kind: JobKind, wanted: Filter, *, traceparent: str, key: SubmitKey | None = None
) -> UUID | NotBegun:
    """Have something done to every task of an owner's that passes a filter, and remember it under `key`.

    Returns:
        The id of the job, or why there is none. If the key came before, `remembered` says what began then;
        if it did not, whoever was overtaken may try again.
    """
    [row] = await db.fetch(
        _BEGIN,
        ids.uuid7(),
        owner,
        str(kind),
        _as_json(wanted),
        traceparent,
        key.route if key else None,
        key.key if key else None,
        key.fingerprint if key else None,
    )
    job_id: UUID | None = row["job_id"]
    return job_id or (NotBegun.OVERTAKEN if row["has_room"] else NotBegun.FULL)


_JOB = "id, kind, status, acted, passed_over, created_at, finished_at"


async def job(db: Database, job_id: UUID, owner: str) -> Job | None:
    """How far an owner's job has come; None if it is unknown, or somebody else's."""
    return _job_of(await db.fetchrow(f"SELECT {_JOB} FROM job WHERE id = $1 AND owner = $2", job_id, owner))


_STOP = f"""
UPDATE job SET status = 'cancelled', finished_at = now(), token = NULL, lease_until = NULL
 WHERE id = $1 AND owner = $2 AND status = 'running'
RETURNING {_JOB}
"""


async def cancel_job(db: Database, job_id: UUID, owner: str) -> Job | None:
    """Take no further step of an owner's job. What it has done stays done; one that has ended stays as it is."""
    return _job_of(await db.fetchrow(_STOP, job_id, owner)) or await job(db, job_id, owner)


# The turn is that of the owner whose newest step was the longest ago, also if its job has ended with that step; of its
# jobs, of the one that has waited longest.
_TAKE_STEP = """
UPDATE job SET token = $1, lease_until = now() + make_interval(secs => $2), stepped_at = now()
 WHERE id = (SELECT id FROM job j WHERE status = 'running' AND (lease_until IS NULL OR lease_until < now())
              ORDER BY (SELECT max(stepped_at) FROM job WHERE owner = j.owner AND stepped_at > created_at) NULLS FIRST,
                       stepped_at
              LIMIT 1 FOR UPDATE SKIP LOCKED)
RETURNING id, owner, kind, filter, mark_at, mark_id, created_at
"""


async def take_step(db: Database) -> Step | None:
    """The next step of the job whose turn it is; None if there is none."""
    token = uuid4()
    row = await db.fetchrow(_TAKE_STEP, token, LEASE_SECONDS)
    if row is None:
        return None
    kind, wanted = JobKind(row["kind"]), _from_json(row["filter"])
    before = row["created_at"] if wanted.created_before is None else min(wanted.created_before, row["created_at"])
    return Step(
        job_id=row["id"],
        owner=row["owner"],
        kind=kind,
        token=token,
        wanted=replace(wanted, statuses=wanted.statuses & ELIGIBLE[kind], created_before=before),
        after=None if row["mark_at"] is None else Mark(row["mark_at"], row["mark_id"]),
    )


# The job's row is locked first: as long as this goes on, nobody else takes the step, or stops the job. Tasks that
# change are locked in the order of their ids, as wherever several are waited for; those that have ended do not change.
_MINE = """
WITH mine AS MATERIALIZED (
    SELECT id, traceparent FROM job WHERE id = $1 AND token = $2 AND status = 'running' FOR UPDATE
), meant AS MATERIALIZED (
    SELECT t.id FROM task t, mine WHERE t.id = ANY ($3::uuid[]) AND t.status = ANY ($4::text[]) AND t.owner = $5
     ORDER BY t.id {lock}
)"""
_ADVANCE = """
    UPDATE job SET acted = acted + (SELECT count(*) FROM done),
                   passed_over = passed_over + cardinality($3::uuid[]) - (SELECT count(*) FROM done),
                   mark_at = $6::timestamptz, mark_id = $7::uuid, token = NULL, lease_until = NULL,
                   status = CASE WHEN $6::timestamptz IS NULL THEN 'done' ELSE 'running' END,
                   finished_at = CASE WHEN $6::timestamptz IS NULL THEN now() END
      FROM mine WHERE job.id = mine.id
"""
_CANCEL_STEP = f"""{_MINE.format(lock="FOR UPDATE OF t")}, done AS ({CANCEL}
     WHERE id IN (SELECT id FROM meant) AND status IN ('PENDING', 'RETRY', 'STARTED')
    RETURNING {delivery.told_columns()}, error_traceback, queue
), unheld AS (
    DELETE FROM held_task WHERE task_id = ANY (ARRAY(SELECT id FROM meant))
), hook AS ({delivery.intend("done")}), advanced AS ({_ADVANCE})
SELECT * FROM done
"""
# A relay publishes what is made here, in order, as it does whatever was held back.
_RERUN_STEP = f"""{_MINE.format(lock="")}, done AS (
    INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, webhook_events, max_retries, time_limit, owner,
                      concurrency_key, traceparent, rerun_of, position)
    SELECT made.id, t.name, t.queue, t.args, t.kwargs, t.tags, t.webhook_url, t.webhook_events, t.max_retries,
           t.time_limit, t.owner, t.concurrency_key, mine.traceparent, t.id, nextval('task_position')
      FROM meant JOIN task t ON t.id = meant.id
      JOIN unnest($3::uuid[], $8::uuid[]) AS made (old, id) ON made.old = t.id, mine
    RETURNING id
), advanced AS ({_ADVANCE})
SELECT id FROM done
"""


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step did.

    Attributes:
        acted: tasks that it was done to.
        ended: the tasks that it ended.
    """

    acted: int
    ended: list[Ended]


async def step(db: Database, mine: Step) -> Stepped:
    """Act on the next tasks of a job. Nothing is done if the job was stopped, or the step is another's by now."""
    page = await listing.page(db, mine.owner, mine.wanted, after=mine.after, limit=STEP, walk=WALK)
    found = [one.id for one in page.tasks]
    arguments: tuple[object, ...] = (
        mine.job_id,
        mine.token,
        found,
        [str(status) for status in mine.wanted.statuses],
        mine.owner,
        None if page.end is None else page.end.at,
        None if page.end is None else page.end.id,
    )
    if mine.kind is JobKind.CANCEL:
        rows = await db.fetch(_CANCEL_STEP, *arguments)
        ends = [settled_of(row).ended for row in rows]
        return Stepped(len(rows), [one for one in ends if one is not None])
    rows = await db.fetch(_RERUN_STEP, *arguments, _new_ids(found))
    return Stepped(len(rows), [])


def _new_ids(old: Sequence[UUID]) -> list[UUID]:
    """As many new ids, in their order."""
    return sorted(ids.uuid7() for _ in old)


_FORGET = """
WITH old AS (
    SELECT id FROM job WHERE finished_at < now() - make_interval(secs => $1)
     ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM job USING old WHERE job.id = old.id RETURNING job.id
"""


async def forget_jobs(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove jobs that have ended, the oldest first. Returns how many were removed."""
    return len(await db.fetch(_FORGET, older_than_seconds, limit))


def _job_of(row: Record | None) -> Job | None:
    if row is None:
        return None
    columns = dict(row)
    return Job(kind=JobKind(columns.pop("kind")), status=JobStatus(columns.pop("status")), **columns)


_MOMENTS = ("created_after", "created_before", "finished_after", "finished_before")
_WORDS = ("name", "queue", "tag", "error_type")


def _as_json(wanted: Filter) -> str:
    moments = {name: moment.isoformat() for name in _MOMENTS if (moment := getattr(wanted, name)) is not None}
    words = {name: word for name in _WORDS if (word := getattr(wanted, name)) is not None}
    return json.dumps({"statuses": sorted(wanted.statuses), **words, **moments})


def _from_json(text: str) -> Filter:
    found: dict[str, Any] = json.loads(text)
    moments = {name: datetime.fromisoformat(found[name]) for name in _MOMENTS if name in found}
    return Filter(
        statuses=frozenset(map(TaskStatus, found["statuses"])),
        name=found.get("name"),
        queue=found.get("queue"),
        tag=found.get("tag"),
        error_type=found.get("error_type"),
        created_after=moments.get("created_after"),
        created_before=moments.get("created_before"),
        finished_after=moments.get("finished_after"),
        finished_before=moments.get("finished_before"),
    )

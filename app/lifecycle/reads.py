"""What may be asked about tasks. Reads take no locks and change nothing.

What a caller asks for is their own: without an owner it is what belongs to
nobody in particular, so who forgets to name one finds less, never more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from app.core.statuses import TERMINAL, HeldFor, TaskStatus
from app.db import Database, Record
from app.lifecycle.rules import Budgets, Claim, Error
from app.lifecycle.values import Ended, budgets_of, ended_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """Everything that is shown of a task but its arguments and result."""

    id: UUID
    name: str
    queue: str
    concurrency_key: str
    status: TaskStatus
    held: HeldFor | None
    attempt: int
    failures: int
    max_retries: int
    tags: tuple[str, ...]
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    time_limit: float | None
    progress: float | None
    progress_message: str | None
    error: Error | None
    cancel_requested: bool
    rerun_of: UUID | None
    schedule: str | None
    scheduled_for: datetime | None
    traceparent: str | None
    webhook_url: str | None
    webhook_status: str | None
    webhook_attempt: int | None
    webhook_next_at: datetime | None


_GIVEN_KEY = """substr(t.concurrency_key, length(t.owner) + 2) AS concurrency_key"""
"""SQL: a task's `concurrency_key` as it was given (`NewTask.stored_key`)."""
_VIEW = f"""
SELECT t.id, t.name, t.queue, t.status,
       {_GIVEN_KEY},
       CASE WHEN t.status IN ('PENDING', 'RETRY') AND t.published_at = 'infinity' THEN h.reason END AS held,
       t.attempt, t.failures, t.max_retries, t.tags, t.created_at, t.run_at,
       t.started_at, t.finished_at, t.expires_at, t.time_limit, t.progress, t.progress_message,
       t.error_type, t.error_message, t.error_traceback, t.cancel_requested, t.rerun_of,
       t.schedule, t.scheduled_for, t.traceparent, t.webhook_url,
       d.status AS webhook_status, d.attempt AS webhook_attempt, d.next_at AS webhook_next_at
  FROM task t
  LEFT JOIN held_task h ON h.task_id = t.id
  LEFT JOIN LATERAL (SELECT status, attempt, next_at FROM webhook_delivery
                      WHERE task_id = t.id ORDER BY sequence DESC LIMIT 1) d ON true
 WHERE t.id = $1 AND t.owner = $2
"""


async def view(db: Database, task_id: UUID, *, owner: str = "") -> TaskView | None:
    """Everything known about a task of `owner`, with the state of its newest webhook; None if they have none."""
    row = await db.fetchrow(_VIEW, task_id, owner)
    if row is None:
        return None
    columns = dict(row)
    error_type, message, traceback = (columns.pop("error_" + part) for part in ("type", "message", "traceback"))
    status = TaskStatus(columns.pop("status"))
    held = columns.pop("held")
    # A retried task that succeeds keeps what its failed attempts said in its row; it is not its end.
    shown = error_type is not None and status is not TaskStatus.SUCCESS
    error = Error(type=error_type, message=message or "", traceback=traceback) if shown else None
    held = None if held is None else HeldFor(held)
    return TaskView(status=status, held=held, tags=tuple(columns.pop("tags")), error=error, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A task as it was submitted, but for its times.

    Attributes:
        args: JSON text of an array.
        kwargs: JSON text of an object.
    """

    status: TaskStatus
    name: str
    queue: str
    concurrency_key: str
    args: str
    kwargs: str
    tags: tuple[str, ...]
    webhook_url: str | None
    webhook_events: tuple[str, ...] | None
    max_retries: int
    time_limit: float | None
    traceparent: str | None


_AS_SUBMITTED = f"""
SELECT t.status, t.name, t.queue, t.args, t.kwargs, t.tags, t.webhook_url, t.webhook_events, t.max_retries,
       t.time_limit, t.traceparent, {_GIVEN_KEY}
  FROM task t WHERE t.id = $1 AND t.owner = $2
"""


async def as_submitted(db: Database, task_id: UUID, *, owner: str) -> Original | None:
    """How a task of `owner` was submitted; None if they have no such task."""
    row = await db.fetchrow(_AS_SUBMITTED, task_id, owner)
    if row is None:
        return None
    columns = dict(row)
    events = columns.pop("webhook_events")
    return Original(
        status=TaskStatus(columns.pop("status")),
        tags=tuple(columns.pop("tags")),
        webhook_events=None if events is None else tuple(events),
        **columns,
    )


async def status(db: Database, task_id: UUID, *, owner: str = "") -> TaskStatus | None:
    """The status of a task of `owner`; None if they have no such task."""
    found = await db.fetchval("SELECT status FROM task WHERE id = $1 AND owner = $2", task_id, owner)
    return None if found is None else TaskStatus(found)


_STATUSES = "SELECT id, owner, status FROM task WHERE id = ANY($1::uuid[])"


async def statuses(db: Database, wanted: Sequence[tuple[UUID, str]]) -> list[TaskStatus | None]:
    """The status of each of these tasks of these owners, in their order; None where an owner has no such task."""
    rows = await db.fetch(_STATUSES, list({task_id for task_id, _ in wanted}))
    found = {(row["id"], row["owner"]): TaskStatus(row["status"]) for row in rows}
    return [found.get(one) for one in wanted]


_HOW = "SELECT id, status, result, error_type, error_message, error_traceback FROM task"
_RESULT = f"{_HOW} WHERE id = $1 AND owner = $2"
_RESULTS = f"{_HOW} WHERE id = ANY($1::uuid[])"


async def result(db: Database, task_id: UUID, *, owner: str = "") -> tuple[TaskStatus, Ended | None] | None:
    """The status of a task of `owner` and, if it has ended, how; None if they have no such task."""
    row = await db.fetchrow(_RESULT, task_id, owner)
    return None if row is None else _status_and_end(row)


async def results(db: Database, task_ids: Sequence[UUID]) -> dict[UUID, tuple[TaskStatus, Ended | None]]:
    """As `result`, for all of these that are known, whosever they are: for our own processes, not for a caller."""
    rows = await db.fetch(_RESULTS, list(task_ids))
    return {row["id"]: _status_and_end(row) for row in rows}


def _status_and_end(row: Record) -> tuple[TaskStatus, Ended | None]:
    found = TaskStatus(row["status"])
    return found, ended_of(row) if found in TERMINAL else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What of a task changes while it is followed."""

    status: TaskStatus
    attempt: int
    progress: float | None
    progress_message: str | None
    error_type: str | None
    started_at: datetime | None = None
    token: UUID | None = field(default=None, repr=False)
    """Of the attempt that runs, or ran last: what is told of it is sealed with this."""


_SNAPSHOTS = """
SELECT id, status, attempt, progress, progress_message, error_type, started_at, token FROM task
 WHERE id = ANY($1::uuid[]) AND ($2::text IS NULL OR owner = $2)
"""


async def snapshots(db: Database, task_ids: Sequence[UUID], *, owner: str | None = None) -> dict[UUID, Snapshot]:
    """How far these tasks have come, those that are known; without `owner` for our own processes."""
    found = {}
    for row in await db.fetch(_SNAPSHOTS, list(task_ids), owner):
        columns = dict(row)
        task_id, status = columns.pop("id"), TaskStatus(columns.pop("status"))
        found[task_id] = Snapshot(status=status, **columns)
    return found


# `pg_postmaster_start_time`: leases that ran out while Postgres was away ran out for a fault of ours.
_EXPIRED_LEASES = """
SELECT id, attempt, token, failures, crashes, losses, refusals, max_retries FROM task
 WHERE queue = $1 AND status = 'STARTED' AND lease_until < now()
   AND pg_postmaster_start_time() < now() - make_interval(secs => $2)
 ORDER BY id LIMIT $3
"""


async def expired_leases(db: Database, queue: str, *, lease_seconds: float, limit: int) -> list[tuple[Claim, Budgets]]:
    """Running tasks of a queue whose lease has run out, unless Postgres itself (re)started within a lease."""
    rows = await db.fetch(_EXPIRED_LEASES, queue, lease_seconds, limit)
    return [(Claim(row["id"], row["attempt"], row["token"]), budgets_of(row)) for row in rows]


async def budgets(db: Database, held: Claim) -> Budgets | None:
    """What the task of a claim has spent; None if the claim no longer holds."""
    row = await db.fetchrow(
        "SELECT failures, crashes, losses, refusals, max_retries FROM task"
        " WHERE id = $1 AND attempt = $2 AND token = $3 AND lease_until IS NOT NULL",
        held.task_id,
        held.attempt,
        held.token,
    )
    return None if row is None else Budgets(**dict(row))


# One probe for each queue there is, not for each row: from one name to the next, in the indexes that lead with it.
_UNFINISHED_QUEUES = """
WITH RECURSIVE found (queue) AS (
    (SELECT queue FROM task WHERE {condition} ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT queue FROM task WHERE {condition} AND queue > found.queue ORDER BY queue LIMIT 1)
      FROM found WHERE found.queue IS NOT NULL
)
SELECT queue FROM found WHERE queue IS NOT NULL
"""
_UNFINISHED = (
    "status IN ('PENDING', 'RETRY') AND published_at IS NULL",
    "status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL",
    "status = 'STARTED'",
)


async def unfinished_queues(db: Database) -> set[str]:
    """The queues that have tasks which wait or run, whether or not anybody looks after them."""
    sql = " UNION ".join(f"({_UNFINISHED_QUEUES.format(condition=condition)})" for condition in _UNFINISHED)
    return {row["queue"] for row in await db.fetch(sql)}


# An entry of the one index takes 28 bytes of a page at least, of the others 44. What is held has no position, and
# such entries are packed more densely, so it is counted by its line.
_MOST_WAITING = """
SELECT (pg_relation_size('task_published') + pg_relation_size('task_unpublished')
        + pg_relation_size('held_task_line')) / 28
"""


async def most_waiting(db: Database) -> int:
    """What `count_waiting` can't exceed: as many as fit into the indexes of what waits. Costs nothing to ask.

    It is about twice the truth, and more after a backlog was worked off.
    """
    most: int = await db.fetchval(_MOST_WAITING)
    return most


# Two counts, because each has an index of its own.
_COUNT_WAITING = """
SELECT (SELECT count(*) FROM (SELECT FROM task WHERE status IN ('PENDING', 'RETRY') AND published_at IS NULL
                               LIMIT $1) AS unpublished)
     + (SELECT count(*) FROM (SELECT FROM task WHERE status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL
                               LIMIT $1) AS published)
"""


async def count_waiting(db: Database, *, limit: int) -> int:
    """How many tasks wait, in all queues; a count that is over `limit` says no more than that."""
    waiting: int = await db.fetchval(_COUNT_WAITING, limit)
    return waiting


async def clock(db: Database) -> datetime:
    """Postgres's time, the only one that counts."""
    now: datetime = await db.fetchval("SELECT clock_timestamp()")
    return now


_PLACES = """
SELECT id, position FROM task
 WHERE id = ANY($1::uuid[]) AND status IN ('PENDING', 'RETRY') AND position IS NOT NULL
"""


async def places(db: Database, task_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Which positions these tasks have in line; those that don't wait in one are left out."""
    return {row["id"]: row["position"] for row in await db.fetch(_PLACES, list(task_ids))}

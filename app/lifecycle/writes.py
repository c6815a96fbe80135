"""Every statement that moves a task. Each carries its guard; zero rows is an answer, not an error.

All times are Postgres's own `now()`: no clock of ours decides anything. Every
statement that ends a task also writes the intent to notify (`delivery.intend`),
so the two happen together or not at all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app import delivery
from app.db import Database, Record
from app.lifecycle import rules
from app.lifecycle.rules import Budgets, Claim, Error, Transition
from app.models import TaskStatus

EARLY_CLAIM_SECONDS = 1.0
"""How far ahead of `run_at` a claim may come: less than anybody can promise about a queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task to be submitted. JSON travels as text, so that nothing is parsed twice.

    Attributes:
        id: a UUIDv7, made by whoever submits.
        args: a JSON array.
        kwargs: a JSON object.
        delay_seconds: from now until it is due; ignored when `due_at` is set.
        due_at: when it is due, with a time zone.
        expires_in_seconds: from now until it is not worth running any more; or `expires_at`.
        time_limit: seconds that one attempt may take.
        failures: what it has spent already of `max_retries`, as Celery's `apply_async(retries=…)` says.
    """

    id: UUID
    name: str
    queue: str
    args: str = "[]"
    kwargs: str = "{}"
    tags: tuple[str, ...] = ()
    webhook_url: str | None = None
    max_retries: int = 3
    time_limit: float | None = None
    delay_seconds: float = 0.0
    due_at: datetime | None = None
    expires_in_seconds: float | None = None
    expires_at: datetime | None = None
    traceparent: str | None = None
    rerun_of: UUID | None = None
    failures: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bell:
    """A message to push, for a row that was just stamped as published.

    Attributes:
        position: its place in line.
        overdue: it has been in line before, so it is pushed at the tail, where it is next.
    """

    task_id: UUID
    name: str
    queue: str
    attempt: int
    position: int
    time_limit: float | None = None
    traceparent: str | None = None
    overdue: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A task that this process may run, until its lease ends.

    Attributes:
        args: JSON text of an array.
        kwargs: JSON text of an object.
        waited_seconds: from being due to this claim.
    """

    claim: Claim
    name: str
    queue: str
    args: str
    kwargs: str
    budgets: Budgets
    time_limit: float | None
    traceparent: str | None
    waited_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a task ended: what waiters and Celery's result backend hear.

    Attributes:
        result: JSON text; None unless it succeeded.
    """

    task_id: UUID
    status: TaskStatus
    result: str | None
    error: Error | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A transition that was written.

    Attributes:
        status: where the task went; a task whose cancel was asked for goes nowhere but REVOKED.
        ended: set if that is its end.
    """

    status: TaskStatus
    ended: Ended | None


@dataclass(frozen=True, slots=True)
class Lease:
    """What a renewal found: whether the claim still holds, and whether its task is to be cancelled."""

    claim: Claim
    held: bool
    cancel_requested: bool


# `held_back`: rows of this queue that were never pushed. While there are any, new ones go to the
# relay as well, so that nobody overtakes.
_SUBMIT = """
WITH due AS (
    SELECT COALESCE($13::timestamptz, now() + make_interval(secs => $12::float8)) AS run_at
), publish AS (
    SELECT run_at <= now() AS now_due,
           NOT $16 AND NOT EXISTS (
               SELECT FROM task WHERE queue = $3 AND status IN ('PENDING', 'RETRY') AND attempt = 0
                  AND published_at IS NULL AND position IS NOT NULL) AS may_push
      FROM due
)
INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, max_retries, time_limit, traceparent,
                  rerun_of, failures,
                  run_at, expires_at, position, published_at)
SELECT $1, $2, $3, $4::json, $5::json, $6::text[], $7, $8, $9::float8, $10, $11::uuid, $17,
       due.run_at,
       COALESCE($15::timestamptz, now() + make_interval(secs => $14::float8)),
       CASE WHEN now_due THEN nextval('task_position') END,
       CASE WHEN now_due AND may_push THEN now() END
  FROM due, publish
ON CONFLICT (id) DO NOTHING
RETURNING published_at IS NOT NULL AS stamped, position
"""


async def submit(db: Database, new: NewTask, *, hold_back: bool = False) -> Bell | None:
    """Insert a task. It is durable when this returns.

    Args:
        db: where to.
        new: the task.
        hold_back: leave its message to the relay, because Redis is away or full.

    Returns:
        The message to push now, or None if the relay will push it: it is not due, or held back,
        or a task of this id is there already (then nothing was written).
    """
    row = await db.fetchrow(
        _SUBMIT,
        new.id,
        new.name,
        new.queue,
        new.args,
        new.kwargs,
        list(new.tags),
        new.webhook_url,
        new.max_retries,
        new.time_limit,
        new.traceparent,
        new.rerun_of,
        new.delay_seconds,
        new.due_at,
        new.expires_in_seconds,
        new.expires_at,
        hold_back,
        new.failures,
    )
    if row is None or not row["stamped"]:
        return None
    return Bell(
        task_id=new.id,
        name=new.name,
        queue=new.queue,
        attempt=0,
        position=row["position"],
        time_limit=new.time_limit,
        traceparent=new.traceparent,
    )


# A claim need not be durable: if Postgres dies before it is, the row is as it was, and the random
# token keeps the forgotten claimant from writing. A claim repeated with its own token succeeds,
# which also heals a lost answer.
_CLAIM = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE task
   SET status = 'STARTED', attempt = $3 + 1, token = $4, worker = $5, started_at = now(),
       lease_until = now() + make_interval(secs => $6)
  FROM quick
 WHERE id = $1 AND name = $2 AND NOT cancel_requested
   AND (status IN ('PENDING', 'RETRY') AND attempt = $3
            AND run_at <= now() + make_interval(secs => $7)
            AND (expires_at IS NULL OR expires_at > now())
        OR status = 'STARTED' AND attempt = $3 + 1 AND token = $4)
RETURNING queue, args, kwargs, failures, crashes, losses, max_retries, time_limit, traceparent,
          GREATEST(0, extract(epoch FROM now() - GREATEST(run_at, created_at)))::float8 AS waited_seconds
"""


async def claim(db: Database, wanted: Claim, *, name: str, worker: str, lease_seconds: float) -> Claimed | None:
    """Start attempt `wanted.attempt` of a waiting task.

    The name is part of the guard: a forged message must not run a row under
    another task's code. Safe to repeat with the same token.

    Returns:
        What to run; None if the message was a duplicate, stale, early, or its task is cancelled,
        expired or unknown.
    """
    row = await db.fetchrow(
        _CLAIM,
        wanted.task_id,
        name,
        wanted.attempt - 1,
        wanted.token,
        worker,
        lease_seconds,
        EARLY_CLAIM_SECONDS,
    )
    if row is None:
        return None
    return Claimed(
        claim=wanted,
        name=name,
        queue=row["queue"],
        args=row["args"],
        kwargs=row["kwargs"],
        budgets=_budgets(row),
        time_limit=row["time_limit"],
        traceparent=row["traceparent"],
        waited_seconds=row["waited_seconds"],
    )


# `mine` reports what was asked for, whether or not the row still agrees. Leases are only pushed out
# once a third of them is used, so that asking every second does not write every second. Rows are
# locked in the order of their ids, so that two statements over the same rows can't deadlock.
_RENEW = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true)),
mine AS (
    SELECT * FROM unnest($1::uuid[], $2::int[], $3::uuid[]) AS m (id, attempt, token)
), due AS (
    SELECT t.id FROM task t JOIN mine m USING (id), quick
     WHERE t.attempt = m.attempt AND t.token = m.token AND t.status = 'STARTED'
       AND t.lease_until < now() + make_interval(secs => $4 * 2 / 3)
     ORDER BY t.id FOR UPDATE OF t
), renewed AS (
    UPDATE task t SET lease_until = now() + make_interval(secs => $4) FROM due WHERE t.id = due.id
)
SELECT m.id, m.attempt, m.token, t.id IS NOT NULL AS held, COALESCE(t.cancel_requested, false) AS cancel_requested
  FROM mine m
  LEFT JOIN task t ON t.id = m.id AND t.attempt = m.attempt AND t.token = m.token AND t.status = 'STARTED'
"""


async def renew(db: Database, claims: Sequence[Claim], *, lease_seconds: float) -> list[Lease]:
    """Push out the leases of `claims` where a third of one is used, and hear which of them still hold."""
    rows = await db.fetch(
        _RENEW,
        [held.task_id for held in claims],
        [held.attempt for held in claims],
        [held.token for held in claims],
        lease_seconds,
    )
    return [Lease(Claim(row["id"], row["attempt"], row["token"]), row["held"], row["cancel_requested"]) for row in rows]


# The one statement that ends an attempt. `asked` turns a cancelled task's retry or release into its
# end. A release keeps the task's place in line; a retry gives it up. The token stays when the claimant
# itself writes, so that it can tell, after a lost answer, its own hand from another's.
_SETTLE = f"""
WITH moved AS (
    UPDATE task
       SET status = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'REVOKED' ELSE $4 END,
           result = $5::json,
           error_type = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'Cancelled'
                             WHEN $4 = 'PENDING' THEN error_type ELSE $6 END,
           error_message = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'The task was cancelled'
                                WHEN $4 = 'PENDING' THEN error_message ELSE $7 END,
           error_traceback = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN NULL
                                  WHEN $4 = 'PENDING' THEN error_traceback ELSE $8 END,
           run_at = CASE WHEN $4 IN ('PENDING', 'RETRY') THEN now() + make_interval(secs => $9) ELSE run_at END,
           finished_at = CASE WHEN cancel_requested OR $4 NOT IN ('PENDING', 'RETRY') THEN now() END,
           lease_until = NULL, published_at = NULL,
           position = CASE WHEN $4 = 'PENDING' THEN position END,
           failures = failures + ($10 = 'failures')::int,
           crashes = crashes + ($10 = 'crashes')::int,
           losses = losses + ($10 = 'losses')::int,
           token = CASE WHEN $11 THEN token END
     WHERE id = $1 AND attempt = $2 AND token = $3 AND status = 'STARTED' AND (NOT $12 OR lease_until < now())
    RETURNING id, status, result, error_type, error_message, error_traceback, webhook_url, finished_at
), hook AS ({delivery.intend("moved")})
SELECT id, status, result, error_type, error_message, error_traceback, finished_at FROM moved
UNION ALL
SELECT id, status, result, error_type, error_message, error_traceback, finished_at FROM task
 WHERE id = $1 AND attempt = $2 AND token = $3 AND status <> 'STARTED' AND NOT EXISTS (SELECT FROM moved)
"""


async def settle(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """Write what became of the attempt that this process ran. Durable when it returns; safe to repeat.

    Returns:
        Where the task went; None if the claim was superseded, and nothing was written.
    """
    return await _settle(db, held, transition, own_hand=True, only_expired=False)


async def settle_for(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle`, on behalf of a process that is dead or will not answer: it can't settle any more."""
    return await _settle(db, held, transition, own_hand=False, only_expired=False)


async def reap(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle_for`, but only if the lease has run out by Postgres's clock."""
    return await _settle(db, held, transition, own_hand=False, only_expired=True)


async def _settle(
    db: Database, held: Claim, transition: Transition, *, own_hand: bool, only_expired: bool
) -> Settled | None:
    error = transition.error
    row = await db.fetchrow(
        _SETTLE,
        held.task_id,
        held.attempt,
        held.token,
        str(transition.status),
        transition.result,
        error.type if error else None,
        error.message if error else None,
        error.traceback if error else None,
        transition.run_in_seconds,
        transition.spends or "none",
        own_hand,
        only_expired,
    )
    if row is None:
        return None
    return Settled(status=TaskStatus(row["status"]), ended=_ended(row) if row["finished_at"] else None)


_PROGRESS = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE task SET progress = $4, progress_message = $5 FROM quick
 WHERE id = $1 AND attempt = $2 AND token = $3 AND status = 'STARTED'
"""


async def record_progress(db: Database, held: Claim, fraction: float, message: str | None) -> None:
    """Show how far an attempt is: a fraction from 0 to 1. Not durable, and dropped if superseded."""
    await db.execute(_PROGRESS, held.task_id, held.attempt, held.token, fraction, message)


_CANCEL = f"""
WITH asked AS (
    UPDATE task
       SET cancel_requested = true,
           status = CASE WHEN status = 'STARTED' THEN status ELSE 'REVOKED' END,
           finished_at = CASE WHEN status = 'STARTED' THEN NULL ELSE now() END,
           error_type = CASE WHEN status = 'STARTED' THEN error_type ELSE 'Cancelled' END,
           error_message = CASE WHEN status = 'STARTED' THEN error_message ELSE 'The task was cancelled' END,
           error_traceback = CASE WHEN status = 'STARTED' THEN error_traceback END
     WHERE id = $1 AND status IN ('PENDING', 'RETRY', 'STARTED')
    RETURNING id, status, result, error_type, error_message, error_traceback, webhook_url, finished_at
), hook AS ({delivery.intend("asked")})
SELECT * FROM asked
"""


async def cancel(db: Database, task_id: UUID) -> Settled | None:
    """End a waiting task as REVOKED at once; mark a running one, whose next renewal hears of it.

    Returns:
        Its status now; None if there is no such task or it has ended.
    """
    row = await db.fetchrow(_CANCEL, task_id)
    if row is None:
        return None
    return Settled(status=TaskStatus(row["status"]), ended=_ended(row) if row["finished_at"] else None)


_EXPIRE = f"""
WITH late AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND expires_at IS NOT NULL AND expires_at <= now()
     ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE task t
       SET status = 'REVOKED', finished_at = now(), published_at = NULL, error_type = 'Expired',
           error_message = 'The task was still waiting when it expired', error_traceback = NULL
      FROM late WHERE t.id = late.id
    RETURNING t.id, t.status, t.result, t.error_type, t.error_message, t.error_traceback, t.webhook_url,
              t.finished_at
), hook AS ({delivery.intend("ended")})
SELECT * FROM ended
"""


async def expire(db: Database, queue: str, *, limit: int) -> list[Ended]:
    """End waiting tasks of a queue whose `expires_at` has passed."""
    return [_ended(row) for row in await db.fetch(_EXPIRE, queue, limit)]


# The wait doubles from one second to half a minute, so that a rolling deploy has time to finish.
_REFUSE = f"""
WITH refused AS (
    UPDATE task
       SET refusals = refusals + 1, position = NULL, published_at = NULL,
           run_at = now() + make_interval(secs => LEAST(30, power(2, refusals))),
           status = CASE WHEN refusals + 1 >= $4 THEN 'FAILURE' ELSE status END,
           finished_at = CASE WHEN refusals + 1 >= $4 THEN now() END,
           error_type = CASE WHEN refusals + 1 >= $4 THEN 'UnknownTask' ELSE error_type END,
           error_message = CASE WHEN refusals + 1 >= $4 THEN 'No worker knows a task of this name'
                                ELSE error_message END
     WHERE id = $1 AND attempt = $2 AND name = $3 AND status IN ('PENDING', 'RETRY')
    RETURNING id, status, result, error_type, error_message, error_traceback, webhook_url, finished_at
), hook AS ({delivery.intend("refused")})
SELECT * FROM refused
"""


async def refuse(db: Database, task_id: UUID, *, attempt: int, name: str) -> Settled | None:
    """Hand back a waiting task that this worker does not know: another may, or one of the next release.

    After `rules.REFUSAL_BUDGET` refusals it ends as FAILURE `UnknownTask`.

    Returns:
        Its status now; None if the message was stale.
    """
    row = await db.fetchrow(_REFUSE, task_id, attempt, name, rules.REFUSAL_BUDGET)
    if row is None:
        return None
    return Settled(status=TaskStatus(row["status"]), ended=_ended(row) if row["finished_at"] else None)


# A row that was held back keeps the place it was given when it was submitted; one that comes due gets
# a new one. Positions are drawn in the order in which the batch will be pushed.
_TAKE_DUE = """
WITH due AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NULL AND run_at <= now()
     ORDER BY run_at, id LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE task t SET published_at = now(), position = COALESCE(t.position, nextval('task_position'))
  FROM due WHERE t.id = due.id
RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent,
          t.attempt > 0 AND t.status = 'PENDING' AS overdue
"""


async def take_due(db: Database, queue: str, *, limit: int) -> list[Bell]:
    """Stamp waiting rows that have no message and are due; the caller pushes what is returned."""
    return _bells(await db.fetch(_TAKE_DUE, queue, limit))


# A row whose place lies below the tail as it was one grace ago, and which was pushed before that, has
# no message: lists are first in, first out.
_TAKE_LOST = """
WITH lost AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL
       AND position < $2 AND published_at < $3 AND run_at <= now()
     ORDER BY position LIMIT $4 FOR UPDATE SKIP LOCKED
)
UPDATE task t SET published_at = now() FROM lost WHERE t.id = lost.id
RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent, true AS overdue
"""


async def take_lost(
    db: Database, queue: str, *, below_position: int, published_before: datetime, limit: int
) -> list[Bell]:
    """Stamp waiting rows whose message was lost; the caller pushes what is returned at the tail.

    Args:
        db: where.
        queue: whose rows.
        below_position: where the tail was one grace ago; `broker.END_OF_LINE` if the list was empty.
        published_before: when that was noted, by Postgres's clock.
        limit: rows at most.
    """
    return _bells(await db.fetch(_TAKE_LOST, queue, below_position, published_before, limit))


_UNPUBLISH = """
UPDATE task t SET published_at = NULL
  FROM (SELECT w.id FROM task w JOIN unnest($1::uuid[], $2::int[]) AS m (id, attempt) USING (id)
         WHERE w.attempt = m.attempt AND w.status IN ('PENDING', 'RETRY') ORDER BY w.id FOR UPDATE OF w) d
 WHERE t.id = d.id
"""


async def unpublish(db: Database, bells: Sequence[Bell]) -> None:
    """Take back the stamp of messages that could not be pushed, so that the relay feeds them in order."""
    await db.execute(_UNPUBLISH, [bell.task_id for bell in bells], [bell.attempt for bell in bells])


def _bells(rows: Sequence[Record]) -> list[Bell]:
    bells = [
        Bell(
            task_id=row["id"],
            name=row["name"],
            queue=row["queue"],
            attempt=row["attempt"],
            position=row["position"],
            time_limit=row["time_limit"],
            traceparent=row["traceparent"],
            overdue=row["overdue"],
        )
        for row in rows
    ]
    return sorted(bells, key=lambda bell: bell.position)


def _budgets(row: Record) -> Budgets:
    return Budgets(
        failures=row["failures"], crashes=row["crashes"], losses=row["losses"], max_retries=row["max_retries"]
    )


def _ended(row: Record) -> Ended:
    error = None
    if row["error_type"] is not None and row["status"] != "SUCCESS":
        error = Error(type=row["error_type"], message=row["error_message"] or "", traceback=row["error_traceback"])
    return Ended(task_id=row["id"], status=TaskStatus(row["status"]), result=row["result"], error=error)

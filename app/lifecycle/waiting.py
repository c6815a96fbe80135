"""Every statement that moves a task that waits: into the line, through it, and out of it.

Each carries its guard; zero rows is an answer, not an error. All times are
Postgres's own `now()`. Every statement that ends a task also writes the intent
to notify (`delivery.intend`), so the two happen together or not at all.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from app import delivery
from app.core import backoff
from app.db import Database
from app.lifecycle import rules
from app.lifecycle.lines import HOLD, IN_LINE
from app.lifecycle.values import Bell, Ended, NewTask, Settled, bells_of, ended_of, settled_of

# `may_push`: no rows of this queue wait that were never pushed. While there are any, new ones go to the relay as
# well, so that nobody overtakes. The last in line is asked for, not the first: before the first lie the dead
# entries of all that were fed since the last vacuum.
_DUE = """
WITH due AS (
    SELECT COALESCE($13::timestamptz, now() + make_interval(secs => $12::float8)) AS run_at
), publish AS (
    SELECT run_at <= now() AS now_due,
           NOT $16 AND (
               SELECT position FROM task
                WHERE queue = $3 AND status IN ('PENDING', 'RETRY') AND attempt = 0
                  AND published_at IS NULL AND position IS NOT NULL
                ORDER BY queue DESC, position DESC LIMIT 1) IS NULL AS may_push
      FROM due
)"""
_INSERT = """
INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, max_retries, time_limit, traceparent,
                  rerun_of, failures, webhook_events, owner, concurrency_key,
                  run_at, expires_at, position, published_at)
SELECT $1, $2, $3, $4::json, $5::json, $6::text[], $7, $8, $9::float8, $10, $11::uuid, $17, $18::text[], $19, $20,
       due.run_at,
       COALESCE($15::timestamptz, now() + make_interval(secs => $14::float8)),"""
_SUBMIT = f"""
{_DUE}
{_INSERT}
       CASE WHEN now_due THEN nextval('task_position') END,
       CASE WHEN now_due AND may_push THEN now() END
  FROM due, publish
 WHERE NOT EXISTS (SELECT FROM queue_setting s WHERE s.queue = $3)
ON CONFLICT (id) DO NOTHING
RETURNING published_at IS NOT NULL AS stamped, position
"""

# For a queue that has a setting. What is due is held right away if the queue is paused, or if others are held before
# it, and never makes the way through Redis.
_SUBMIT_OR_HOLD = f"""
{_DUE}, gate AS (
    SELECT reason, line FROM (
        (SELECT 1 AS nth, 'paused' AS reason, '' AS line FROM queue_setting s WHERE s.queue = $3 AND s.paused)
        UNION ALL
        (SELECT 2, reason, line FROM held_task WHERE queue = $3 AND line = '' AND let_go_at IS NULL
          ORDER BY queue DESC, line DESC, run_at DESC, task_id DESC LIMIT 1)
        UNION ALL
        (SELECT 3, reason, line FROM held_task WHERE $20 <> '' AND queue = $3 AND line = $20 AND let_go_at IS NULL
          ORDER BY queue DESC, line DESC, run_at DESC, task_id DESC LIMIT 1)
    ) AS held ORDER BY nth LIMIT 1
), inserted AS (
{_INSERT}
       CASE WHEN now_due AND reason IS NULL THEN nextval('task_position') END,
       CASE WHEN now_due AND reason IS NOT NULL THEN 'infinity' WHEN now_due AND may_push THEN now() END
  FROM due, publish LEFT JOIN gate ON true
ON CONFLICT (id) DO NOTHING
RETURNING id, queue, concurrency_key, run_at, published_at, position
), held AS (
    {HOLD} SELECT i.id, i.queue, i.concurrency_key, gate.line, gate.reason, i.run_at FROM inserted i, gate
     WHERE i.published_at = 'infinity' {IN_LINE}
)
SELECT published_at < 'infinity' AS stamped, position FROM inserted
"""


async def submit(db: Database, new: NewTask, *, hold_back: bool = False) -> Bell | None:
    """Insert a task. It is durable when this returns.

    Args:
        db: where to.
        new: the task.
        hold_back: leave its message to the relay, because Redis is away or full.

    Returns:
        The message to push now, or None if the relay will push it: it is not due, or held back, or its
        queue is paused or has others before it, or a task of this id is there already (then nothing was written).
    """
    arguments = (
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
        None if new.webhook_events is None else list(new.webhook_events),
        new.owner,
        new.stored_key,
    )
    row = await db.fetchrow(_SUBMIT, *arguments) or await db.fetchrow(_SUBMIT_OR_HOLD, *arguments)
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


def insert_fired(source: str) -> str:
    """The body of a CTE that inserts a task for each row of another CTE, which a schedule's statement has made.

    They are due at once. Like those that were delayed they have no place in line yet: the feed gives them one, and
    pushes their messages.

    Args:
        source: the name of a CTE with a column for each that is inserted here but the last two, and `expires_seconds`.
    """
    # `source` is a name that our own statements use, never input.
    return f"""
    INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, webhook_events, max_retries, time_limit,
                      traceparent, owner, concurrency_key, schedule, scheduled_for, run_at, expires_at)
    SELECT id, name, queue, args, kwargs, tags, webhook_url, webhook_events, max_retries, time_limit,
           traceparent, owner, concurrency_key, schedule, scheduled_for,
           now(), now() + make_interval(secs => expires_seconds)
      FROM {source}
    RETURNING id
    """


# A row that was held back or released keeps its place; one that comes due gets a new one, in the order
# in which the rows became due. Only a released row has had its turn, and goes ahead of all that wait.
_TAKE_DUE = """
WITH due AS (
    SELECT id, run_at, position FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NULL AND run_at <= now()
     ORDER BY run_at, id LIMIT $2 FOR UPDATE SKIP LOCKED
), placed AS (
    SELECT id, position IS NOT NULL AS had_place, COALESCE(position, nextval('task_position')) AS place
      FROM (SELECT * FROM due ORDER BY run_at, id) AS in_order
)
UPDATE task t SET published_at = now(), position = placed.place
  FROM placed WHERE t.id = placed.id
RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent,
          placed.had_place AND t.attempt > 0 AND t.status = 'PENDING' AS overdue,
          CASE WHEN NOT (placed.had_place AND t.attempt > 0) THEN
              extract(epoch FROM now() - GREATEST(t.run_at, t.created_at))::float8 END AS due_seconds
"""


async def take_due(db: Database, queue: str, *, limit: int) -> list[Bell]:
    """Stamp waiting rows that have no message and are due; the caller pushes what is returned."""
    return bells_of(await db.fetch(_TAKE_DUE, queue, limit))


# Rows are fed in the order in which they were due, and a released one keeps its time, so it is among the
# first of those that have no message. Nothing is locked that is not taken: this is asked for as long as a
# queue is full, with any number of rows behind.
_TAKE_RELEASED = """
WITH first AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NULL AND run_at <= now()
     ORDER BY run_at, id LIMIT $2
)
UPDATE task t SET published_at = now()
  FROM first
 WHERE t.id = first.id AND t.status = 'PENDING' AND t.attempt > 0 AND t.position IS NOT NULL
   AND t.published_at IS NULL
RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent, true AS overdue
"""


async def take_released(db: Database, queue: str, *, among: int) -> list[Bell]:
    """Stamp tasks that a stopping worker handed back: they had their turn, and wait for no room in the queue.

    Args:
        db: where.
        queue: whose rows.
        among: how many of the rows that are due first are looked at.
    """
    return bells_of(await db.fetch(_TAKE_RELEASED, queue, among))


# A row whose place lies below the tail as it was one grace ago, and which was pushed before that, has
# no message: lists are first in, first out. The highest places go first, because each batch is pushed
# ahead of the one before: were the lowest not next in the end, the rest would look lost again. For the same
# reason one relay searches a queue at a time; another that comes meanwhile finds nothing.
_TAKE_LOST = """
WITH alone AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock(hashtextextended('taskqueue lost ' || $1, 0)) AS searches
), lost AS (
    SELECT id FROM task
     WHERE (SELECT searches FROM alone) AND queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL
       AND position < $2 AND published_at < $3 AND run_at <= now()
       AND EXISTS (SELECT FROM task
                    WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL
                      AND position < $2 AND published_at < $5 AND run_at <= now())
     ORDER BY position DESC LIMIT $4 FOR UPDATE SKIP LOCKED
)
UPDATE task t SET published_at = now() FROM lost WHERE t.id = lost.id
RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent, true AS overdue
"""


async def take_lost(
    db: Database,
    queue: str,
    *,
    below_position: int,
    published_before: datetime,
    limit: int,
    surely_before: datetime | None = None,
) -> list[Bell]:
    """Stamp waiting rows whose message was lost; the caller pushes what is returned at the tail.

    Args:
        db: where.
        queue: whose rows.
        below_position: where the tail was one grace ago; `broker.END_OF_LINE` if the list was empty.
        published_before: when that was noted, by Postgres's clock.
        limit: rows at most.
        surely_before: when one of them must have been stamped, or none is taken; `published_before` if None.
    """
    surely = published_before if surely_before is None else surely_before
    return bells_of(await db.fetch(_TAKE_LOST, queue, below_position, published_before, limit, surely))


_UNPUBLISH = """
UPDATE task t SET published_at = NULL
  FROM (SELECT w.id FROM task w JOIN unnest($1::uuid[], $2::int[]) AS m (id, attempt) USING (id)
         WHERE w.attempt = m.attempt AND w.status IN ('PENDING', 'RETRY') AND w.published_at IS DISTINCT FROM 'infinity'
         ORDER BY w.id FOR UPDATE OF w) d
 WHERE t.id = d.id
"""


async def unpublish(db: Database, bells: Sequence[Bell]) -> None:
    """Take back the stamp of messages that could not be pushed, so that the relay feeds them in order."""
    await db.execute(_UNPUBLISH, [bell.task_id for bell in bells], [bell.attempt for bell in bells])


CANCEL = f"""
    UPDATE task
       SET cancel_requested = true,
           status = CASE WHEN status = 'STARTED' THEN status ELSE 'REVOKED' END,
           finished_at = CASE WHEN status = 'STARTED' THEN NULL ELSE now() END,
           error_type = CASE WHEN status = 'STARTED' THEN error_type ELSE 'Cancelled' END,
           error_message = CASE WHEN status = 'STARTED' THEN error_message ELSE 'The task was cancelled' END,
           error_traceback = CASE WHEN status = 'STARTED' THEN error_traceback END,
           event_sequence = event_sequence
                          + {delivery.tells("CASE WHEN status <> 'STARTED' THEN 'REVOKED' END")}
"""
"""What a cancel does to the rows that its WHERE names, all of them unfinished."""
_CANCEL = f"""
WITH asked AS ({CANCEL}
     WHERE id = $1 AND owner = $2 AND status IN ('PENDING', 'RETRY', 'STARTED')
    RETURNING {delivery.told_columns()}, error_traceback, queue
), unheld AS (
    DELETE FROM held_task WHERE task_id IN (SELECT id FROM asked)
), hook AS ({delivery.intend("asked")})
SELECT * FROM asked
"""


async def cancel(db: Database, task_id: UUID, *, owner: str = "") -> Settled | None:
    """End a waiting task of `owner` as REVOKED at once; mark a running one, whose next renewal hears of it.

    Returns:
        Its status now; None if they have no such task or it has ended.
    """
    row = await db.fetchrow(_CANCEL, task_id, owner)
    if row is None:
        return None
    return settled_of(row)


_EXPIRE = f"""
WITH late AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND expires_at IS NOT NULL AND expires_at <= now()
     ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
), ended AS (
    UPDATE task t
       SET status = 'REVOKED', finished_at = now(), published_at = NULL, error_type = 'Expired',
           error_message = 'The task was still waiting when it expired', error_traceback = NULL,
           event_sequence = event_sequence + {delivery.tells("'REVOKED'")}
      FROM late WHERE t.id = late.id
    RETURNING {delivery.told_columns("t")}, t.error_traceback, t.queue
), unheld AS (
    DELETE FROM held_task WHERE task_id = ANY (ARRAY(SELECT id FROM late))
), hook AS ({delivery.intend("ended")})
SELECT * FROM ended
"""


async def expire(db: Database, queue: str, *, limit: int) -> list[Ended]:
    """End waiting tasks of a queue whose `expires_at` has passed."""
    return [ended_of(row) for row in await db.fetch(_EXPIRE, queue, limit)]


# `$6` are the waits, by refusals so far. Copies of one message count once: the first takes the row out of
# the line, and its next place is another.
_REFUSE = f"""
WITH refused AS (
    UPDATE task
       SET refusals = refusals + 1, position = NULL, published_at = NULL,
           run_at = now() + make_interval(secs => ($6::float8[])[LEAST(refusals + 1, cardinality($6))]),
           status = CASE WHEN refusals + 1 >= $4 THEN 'FAILURE' ELSE status END,
           finished_at = CASE WHEN refusals + 1 >= $4 THEN now() END,
           error_type = CASE WHEN refusals + 1 >= $4 THEN 'UnknownTask' ELSE error_type END,
           error_message = CASE WHEN refusals + 1 >= $4 THEN 'No worker knows a task of this name'
                                ELSE error_message END,
           event_sequence = event_sequence + {delivery.tells("CASE WHEN refusals + 1 >= $4 THEN 'FAILURE' END")}
     WHERE id = $1 AND attempt = $2 AND name = $3 AND position = $5 AND status IN ('PENDING', 'RETRY')
       AND published_at IS NOT NULL AND run_at <= now()
    RETURNING {delivery.told_columns()}, error_traceback, queue
), hook AS ({delivery.intend("refused")})
SELECT * FROM refused
"""


async def refuse(db: Database, task_id: UUID, *, attempt: int, name: str, position: int) -> Settled | None:
    """Hand back a waiting task that this worker does not know: another may, or one of the next release.

    After `rules.REFUSAL_BUDGET` refusals it ends as FAILURE `UnknownTask`.

    Returns:
        Its status now; None if the message was stale.
    """
    waits = [backoff.refusal_wait(refusals) for refusals in range(rules.REFUSAL_BUDGET)]
    row = await db.fetchrow(_REFUSE, task_id, attempt, name, rules.REFUSAL_BUDGET, position, waits)
    if row is None:
        return None
    return settled_of(row)

"""Every statement on an attempt: its claim, its lease, and its end.

Each carries its guard, the fence of attempt and token; zero rows means that the
attempt was superseded. All times are Postgres's own `now()`: no clock of ours
decides anything.
"""

import enum
from collections.abc import Sequence
from dataclasses import replace

from app import delivery
from app.core import tracing
from app.core.statuses import TERMINAL, AttemptOutcome, TaskStatus
from app.db import Database
from app.lifecycle.lines import BURST_SECONDS, HOLD, IN_LINE, next_start
from app.lifecycle.rules import Claim, Transition
from app.lifecycle.values import Claimed, Lease, Log, Settled, budgets_of, settled_of

EARLY_CLAIM_SECONDS = 1.0
"""How far ahead of `run_at` a claim may come: less than anybody can promise about a queue."""

# A claim need not be durable: if Postgres dies before it is, the row is as it was, and the random
# token keeps the forgotten claimant from writing. A claim repeated with its own token succeeds,
# which also heals a lost answer.
_START = """
       SET status = 'STARTED', attempt = $3 + 1, token = $4, worker = $5, started_at = now(),
           lease_until = now() + make_interval(secs => $6)"""
_MAY_START = """
     WHERE id = $1 AND name = $2 AND NOT cancel_requested
       AND (status IN ('PENDING', 'RETRY') AND attempt = $3
                AND run_at <= now() + make_interval(secs => $7)
                AND (expires_at IS NULL OR expires_at > now())
            OR status = 'STARTED' AND attempt = $3 + 1 AND token = $4)"""
_WAITED = "GREATEST(0, extract(epoch FROM now() - GREATEST(run_at, created_at)))::float8 AS waited_seconds"
_TO_RUN = "queue, args, kwargs, failures, crashes, losses, refusals, max_retries, time_limit, traceparent"
_UNLIMITED = "(SELECT true FROM queue_setting s WHERE s.queue = task.queue) IS NULL"
_CLAIM = f"""
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
    UPDATE task {_START} FROM quick {_MAY_START} AND COALESCE('task.started' <> ALL (webhook_events), true)
       AND {_UNLIMITED}
 RETURNING {_TO_RUN}, {_WAITED}
"""

# For those that want to hear of it, and for messages that claim nothing: no other claim pays for an INSERT that it
# does not need. The newest event of a claim that is repeated is the one that it wrote the first time.
_BEGUN = frozenset({TaskStatus.STARTED})
_BEGINS = delivery.tells("CASE WHEN status <> 'STARTED' THEN 'STARTED' END", _BEGUN)
_TELL = f"event_sequence = event_sequence + {_BEGINS}"
_CLAIM_AND_TELL = f"""
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true)),
claimed AS (
    UPDATE task {_START}, {_TELL} FROM quick {_MAY_START} AND {_UNLIMITED}
    RETURNING {delivery.told_columns()}, {_TO_RUN}, run_at
), hook AS (
    {delivery.intend("claimed", _BEGUN)} ON CONFLICT DO NOTHING
)
SELECT {_TO_RUN}, {_WAITED},
       CASE WHEN id IS NULL THEN
           EXISTS (SELECT FROM task t JOIN queue_setting s ON s.queue = t.queue WHERE t.id = $1) END AS limited
  FROM quick LEFT JOIN claimed ON true
"""

# For queues that have a setting. Claims of one queue, or of one key, that is limited come one after the other: each
# sees what those before it have started (`queue_load`). One that may not start is held in this same statement,
# behind those that are held already; who was let go has his turn, and minds only who runs. A turn in the line of the
# queue is none in that of a key.
_CLAIM_ONE_BY_ONE = f"""
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true)),
asked AS MATERIALIZED (
    SELECT t.queue, t.concurrency_key AS key, h.task_id IS NOT NULL AS in_turn,
           COALESCE(h.line <> '', false) AS in_turn_of_key,
           COALESCE(s.paused, false) AS paused,
           COALESCE(s.concurrency_limit, s.rate_count) IS NOT NULL AS by_queue,
           t.concurrency_key <> '' AND COALESCE(s.key_concurrency_limit, s.key_rate_count) IS NOT NULL AS by_key,
           s.concurrency_limit, s.rate_seconds / s.rate_count AS distance,
           s.key_concurrency_limit, s.key_rate_seconds / s.key_rate_count AS key_distance
      FROM (SELECT id, queue, concurrency_key FROM task, quick {_MAY_START} AND status <> 'STARTED') t
      LEFT JOIN held_task h ON h.task_id = t.id AND h.let_go_at IS NOT NULL
      LEFT JOIN queue_setting s ON s.queue = t.queue
), behind_queue AS MATERIALIZED (
    SELECT a.*, CASE WHEN by_queue AND NOT paused
                     THEN pg_advisory_xact_lock(hashtextextended('taskqueue queue ' || queue, 0)) IS NULL END AS alone
      FROM asked a
), behind_key AS MATERIALIZED (
    SELECT b.*, CASE WHEN by_key AND NOT paused
                     THEN pg_advisory_xact_lock(hashtextextended('taskqueue key ' || queue || ' ' || key, 0)) IS NULL
                END AS alone_of_key
      FROM behind_queue b
), verdict AS MATERIALIZED (
    SELECT b.queue AS of_queue, b.key, b.distance, b.key_distance,
           by_queue OR by_key AS restricted,
           {next_start("q.next_at", "in_turn")} AS start, {next_start("k.next_at", "in_turn")} AS key_start,
           CASE WHEN paused THEN 'paused'
                WHEN q.running + CASE WHEN in_turn THEN 0 ELSE q.let_go END >= concurrency_limit THEN 'concurrency'
                WHEN distance IS NOT NULL AND q.next_at > now() + make_interval(secs => {BURST_SECONDS}) THEN 'rate'
                WHEN q.others_held AND NOT in_turn
                    THEN CASE WHEN concurrency_limit IS NULL THEN 'rate' ELSE 'concurrency' END
                WHEN k.running + CASE WHEN in_turn_of_key THEN 0 WHEN in_turn THEN k.let_go - 1 ELSE k.let_go END
                     >= key_concurrency_limit
                    THEN 'key_concurrency'
                WHEN key_distance IS NOT NULL AND k.next_at > now() + make_interval(secs => {BURST_SECONDS})
                    THEN 'key_rate'
                WHEN k.others_held AND NOT in_turn_of_key
                    THEN CASE WHEN key_concurrency_limit IS NULL THEN 'key_rate' ELSE 'key_concurrency' END
           END AS hold_for
      FROM behind_key b,
           queue_load(CASE WHEN by_queue AND NOT paused THEN b.queue END, '', COALESCE(concurrency_limit, 1)) q,
           queue_load(CASE WHEN by_key AND NOT paused THEN b.queue END, b.key, COALESCE(key_concurrency_limit, 1)) k
), spent AS (
    INSERT INTO queue_rate (queue, key, next_at)
    SELECT of_queue, '', start + make_interval(secs => distance) FROM verdict
     WHERE hold_for IS NULL AND distance IS NOT NULL
     UNION ALL
    SELECT of_queue, key, key_start + make_interval(secs => key_distance) FROM verdict
     WHERE hold_for IS NULL AND key_distance IS NOT NULL AND key <> ''
    ON CONFLICT (queue, key) DO UPDATE SET next_at = EXCLUDED.next_at
), kept AS (
    UPDATE task SET published_at = 'infinity', position = NULL FROM verdict
    {_MAY_START} AND verdict.hold_for IS NOT NULL AND status <> 'STARTED' AND published_at IS DISTINCT FROM 'infinity'
    RETURNING id, queue, concurrency_key, hold_for, run_at
), held AS (
    {HOLD} SELECT id, queue, concurrency_key, CASE WHEN hold_for LIKE 'key%' THEN concurrency_key ELSE '' END, hold_for,
                  run_at FROM kept
    {IN_LINE}
), claimed AS (
    UPDATE task {_START}, {_TELL} FROM quick LEFT JOIN verdict ON true {_MAY_START} AND verdict.hold_for IS NULL
    RETURNING {delivery.told_columns()}, {_TO_RUN}, run_at, concurrency_key, verdict.restricted
), had_turn AS (
    DELETE FROM held_task WHERE task_id = $1 AND EXISTS (SELECT FROM claimed)
), hook AS (
    {delivery.intend("claimed", _BEGUN)} ON CONFLICT DO NOTHING
)
SELECT {_TO_RUN}, {_WAITED}, CASE WHEN restricted THEN concurrency_key END AS limited_with,
       EXISTS (SELECT FROM verdict WHERE hold_for IS NOT NULL) AS held
  FROM quick LEFT JOIN claimed ON true
"""


class Unclaimed(enum.Enum):
    """Why there is nothing to run."""

    STALE = enum.auto()
    """The message was a duplicate, stale or early, or its task is cancelled, expired or unknown."""
    HELD = enum.auto()
    """The task is held: its queue is paused, or as many run as may."""


async def claim(db: Database, wanted: Claim, *, name: str, worker: str, lease_seconds: float) -> Claimed | None:
    """As `claim_or_hold`, but that it gives None whyever there is nothing to run."""
    found = await claim_or_hold(db, wanted, name=name, worker=worker, lease_seconds=lease_seconds)
    return found if isinstance(found, Claimed) else None


async def claim_or_hold(
    db: Database, wanted: Claim, *, name: str, worker: str, lease_seconds: float
) -> Claimed | Unclaimed:
    """Start attempt `wanted.attempt` of a waiting task.

    The name is part of the guard: a forged message must not run a row under
    another task's code. Safe to repeat with the same token.
    """
    arguments = (
        wanted.task_id,
        name,
        wanted.attempt - 1,
        wanted.token,
        worker,
        lease_seconds,
        EARLY_CLAIM_SECONDS,
    )
    row = await db.fetchrow(_CLAIM, *arguments) or await db.fetchrow(_CLAIM_AND_TELL, *arguments)
    if row is not None and row.get("limited"):
        row = await db.fetchrow(_CLAIM_ONE_BY_ONE, *arguments)
    if row is None or row["queue"] is None:
        return Unclaimed.HELD if row is not None and row.get("held") else Unclaimed.STALE
    return Claimed(
        claim=wanted,
        name=name,
        queue=row["queue"],
        args=row["args"],
        kwargs=row["kwargs"],
        budgets=budgets_of(row),
        time_limit=row["time_limit"],
        traceparent=row["traceparent"],
        waited_seconds=row["waited_seconds"],
        limited_with=row.get("limited_with"),
    )


# From here on the fence asks for the lease, which a task has if and only if it is STARTED (a CHECK says so). Were it
# to ask for the status, the planner might read the whole index of what is running: it is tiny, until it is not.

# `mine` reports what was asked for, whether or not the row still agrees. Leases are only pushed out
# once a third of them is used, so that asking every second does not write every second. A row that is
# locked is left for the next second: a settle holds its row for as long as its commit waits, for a
# standby perhaps, and its neighbours must not lose their leases to that.
_RENEW = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true)),
mine AS (
    SELECT * FROM unnest($1::uuid[], $2::int[], $3::uuid[]) AS m (id, attempt, token)
), due AS (
    SELECT t.id FROM task t JOIN mine m USING (id), quick
     WHERE t.attempt = m.attempt AND t.token = m.token
       AND t.lease_until < now() + make_interval(secs => $4::float8 * 2 / 3)
     ORDER BY t.id FOR UPDATE OF t SKIP LOCKED
), renewed AS (
    UPDATE task t SET lease_until = now() + make_interval(secs => $4) FROM due WHERE t.id = due.id
)
SELECT m.id, m.attempt, m.token, t.id IS NOT NULL AS held, COALESCE(t.cancel_requested, false) AS cancel_requested
  FROM mine m
  LEFT JOIN task t ON t.id = m.id AND t.attempt = m.attempt AND t.token = m.token AND t.lease_until IS NOT NULL
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


# The one statement that ends an attempt. A cancelled task's retry or release becomes its end. A release
# keeps the task's place in line and its time, so that it comes before all that was due after it; a retry gives
# both up. The token stays when the claimant itself writes,
# so that it can tell, after a lost answer, its own hand from another's.
_TOLD = TERMINAL | {TaskStatus.RETRY}
_NEXT = "CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'REVOKED' ELSE $4 END"
_AGAIN = f"{_NEXT} IN ('PENDING', 'RETRY')"
_MOVED = f"""
WITH moved AS (
    UPDATE task
       SET status = {_NEXT},
           result = $5::json,
           error_type = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'Cancelled'
                             WHEN $4 = 'PENDING' THEN error_type ELSE $6 END,
           error_message = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN 'The task was cancelled'
                                WHEN $4 = 'PENDING' THEN error_message ELSE $7 END,
           error_traceback = CASE WHEN cancel_requested AND $4 IN ('PENDING', 'RETRY') THEN NULL
                                  WHEN $4 = 'PENDING' THEN error_traceback ELSE $8 END,
           run_at = CASE WHEN $4 = 'RETRY' THEN now() + make_interval(secs => $9) ELSE run_at END,
           finished_at = CASE WHEN cancel_requested OR $4 NOT IN ('PENDING', 'RETRY') THEN now() END,
           lease_until = NULL, published_at = NULL,
           position = CASE WHEN $4 = 'PENDING' THEN position END,
           failures = failures + ($10 = 'failures')::int,
           crashes = crashes + ($10 = 'crashes')::int,
           losses = losses + ($10 = 'losses')::int,
           refusals = refusals + ($10 = 'refusals')::int,
           token = CASE WHEN $11 THEN token END,
           progress = CASE WHEN {_AGAIN} THEN NULL ELSE progress END,
           progress_message = CASE WHEN {_AGAIN} THEN NULL ELSE progress_message END,
           event_sequence = event_sequence + {delivery.tells(_NEXT, _TOLD)}
     WHERE id = $1 AND attempt = $2 AND token = $3 AND lease_until IS NOT NULL AND (NOT $12 OR lease_until < now())
    RETURNING {delivery.told_columns()}, error_traceback, started_at, worker, queue, traceparent
), hook AS ({delivery.intend("moved", _TOLD)})
"""
_SETTLE = f"""{_MOVED}
SELECT * FROM moved
"""

# An attempt that succeeded and logged nothing is known from the row of its task, and costs no more than that UPDATE.
_SETTLE_AND_KEEP = f"""{_MOVED}, kept AS (
    INSERT INTO task_attempt (task_id, number, started_at, worker, outcome, error_type, error_message, error_traceback,
                              log, log_dropped)
    SELECT id, attempt, started_at, worker, $13, $6, $7, $8, $14::json, $15 FROM moved
    ON CONFLICT DO NOTHING
)
SELECT * FROM moved
"""

_MY_OWN_HAND = """
SELECT id, name, queue, status, result, error_type, error_message, error_traceback, created_at, finished_at FROM task
 WHERE id = $1 AND attempt = $2 AND token = $3 AND status <> 'STARTED'
"""


async def settle(db: Database, held: Claim, transition: Transition, log: Log | None = None) -> Settled | None:
    """Write what became of the attempt that this process ran. Durable when it returns; safe to repeat.

    Args:
        db: where.
        held: the attempt.
        transition: what it means for the task.
        log: what its code has logged, if anything.

    Returns:
        Where the task went; None if the claim was superseded, and nothing was written.
    """
    return await _settle(db, held, transition, own_hand=True, only_expired=False, log=log)


async def settle_for(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle`, on behalf of a process that is dead or will not answer: it can't settle any more."""
    return await _settle(db, held, transition, own_hand=False, only_expired=False)


async def reap(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle_for`, but only if the lease has run out by Postgres's clock."""
    return await _settle(db, held, transition, own_hand=False, only_expired=True)


async def _settle(
    db: Database, held: Claim, transition: Transition, *, own_hand: bool, only_expired: bool, log: Log | None = None
) -> Settled | None:
    error = transition.error
    keeps = log is not None or transition.outcome is not AttemptOutcome.SUCCEEDED
    history = (str(transition.outcome), log and log.lines, log.dropped if log else 0) if keeps else ()
    row = await db.fetchrow(
        _SETTLE_AND_KEEP if keeps else _SETTLE,
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
        *history,
    )
    if row is None and own_hand:
        # A first copy of this statement may have been applied without an answer. Only a statement of its own,
        # with a new snapshot, sees what that copy wrote while this one waited for its lock.
        row = await db.fetchrow(_MY_OWN_HAND, held.task_id, held.attempt, held.token)
    if row is None:
        return None
    settled = settled_of(row)
    if own_hand:
        return settled
    ended = tracing.Attempt(
        task_id=held.task_id,
        number=held.attempt,
        task=row["name"],
        queue=row["queue"],
        traceparent=row["traceparent"],
    )
    return replace(settled, attempt=ended, began=row["started_at"])


_PROGRESS = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE task SET progress = $4, progress_message = $5 FROM quick
 WHERE id = $1 AND attempt = $2 AND token = $3 AND lease_until IS NOT NULL
"""


async def record_progress(db: Database, held: Claim, fraction: float, message: str | None) -> None:
    """Show how far an attempt is: a fraction from 0 to 1. Not durable, and dropped if superseded."""
    await db.execute(_PROGRESS, held.task_id, held.attempt, held.token, fraction, message)

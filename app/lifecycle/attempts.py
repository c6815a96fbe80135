"""Every statement on an attempt: its claim, its lease, and its end.

Each carries its guard, the fence of attempt and token; zero rows means that the
attempt was superseded. All times are Postgres's own `now()`: no clock of ours
decides anything.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace

from app import delivery
from app.core import tracing
from app.core.statuses import TERMINAL, AttemptOutcome, TaskStatus
from app.db import LOCK_TIMEOUT, Database, Record
from app.lifecycle.lines import BURST_SECONDS, HOLD, IN_LINE, next_start
from app.lifecycle.rules import Claim, Transition
from app.lifecycle.values import Claimed, Lease, Log, Settled, budgets_of, settled_of

LOCK_TIMEOUT_ALONE = "1s"
"""How long a claim does that comes alone. It is tried again, but for so long it keeps a connection from others."""
EARLY_CLAIM_SECONDS = 1.0
"""How far ahead of `run_at` a claim may come: less than anybody can promise about a queue."""


# A claim need not be durable: if Postgres dies before it is, the row is as it was, and the random
# token keeps the forgotten claimant from writing. A claim repeated with its own token succeeds,
# which also heals a lost answer.
def _start(attempts: str, token: str, worker: str, lease_seconds: str) -> str:
    return f"""
       SET status = 'STARTED', attempt = {attempts} + 1, token = {token}, worker = {worker}, started_at = now(),
           lease_until = now() + make_interval(secs => {lease_seconds})"""


def _quick(lock_timeout: str) -> str:
    return f"SELECT set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '{lock_timeout}', true)"


def _may_start(task_id: str, name: str, attempts: str, token: str, early_seconds: str) -> str:
    return f"""
     WHERE id = {task_id} AND name = {name} AND NOT cancel_requested
       AND (status IN ('PENDING', 'RETRY') AND attempt = {attempts}
                AND run_at <= now() + make_interval(secs => {early_seconds})
                AND (expires_at IS NULL OR expires_at > now())
            OR status = 'STARTED' AND attempt = {attempts} + 1 AND token = {token})"""


_START = _start("$3", "$4", "$5", "$6")
_MAY_START = _may_start("$1", "$2", "$3", "$4", "$7")
_WAITED = "GREATEST(0, extract(epoch FROM now() - GREATEST(run_at, created_at)))::float8 AS waited_seconds"
_TO_RUN = "queue, args, kwargs, failures, crashes, losses, refusals, max_retries, time_limit, traceparent"
_UNLIMITED = "(SELECT true FROM queue_setting s WHERE s.queue = task.queue) IS NULL"
# They come in the order of their ids: two workers that are offered the same tasks then never wait for each other.
_CLAIM = f"""
WITH quick AS ({_quick(LOCK_TIMEOUT)}),
wanted AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::int[], $4::uuid[], $5::text[])
        AS w (wanted_id, wanted_name, attempts, by_token, by_worker)
)
    UPDATE task {_start("attempts", "by_token", "by_worker", "$6")} FROM quick, wanted
    {_may_start("wanted_id", "wanted_name", "attempts", "by_token", "$7")}
       AND COALESCE('task.started' <> ALL (webhook_events), true) AND {_UNLIMITED}
 RETURNING by_token, {_TO_RUN}, {_WAITED}
"""

# For those that want to hear of it, and for messages that claim nothing: no other claim pays for an INSERT that it
# does not need. The newest event of a claim that is repeated is the one that it wrote the first time.
_BEGUN = frozenset({TaskStatus.STARTED})
_BEGINS = delivery.tells("CASE WHEN status <> 'STARTED' THEN 'STARTED' END", _BEGUN)
_TELL = f"event_sequence = event_sequence + {_BEGINS}"
_CLAIM_AND_TELL = f"""
WITH quick AS ({_quick(LOCK_TIMEOUT_ALONE)}),
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
WITH quick AS ({_quick(LOCK_TIMEOUT_ALONE)}),
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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A claim that is asked for: of a task with this name, by this worker."""

    claim: Claim
    name: str
    worker: str


async def claim(db: Database, wanted: Claim, *, name: str, worker: str, lease_seconds: float) -> Claimed | None:
    """As `claim_or_hold`, but that it gives None whyever there is nothing to run."""
    found = await claim_or_hold(db, Wanted(wanted, name, worker), lease_seconds=lease_seconds)
    return found if isinstance(found, Claimed) else None


async def claim_or_hold(db: Database, wanted: Wanted, *, lease_seconds: float) -> Claimed | Unclaimed:
    """Start attempt `wanted.claim.attempt` of a waiting task.

    The name is part of the guard: a forged message must not run a row under
    another task's code. Safe to repeat with the same token.
    """
    [found] = await claim_plain(db, [wanted], lease_seconds=lease_seconds)
    return found or await claim_with_care(db, wanted, lease_seconds=lease_seconds)


async def claim_plain(db: Database, wanted: Sequence[Wanted], *, lease_seconds: float) -> list[Claimed | None]:
    """As `claim_or_hold`, for several at once, in their order.

    None where that takes a statement of its own (`claim_with_care`): somebody wants to hear of its start, its queue has
    a setting, or there is nothing to run.

    Raises:
        Locked: if one of the rows is for longer than `LOCK_TIMEOUT`.
    """
    some = sorted(wanted, key=lambda one: one.claim.task_id)
    rows = await db.fetch(
        _CLAIM,
        [one.claim.task_id for one in some],
        [one.name for one in some],
        [one.claim.attempt - 1 for one in some],
        [one.claim.token for one in some],
        [one.worker for one in some],
        lease_seconds,
        EARLY_CLAIM_SECONDS,
    )
    found = {row["by_token"]: row for row in rows}
    return [_claimed(one, row) if (row := found.get(one.claim.token)) else None for one in wanted]


async def claim_with_care(db: Database, wanted: Wanted, *, lease_seconds: float) -> Claimed | Unclaimed:
    """As `claim_or_hold`, for what `claim_plain` has passed over.

    Raises:
        Locked: if its row, or a claim of its queue, keeps it waiting for `LOCK_TIMEOUT_ALONE`.
    """
    claim = wanted.claim
    arguments = (
        claim.task_id,
        wanted.name,
        claim.attempt - 1,
        claim.token,
        wanted.worker,
        lease_seconds,
        EARLY_CLAIM_SECONDS,
    )
    row = await db.fetchrow(_CLAIM_AND_TELL, *arguments)
    if row is not None and row["limited"]:
        row = await db.fetchrow(_CLAIM_ONE_BY_ONE, *arguments)
    if row is None or row["queue"] is None:
        return Unclaimed.HELD if row is not None and row.get("held") else Unclaimed.STALE
    return _claimed(wanted, row)


def _claimed(wanted: Wanted, row: Record) -> Claimed:
    return Claimed(
        claim=wanted.claim,
        name=wanted.name,
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
_NEXT = "CASE WHEN cancel_requested AND next_status IN ('PENDING', 'RETRY') THEN 'REVOKED' ELSE next_status END"
_AGAIN = f"{_NEXT} IN ('PENDING', 'RETRY')"
# An attempt that succeeded and logged nothing is known from the row of its task, and costs no more than that UPDATE.
_SETTLE = f"""
WITH patience AS (SELECT set_config('lock_timeout', '{LOCK_TIMEOUT}', true)),
given AS (
    SELECT * FROM unnest($1::uuid[], $2::int[], $3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[],
                         $9::float8[], $10::text[], $11::text[], $12::text[], $13::int[])
        AS g (of_id, of_attempt, of_token, next_status, next_result, next_type, next_message, next_traceback,
              wait_seconds, spends, outcome, log, log_dropped)
), moved AS (
    UPDATE task
       SET status = {_NEXT},
           result = next_result::json,
           error_type = CASE WHEN cancel_requested AND next_status IN ('PENDING', 'RETRY') THEN 'Cancelled'
                             WHEN next_status = 'PENDING' THEN error_type ELSE next_type END,
           error_message = CASE WHEN cancel_requested AND next_status IN ('PENDING', 'RETRY')
                                THEN 'The task was cancelled'
                                WHEN next_status = 'PENDING' THEN error_message ELSE next_message END,
           error_traceback = CASE WHEN cancel_requested AND next_status IN ('PENDING', 'RETRY') THEN NULL
                                  WHEN next_status = 'PENDING' THEN error_traceback ELSE next_traceback END,
           run_at = CASE WHEN next_status = 'RETRY' THEN now() + make_interval(secs => wait_seconds) ELSE run_at END,
           finished_at = CASE WHEN cancel_requested OR next_status NOT IN ('PENDING', 'RETRY') THEN now() END,
           lease_until = NULL, published_at = NULL,
           position = CASE WHEN next_status = 'PENDING' THEN position END,
           failures = failures + (spends = 'failures')::int,
           crashes = crashes + (spends = 'crashes')::int,
           losses = losses + (spends = 'losses')::int,
           refusals = refusals + (spends = 'refusals')::int,
           token = CASE WHEN $14 THEN token END,
           progress = CASE WHEN {_AGAIN} THEN NULL ELSE progress END,
           progress_message = CASE WHEN {_AGAIN} THEN NULL ELSE progress_message END,
           event_sequence = event_sequence + {delivery.tells(_NEXT, _TOLD)}
      FROM patience, given
     WHERE id = of_id AND attempt = of_attempt AND token = of_token AND lease_until IS NOT NULL
       AND (NOT $15 OR lease_until < now())
    RETURNING {delivery.told_columns()}, error_traceback, started_at, worker, queue, traceparent, given.*
), hook AS ({delivery.intend("moved", _TOLD)}
), kept AS (
    INSERT INTO task_attempt (task_id, number, started_at, worker, outcome, error_type, error_message, error_traceback,
                              log, log_dropped)
    SELECT id, attempt, started_at, worker, outcome, next_type, next_message, next_traceback, log::json, log_dropped
      FROM moved WHERE outcome <> '{AttemptOutcome.SUCCEEDED}' OR log IS NOT NULL
    ON CONFLICT DO NOTHING
)
SELECT * FROM moved
"""

_MY_OWN_HAND = """
SELECT id, name, queue, status, result, error_type, error_message, error_traceback, created_at, finished_at FROM task
 WHERE id = $1 AND attempt = $2 AND token = $3 AND status <> 'STARTED'
"""


@dataclass(frozen=True, slots=True)
class Done:
    """An attempt that is over.

    Attributes:
        claim: which.
        transition: what that means for its task.
        log: what its code has logged, if anything.
    """

    claim: Claim
    transition: Transition
    log: Log | None = None


async def settle(db: Database, held: Claim, transition: Transition, log: Log | None = None) -> Settled | None:
    """Write what became of the attempt that this worker ran. Durable when it returns; safe to repeat.

    Returns:
        Where the task went; None if the claim was superseded, and nothing was written.
    """
    [settled] = await settle_all(db, [Done(held, transition, log)])
    return settled


async def settle_all(db: Database, done: Sequence[Done]) -> list[Settled | None]:
    """As `settle`, for several at once, in their order: all of them or none.

    Raises:
        Locked: if one of the rows is for longer than `LOCK_TIMEOUT`.
        StatementRefused: if what one of them has to say can't be stored.
    """
    rows = await _settle(db, done, own_hand=True, only_expired=False)
    # A first copy of this statement may have been applied without an answer. Only a statement of its own,
    # with a new snapshot, sees what that copy wrote while this one waited for its lock.
    found = [
        row or await db.fetchrow(_MY_OWN_HAND, one.claim.task_id, one.claim.attempt, one.claim.token)
        for one, row in zip(done, rows, strict=True)
    ]
    return [None if row is None else settled_of(row) for row in found]


async def settle_for(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle`, on behalf of a process that is dead or will not answer: it can't settle any more."""
    return await _settle_for(db, held, transition, only_expired=False)


async def reap(db: Database, held: Claim, transition: Transition) -> Settled | None:
    """As `settle_for`, but only if the lease has run out by Postgres's clock."""
    return await _settle_for(db, held, transition, only_expired=True)


async def _settle_for(db: Database, held: Claim, transition: Transition, *, only_expired: bool) -> Settled | None:
    [row] = await _settle(db, [Done(held, transition)], own_hand=False, only_expired=only_expired)
    if row is None:
        return None
    ended = tracing.Attempt(
        task_id=held.task_id,
        number=held.attempt,
        task=row["name"],
        queue=row["queue"],
        traceparent=row["traceparent"],
    )
    return replace(settled_of(row), attempt=ended, began=row["started_at"])


async def _settle(db: Database, done: Sequence[Done], *, own_hand: bool, only_expired: bool) -> list[Record | None]:
    some = sorted(done, key=lambda one: one.claim.task_id)
    why = [one.transition.error for one in some]
    rows = await db.fetch(
        _SETTLE,
        [one.claim.task_id for one in some],
        [one.claim.attempt for one in some],
        [one.claim.token for one in some],
        [str(one.transition.status) for one in some],
        [one.transition.result for one in some],
        [error and error.type for error in why],
        [error and error.message for error in why],
        [error and error.traceback for error in why],
        [one.transition.run_in_seconds for one in some],
        [one.transition.spends or "none" for one in some],
        [str(one.transition.outcome) for one in some],
        [one.log and one.log.lines for one in some],
        [one.log.dropped if one.log else 0 for one in some],
        own_hand,
        only_expired,
    )
    found = {row["of_token"]: row for row in rows}
    return [found.get(one.claim.token) for one in done]


_PROGRESS = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true))
UPDATE task SET progress = $4, progress_message = $5 FROM quick
 WHERE id = $1 AND attempt = $2 AND token = $3 AND lease_until IS NOT NULL
"""


async def record_progress(db: Database, held: Claim, fraction: float, message: str | None) -> None:
    """Show how far an attempt is: a fraction from 0 to 1. Not durable, and dropped if superseded."""
    await db.execute(_PROGRESS, held.task_id, held.attempt, held.token, fraction, message)

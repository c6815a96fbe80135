"""The webhook outbox: who is to hear of what, and how far that has come.

    (a task ends) ──intend──▶ pending ──claim_due──▶ delivering ──settle──▶ delivered | exhausted
                                 ▲                     │  │
                                 └──── next attempt ───┘  └── lease ran out: claimed again

The row is written by the very statement that ends the task, so an event is
neither lost nor invented. A relay claims what is due, sends without a
transaction open, and settles by the receipt. Claim and settle are fenced by a
random token, as those of a task are: a relay that was presumed dead changes
nothing. Its POST may have arrived all the same, so delivery is at least once,
under one id.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from app.core import backoff
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.utils import webhook
from app.utils.webhook import Outcome, Receipt

REST_SECONDS = 60.0
"""The least wait after a 429 or a timeout: a limit per minute would only be met again sooner."""
GONE = 410
HOPELESS = frozenset({Outcome.BLOCKED, Outcome.INVALID_URL})
"""What no second attempt changes; the user has to."""
_WEARY = frozenset({Outcome.HTTP_429, Outcome.TIMEOUT})


def intend(source: str) -> str:
    """The body of a CTE that writes the event of every task that another CTE has ended.

    A task ends once, so a second event of the same sequence is a bug, and the
    unique index (task_id, sequence) fails the statement.

    Args:
        source: the name of a CTE with the columns `id`, `status` and `webhook_url` of
            `task`. Its rows that are not terminal, or have no URL, are passed over.
    """
    # `source` is a name that our own statements use, never input.
    return f"""
    INSERT INTO webhook_delivery (id, task_id, event, sequence, url)
    SELECT gen_random_uuid(), {source}.id,
           CASE {source}.status WHEN 'SUCCESS' THEN 'task.succeeded'
                                WHEN 'FAILURE' THEN 'task.failed'
                                ELSE 'task.revoked' END,
           1, {source}.webhook_url
      FROM {source}
     WHERE {source}.webhook_url IS NOT NULL AND {source}.status IN ('SUCCESS', 'FAILURE', 'REVOKED')
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A delivery that this relay may attempt until its lease runs out.

    Attributes:
        id: the `webhook-id`, the same for every attempt.
        attempt: which attempt this is, 1 for the first.
        token: fences `settle`.
        claimed_at: Postgres's clock, for the `webhook-timestamp`.
        traceparent: of the submit.
        task_attempt: how many claims the task had.
        result: JSON text as it is stored, for a task that succeeded.
    """

    id: UUID
    task_id: UUID
    url: str
    event: str
    sequence: int
    attempt: int
    token: UUID
    claimed_at: datetime
    traceparent: str | None
    task: str
    status: str
    task_attempt: int
    result: str | None
    error_type: str | None
    error_message: str | None
    created_at: datetime
    finished_at: datetime


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an attempt means for its delivery.

    Attributes:
        status: delivered, exhausted, or pending for another attempt.
        wait_seconds: until that attempt; 0 if there is none.
    """

    status: DeliveryStatus
    wait_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a task's newest webhook has come. `next_at` is None when no attempt will follow."""

    status: DeliveryStatus
    attempt: int
    next_at: datetime | None
    last_status_code: int | None
    last_error: str | None


# Two searches, so that each walks its own partial index in order and stops at the limit.
_CLAIM_DUE = """
WITH orphaned AS (
    SELECT id FROM webhook_delivery
     WHERE status = 'delivering' AND lease_until < now()
     ORDER BY lease_until LIMIT $1 FOR UPDATE SKIP LOCKED
), due AS (
    SELECT id FROM webhook_delivery
     WHERE status = 'pending' AND next_at <= now()
     ORDER BY next_at LIMIT $1 FOR UPDATE SKIP LOCKED
), chosen AS (
    SELECT id FROM orphaned UNION ALL SELECT id FROM due LIMIT $1
)
UPDATE webhook_delivery d
   SET status = 'delivering', attempt = d.attempt + 1, token = gen_random_uuid(),
       lease_until = now() + make_interval(secs => $2)
  FROM chosen, task t
 WHERE d.id = chosen.id AND t.id = d.task_id
RETURNING d.id, d.task_id, d.url, d.event, d.sequence, d.attempt, d.token, now() AS claimed_at,
          t.traceparent, t.name AS task, t.status, t.attempt AS task_attempt, t.result::text AS result,
          t.error_type, t.error_message, t.created_at, t.finished_at
"""


async def claim_due(db: Database, *, limit: int, lease_seconds: float) -> list[Claimed]:
    """Claim deliveries that are due, and those whose relay let its lease run out, up to `limit`.

    Any number of relays may do so at once: none waits for another, none gets what
    another has. A lease must outlast the deadline of the POST.
    """
    rows = await db.fetch(_CLAIM_DUE, limit, lease_seconds)
    return [Claimed(**dict(row)) for row in rows]


def body(claimed: Claimed, payload: Literal["full", "thin"]) -> bytes:
    """The JSON that is signed and sent, the same bytes on every attempt (Standard Webhooks, "Payload").

    The stored result is spliced in as the text it is, so that no number loses a digit.

    Args:
        claimed: what to tell of.
        payload: `full` has the result, or the error; `thin` has neither.
    """
    data = {
        "task_id": json.dumps(str(claimed.task_id)),
        "task": json.dumps(claimed.task),
        "status": json.dumps(claimed.status),
        "attempt": json.dumps(claimed.task_attempt),
        "sequence": json.dumps(claimed.sequence),
    }
    if payload == "full":
        data |= _end(claimed)
    data["created_at"] = json.dumps(_instant(claimed.created_at))
    data["finished_at"] = json.dumps(_instant(claimed.finished_at))
    event = {
        "type": json.dumps(claimed.event),
        "timestamp": json.dumps(_instant(claimed.finished_at)),
        "data": _object(data),
    }
    return _object(event).encode()


def _end(claimed: Claimed) -> dict[str, str]:
    if claimed.status == "SUCCESS":
        return {"result": claimed.result or "null"}
    error = {"type": claimed.error_type, "message": claimed.error_message or ""}
    return {"error": json.dumps(error)}


def _object(members: dict[str, str]) -> str:
    """A JSON object of members that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in members.items()) + "}"


def _instant(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds: `2026-01-31T12:00:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def decide(attempt: int, receipt: Receipt, schedule: Sequence[float]) -> Verdict:
    """What to do after an attempt (Standard Webhooks, "Deliverability and reliability").

    Any 2xx delivers. A 410 ends it, as do a blocked address and a URL that is
    none. Everything else is tried again while the schedule lasts, and
    `Retry-After` can only lengthen the wait.

    Args:
        attempt: which attempt the receipt is of, 1 for the first.
        receipt: what happened.
        schedule: seconds before each attempt, the first included.
    """
    if receipt.outcome is Outcome.SUCCESS:
        return Verdict(DeliveryStatus.DELIVERED)
    wait = backoff.scheduled_wait(schedule, attempt)
    if receipt.outcome in HOPELESS or receipt.status_code == GONE or wait is None:
        return Verdict(DeliveryStatus.EXHAUSTED)
    asked = min(receipt.retry_after_seconds or 0.0, webhook.RETRY_AFTER_LIMIT_SECONDS)
    rest = REST_SECONDS if receipt.outcome in _WEARY else 0.0
    return Verdict(DeliveryStatus.PENDING, max(wait, asked, rest))


_SETTLE = """
UPDATE webhook_delivery
   SET status = $3, lease_until = NULL, token = NULL,
       next_at = CASE WHEN $3 = 'pending' THEN now() + make_interval(secs => $4) ELSE next_at END,
       delivered_at = CASE WHEN $3 = 'delivered' THEN now() END,
       last_status_code = $5, last_error = $6
 WHERE id = $1 AND token = $2 AND lease_until IS NOT NULL
RETURNING true
"""


async def settle(db: Database, claimed: Claimed, receipt: Receipt, verdict: Verdict) -> bool:
    """Write what became of an attempt, if it is still this relay's.

    Returns:
        False if it was superseded: its lease ran out and another relay has it or had it.
    """
    error = None if receipt.outcome is Outcome.SUCCESS else receipt.outcome.value
    settled = await db.fetchval(
        _SETTLE,
        claimed.id,
        claimed.token,
        verdict.status.value,
        verdict.wait_seconds,
        receipt.status_code,
        error,
    )
    return settled is not None


_RELEASE = """
UPDATE webhook_delivery d
   SET status = 'pending', attempt = d.attempt - 1, lease_until = NULL, token = NULL
  FROM unnest($1::uuid[], $2::uuid[]) AS held (id, token)
 WHERE d.id = held.id AND d.token = held.token AND d.lease_until IS NOT NULL
RETURNING d.id
"""


async def release(db: Database, claimed: Sequence[Claimed]) -> int:
    """Hand back what this relay claimed and did not send, as when it stops: no attempt is spent.

    Returns:
        How many were still its own.
    """
    rows = await db.fetch(_RELEASE, [one.id for one in claimed], [one.token for one in claimed])
    return len(rows)


_STATE = """
SELECT status, attempt, CASE WHEN status = 'pending' THEN next_at END AS next_at, last_status_code, last_error
  FROM webhook_delivery WHERE task_id = $1 ORDER BY sequence DESC LIMIT 1
"""


async def state_of(db: Database, task_id: UUID) -> State | None:
    """How far the newest webhook of a task has come; None if it has none (yet)."""
    row = await db.fetchrow(_STATE, task_id)
    if row is None:
        return None
    columns = dict(row)
    return State(status=DeliveryStatus(columns.pop("status")), **columns)


_COUNT_DUE = """
SELECT (SELECT count(*) FROM webhook_delivery WHERE status = 'pending' AND next_at <= now())
     + (SELECT count(*) FROM webhook_delivery WHERE status = 'delivering' AND lease_until < now())
"""


async def count_due(db: Database) -> int:
    """How many deliveries could be claimed now."""
    return int(await db.fetchval(_COUNT_DUE))

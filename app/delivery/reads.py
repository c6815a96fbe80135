"""What may be asked about deliveries and their attempts. Reads take no locks and change nothing.

As with tasks, a caller sees their own: without an owner that is what belongs to nobody in particular.
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app.core.statuses import DeliveryStatus
from app.db import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How far a delivery has come.

    Attributes:
        id: the `webhook-id`.
        attempt: attempts so far, one under way included.
        next_at: when the next attempt is due; None when none will follow, or one is under way.
    """

    id: UUID
    event: str
    sequence: int
    status: DeliveryStatus
    attempt: int
    next_at: datetime | None
    delivered_at: datetime | None
    last_status_code: int | None
    last_error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One POST that was made, or tried.

    Attributes:
        delivery_id: the `webhook-id`.
        number: which attempt of its delivery, 1 for the first. A relay that died in the middle leaves a gap.
        started_at: by Postgres's clock.
        status_code: of the answer, if there was one.
        error: why it failed, one of the words of `utils.webhook.Outcome`; None if it did not.
        excerpt: the beginning of an answer other than 2xx, at most 4 KiB.
    """

    delivery_id: UUID
    event: str
    sequence: int
    number: int
    started_at: datetime
    duration_seconds: float
    status_code: int | None
    error: str | None
    excerpt: str


_STATE = """
SELECT id, event, sequence, status, attempt, CASE WHEN status = 'pending' THEN next_at END AS next_at, delivered_at,
       last_status_code, last_error
  FROM webhook_delivery WHERE task_id = $1 AND owner = $2 ORDER BY sequence DESC LIMIT 1
"""


async def state_of(db: Database, task_id: UUID, *, owner: str = "") -> State | None:
    """How far the newest webhook of a task of `owner` has come; None if it has none (yet)."""
    row = await db.fetchrow(_STATE, task_id, owner)
    if row is None:
        return None
    columns = dict(row)
    return State(status=DeliveryStatus(columns.pop("status")), **columns)


_ATTEMPTS = """
SELECT a.delivery_id, d.event, d.sequence, a.number, a.started_at, a.duration_seconds, a.status_code, a.error,
       a.excerpt
  FROM webhook_delivery d JOIN webhook_attempt a ON a.delivery_id = d.id
 WHERE d.task_id = $1 AND d.owner = $5 AND d.sequence >= $2::int AND (d.sequence, a.number) > ($2::int, $3::int)
 ORDER BY d.sequence, a.number LIMIT $4
"""


async def attempts(
    db: Database, task_id: UUID, *, owner: str = "", after: tuple[int, int] = (0, 0), limit: int
) -> list[Attempt]:
    """The attempts to tell somebody of a task, in the order of its events and then of their numbers.

    Args:
        db: where.
        task_id: of which task.
        owner: whose it is.
        after: sequence and number of the last one that is known already.
        limit: attempts at most.
    """
    rows = await db.fetch(_ATTEMPTS, task_id, *after, limit, owner)
    return [Attempt(**dict(row)) for row in rows]

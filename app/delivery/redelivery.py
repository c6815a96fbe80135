"""Sending again what was sent, or given up: under the same `webhook-id`, from the start of the schedule."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from uuid import UUID

from app.core.statuses import DeliveryStatus
from app.db import Database
from app.delivery.rules import ATTEMPTS_AT_MOST


class Redelivery(Enum):
    """What became of the wish to have a webhook sent again."""

    DUE = auto()
    """It is due now, and has the whole schedule before it."""
    UNDER_WAY = auto()
    """It is being sent at this moment."""
    SPENT = auto()
    """It has been attempted as often as any webhook may be."""
    NOTHING = auto()
    """There is no event to tell yet."""


# What is due and has not been tried since is as it should be: asking twice is asking once.
_BEGIN_ANEW = """
   SET status = 'pending', next_at = LEAST(now(), CASE WHEN d.status = 'pending' THEN d.next_at END),
       delivered_at = NULL, earlier_attempts = d.attempt, scheduled_at = now()
"""
_REDELIVER = f"""
WITH newest AS (
    SELECT id, status, attempt FROM webhook_delivery
     WHERE task_id = $1 AND owner = $2 ORDER BY sequence DESC LIMIT 1 FOR UPDATE
), again AS (
    UPDATE webhook_delivery d {_BEGIN_ANEW} FROM newest
     WHERE d.id = newest.id AND newest.status <> 'delivering' AND newest.attempt < {ATTEMPTS_AT_MOST}
)
SELECT status, attempt FROM newest
"""


async def redeliver(db: Database, task_id: UUID, *, owner: str = "") -> Redelivery:
    """Make the newest webhook of a task of `owner` due now, unless it is being sent or has been too often.

    Asking twice is asking once.
    """
    was = await db.fetchrow(_REDELIVER, task_id, owner)
    if was is None:
        return Redelivery.NOTHING
    if was["status"] == DeliveryStatus.DELIVERING:
        return Redelivery.UNDER_WAY
    return Redelivery.DUE if was["attempt"] < ATTEMPTS_AT_MOST else Redelivery.SPENT


@dataclass(frozen=True, slots=True)
class Mark:
    """A place among the webhooks of one owner, in the order in which their events happened."""

    created_at: datetime
    id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step through the webhooks has done.

    Attributes:
        redelivered: how many are due now that were not before.
        end: where to go on; None if there is nothing behind.
    """

    redelivered: int
    end: Mark | None


# Bounded by what is looked at, not by what is found: a batch costs the same whether few or many of its webhooks have
# one of the wanted states.
_REDELIVER_BATCH = f"""
WITH looked_at AS (
    SELECT id, created_at FROM webhook_delivery
     WHERE owner = $7 AND created_at >= $1 AND created_at < COALESCE($2::timestamptz, 'infinity')
       AND ($3::timestamptz IS NULL OR (created_at, id) > ($3, $4::uuid))
     ORDER BY created_at, id LIMIT $5
), due AS (
    SELECT w.id FROM webhook_delivery w JOIN looked_at l ON l.id = w.id
     WHERE w.status = ANY ($6::text[]) AND w.attempt < {ATTEMPTS_AT_MOST}
       AND NOT (w.status = 'pending' AND w.attempt = w.earlier_attempts AND w.next_at <= now())
     ORDER BY w.id FOR UPDATE OF w SKIP LOCKED
), again AS (
    UPDATE webhook_delivery d {_BEGIN_ANEW} FROM due WHERE d.id = due.id RETURNING d.id
)
SELECT count(*) AS looked_at, (SELECT count(*) FROM again) AS redelivered,
       max(created_at) AS created_at, (array_agg(id ORDER BY created_at DESC, id DESC))[1] AS id
  FROM looked_at
"""


async def redeliver_batch(
    db: Database,
    *,
    owner: str = "",
    since: datetime,
    until: datetime | None,
    statuses: Collection[DeliveryStatus],
    after: Mark | None,
    limit: int,
) -> Batch:
    """Make webhooks due now, the oldest event first, looking at `limit` of them.

    Args:
        db: where.
        owner: whose webhooks.
        since: when the event happened, or later.
        until: before when it happened; None for any time.
        statuses: which of them; what is being sent, or was too often, is left alone, and what is due already
            is not counted.
        after: where the step before has ended.
        limit: webhooks to look at.
    """
    mark = (None, None) if after is None else (after.created_at, after.id)
    # What is first in the window is reached through the index even where `after` is given.
    begin = since if after is None else max(since, after.created_at)
    wanted = [str(status) for status in statuses]
    row = await db.fetchrow(_REDELIVER_BATCH, begin, until, *mark, limit, wanted, owner)
    if row is None:  # pragma: no cover - an aggregate has a row
        return Batch(redelivered=0, end=None)
    end = Mark(row["created_at"], row["id"]) if row["looked_at"] == limit else None
    return Batch(redelivered=row["redelivered"], end=end)

"""How many deliveries are due, and since when: what the relay exports."""

from collections.abc import Collection

from app.db import Database
from app.delivery.outbox import Receiver

DUE_AT_MOST = 100_000
"""How far due deliveries are counted: more need no exact number, and counting them would take seconds."""
RECEIVERS_AT_MOST = 5_000
"""How many receivers are looked at for the oldest."""

_COUNT_DUE = f"""
SELECT (SELECT count(*) FROM (SELECT FROM webhook_delivery
                               WHERE status = 'pending' AND next_at <= now() LIMIT {DUE_AT_MOST}) AS due)
     + (SELECT count(*) FROM (SELECT FROM webhook_delivery
                               WHERE status = 'delivering' AND lease_until < now() LIMIT {DUE_AT_MOST}) AS orphaned)
"""


async def count_due(db: Database) -> int:
    """How many deliveries could be claimed now, of each kind counted up to `DUE_AT_MOST`."""
    return int(await db.fetchval(_COUNT_DUE))


# From receiver to receiver, as a claim goes, and of each the one that was due first: however much is due to one whose
# circuit is open, it is stepped over at once.
_OLDEST_DUE = f"""
WITH RECURSIVE walk (owner, origin, steps) AS (
    (SELECT owner, origin, 1 FROM webhook_delivery
      WHERE status = 'pending' AND origin IS NOT NULL ORDER BY owner, origin LIMIT 1)
    UNION ALL
    SELECT next.owner, next.origin, steps + 1
      FROM walk, LATERAL (
        SELECT owner, origin FROM webhook_delivery
         WHERE status = 'pending' AND origin IS NOT NULL AND (owner, origin) > (walk.owner, walk.origin)
         ORDER BY owner, origin LIMIT 1) AS next
     WHERE steps < {RECEIVERS_AT_MOST}
), sent_to AS (
    SELECT owner, origin FROM walk
     WHERE NOT EXISTS (SELECT FROM unnest($1::text[], $2::text[]) AS open (owner, origin)
                        WHERE open.owner = walk.owner AND open.origin = walk.origin)
)
SELECT GREATEST(0, COALESCE(extract(epoch FROM now() - min(first.next_at)), 0))::float8
  FROM sent_to, LATERAL (
    SELECT next_at FROM webhook_delivery d
     WHERE status = 'pending' AND d.owner = sent_to.owner AND d.origin = sent_to.origin AND next_at <= now()
     ORDER BY next_at LIMIT 1) AS first
"""


async def oldest_due_seconds(db: Database, *, without: Collection[Receiver]) -> float:
    """Since when the oldest delivery has been due that could be sent; 0 if none is.

    Args:
        db: where.
        without: receivers that are sent nothing.
    """
    receivers = list(without)
    found: float = await db.fetchval(_OLDEST_DUE, [one.owner for one in receivers], [one.origin for one in receivers])
    return found

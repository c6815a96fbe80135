"""The events in one line, for whoever asks instead of listening.

A reader goes on behind the last event that it has seen, so an event must never
appear before that place. Transactions that write events commit in any order;
a number that they took with them would do so too. So a relay gives the numbers
afterwards, to events that are committed, and one relay at a time: whoever sees
a number sees all that are lower.
"""

from dataclasses import dataclass
from uuid import UUID

from app.db import Database
from app.delivery.outbox import FACTS, OUTCOME

TURN = 0x7461736B65766E74
"""`taskevnt` in ASCII: the advisory lock of whoever gives numbers."""

# The lock is let go when the numbers are committed and seen. It must be durable too: a number that was read and then
# forgotten would be given to another event.
_NUMBER = f"""
WITH turn AS MATERIALIZED (
    SELECT pg_try_advisory_xact_lock({TURN}) AS is_mine
), found AS (
    SELECT id, created_at, sequence FROM webhook_delivery
     WHERE position IS NULL AND (SELECT is_mine FROM turn)
     ORDER BY created_at, sequence LIMIT $1 FOR UPDATE SKIP LOCKED
), numbered AS (
    SELECT id, nextval('event_position') AS position
      FROM (SELECT id FROM found ORDER BY created_at, sequence) AS in_order
)
UPDATE webhook_delivery d SET position = numbered.position FROM numbered WHERE d.id = numbered.id
RETURNING d.id
"""


async def number(db: Database, *, limit: int) -> int:
    """Give the events that have no number the next ones, unless somebody else is doing so.

    Returns:
        How many have one now that had none.
    """
    return len(await db.fetch(_NUMBER, limit))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a task, as its webhook tells it.

    Attributes:
        id: the `webhook-id`.
        position: its place in line.
        facts: the JSON of the event without its outcome; `events.body` puts the two together.
    """

    id: UUID
    position: int
    facts: str
    outcome: str | None


# An earlier release writes events without the owner of their task, so the task is asked as well.
_EVENTS = f"""
SELECT d.id, d.position, {FACTS} AS facts, {OUTCOME} AS outcome
  FROM webhook_delivery d JOIN task t ON t.id = d.task_id
 WHERE d.owner = $3 AND t.owner = $3 AND d.position IS NOT NULL AND d.position > $1
 ORDER BY d.position LIMIT $2
"""


async def events(db: Database, *, owner: str = "", after: int, limit: int) -> list[Event]:
    """The events of an owner behind a place, in line. Whoever asks on from the last of them misses none.

    Args:
        db: where.
        owner: whose tasks they are of.
        after: position of the last one that is known already; 0 for the oldest that is kept.
        limit: events at most.
    """
    return [Event(**dict(row)) for row in await db.fetch(_EVENTS, after, limit, owner)]

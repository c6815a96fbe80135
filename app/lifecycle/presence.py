"""Which workers there are, and what they consume: each says so itself, every few seconds.

A worker that is killed says nothing any more: it counts as there until it was
not seen for `SEEN_SECONDS`. Nothing depends on it but what is told to people.
"""

from collections.abc import Sequence

from app.db import Database

SEEN_SECONDS = 30.0
"""How long after it was seen last a worker counts as there: three times as long as it takes between two words."""

# Those that went without a word are removed by the others.
_ANNOUNCE = """
WITH quick AS (SELECT set_config('synchronous_commit', 'off', true)),
gone AS (DELETE FROM worker WHERE seen_at < now() - interval '1 day')
INSERT INTO worker (name, queues, slots, busy) SELECT $1, $2::text[], $3, $4 FROM quick
ON CONFLICT (name) DO UPDATE
   SET queues = excluded.queues, slots = excluded.slots, busy = excluded.busy, seen_at = now()
"""


async def announce(db: Database, worker: str, *, queues: Sequence[str], slots: int, busy: int) -> None:
    """Say that a worker is there.

    Args:
        db: where.
        worker: its name.
        queues: which it consumes.
        slots: tasks that it can run at once.
        busy: how many it runs.
    """
    await db.execute(_ANNOUNCE, worker, list(queues), slots, busy)


async def leave(db: Database, worker: str) -> None:
    """Say that a worker consumes nothing any more."""
    await db.execute("DELETE FROM worker WHERE name = $1", worker)

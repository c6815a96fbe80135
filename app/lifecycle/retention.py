"""How ended tasks leave: in small batches, once nobody is to hear of them any more.

A tombstone stays for as long again, so that a late reader hears `410` and not
`404`: the task was there, and its result is gone.
"""

from uuid import UUID

from app.db import Database

# An id that a caller chose may come again after it was pruned, and so may its tombstone.
# The question about webhooks is asked for one task at a time, of the index of its own: NOT EXISTS would let the
# planner join, and read all that are under way.
_PRUNE = """
WITH old AS (
    SELECT id FROM task t
     WHERE finished_at < now() - make_interval(secs => $1)
       AND (SELECT true FROM webhook_delivery d
             WHERE d.task_id = t.id AND d.status IN ('pending', 'delivering') LIMIT 1) IS NULL
     ORDER BY finished_at LIMIT $2 FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM task t USING old WHERE t.id = old.id RETURNING t.id, t.owner
), free AS (
    DELETE FROM unique_task u USING old WHERE u.task_id = old.id
)
INSERT INTO task_tombstone (id, owner) SELECT id, owner FROM gone
ON CONFLICT (id) DO UPDATE SET pruned_at = now(), owner = excluded.owner
RETURNING id
"""


async def prune(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove ended tasks, the oldest first, but for those whose webhook is still under way.

    Args:
        db: where.
        older_than_seconds: since a task ended.
        limit: tasks at most.

    Returns:
        How many were removed.
    """
    return len(await db.fetch(_PRUNE, older_than_seconds, limit))


_FORGET = """
WITH old AS (
    SELECT id FROM task_tombstone WHERE pruned_at < now() - make_interval(secs => $1)
     ORDER BY pruned_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM task_tombstone t USING old WHERE t.id = old.id RETURNING t.id
"""


async def forget(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove tombstones; from then on their ids are unknown. Returns how many were removed."""
    return len(await db.fetch(_FORGET, older_than_seconds, limit))


_FORGET_KEYS = """
WITH old AS (
    SELECT owner, route, key FROM idempotency_key WHERE created_at < now() - make_interval(secs => $1)
     ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
DELETE FROM idempotency_key k USING old
 WHERE k.owner = old.owner AND k.route = old.route AND k.key = old.key
RETURNING true
"""


async def forget_keys(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove keys of requests; from then on each may stand for another one. Returns how many were removed."""
    return len(await db.fetch(_FORGET_KEYS, older_than_seconds, limit))


async def was_pruned(db: Database, task_id: UUID, *, owner: str = "") -> bool:
    """Whether `owner` had a task of this id that was removed after its retention."""
    sql = "SELECT true FROM task_tombstone WHERE id = $1 AND owner = $2"
    return await db.fetchval(sql, task_id, owner) is True

"""How many tasks there are, and how old the oldest are, queue by queue: what the relay exports.

Counting reads an index entry for each task that is counted, so it is asked for
more rarely the more there are. Ages are a probe each, whatever waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from app.db import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueCounts:
    """Unfinished tasks of one queue. Each is in one of these.

    Attributes:
        published: due, with a message.
        unpublished: due, without one.
        scheduled: not due yet.
        held: by a pause or a limit.
        running: being run.
    """

    queue: str
    published: int
    unpublished: int
    scheduled: int
    held: int
    running: int

    @property
    def waiting(self) -> int:
        """All that will be run, without those that are held."""
        return self.published + self.unpublished + self.scheduled


# What waits is counted in parts, because each has an index of its own, which says no more than this of a row: that it
# is a first run or a retry is nowhere but in the table.
_QUEUE_COUNTS = """
SELECT q.queue,
       (SELECT count(*) FROM task t
         WHERE t.queue = q.queue AND t.status IN ('PENDING', 'RETRY') AND t.published_at IS NOT NULL
           AND t.position IS NOT NULL) AS published,
       (SELECT count(*) FROM task t
         WHERE t.queue = q.queue AND t.status IN ('PENDING', 'RETRY') AND t.published_at IS NULL
           AND t.run_at <= now()) AS unpublished,
       (SELECT count(*) FROM task t
         WHERE t.queue = q.queue AND t.status IN ('PENDING', 'RETRY') AND t.published_at IS NULL
           AND t.run_at > now()) AS scheduled,
       (SELECT count(*) FROM held_task h WHERE h.queue = q.queue AND h.let_go_at IS NULL) AS held,
       (SELECT count(*) FROM task t WHERE t.queue = q.queue AND t.status = 'STARTED') AS running
  FROM unnest($1::text[]) AS q (queue)
"""


async def queue_counts(db: Database, queues: Sequence[str]) -> list[QueueCounts]:
    """How many tasks wait and run, per queue."""
    return [QueueCounts(**dict(row)) for row in await db.fetch(_QUEUE_COUNTS, list(queues))]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueAges:
    """Since when the oldest of one queue wait and run, in seconds; 0 where there are none.

    Attributes:
        paused: whether the queue is.
        unpublished_seconds: since when the oldest task without a message has been due.
        published_seconds: the same of the one that is next in line.
        running_seconds: how long the attempt has run that runs for longest.
    """

    queue: str
    paused: bool
    unpublished_seconds: float
    published_seconds: float
    running_seconds: float

    @property
    def oldest_seconds(self) -> float:
        """Since when the task that has waited for longest has been due."""
        return max(self.unpublished_seconds, self.published_seconds)


_DUE = "GREATEST(run_at, created_at)"
_AGE = "GREATEST(0, COALESCE(extract(epoch FROM now() - ({moment})), 0))::float8"
_UNPUBLISHED = f"""
           SELECT {_DUE} FROM task t WHERE t.queue = q.queue AND status IN ('PENDING', 'RETRY')
              AND published_at IS NULL AND run_at <= now() ORDER BY run_at, id LIMIT 1"""
_PUBLISHED = f"""
           SELECT {_DUE} FROM task t WHERE t.queue = q.queue AND status IN ('PENDING', 'RETRY')
              AND published_at IS NOT NULL AND position IS NOT NULL ORDER BY position LIMIT 1"""
_RUNNING = """
           SELECT min(started_at) FROM task t WHERE t.queue = q.queue AND status = 'STARTED'"""
_QUEUE_AGES = f"""
SELECT q.queue, COALESCE((SELECT paused FROM queue_setting s WHERE s.queue = q.queue), false) AS paused,
       {_AGE.format(moment=_UNPUBLISHED)} AS unpublished_seconds,
       {_AGE.format(moment=_PUBLISHED)} AS published_seconds,
       {_AGE.format(moment=_RUNNING)} AS running_seconds
  FROM unnest($1::text[]) AS q (queue)
"""


async def queue_ages(db: Database, queues: Sequence[str]) -> list[QueueAges]:
    """How old the oldest tasks are, per queue."""
    return [QueueAges(**dict(row)) for row in await db.fetch(_QUEUE_AGES, list(queues))]


# By owner, because the index is: from one to the next, and of each those that failed. The inner limit keeps the planner
# from walking through all tasks in search of an owner's.
_FAILED = """
WITH RECURSIVE owners (owner) AS (
    (SELECT owner FROM task ORDER BY owner LIMIT 1)
    UNION ALL
    SELECT (SELECT owner FROM task WHERE owner > owners.owner ORDER BY owner LIMIT 1)
      FROM owners WHERE owners.owner IS NOT NULL
), failed AS MATERIALIZED (
    SELECT one.queue FROM owners CROSS JOIN LATERAL (
        SELECT queue FROM task WHERE owner = owners.owner AND status = 'FAILURE' LIMIT $1) AS one
     LIMIT $1
)
SELECT queue, count(*) AS failed FROM failed GROUP BY queue
"""


async def failed_counts(db: Database, queues: Sequence[str], *, limit: int) -> dict[str, int]:
    """How many tasks have failed for good and are still there, per queue, counted up to `limit` in all."""
    found = {row["queue"]: row["failed"] for row in await db.fetch(_FAILED, limit)}
    return {queue: found.get(queue, 0) for queue in queues}

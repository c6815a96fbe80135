"""What holds for whole queues, their pauses and limits, and how they are now. The claims keep them (`attempts`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from app.db import Database, Record


@dataclass(frozen=True, slots=True)
class Rate:
    """So many tasks in so many seconds, at even distances."""

    count: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may be limited of a queue; None for what is not.

    Attributes:
        concurrency: how many of its tasks may run at once.
        rate: how many may start.
        key_concurrency: as `concurrency`, of those that have the same key.
        key_rate: as `rate`, of those that have the same key.
    """

    concurrency: int | None = None
    rate: Rate | None = None
    key_concurrency: int | None = None
    key_rate: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueState:
    """One queue, as it is now.

    Attributes:
        waiting: tasks that wait, without those that are held.
        oldest_seconds: since when the task that has been due for longest waits; None if none does.
        ended_per_second: over the last minute, or the part of it in which the newest `RECENT` ended.
    """

    queue: str
    paused: bool
    limits: Limits
    waiting: int
    held: int
    running: int
    oldest_seconds: float | None
    ended_per_second: float


_PAUSE = """
INSERT INTO queue_setting (queue, paused) VALUES ($1, $2)
ON CONFLICT (queue) DO UPDATE SET paused = $2, updated_at = now() WHERE queue_setting.paused <> $2
"""


async def pause_queue(db: Database, queue: str) -> None:
    """Let no task of a queue start any more. Those that run go on. Asking twice is asking once."""
    await db.execute(_PAUSE, queue, True)


async def resume_queue(db: Database, queue: str) -> None:
    """Let the tasks of a queue start again. Asking twice is asking once."""
    await db.execute(_PAUSE, queue, False)


# A rate that is changed holds at once: the next start is no further off than by the new distance. The row of the queue
# comes before those of its keys, as in a claim.
_SET_LIMITS = """
WITH known AS (
    SELECT key FROM queue_rate WHERE queue = $1 ORDER BY key FOR UPDATE
), hastened AS (
    UPDATE queue_rate r
       SET next_at = LEAST(r.next_at, now() + make_interval(secs => CASE r.key WHEN '' THEN $4::float8 / $3::int
                                                                    ELSE $7::float8 / $6::int END))
      FROM known WHERE r.queue = $1 AND r.key = known.key
)
INSERT INTO queue_setting (queue, concurrency_limit, rate_count, rate_seconds,
                           key_concurrency_limit, key_rate_count, key_rate_seconds)
VALUES ($1, $2, $3, $4, $5, $6, $7)
ON CONFLICT (queue) DO UPDATE
   SET concurrency_limit = $2, rate_count = $3, rate_seconds = $4,
       key_concurrency_limit = $5, key_rate_count = $6, key_rate_seconds = $7, updated_at = now()
"""


async def limit_queue(db: Database, queue: str, limits: Limits) -> None:
    """Limit a queue so from now on. What runs already goes on."""
    rate, key_rate = limits.rate, limits.key_rate
    await db.execute(
        _SET_LIMITS,
        queue,
        limits.concurrency,
        rate.count if rate else None,
        rate.seconds if rate else None,
        limits.key_concurrency,
        key_rate.count if key_rate else None,
        key_rate.seconds if key_rate else None,
    )


_RESTRICTED = """
SELECT queue, paused FROM queue_setting
 WHERE paused OR COALESCE(concurrency_limit, rate_count, key_concurrency_limit, key_rate_count) IS NOT NULL
 ORDER BY queue
"""


async def restricted_queues(db: Database) -> Mapping[str, bool]:
    """The queues that are paused or limited, each with whether it is paused."""
    return {row["queue"]: row["paused"] for row in await db.fetch(_RESTRICTED)}


# With a row here a submit asks who is held, so one that says nothing is removed once nobody is.
_FORGET_SETTINGS = """
DELETE FROM queue_setting s
 WHERE NOT s.paused
   AND COALESCE(s.concurrency_limit, s.rate_count, s.key_concurrency_limit, s.key_rate_count) IS NULL
   AND s.updated_at < now() - make_interval(secs => $1)
   AND NOT EXISTS (SELECT FROM held_task h WHERE h.queue = s.queue)
"""


async def forget_settings(db: Database, *, older_than_seconds: float) -> int:
    """Remove the settings of queues that are neither paused nor limited, and hold nobody; returns how many."""
    return int((await db.execute(_FORGET_SETTINGS, older_than_seconds)).rpartition(" ")[2])


MOST_COUNTED = 1_000_000
"""Where the counts of `queue_states` stop: they are asked for by people, as often as these please."""
RECENT = 5_000
"""How many of the tasks that ended last are looked at for the rate."""

_QUEUES = f"""
WITH recent AS MATERIALIZED (
    SELECT queue, finished_at FROM task WHERE finished_at > now() - interval '1 minute'
     ORDER BY finished_at DESC LIMIT {RECENT}
), span AS MATERIALIZED (
    SELECT CASE WHEN count(*) < {RECENT} THEN 60
                ELSE GREATEST(extract(epoch FROM now() - min(finished_at)), 0.001) END::float8 AS seconds
      FROM recent
)
SELECT q.queue, COALESCE(s.paused, false) AS paused,
       s.concurrency_limit, s.rate_count, s.rate_seconds,
       s.key_concurrency_limit, s.key_rate_count, s.key_rate_seconds,
       (SELECT count(*) FROM (SELECT FROM task t
         WHERE t.queue = q.queue AND t.status IN ('PENDING', 'RETRY') AND t.published_at IS NULL
         LIMIT {MOST_COUNTED}) AS unpublished)
     + (SELECT count(*) FROM (SELECT FROM task t
         WHERE t.queue = q.queue AND t.status IN ('PENDING', 'RETRY') AND t.published_at IS NOT NULL
           AND t.position IS NOT NULL LIMIT {MOST_COUNTED}) AS published) AS waiting,
       (SELECT count(*) FROM (SELECT FROM held_task h WHERE h.queue = q.queue AND h.let_go_at IS NULL
         LIMIT {MOST_COUNTED}) AS held) AS held,
       (SELECT count(*) FROM task t WHERE t.queue = q.queue AND t.status = 'STARTED') AS running,
       extract(epoch FROM now() - LEAST(
           (SELECT run_at FROM task WHERE queue = q.queue AND status IN ('PENDING', 'RETRY') AND published_at IS NULL
               AND run_at <= now() ORDER BY run_at, id LIMIT 1),
           (SELECT run_at FROM task WHERE queue = q.queue AND status IN ('PENDING', 'RETRY')
               AND published_at IS NOT NULL AND position IS NOT NULL ORDER BY position LIMIT 1),
           (SELECT run_at FROM held_task WHERE queue = q.queue AND line = '' AND let_go_at IS NULL
             ORDER BY run_at, task_id LIMIT 1)
       ))::float8 AS oldest_seconds,
       (SELECT count(*) FROM recent r WHERE r.queue = q.queue) / (SELECT seconds FROM span) AS ended_per_second
  FROM unnest($1::text[]) WITH ORDINALITY AS q (queue, place) LEFT JOIN queue_setting s ON s.queue = q.queue
 ORDER BY q.place
"""


async def queue_states(db: Database, names: Sequence[str]) -> list[QueueState]:
    """These queues as they are now. No count goes beyond `MOST_COUNTED`."""
    return [_state(row) for row in await db.fetch(_QUEUES, list(names))]


def _state(row: Record) -> QueueState:
    return QueueState(
        queue=row["queue"],
        paused=row["paused"],
        limits=Limits(
            concurrency=row["concurrency_limit"],
            rate=_rate(row["rate_count"], row["rate_seconds"]),
            key_concurrency=row["key_concurrency_limit"],
            key_rate=_rate(row["key_rate_count"], row["key_rate_seconds"]),
        ),
        waiting=row["waiting"],
        held=row["held"],
        running=row["running"],
        oldest_seconds=None if row["oldest_seconds"] is None else max(0.0, row["oldest_seconds"]),
        ended_per_second=row["ended_per_second"],
    )


def _rate(count: int | None, seconds: float | None) -> Rate | None:
    return None if count is None or seconds is None else Rate(count, seconds)

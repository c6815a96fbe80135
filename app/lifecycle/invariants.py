"""What must hold for every row, whatever was killed: the questions of `taskqueue verify`.

The CHECKs of the tables rule out what one row can say alone. These look across
tables and at times; each finds the rows that break a promise.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from app.db import Database

SAMPLE = 5
"""How many breaching ids are named."""


@dataclass(frozen=True, slots=True)
class Breach:
    """An invariant that does not hold.

    Attributes:
        invariant: the sentence that is untrue.
        rows: how many rows break it.
        sample: some of their ids.
    """

    invariant: str
    rows: int
    sample: tuple[str, ...]


# `$1`: how long, in seconds, something may be overdue before it counts: long enough for every sweep.
_BREACHES: Mapping[str, str] = {
    "a task that ended, and whose end somebody is to hear of, has its webhook": """
        SELECT t.id FROM task t
         WHERE t.finished_at IS NOT NULL AND t.webhook_url IS NOT NULL AND $1::float8 IS NOT NULL
           AND (t.webhook_events IS NULL
                OR CASE t.status WHEN 'SUCCESS' THEN 'task.succeeded' WHEN 'FAILURE' THEN 'task.failed'
                                 WHEN 'REVOKED' THEN 'task.revoked' END = ANY (t.webhook_events))
           AND NOT EXISTS (SELECT FROM webhook_delivery d
                            WHERE d.task_id = t.id
                              AND d.event IN ('task.succeeded', 'task.failed', 'task.revoked'))""",
    "a webhook tells of a task that ended, and of the end that it had": """
        SELECT d.id FROM webhook_delivery d JOIN task t ON t.id = d.task_id
         WHERE $1::float8 IS NOT NULL AND d.event NOT IN ('task.started', 'task.retrying')
           AND d.event IS DISTINCT FROM CASE t.status WHEN 'SUCCESS' THEN 'task.succeeded'
                                                      WHEN 'FAILURE' THEN 'task.failed'
                                                      WHEN 'REVOKED' THEN 'task.revoked' END""",
    "a running task's lease is renewed or reaped": """
        SELECT id FROM task WHERE status = 'STARTED' AND lease_until < now() - make_interval(secs => $1)""",
    "a due task has a message, or gets one": """
        SELECT id FROM task
         WHERE status IN ('PENDING', 'RETRY') AND published_at IS NULL
           AND run_at < now() - make_interval(secs => $1)
           AND NOT EXISTS (SELECT FROM task e WHERE e.queue = task.queue AND e.status IN ('PENDING', 'RETRY')
                              AND e.published_at < 'infinity')""",
    "a held task stands in a line": """
        SELECT t.id FROM task t
         WHERE t.status IN ('PENDING', 'RETRY') AND t.published_at = 'infinity' AND $1::float8 IS NOT NULL
           AND (SELECT h.let_go_at IS NULL FROM held_task h WHERE h.task_id = t.id) IS NOT TRUE""",
    # The first of each line is enough: the others wait for it.
    "a held task waits for a pause, a rate, or others that wait for a worker, run or have just ended": """
        SELECT h.task_id
          FROM (SELECT DISTINCT ON (queue, line) queue, line, concurrency_key, task_id, run_at FROM held_task
                 WHERE let_go_at IS NULL ORDER BY queue, line, run_at, task_id) h
          JOIN task t ON t.id = h.task_id AND t.status IN ('PENDING', 'RETRY') AND t.published_at = 'infinity'
          LEFT JOIN queue_setting s ON s.queue = h.queue
         WHERE h.run_at < now() - make_interval(secs => $1)
           AND s.paused IS NOT TRUE AND COALESCE(s.updated_at < now() - make_interval(secs => $1), true)
           AND NOT EXISTS (SELECT FROM task o
                            WHERE o.queue = h.queue
                              AND (o.status = 'STARTED' OR o.finished_at > now() - make_interval(secs => $1)
                                   OR o.status IN ('PENDING', 'RETRY') AND o.published_at < 'infinity'))
           AND NOT EXISTS (SELECT FROM queue_rate r
                            WHERE r.queue = h.queue AND r.key IN ('', h.concurrency_key)
                              AND r.next_at > now() - make_interval(secs => $1))""",
    "a cancelled task does not wait": """
        SELECT id FROM task WHERE status IN ('PENDING', 'RETRY') AND cancel_requested AND $1::float8 IS NOT NULL""",
    "an expired task does not wait": """
        SELECT id FROM task
         WHERE status IN ('PENDING', 'RETRY') AND expires_at < now() - make_interval(secs => $1)""",
    "a webhook that is being sent is sent or tried again": """
        SELECT id FROM webhook_delivery
         WHERE status = 'delivering' AND lease_until < now() - make_interval(secs => $1)""",
    "a webhook that is due is sent": """
        SELECT id FROM webhook_delivery WHERE status = 'pending' AND next_at < now() - make_interval(secs => $1)""",
    "a schedule that is due is fired, or says why not": """
        SELECT owner || '/' || name FROM schedule WHERE due_at < now() - make_interval(secs => $1)""",
    "what was removed is not there": """
        SELECT t.id FROM task t JOIN task_tombstone s ON s.id = t.id
         WHERE t.created_at < s.pruned_at AND $1::float8 IS NOT NULL""",
}


async def breaches(db: Database, *, overdue_seconds: float) -> list[Breach]:
    """Every invariant that does not hold now.

    Args:
        db: where.
        overdue_seconds: how long a lease, a due task or a due webhook may wait for its sweep.
    """
    found = []
    for invariant, sql in _BREACHES.items():
        rows = await db.fetch(
            f"SELECT count(*) AS rows, (array_agg(id::text))[1:{SAMPLE}] AS sample FROM ({sql}) AS breaching (id)",
            overdue_seconds,
        )
        if rows[0]["rows"]:
            found.append(Breach(invariant, rows[0]["rows"], tuple(rows[0]["sample"])))
    return found


def invariants() -> tuple[str, ...]:
    """What is asked, as sentences that should be true."""
    return tuple(_BREACHES)

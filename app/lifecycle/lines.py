"""The lines in which held tasks wait: for their queue, or for the others with their key.

A claim decides (`attempts`): where its queue is paused or a limit is full, the
row is held in that same statement, and its message has done its work. A held row
has no message and needs none, so however many there are cost no worker a slot
and Redis no memory. Here is what lets them go: as many as may start now, the
first in line first. Whoever lets go decides nothing, the next claim does, and
what is running is counted from the rows that run.
"""

from collections.abc import Sequence

from app.db import LOCK_TIMEOUT, Database, Record
from app.lifecycle.values import Bell, bells_of

BURST_SECONDS = 0.05
"""How far ahead of the even distances of a rate a task may start, so that two that come together both can."""
CATCH_UP_SECONDS = 2.0
"""How late those that were let go may be without a loss to the rate: longer than they ever wait for a relay."""


HOLD = "INSERT INTO held_task (task_id, queue, concurrency_key, line, reason, run_at)"
"""SQL: put a row that gets `published_at = 'infinity'` into its line."""
IN_LINE = """ON CONFLICT (task_id) DO UPDATE
       SET line = EXCLUDED.line, reason = EXCLUDED.reason, run_at = EXCLUDED.run_at, let_go_at = NULL"""
"""SQL: even if it had its turn already."""


# What comes due in a queue that is paused or limited takes its place in a line without a way through Redis, where it
# would look like work to a scaler, and through a worker's slot. Only what nothing limits is left to the feed.
_HOLD_DUE = f"""
WITH setting AS MATERIALIZED (
    SELECT paused, COALESCE(concurrency_limit, rate_count) IS NOT NULL AS by_queue,
           COALESCE(key_concurrency_limit, key_rate_count) IS NOT NULL AS by_key,
           CASE WHEN paused THEN 'paused' WHEN concurrency_limit IS NULL THEN 'rate' ELSE 'concurrency' END AS reason,
           CASE WHEN key_concurrency_limit IS NULL THEN 'key_rate' ELSE 'key_concurrency' END AS key_reason
      FROM queue_setting WHERE queue = $1
), first AS MATERIALIZED (
    SELECT id, paused OR by_queue AS whole, reason, key_reason
      FROM (SELECT id, concurrency_key FROM task
             WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NULL AND run_at <= now()
             ORDER BY run_at, id LIMIT $2) AS due, setting
     WHERE paused OR by_queue OR by_key AND concurrency_key <> ''
), locked AS (
    SELECT t.id, first.whole, first.reason, first.key_reason
      FROM task t JOIN first USING (id)
     WHERE t.status IN ('PENDING', 'RETRY') AND t.published_at IS NULL
     ORDER BY t.run_at, t.id FOR UPDATE OF t SKIP LOCKED
), kept AS (
    UPDATE task t SET published_at = 'infinity', position = NULL FROM locked WHERE t.id = locked.id
    RETURNING t.id, t.queue, t.concurrency_key, t.run_at, locked.whole, locked.reason, locked.key_reason
)
{HOLD} SELECT id, queue, concurrency_key, CASE WHEN whole THEN '' ELSE concurrency_key END,
              CASE WHEN whole THEN reason ELSE key_reason END, run_at FROM kept
{IN_LINE}
"""


async def hold_due(db: Database, queue: str, *, limit: int) -> int:
    """Hold rows that are due and have no message, as far as a pause or a limit concerns them; returns how many.

    Args:
        db: where.
        queue: whose rows.
        limit: how many of the rows that are due first are looked at.
    """
    return int((await db.execute(_HOLD_DUE, queue, limit)).rpartition(" ")[2])


# A row that is held but stands in no line would wait for ever. No statement leaves one behind, as far as we know; a
# mistake in one of them, or a hand in the tables, must not cost a task.
_MEND = """
UPDATE task SET published_at = NULL
 WHERE id = ANY (ARRAY(
       SELECT id FROM task t
        WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL AND position IS NULL
          AND published_at = 'infinity' AND (SELECT true FROM held_task h WHERE h.task_id = t.id) IS NULL
        LIMIT $2 FOR UPDATE SKIP LOCKED))
"""


async def mend(db: Database, queue: str, *, limit: int) -> int:
    """Have rows that are held and stand in no line fed again; returns how many there were."""
    return int((await db.execute(_MEND, queue, limit)).rpartition(" ")[2])


def next_start(next_at: str, in_turn: str) -> str:
    """SQL: the time that the next start counts from, for the rate.

    Who held for the rate may be late, because a relay looks now and then; who comes by himself gets no
    more for having come late.
    """
    return (
        f"CASE WHEN {in_turn} AND {next_at} > now() - make_interval(secs => {CATCH_UP_SECONDS}) THEN {next_at}"
        f" ELSE GREATEST({next_at}, now()) END"
    )


def _room(load: str, concurrency: str, count: str, seconds: str) -> str:
    """SQL: how many more may start now, beside those that have their turn; NULL if nothing limits it."""
    late = f"extract(epoch FROM now() - {next_start(f'{load}.next_at', 'true')})::float8"
    return (
        f"LEAST({concurrency} - {load}.running,"
        f" floor(({late} + {BURST_SECONDS}) * {count} / {seconds})::bigint + 1) - {load}.let_go"
    )


def _next_line(after: str) -> str:
    return (
        f"(SELECT line FROM held_task WHERE queue = $1 AND line > {after} AND let_go_at IS NULL ORDER BY line LIMIT 1)"
    )


# One after the other: two at once would let go the same number each. Who waits for long leaves it to those before, or
# to the next look. `$2`: at most so many.
_ROOM = f"""
WITH RECURSIVE patience AS MATERIALIZED (SELECT set_config('lock_timeout', '{LOCK_TIMEOUT}', true)
), alone AS MATERIALIZED (
    SELECT pg_advisory_xact_lock(hashtextextended('taskqueue held ' || $1, 0)) IS NULL AS at_last FROM patience
), setting AS MATERIALIZED (
    SELECT s.concurrency_limit, s.rate_count, s.rate_seconds,
           s.key_concurrency_limit, s.key_rate_count, s.key_rate_seconds,
           COALESCE(s.concurrency_limit, s.rate_count) IS NOT NULL AS by_queue,
           COALESCE(s.concurrency_limit, s.rate_count, s.key_concurrency_limit, s.key_rate_count) IS NOT NULL AS limited
      FROM alone LEFT JOIN queue_setting s ON s.queue = $1
     WHERE s.paused IS NOT TRUE
), room AS MATERIALIZED (
    SELECT GREATEST(0, LEAST($2::int, {_room("l", "s.concurrency_limit", "s.rate_count", "s.rate_seconds")})) AS free
      FROM setting s,
           queue_load(CASE WHEN s.by_queue THEN $1 END, '', COALESCE(s.concurrency_limit, $2::int)) l
)"""
# Rows of `task` are locked before those of `held_task`, as a claim or a cancel does it, and who is at one just now is
# left for the next time. What is in line and is not held any more, because a release that knows no lines has ended or
# started it, is removed. Without a limit nobody waits for room, and so nobody needs to have it kept. Ids are given as
# arrays, and the words for a waiting row are others than those of the indexes over them, so that the planner has no
# way to these rows but by their ids.
_PLACED = """
still AS MATERIALIZED (
    SELECT id FROM task
     WHERE id = ANY (ARRAY(SELECT task_id FROM first))
       AND lease_until IS NULL AND finished_at IS NULL AND published_at = 'infinity'
), locked AS (
    SELECT id, run_at FROM task
     WHERE id = ANY (ARRAY(SELECT id FROM still))
       AND lease_until IS NULL AND finished_at IS NULL AND published_at = 'infinity'
     ORDER BY run_at, id FOR UPDATE SKIP LOCKED
), placed AS (
    SELECT id, nextval('task_position') AS place FROM (SELECT id FROM locked ORDER BY run_at, id) AS in_order
), let_go AS (
    UPDATE task t SET published_at = now(), position = placed.place FROM placed WHERE t.id = placed.id
    RETURNING t.id, t.name, t.queue, t.attempt, t.position, t.time_limit, t.traceparent, false AS overdue
), in_turn AS (
    UPDATE held_task SET let_go_at = now()
     WHERE task_id = ANY (ARRAY(SELECT id FROM let_go)) AND (SELECT limited FROM setting)
), gone AS (
    DELETE FROM held_task h
     WHERE h.task_id = ANY (ARRAY(SELECT task_id FROM first))
       AND (NOT (SELECT limited FROM setting) AND EXISTS (SELECT FROM let_go WHERE let_go.id = h.task_id)
            OR NOT EXISTS (SELECT FROM still WHERE still.id = h.task_id))
)"""
# From one key to the next, round and round, whatever number of rows each has: `$4` keys behind `$3`. The key of a task
# that has just ended (`$5`) comes first; where nothing but its key was limited, its end makes room for no other.
_LET_GO = f"""
{_ROOM}, walked AS MATERIALIZED (
    SELECT key, nth FROM (
        WITH RECURSIVE walk (key, round, nth) AS (
            SELECT line, line <= $3, 1 FROM (SELECT COALESCE({_next_line("$3")}, {_next_line("''")}) AS line) AS start
            UNION ALL
            SELECT line, round OR line <= key, nth + 1
              FROM (SELECT COALESCE({_next_line("walk.key")}, CASE WHEN NOT round THEN {_next_line("''")} END) AS line,
                           key, round, nth
                      FROM walk WHERE NOT (round AND key > $3)) AS next
             WHERE line IS NOT NULL
        ) SELECT key, nth FROM walk WHERE key IS NOT NULL AND NOT (round AND key > $3)
           LIMIT CASE WHEN (SELECT free FROM room) > 0 AND ($5::text IS NULL OR (SELECT by_queue FROM setting))
                      THEN $4::int ELSE 0 END
    ) AS walked
), keys AS (
    SELECT key FROM walked UNION SELECT $5 WHERE $5 <> ''
), free AS MATERIALIZED (
    SELECT keys.key, GREATEST(0, LEAST($2::int, {
    _room("l", "s.key_concurrency_limit", "s.key_rate_count", "s.key_rate_seconds")
})) AS free
      FROM setting s, keys,
           queue_load(CASE WHEN COALESCE(s.key_concurrency_limit, s.key_rate_count) IS NOT NULL THEN $1 END, keys.key,
                      COALESCE(s.key_concurrency_limit, $2::int)) l
), first AS MATERIALIZED (
    SELECT task_id, run_at FROM (
        (SELECT task_id, run_at FROM held_task WHERE queue = $1 AND line = '' AND let_go_at IS NULL
          ORDER BY run_at, task_id LIMIT COALESCE((SELECT free FROM room), 0))
         UNION ALL
        SELECT one.task_id, one.run_at
          FROM free CROSS JOIN LATERAL (
               SELECT task_id, run_at FROM held_task WHERE queue = $1 AND line = free.key AND let_go_at IS NULL
                ORDER BY run_at, task_id LIMIT LEAST(free.free, (SELECT room.free FROM room))) AS one
    ) AS those
     ORDER BY run_at, task_id LIMIT COALESCE((SELECT free FROM room), 0)
), {_PLACED}
SELECT w.walked_to, g.id, g.name, g.queue, g.attempt, g.position, g.time_limit, g.traceparent, g.overdue
  FROM (SELECT (SELECT key FROM walked ORDER BY nth DESC LIMIT 1) AS walked_to) AS w LEFT JOIN let_go g ON true
"""
_NEXT_KEYS = 32
"""How many other keys are looked at when a task ends. The relay comes to all of them in time."""


async def let_go(db: Database, queue: str, *, key: str = "", limit: int) -> list[Bell]:
    """Stamp rows that are held, as many as may start; the caller pushes what is returned.

    Of all that may start, those go first that have been due for longest, whatever they wait for. They take a new
    place, as retries do: several that are let go one after the other run in that order.

    Args:
        db: where.
        queue: whose rows.
        key: of the task that has just ended.
        limit: rows at most.

    Raises:
        Locked: if somebody lets others of this queue go for longer than `LOCK_TIMEOUT`.
    """
    return _pushed(await db.fetch(_LET_GO, queue, limit, key, _NEXT_KEYS, key))


async def let_go_round(db: Database, queue: str, *, after: str, keys: int, limit: int) -> tuple[list[Bell], str]:
    """As `let_go`, for whoever goes round the keys, however many there are.

    Args:
        db: where.
        queue: whose rows.
        after: the key after which to begin; at first ''.
        keys: how many keys are looked at.
        limit: rows at most, in all.

    Returns:
        What to push, and the key to go on after.

    Raises:
        Locked: as `let_go`.
    """
    rows = await db.fetch(_LET_GO, queue, limit, after, keys, None)
    walked_to = rows[0]["walked_to"] if rows else None
    return _pushed(rows), walked_to or ""


def _pushed(rows: Sequence[Record]) -> list[Bell]:
    return bells_of([row for row in rows if row["id"] is not None])


# A rate that nobody has used for an hour says what its absence says.
_FORGET_RATES = """
DELETE FROM queue_rate r
 USING (SELECT queue, key FROM queue_rate WHERE next_at < now() - interval '1 hour' LIMIT $1 FOR UPDATE SKIP LOCKED) d
 WHERE r.queue = d.queue AND r.key = d.key
"""


async def forget_rates(db: Database, *, limit: int) -> int:
    """Remove what is known of keys that have not started a task for long; returns how many."""
    return int((await db.execute(_FORGET_RATES, limit)).rpartition(" ")[2])


# A turn is over within a moment, with the claim. What has not come to one may have been started by a claim of before
# the limit, or handed back: its room must not be kept for ever.
_END_TURNS = """
DELETE FROM held_task
 WHERE task_id = ANY (ARRAY(
       SELECT task_id FROM held_task h
        WHERE h.let_go_at < now() - make_interval(secs => $1)
          AND NOT EXISTS (SELECT FROM task t WHERE t.id = h.task_id AND t.lease_until IS NULL
                             AND t.finished_at IS NULL AND t.published_at < 'infinity')
          FOR UPDATE OF h SKIP LOCKED))
"""


async def end_turns(db: Database, *, older_than_seconds: float) -> int:
    """Keep no room any more for those who had their turn and don't wait for a worker; returns for how many."""
    return int((await db.execute(_END_TURNS, older_than_seconds)).rpartition(" ")[2])

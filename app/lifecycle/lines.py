"""The lines in which held tasks wait: for their queue, or for the others with their key.

A claim decides (`attempts`): where its queue is paused or a limit is full, the
row is held in that same statement, and its message has done its work. A held row
has no message and needs none, so however many there are cost no worker a slot
and Redis no memory. Here is what lets them go: as many as may start now, the
first in line first. Whoever lets go decides nothing, the next claim does, and
what is running is counted from the rows that run.
"""

from collections.abc import Sequence

from app.db import Database, Record
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


# What comes due in a paused queue is held without a way through Redis, where it would look like work to a scaler.
_HOLD_DUE = f"""
WITH due AS (
    SELECT id FROM task
     WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NULL AND run_at <= now()
       AND EXISTS (SELECT FROM queue_setting s WHERE s.queue = $1 AND s.paused)
     ORDER BY run_at, id LIMIT $2 FOR UPDATE SKIP LOCKED
), kept AS (
    UPDATE task t SET published_at = 'infinity', position = NULL FROM due WHERE t.id = due.id
    RETURNING t.id, t.queue, t.concurrency_key, t.run_at
)
{HOLD} SELECT id, queue, concurrency_key, '', 'paused', run_at FROM kept
{IN_LINE}
"""


async def hold_due(db: Database, queue: str, *, limit: int) -> int:
    """Hold rows of a queue that are due and have no message, if it is paused; returns how many."""
    return int((await db.execute(_HOLD_DUE, queue, limit)).rpartition(" ")[2])


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


# One after the other: two at once would let go the same number each. `$2`: at most so many.
_ROOM = f"""
WITH RECURSIVE alone AS MATERIALIZED (
    SELECT pg_advisory_xact_lock(hashtextextended('taskqueue held ' || $1, 0)) IS NULL AS at_last
), setting AS MATERIALIZED (
    SELECT s.concurrency_limit, s.rate_count, s.rate_seconds,
           s.key_concurrency_limit, s.key_rate_count, s.key_rate_seconds,
           COALESCE(s.concurrency_limit, s.rate_count, s.key_concurrency_limit, s.key_rate_count) IS NOT NULL AS limited
      FROM alone LEFT JOIN queue_setting s ON s.queue = $1
     WHERE s.paused IS NOT TRUE
), room AS MATERIALIZED (
    SELECT GREATEST(0, LEAST($2::int, {_room("l", "s.concurrency_limit", "s.rate_count", "s.rate_seconds")})) AS free
      FROM setting s,
           queue_load(CASE WHEN COALESCE(s.concurrency_limit, s.rate_count) IS NOT NULL THEN $1 END, '',
                      COALESCE(s.concurrency_limit, $2::int)) l
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
_LET_GO = f"""
{_ROOM}, first AS (
    SELECT task_id, run_at FROM held_task WHERE queue = $1 AND line = '' AND let_go_at IS NULL
     ORDER BY run_at, task_id LIMIT COALESCE((SELECT free FROM room), 0)
), {_PLACED}
SELECT id, name, queue, attempt, position, time_limit, traceparent, overdue FROM let_go
"""


async def let_go(db: Database, queue: str, *, limit: int) -> list[Bell]:
    """Stamp rows that wait for their queue, as many as may start; the caller pushes what is returned.

    They take a new place, as retries do: several that are let go one after the other run in that order.
    """
    return bells_of(await db.fetch(_LET_GO, queue, limit))


def _let_go_by_key(keys: str) -> str:
    return f"""
{_ROOM}, keys (key) AS ({keys}
), free AS MATERIALIZED (
    SELECT keys.key, GREATEST(0, LEAST($2::int, {
        _room("l", "s.key_concurrency_limit", "s.key_rate_count", "s.key_rate_seconds")
    })) AS free
      FROM setting s, keys,
           queue_load(CASE WHEN COALESCE(s.key_concurrency_limit, s.key_rate_count) IS NOT NULL THEN $1 END, keys.key,
                      COALESCE(s.key_concurrency_limit, $2::int)) l
     WHERE keys.key IS NOT NULL
), first AS (
    SELECT one.task_id, one.run_at
      FROM free CROSS JOIN LATERAL (
           SELECT task_id, run_at FROM held_task WHERE queue = $1 AND line = free.key AND let_go_at IS NULL
            ORDER BY run_at, task_id LIMIT free.free) AS one
     LIMIT COALESCE((SELECT free FROM room), 0)
), {_PLACED}
SELECT w.walked, w.walked_to, g.id, g.name, g.queue, g.attempt, g.position, g.time_limit, g.traceparent, g.overdue
  FROM (SELECT count(key) AS walked, max(key) AS walked_to FROM keys) AS w LEFT JOIN let_go g ON true
"""


# From one key to the next, whatever number of rows each has.
_LET_GO_BY_KEY = _let_go_by_key("""
    SELECT key FROM (
        WITH RECURSIVE walk (key) AS (
            (SELECT line FROM held_task WHERE queue = $1 AND line > $3 AND let_go_at IS NULL ORDER BY line LIMIT 1)
            UNION ALL
            SELECT (SELECT line FROM held_task WHERE queue = $1 AND line > walk.key AND let_go_at IS NULL
                     ORDER BY line LIMIT 1)
              FROM walk WHERE walk.key IS NOT NULL
        ) SELECT key FROM walk WHERE key IS NOT NULL LIMIT $4::int
    ) AS walked""")
_LET_GO_OF_KEY = _let_go_by_key("SELECT $3::text")


async def let_go_by_key(db: Database, queue: str, *, after: str, keys: int, limit: int) -> tuple[list[Bell], str]:
    """As `let_go`, rows that wait for others with their key.

    Args:
        db: where.
        queue: whose rows.
        after: the key after which to begin; at first ''.
        keys: how many keys are looked at.
        limit: rows at most, in all.

    Returns:
        What to push, and the key to go on after: '' from the beginning.
    """
    rows = await db.fetch(_LET_GO_BY_KEY, queue, limit, after, keys)
    walked_to = rows[0]["walked_to"] if rows and rows[0]["walked"] == keys else ""
    return _pushed(rows), walked_to


async def let_go_of_key(db: Database, queue: str, key: str, *, limit: int) -> list[Bell]:
    """As `let_go_by_key`, of one key."""
    return _pushed(await db.fetch(_LET_GO_OF_KEY, queue, limit, key))


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

"""Submits that are more than one INSERT of one row: several tasks at once, under a key, or the only one of a kind.

All of it is one statement, so there is no moment at which a key is known and its
tasks are not, or half of a batch is there. A plain submit is `waiting.submit`,
and pays for none of this.
"""

from collections.abc import Collection, Sequence
from uuid import UUID

from app.core import errors, jsontext, limits
from app.db import Database, Record
from app.lifecycle.lines import HOLD, IN_LINE
from app.lifecycle.values import Bell, NewTask, Remembered, SubmitKey, Submitted

RACED = "unique_task_is_nobody_elses"
"""The constraint that breaks when a rival got ahead."""
ATTEMPTS = 100
"""How often a submit may meet a rival for its digest that it did not see: one of them gets ahead each time."""

# The key comes first. Whoever wants the same one waits here until this is committed, and then finds the gate shut.
# `holder` is the task that has a digest already, and `twin` the same if it is unfinished and young enough; else the new
# one takes its place. If the place was taken meanwhile, by a rival that can't be seen yet, NULL is written over it, a
# constraint breaks, and everything is undone; the next try sees it. Digests are taken in their order, so that two
# batches never wait for each other.
# `line` says as `waiting.submit` does whether rows of a queue wait that were never pushed, and whether the new ones are
# held: the queue is paused, or others are held before them.
_SUBMIT_BATCH = f"""
WITH wanted AS MATERIALIZED (
    SELECT w.*, COALESCE(w.due_at, now() + make_interval(secs => w.delay_seconds)) AS run_at,
           decode(w.unique_key, 'hex') AS digest
      FROM ROWS FROM (json_to_recordset($1::json) AS (
               id uuid, name text, queue text, args text, kwargs text, tags text[], webhook_url text,
               webhook_events text[], max_retries int, time_limit float8, traceparent text, owner text,
               delay_seconds float8, due_at timestamptz, expires_in_seconds float8, expires_at timestamptz,
               unique_key text, unique_for_seconds float8, rerun_of uuid, concurrency_key text, failures int))
           WITH ORDINALITY
           AS w (id, name, queue, args, kwargs, tags, webhook_url, webhook_events, max_retries, time_limit, traceparent,
                 owner, delay_seconds, due_at, expires_in_seconds, expires_at, unique_key, unique_for_seconds, rerun_of,
                 concurrency_key, failures, item)
), known AS MATERIALIZED (
    SELECT w.*, u.task_id AS holder, t.id AS twin
      FROM wanted w
      LEFT JOIN unique_task u ON u.digest = w.digest
      LEFT JOIN task t ON t.id = u.task_id AND t.finished_at IS NULL
                      AND t.created_at > now() - make_interval(secs => w.unique_for_seconds)
), kept AS (
    INSERT INTO idempotency_key (owner, route, key, fingerprint, task_ids)
    SELECT $2, $3, $4::text, $5::bytea, (SELECT array_agg(COALESCE(twin, id) ORDER BY item) FROM known)
     WHERE $4 IS NOT NULL
    ON CONFLICT DO NOTHING
    RETURNING true
), gate AS MATERIALIZED (
    SELECT $4 IS NULL OR EXISTS (SELECT FROM kept) AS opens
), taken AS (
    INSERT INTO unique_task (digest, task_id)
    SELECT digest, id FROM known
     WHERE (SELECT opens FROM gate) AND digest IS NOT NULL AND twin IS NULL
     ORDER BY digest
    ON CONFLICT (digest) DO UPDATE
       SET task_id = CASE WHEN unique_task.task_id = (SELECT k.holder FROM known k WHERE k.digest = excluded.digest)
                          THEN excluded.task_id END
), line AS MATERIALIZED (
    SELECT queue,
           NOT queue = ANY ($6::text[]) AND (
               SELECT position FROM task t
                WHERE t.queue = q.queue AND status IN ('PENDING', 'RETRY') AND attempt = 0
                  AND published_at IS NULL AND position IS NOT NULL
                ORDER BY t.queue DESC, position DESC LIMIT 1) IS NULL AS may_push,
           s.queue IS NOT NULL AS has_setting,
           CASE WHEN s.paused THEN 'paused' WHEN s.queue IS NOT NULL THEN
               (SELECT reason FROM held_task h WHERE h.queue = s.queue AND h.line = '' AND let_go_at IS NULL
                 ORDER BY h.queue DESC, h.line DESC, h.run_at DESC, h.task_id DESC LIMIT 1) END AS hold_for
      FROM (SELECT DISTINCT queue FROM wanted) q LEFT JOIN queue_setting s USING (queue)
), placed AS MATERIALIZED (
    SELECT o.*, CASE WHEN run_at <= now() AND reason IS NULL THEN nextval('task_position') END AS place
      FROM (SELECT w.*, line.may_push, CASE WHEN line.hold_for IS NULL THEN w.concurrency_key ELSE '' END AS behind,
                   CASE WHEN w.run_at <= now() AND line.has_setting THEN COALESCE(line.hold_for,
                       (SELECT reason FROM held_task h
                         WHERE h.queue = w.queue AND h.line = w.concurrency_key AND let_go_at IS NULL
                         ORDER BY h.queue DESC, h.line DESC, h.run_at DESC, h.task_id DESC LIMIT 1)) END AS reason
              FROM known w JOIN line USING (queue)
             WHERE (SELECT opens FROM gate) AND w.twin IS NULL ORDER BY item) o
), inserted AS (
    INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, webhook_events, max_retries, time_limit,
                      traceparent, rerun_of, owner, concurrency_key, failures, run_at, expires_at, position,
                      published_at)
    SELECT id, name, queue, args::json, kwargs::json, tags, webhook_url, webhook_events, max_retries, time_limit,
           traceparent, rerun_of, owner, concurrency_key, COALESCE(failures, 0), run_at,
           COALESCE(expires_at, now() + make_interval(secs => expires_in_seconds)),
           place, CASE WHEN reason IS NOT NULL THEN 'infinity' WHEN place IS NOT NULL AND may_push THEN now() END
      FROM placed
    RETURNING id, position, published_at
), held AS (
    {HOLD} SELECT id, queue, concurrency_key, behind, reason, run_at FROM placed WHERE reason IS NOT NULL {IN_LINE}
)
SELECT id, NULL::uuid AS twin, position, COALESCE(published_at < 'infinity', false) AS stamped FROM inserted
 UNION ALL
SELECT id, twin, NULL, false FROM known WHERE twin IS NOT NULL AND (SELECT opens FROM gate)
"""


async def submit_batch(
    db: Database, new: Sequence[NewTask], *, held_back: Collection[str] = (), key: SubmitKey | None = None
) -> Submitted | None:
    """Insert tasks, all or none, and remember them under `key`. They are durable when this returns.

    A task with a `unique_key` gives way to an unfinished one that has the same, also within `new`.

    Args:
        db: where to.
        new: the tasks, in the order in which they are to run.
        held_back: queues whose messages are left to the relay, because Redis is away or they are full.
        key: what the client calls this submit, if it may come again.

    Returns:
        What was made; None if the key came before (`remembered` says what was made then), and nothing was written.

    Raises:
        StatementRefused: if Postgres can't store one of them; then it has stored none.
    """
    first_with: dict[bytes, UUID] = {}
    own = [first_with.setdefault(one.unique_key, one.id) if one.unique_key else one.id for one in new]
    rows = [_row(one) for one, task_id in zip(new, own, strict=True) if one.id == task_id]
    arguments = (
        jsontext.written(rows),
        key.owner if key else None,
        key.route if key else None,
        key.key if key else None,
        key.fingerprint if key else None,
        list(held_back),
    )
    found = await _insert(db, arguments)
    if not found:
        return None
    twins = {row["id"]: row["twin"] or row["id"] for row in found}
    stamped = {row["id"]: row["position"] for row in found if row["stamped"]}
    return Submitted(
        task_ids=tuple(twins[task_id] for task_id in own),
        bells=tuple(_bell(one, stamped[one.id]) for one in new if one.id in stamped),
        created=frozenset(row["id"] for row in found if row["twin"] is None),
    )


async def submit_together(
    db: Database, new: Sequence[NewTask], *, held_back: Collection[str] = ()
) -> list[Bell | None]:
    """Insert plain tasks, all or none: no key, none unique. They are durable when this returns.

    Args:
        db: where to.
        new: the tasks, in the order in which they are to run.
        held_back: as of `submit_batch`.

    Returns:
        For each what `waiting.submit` does: the message to push now, if there is one.

    Raises:
        StatementRefused: if Postgres can't store one of them; then it has stored none.
    """
    nothing = (None, None, None, None)
    found = await db.fetch(_SUBMIT_BATCH, jsontext.written([_row(one) for one in new]), *nothing, list(held_back))
    stamped = {row["id"]: row["position"] for row in found if row["stamped"]}
    places = [stamped.get(one.id) for one in new]
    return [None if place is None else _bell(one, place) for one, place in zip(new, places, strict=True)]


async def _insert(db: Database, arguments: tuple[object, ...]) -> list[Record]:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return await db.fetch(_SUBMIT_BATCH, *arguments)
        except errors.StatementRefused as refused:
            if refused.constraint != RACED or attempt == ATTEMPTS:
                raise
    raise AssertionError  # pragma: no cover - the last attempt raises


def _row(new: NewTask) -> dict[str, object]:
    """What it has. A column that is not there is NULL: a plain task does not say of each what it has not."""
    row: dict[str, object] = {
        "id": str(new.id),
        "name": new.name,
        "queue": new.queue,
        "args": new.args,
        "kwargs": new.kwargs,
        "max_retries": new.max_retries,
        "traceparent": new.traceparent,
        "owner": new.owner,
        "tags": new.tags,
        "delay_seconds": new.delay_seconds,
        "concurrency_key": new.stored_key,
    }
    for name in ("webhook_url", "webhook_events", "time_limit", "expires_in_seconds", "unique_for_seconds"):
        if (value := getattr(new, name)) is not None:
            row[name] = value
    if new.due_at is not None:
        row["due_at"] = new.due_at.isoformat()
    if new.expires_at is not None:
        row["expires_at"] = new.expires_at.isoformat()
    if new.unique_key is not None:
        row["unique_key"] = new.unique_key.hex()
    if new.rerun_of is not None:
        row["rerun_of"] = str(new.rerun_of)
    if new.failures:
        row["failures"] = new.failures
    return row


def _bell(new: NewTask, position: int) -> Bell:
    return Bell(
        task_id=new.id,
        name=new.name,
        queue=new.queue,
        attempt=0,
        position=position,
        time_limit=new.time_limit,
        traceparent=new.traceparent,
    )


_REMEMBERED = """
SELECT fingerprint, task_ids, created_at < now() - make_interval(secs => $4) AS past
  FROM idempotency_key WHERE owner = $1 AND route = $2 AND key = $3
"""
_FORGET = """
DELETE FROM idempotency_key
 WHERE owner = $1 AND route = $2 AND key = $3 AND created_at < now() - make_interval(secs => $4)
"""


async def remembered(db: Database, key: SubmitKey) -> Remembered | None:
    """The first request under this key; None if there was none within `limits.KEY_SECONDS`, and the key is free."""
    place = (key.owner, key.route, key.key, limits.KEY_SECONDS)
    row = await db.fetchrow(_REMEMBERED, *place)
    if row is None:
        return None
    if row["past"]:
        await db.execute(_FORGET, *place)
        return None
    return Remembered(fingerprint=row["fingerprint"], task_ids=tuple(row["task_ids"]))

"""Rows in bulk, as the product would have written them one by one."""

from typing import Literal, TypeAlias

import asyncpg

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Place = Literal["published", "held back", "later"]
"""Whether a waiting row has a message, is due and has none, or is not due yet."""

LINE = "line"
"""A queue whose rows all have a message."""
OTHER = "other"
"""A second one, as long."""
HELD = "held"
"""One whose rows were all held back: Redis is full or away, and the relay feeds them."""
CHUNK = 100_000
DEAD = "https://dead.example"
"""The origin of a receiver to which nothing is sent, whatever is due."""

_ID = """
    (lpad(to_hex((extract(epoch FROM {moment}) * 1000)::bigint), 12, '0') || '7'
     || substr(md5(random()::text), 1, 3) || '8' || substr(md5(random()::text), 1, 15))::uuid
"""

# One in ten may expire, and every end is to be told: what costs most.
_WAITING = f"""
INSERT INTO task (id, name, queue, args, kwargs, tags, webhook_url, traceparent, position, published_at, run_at,
                  expires_at, created_at)
SELECT {_ID.format(moment="moment")}, 'sample.echo', $1, '[]', '{{"value": "something to say"}}', '{{}}',
       'https://receiver.example/hook', '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01',
       CASE WHEN $4 <> 'later' THEN nextval('task_position') END, CASE WHEN $4 = 'published' THEN moment END,
       CASE WHEN $4 = 'later' THEN moment + interval '1 day' ELSE moment END,
       CASE WHEN n % 10 = 0 THEN now() + interval '1 day' END, moment
  FROM generate_series($2::int, $3::int) AS n,
       LATERAL (SELECT now() - interval '2 hours' + make_interval(secs => n / 1000.0) AS moment) AS at
 ORDER BY n
"""

_ENDED = f"""
INSERT INTO task (id, name, queue, args, kwargs, status, attempt, token, worker, result, run_at, created_at, started_at,
                  finished_at)
SELECT {_ID.format(moment="moment")}, 'sample.echo', '{LINE}', '[]', '{{"value": "something to say"}}', 'SUCCESS', 1,
       gen_random_uuid(), 'worker-1', '"something to say"', moment, moment, moment, moment
  FROM generate_series($1::int, $2::int) AS n,
       LATERAL (SELECT now() - interval '60 days' + make_interval(secs => n * 3888000.0 / $3::int) AS moment) AS at
 ORDER BY n
"""


async def wait(connection: Connection, queue: str, rows: int, *, place: Place = "published") -> None:
    """Put so many waiting rows into a queue, the oldest first in line."""
    for first in range(1, rows + 1, CHUNK):
        await connection.execute(_WAITING, queue, first, min(rows, first + CHUNK - 1), place)


async def end(connection: Connection, rows: int) -> None:
    """Put so many ended rows, from 60 days ago to 15."""
    for first in range(1, rows + 1, CHUNK):
        await connection.execute(_ENDED, first, min(rows, first + CHUNK - 1), rows)


_RUN = f"""
UPDATE task SET status = 'STARTED', attempt = 1, token = gen_random_uuid(), worker = 'worker-2', started_at = now(),
                lease_until = now() + interval '1 day'
 WHERE id IN (SELECT id FROM task WHERE queue = '{OTHER}' AND status = 'PENDING' AND published_at IS NOT NULL
               ORDER BY queue, position DESC LIMIT $1)
"""
_TELL = """
INSERT INTO webhook_delivery (id, task_id, event, sequence, url, origin, attempt, next_at)
SELECT gen_random_uuid(), id, 'task.succeeded', 1, 'https://receiver.example/hook',
       'https://receiver.example', 3, now() + interval '1 hour'
  FROM (SELECT id FROM task WHERE finished_at IS NOT NULL AND webhook_url IS NULL
         ORDER BY finished_at DESC LIMIT $1) AS newest
"""
_TELL_DEAD = f"""
INSERT INTO webhook_delivery (id, task_id, event, sequence, url, origin, attempt, next_at)
SELECT gen_random_uuid(), task_id, event, 2, '{DEAD}/hook', '{DEAD}', 3, now() - interval '1 hour'
  FROM webhook_delivery WHERE sequence = 1
"""
_REMEMBER = """
INSERT INTO task_tombstone (id, pruned_at)
SELECT gen_random_uuid(), now() - interval '60 days' + make_interval(secs => n * 3888000.0 / $1::int)
  FROM generate_series(1, $1::int) AS n
"""


async def run(connection: Connection, rows: int) -> None:
    """Have so many rows of the second queue run."""
    await connection.execute(_RUN, rows)


async def fill(connection: Connection, *, waiting: int, ended: int, running: int, undelivered: int) -> None:
    """Fill a database: so many rows that wait in each of the three queues, and so many others.

    As many as wait in the first are to run tomorrow, what runs is of the second. As many as have ended were pruned.
    The webhooks of the tasks that ended last wait for another attempt, and as many to a dead receiver are due.
    """
    await wait(connection, LINE, waiting)
    await wait(connection, LINE, waiting, place="later")
    await wait(connection, OTHER, waiting + running)
    await wait(connection, HELD, waiting, place="held back")
    await end(connection, ended)
    await connection.execute(_REMEMBER, ended)
    await run(connection, running)
    await connection.execute(_TELL, undelivered)
    await connection.execute(_TELL_DEAD)

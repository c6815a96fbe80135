import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import redis.asyncio

from app import broker, lifecycle
from app import relay as relays
from app.broker import END_OF_LINE, TAIL_DEPTH, Broker, Message
from app.core import errors
from app.core.config import Settings
from app.db import Database
from app.lifecycle import reads, waiting
from app.relay import Note, Relay
from app.utils.webhook import Sender
from tests.support.database import opened, row, started, submitted

QUEUE = "default"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def one_connection(settings: Settings) -> AsyncIterator[Database]:
    """A pool of one: what a statement does to its session holds for the next."""
    database = Database(settings.postgres_dsn, max_connections=1, application_name="test")
    yield database
    await database.close()


@pytest.fixture
async def plain(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(settings.redis_url.get_secret_value()) as client:
        yield client


@pytest.fixture
async def relay(db: Database, settings: Settings) -> AsyncIterator[Relay]:
    """A relay without patience: a note proves a loss at once."""
    wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with Sender.from_settings(settings) as sender:
        yield Relay(settings, db, wire, sender, grace_seconds=0.0)
    await wire.close()


class DeafAtTheTail(Broker):
    """A Redis that goes away between the push at the head and the one at the tail."""

    async def publish(self, queue: str, messages: Sequence[Message], *, at_tail: bool = False) -> int:
        if at_tail:
            raise errors.BrokerUnavailable("Redis went away")
        return await super().publish(queue, messages)


async def lined_up(db: Database, number: int) -> list[UUID]:
    """Tasks whose messages were pushed, says their rows; in the order of the line."""
    rows = await db.fetch(
        "INSERT INTO task (id, name, queue, args, kwargs, position, published_at)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', nextval('task_position'), now()"
        "   FROM generate_series(1, $1::int) RETURNING id, position",
        number,
    )
    return [found["id"] for found in sorted(rows, key=lambda found: int(found["position"]))]


async def pushed(relay: Relay, tasks: Sequence[UUID]) -> None:
    await relay.broker.publish(QUEUE, [await bell(relay.db, one) for one in tasks])


async def bell(db: Database, task_id: UUID) -> lifecycle.Bell:
    stored = await row(db, task_id)
    return lifecycle.Bell(
        task_id=task_id,
        name=stored["name"],
        queue=stored["queue"],
        attempt=stored["attempt"],
        position=stored["position"],
    )


async def queued(plain: redis.asyncio.Redis) -> list[broker.Received]:
    """The messages that wait, in the order in which they will be consumed."""
    raw = await plain.lrange(QUEUE, 0, -1)
    return [broker.decode(one) for one in reversed(raw)]


async def test_a_loss_of_more_than_a_batch_is_pushed_again_once_and_in_order(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    tasks = await lined_up(db, 1200)

    await relays._look_for_lost(relay, QUEUE)

    messages = await queued(plain)
    assert [message.task_id for message in messages] == tasks
    assert [message.position for message in messages] == sorted(message.position for message in messages)
    await relays._look_for_lost(relay, QUEUE)
    await relays._look_for_lost(relay, QUEUE)
    assert await plain.llen(QUEUE) == 1200, "none looks lost again"


async def test_a_released_task_that_is_refused_goes_to_the_end_of_the_line(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    task_id = await submitted(db)
    place = (await row(db, task_id))["position"]
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, lifecycle.decide(claimed.budgets, lifecycle.Interrupted()))
    [released] = await lifecycle.take_due(db, QUEUE, limit=10)
    assert (released.position, released.overdue) == (place, True)
    backlog = await lined_up(db, 20)
    await pushed(relay, backlog)

    assert await lifecycle.refuse(db, task_id, attempt=1, name="sample.echo", position=place) is not None
    await db.execute("UPDATE task SET run_at = now() WHERE id = $1", task_id)
    assert await relay.publish_due(QUEUE) == 1

    messages = await queued(plain)
    assert [message.task_id for message in messages] == [*backlog, task_id]
    assert messages[-1].position > messages[-2].position
    for _ in range(3):
        await relay.note_tail(QUEUE)
        assert await relay.publish_lost(QUEUE) == 0


@pytest.mark.parametrize("join", ["nestloop", "hashjoin", "mergejoin"])
async def test_rows_that_come_due_take_their_places_in_the_order_of_being_due(
    one_connection: Database, join: str
) -> None:
    """However the planner joins."""
    db = one_connection
    for other in {"nestloop", "hashjoin", "mergejoin"} - {join}:
        await db.execute(f"SET enable_{other} = off")
    await db.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, run_at)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', now() - make_interval(secs => n * 7 % 50 + 1)"
        "   FROM generate_series(1, 50) AS n"
    )

    bells = await lifecycle.take_due(db, QUEUE, limit=50)

    in_order = await db.fetch("SELECT id, position FROM task ORDER BY run_at")
    positions = [found["position"] for found in in_order]
    assert positions == sorted(positions)
    assert [one.task_id for one in bells] == [found["id"] for found in in_order]
    assert not any(one.overdue for one in bells)


@pytest.mark.parametrize("known", [True, False], ids=["the id of a waiting task", "an unknown id"])
async def test_a_forged_message_at_the_tail_makes_nothing_look_lost(
    relay: Relay, db: Database, plain: redis.asyncio.Redis, *, known: bool
) -> None:
    tasks = await lined_up(db, 3)
    await pushed(relay, tasks)
    real = await bell(db, tasks[0])
    forged = replace(real, task_id=tasks[2] if known else uuid4(), position=END_OF_LINE)
    await plain.rpush(QUEUE, *[broker.encode(forged, QUEUE)] * (TAIL_DEPTH - 1))

    await relay.note_tail(QUEUE)

    assert [note.position for note in relay.notes[QUEUE]] == [real.position], "the next message that is believable"
    assert await relay.publish_lost(QUEUE) == 0

    relay.notes.clear()
    await plain.rpush(QUEUE, broker.encode(forged, QUEUE))
    await relay.note_tail(QUEUE)
    assert not relay.notes[QUEUE], "none of those that are looked at is believable"
    assert await relay.publish_lost(QUEUE) == 0


async def test_a_copy_of_a_real_message_at_the_tail_makes_nothing_look_lost(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    tasks = await lined_up(db, 20)
    await pushed(relay, tasks)
    await plain.rpush(QUEUE, broker.encode(await bell(db, tasks[-1]), QUEUE))

    await relay.note_tail(QUEUE)
    assert await relay.publish_lost(QUEUE) == 0
    assert len(await queued(plain)) == 21


async def test_when_the_clock_of_postgres_is_set_back_the_search_for_lost_messages_begins_anew(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    relay.grace_seconds = 10.0
    tasks = await lined_up(db, 3)
    await pushed(relay, tasks)
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    relay.notes[QUEUE] = deque([Note(in_an_hour, time.monotonic() - 60, END_OF_LINE)])

    await relay.note_tail(QUEUE)

    assert [note.taken_at < in_an_hour for note in relay.notes[QUEUE]] == [True]
    assert await relay.publish_lost(QUEUE) == 0, "what the old note says can't be compared with what is there"
    relay.grace_seconds = 0.0
    await plain.delete(QUEUE)
    await relay.note_tail(QUEUE)
    assert await relay.publish_lost(QUEUE) == 3, "nor does the search wait until the clock has caught up"


async def test_what_was_pushed_keeps_its_stamp_when_a_later_push_fails(
    relay: Relay, db: Database, plain: redis.asyncio.Redis, redis_url: str
) -> None:
    released = await submitted(db)
    claimed = await started(db, released)
    await lifecycle.settle(db, claimed.claim, lifecycle.decide(claimed.budgets, lifecycle.Interrupted()))
    fresh = await submitted(db, delay_seconds=60.0)
    await db.execute("UPDATE task SET run_at = now() WHERE id = $1", fresh)
    relay.broker, whole = DeafAtTheTail(redis_url, client_name="test"), relay.broker

    with pytest.raises(errors.BrokerUnavailable):
        await relay.publish_due(QUEUE)
    await relay.broker.close()
    relay.broker = whole

    assert (await row(db, fresh))["published_at"] is not None
    assert (await row(db, released))["published_at"] is None
    assert await relay.publish_due(QUEUE) == 1
    assert [message.task_id for message in await queued(plain)] == [released, fresh]


STATEMENTS: dict[str, tuple[str, tuple[object, ...], str]] = {
    # statement, arguments, the index that is for it
    "submit": (
        waiting._SUBMIT,
        (uuid4(), "sample.echo", QUEUE, "[]", "{}", [], None, 3, *[None] * 3, 0.0, *[None] * 3, False, 0, None, "", ""),
        "task_handed_back",
    ),
    "take_due": (waiting._TAKE_DUE, (QUEUE, 500), "task_unpublished"),
    "take_lost": (
        waiting._TAKE_LOST,
        (QUEUE, END_OF_LINE, datetime.now(UTC), 500, datetime.now(UTC)),
        "task_published",
    ),
    "expire": (waiting._EXPIRE, (QUEUE, 500), "task_expiring"),
    "expired_leases": (reads._EXPIRED_LEASES, (QUEUE, 30.0, 500), "task_started"),
}


async def test_no_statement_reads_the_whole_table_once_a_backlog_is_gone_and_statistics_are_stale(
    one_connection: Database,
) -> None:
    """The planner may believe that 100,000 rows are held back; they have all succeeded."""
    database = one_connection
    await database.execute("ALTER TABLE task SET (autovacuum_enabled = false)")
    await database.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, position)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', n FROM generate_series(1, 100000) AS n"
    )
    await database.execute("ANALYZE task")
    await database.execute("UPDATE task SET status = 'SUCCESS', result = '1', finished_at = now()")

    for name, (sql, arguments, index) in STATEMENTS.items():
        planned = {"for these arguments": await _plan(database, f"EXPLAIN {sql}", *arguments)}
        await database.execute(f"PREPARE {name} AS {sql}")
        await database.execute("SET plan_cache_mode = force_generic_plan")
        nothing = ", ".join(["NULL"] * len(arguments))
        planned["for any arguments"] = await _plan(database, f"EXPLAIN EXECUTE {name}({nothing})")
        for what, plan in planned.items():
            assert "Seq Scan on task" not in plan, f"{name}, planned {what}:\n{plan}"
            assert index in plan, f"{name}, planned {what}:\n{plan}"


async def _plan(database: Database, sql: str, *arguments: object) -> str:
    return "\n".join(found[0] for found in await database.fetch(sql, *arguments))

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import redis.asyncio
from standardwebhooks import Webhook

from app import broker, delivery, lifecycle
from app import relay as relays
from app.broker import Broker
from app.core import errors, ids, repeating, stopping
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Budgets, Error, RetryAsked, Succeeded, decide
from app.relay import Relay
from app.utils.webhook import Sender
from tests.conftest import settings_for
from tests.support.database import events, opened, row, started, submitted
from tests.support.network import closed_port
from tests.support.receiver import Answer, Receiver
from tests.support.waiting import until

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def plain(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(settings.redis_url.get_secret_value()) as client:
        yield client


@pytest.fixture
async def relay(db: Database, postgres_url: str, redis_url: str) -> AsyncIterator[Relay]:
    """A relay without patience: a note proves a loss at once, and leases are one second."""
    settings = settings_for(
        postgres_url,
        redis_url,
        TASKQUEUE_LEASE_SECONDS=1,
        TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True,
        TASKQUEUE_WEBHOOK_SECRET=SECRET,
        TASKQUEUE_WEBHOOK_SCHEDULE="0 0 0",
    )
    wire = Broker(redis_url, client_name="test")
    async with Sender.from_settings(settings) as sender:
        yield Relay(
            settings,
            db,
            wire,
            sender,
            grace_seconds=0.0,
            connected_since=time.monotonic() - 60,
            answered_at=time.monotonic() + 600,
        )
    await wire.close()


async def queued(plain: redis.asyncio.Redis) -> list[UUID]:
    """Whose messages wait, in the order in which they will be consumed."""
    raw = await plain.lrange("default", 0, -1)
    return [broker.decode(one).task_id for one in reversed(raw) if isinstance(one, bytes)]


async def test_due_rows_are_pushed_once_in_the_order_they_became_due(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    later = await submitted(db, delay_seconds=60.0)
    due = [await submitted(db, delay_seconds=0.01 * n) for n in (3, 1, 2)]
    await db.execute("UPDATE task SET run_at = now() - interval '1 s' + (run_at - created_at) WHERE id <> $1", later)

    assert await relay.publish_due("default") == 3
    assert await relay.publish_due("default") == 0
    assert await queued(plain) == [due[1], due[2], due[0]]


async def test_a_released_task_goes_ahead_and_a_retried_one_to_the_end(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    released, retried, waiting = [await submitted(db) for _ in range(3)]
    await relay.broker.publish("default", [_bell(await row(db, waiting))])
    for task_id, outcome in (
        (released, lifecycle.Interrupted()),
        (retried, RetryAsked(Error(type="E"), 0.0)),
    ):
        claimed = await started(db, task_id)
        await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, outcome))

    assert await relay.publish_due("default") == 2
    assert await queued(plain) == [released, waiting, retried]


@pytest.mark.parametrize("cap", [100, 2], ids=["room", "full"])
async def test_a_released_task_goes_ahead_of_all_that_was_never_pushed(
    relay: Relay, db: Database, plain: redis.asyncio.Redis, monkeypatch: pytest.MonkeyPatch, cap: int
) -> None:
    monkeypatch.setattr("app.publisher.DEPTH_CAP", cap)
    monkeypatch.setattr("app.relay.BATCH", 1)
    released, *line = [await submitted(db) for _ in range(3)]
    claimed = await started(db, released)
    for task_id in line:
        await relay.broker.publish("default", [_bell(await row(db, task_id))])
    held = [lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default") for _ in range(20)]
    for new in held:
        await lifecycle.submit(db, new, hold_back=True)
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, lifecycle.Interrupted()))

    assert await relay.publish_due("default") == 1
    assert (await queued(plain))[0] == released
    assert await relay.publish_due("default") == (cap == 100)


async def test_two_relays_that_find_the_same_loss_keep_the_line_in_order(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    await db.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, position, published_at)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', nextval('task_position'), now()"
        "   FROM generate_series(1, 3000)"
    )
    other = dataclasses.replace(relay, notes={}, refused=set())
    for one in (relay, other):
        await one.note_tail("default")

    found = await asyncio.gather(relay.publish_lost("default"), other.publish_lost("default"))

    assert sum(found) == 3000
    placed = {one["id"]: one["position"] for one in await db.fetch("SELECT id, position FROM task")}
    places = [placed[task_id] for task_id in await queued(plain)]
    assert places == sorted(places)


async def test_a_flushed_queue_is_filled_again(relay: Relay, db: Database, plain: redis.asyncio.Redis) -> None:
    tasks = [await submitted(db) for _ in range(5)]
    await plain.flushdb()

    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 5
    assert await queued(plain) == tasks
    assert await relay.publish_lost("default") == 0, "a push after the note is not missed"


async def test_what_waits_behind_the_tail_is_not_lost(relay: Relay, db: Database, plain: redis.asyncio.Redis) -> None:
    lost, first, second = [await submitted(db) for _ in range(3)]
    await relay.broker.publish("default", [_bell(await row(db, first)), _bell(await row(db, second))])

    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 1
    assert await queued(plain) == [lost, first, second], "it is next, as it would have been"


async def test_a_message_pushed_again_causes_no_storm_when_its_task_retries(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    lost = await submitted(db)
    backlog = [await submitted(db) for _ in range(50)]
    await relay.broker.publish("default", [_bell(await row(db, one)) for one in backlog])
    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 1
    claimed = await started(db, lost)
    await plain.rpop("default")
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, RetryAsked(Error(type="E"), 0.0)))
    await relay.publish_due("default")

    for _ in range(3):
        await relay.note_tail("default")
        assert await relay.publish_lost("default") == 0
    assert await queued(plain) == [*backlog, lost]


async def test_garbage_at_the_tail_stops_nothing(relay: Relay, db: Database, plain: redis.asyncio.Redis) -> None:
    await submitted(db)
    await plain.rpush("default", *[b"\x00garbage"] * 20)

    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 0, "an unreadable tail proves nothing"
    await plain.delete("default")
    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 1


async def test_a_note_proves_nothing_before_the_grace_is_over(relay: Relay, db: Database) -> None:
    relay.grace_seconds = 10.0
    await submitted(db)
    for _ in range(3):
        await relay.note_tail("default")

    assert await relay.publish_lost("default") == 0


async def test_what_was_stamped_just_before_a_note_may_have_been_pushed_just_after_it(
    relay: Relay, db: Database
) -> None:
    new, old = [await submitted(db) for _ in range(2)]
    await relay.note_tail("default")
    # The note is as old as it must be, and nobody waits for that.
    relay.grace_seconds = 10.0
    note = relay.notes["default"][0]
    relay.notes["default"][0] = dataclasses.replace(note, monotonic=note.monotonic - 10.0)
    assert await relay.publish_lost("default") == 0
    # Where something older is missing it goes with that: by itself it would come before what is ahead of it.
    await db.execute("UPDATE task SET published_at = now() - interval '20 s' WHERE id = $1", old)
    assert await relay.publish_lost("default") == 2
    for task_id in (old, new):
        assert (await row(db, task_id))["published_at"] > note.taken_at


async def test_with_redis_away_nothing_is_stamped(relay: Relay, db: Database) -> None:
    task_id = await submitted(db, delay_seconds=0.001)
    relay.broker = Broker(f"redis://127.0.0.1:{closed_port()}/0", client_name="test")

    with pytest.raises(errors.BrokerUnavailable):
        await relay.publish_due("default")
    assert (await row(db, task_id))["published_at"] is None


async def test_a_lost_worker_s_task_runs_again_and_is_not_billed_for_a_crash(relay: Relay, db: Database) -> None:
    task_id = await submitted(db)
    await started(db, task_id, lease_seconds=0.0)

    assert await until(lambda: relay.reap("default"), what="the reap") == 1
    stored = await row(db, task_id)
    assert (stored["status"], stored["losses"], stored["crashes"], stored["failures"]) == ("RETRY", 1, 0, 0)
    assert await relay.publish_due("default") == 1


async def test_nothing_is_reaped_before_this_relay_was_connected_for_a_lease(relay: Relay, db: Database) -> None:
    await started(db, await submitted(db), lease_seconds=0.0)

    relay.connected_since = time.monotonic()
    assert await relay.reap("default") == 0
    relay.connected_since = None
    assert await relay.reap("default") == 0


async def test_the_last_loss_ends_the_task_and_tells_celery_s_waiters(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    task_id = await submitted(db, webhook_url="https://example.com/hook")
    await started(db, task_id, lease_seconds=0.0)
    await db.execute("UPDATE task SET losses = 9 WHERE id = $1", task_id)

    await until(lambda: relay.reap("default"), what="the reap")

    assert (await row(db, task_id))["error_type"] == "WorkerLost"
    assert await events(db, task_id) == ["task.failed"]
    meta = await plain.get(f"celery-task-meta-{task_id}")
    assert meta is not None
    assert json.loads(meta)["result"]["exc_type"] == "WorkerLost"


async def test_an_expired_task_tells_celery_s_waiters(relay: Relay, db: Database, plain: redis.asyncio.Redis) -> None:
    task_id = await submitted(db, expires_in_seconds=0.0)

    assert await relay.expire("default") == 1
    assert await plain.exists(f"celery-task-meta-{task_id}")


async def test_all_that_has_expired_ends_in_one_sweep_however_much_it_is(
    relay: Relay, db: Database, plain: redis.asyncio.Redis
) -> None:
    number = relays.BATCH + 1
    await db.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, expires_at)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', now() FROM generate_series(1, $1::int)",
        number,
    )

    await relays._all(relay.expire, "default")

    assert await db.fetchval("SELECT count(*) FROM task WHERE status = 'REVOKED'") == number
    assert await plain.dbsize() == number, "everybody who waits is told"


async def ended(db: Database, url: str) -> UUID:
    task_id = await submitted(db, webhook_url=url)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded('{"pages":3}')))
    return task_id


async def delivered(relay: Relay, task_id: UUID) -> bool:
    await relay.deliver()
    found = await lifecycle.view(relay.db, task_id)
    return found is not None and found.webhook_status in {"delivered", "exhausted"}


async def test_a_webhook_arrives_signed_and_says_what_the_task_did(relay: Relay, db: Database) -> None:
    with Receiver() as receiver:
        task_id = await ended(db, receiver.url)
        await until(lambda: delivered(relay, task_id), what="the delivery")
        [request] = receiver.requests

    said = Webhook(SECRET).verify(request.body, dict(request.headers))
    assert said["type"] == "task.succeeded"
    assert said["data"]["task_id"] == str(task_id)
    assert said["data"]["result"] == {"pages": 3}
    assert request.headers["content-type"] == "application/json"


async def test_a_webhook_is_retried_under_the_same_id_with_the_same_body(relay: Relay, db: Database) -> None:
    with Receiver([Answer(status=500), Answer(status=503)]) as receiver:
        task_id = await ended(db, receiver.url)
        await until(lambda: delivered(relay, task_id), what="the delivery")
        requests = receiver.requests

    assert len(requests) == 3
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    assert len({request.body for request in requests}) == 1
    view = await lifecycle.view(db, task_id)
    assert view is not None
    assert (view.webhook_status, view.status) == ("delivered", "SUCCESS")


async def test_a_receiver_that_never_answers_well_exhausts_the_schedule_and_changes_no_task(
    relay: Relay, db: Database
) -> None:
    with Receiver(lambda _: Answer(status=500)) as receiver:
        task_id = await ended(db, receiver.url)
        await until(lambda: delivered(relay, task_id), what="the end of the schedule")
        assert len(receiver.requests) == 3

    view = await lifecycle.view(db, task_id)
    assert view is not None
    assert (view.webhook_status, view.status) == ("exhausted", "SUCCESS")


async def test_a_webhook_that_is_sent_again_has_the_whole_schedule_before_it(relay: Relay, db: Database) -> None:
    with Receiver([500, 500, 500, 500, 200]) as receiver:
        task_id = await ended(db, receiver.url)
        await until(lambda: delivered(relay, task_id), what="the end of the schedule")
        assert await delivery.redeliver(db, task_id) is delivery.Redelivery.DUE
        await until(lambda: delivered(relay, task_id), what="the delivery")
        requests = receiver.requests

    assert len(requests) == 5
    assert len({(request.headers["webhook-id"], request.body) for request in requests}) == 1
    assert [one.error for one in await delivery.attempts(db, task_id, limit=10)] == ["http_5xx"] * 4 + [None]


async def test_one_webhook_that_was_claimed_too_often_is_ended_and_stops_no_other(relay: Relay, db: Database) -> None:
    with Receiver() as receiver:
        worn, other = [await ended(db, receiver.url) for _ in range(2)]
        await db.execute(
            "UPDATE webhook_delivery SET attempt = 32767, status = 'delivering', token = gen_random_uuid(),"
            " lease_until = now() - interval '1 second' WHERE task_id = $1",
            worn,
        )
        assert await relay.deliver() == 2
        await until(lambda: not relay.sending, what="the end of both")
        assert len(receiver.requests) == 1
    assert await delivered(relay, other)
    state = await delivery.state_of(db, worn)
    assert state is not None
    assert (state.status, state.last_error) == ("exhausted", "local_fault")
    assert await delivery.attempts(db, worn, limit=10) == []


async def lost(db: Database) -> None:
    """The relay that has them is dead."""
    await db.execute("UPDATE webhook_delivery SET lease_until = now() - interval '1 second' WHERE status='delivering'")


async def test_relays_that_die_spend_nothing_of_the_schedule(relay: Relay, db: Database) -> None:
    schedule = relay.settings.webhook_schedule
    with Receiver(lambda _: Answer(status=500)) as receiver:
        task_id = await ended(db, receiver.url)
        for _ in range(len(schedule) + 2):
            patience = delivery.patience_seconds(schedule)
            await delivery.claim_by_receiver(db, limit=1, lease_seconds=30.0, room=1, patience_seconds=patience)
            await lost(db)
        await until(lambda: delivered(relay, task_id), what="the end of the schedule")
        assert len(receiver.requests) == len(schedule)
    numbers = [one.number for one in await delivery.attempts(db, task_id, limit=10)]
    assert numbers == [len(schedule) + 3 + number for number in range(len(schedule))]


async def test_a_webhook_that_relays_die_of_is_ended_unsent(relay: Relay, db: Database) -> None:
    schedule = relay.settings.webhook_schedule
    with Receiver() as receiver:
        task_id = await ended(db, receiver.url)
        patience = delivery.patience_seconds(schedule)
        await db.execute("UPDATE webhook_delivery SET scheduled_at = now() - $1 * interval '1 s'", patience)
        for attempt in range(len(schedule)):
            claims = await delivery.claim_by_receiver(
                db, limit=1, lease_seconds=30.0, room=1, patience_seconds=patience
            )
            assert [one.scheduled_attempt for one in claims.claimed] == [attempt + 1]
            await lost(db)
        await until(lambda: delivered(relay, task_id), what="its end")
        assert receiver.requests == []
    state = await delivery.state_of(db, task_id)
    assert state is not None
    assert (state.status, state.last_error) == ("exhausted", "local_fault")


async def test_all_events_get_their_place_however_many(relay: Relay, db: Database) -> None:
    await db.execute(
        "WITH t AS (INSERT INTO task (id, name, queue, args, kwargs)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}' FROM generate_series(1, $1::int) RETURNING id)"
        " INSERT INTO webhook_delivery (id, task_id, event, sequence, url, facts)"
        " SELECT gen_random_uuid(), id, 'task.started', 1, 'https://example.com/', '{}' FROM t",
        relays.BATCH + 1,
    )
    await relays._all(relay.number_events)
    assert await db.fetchval("SELECT count(DISTINCT position) FROM webhook_delivery") == relays.BATCH + 1


async def test_tasks_in_a_queue_that_nobody_looks_after_are_reported_once(
    relay: Relay, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    await submitted(db)
    await submitted(db, queue="forgotten")
    await started(db, await submitted(db, queue="left"))
    await submitted(db, queue="later", delay_seconds=60.0)

    assert await lifecycle.unfinished_queues(db) == {"default", "forgotten", "left", "later"}
    for _ in range(2):
        assert await relay.look_for_strays() == 3
    assert [record.getMessage() for record in caplog.records if "forgotten, later, left" in record.getMessage()] == [
        "tasks are stuck in queues that TASKQUEUE_QUEUES does not name: forgotten, later, left"
    ]


def _bell(stored: Any) -> lifecycle.Bell:
    return lifecycle.Bell(
        task_id=stored["id"],
        name=stored["name"],
        queue=stored["queue"],
        attempt=stored["attempt"],
        position=stored["position"],
    )


async def test_a_sweep_that_takes_long_comes_rarely_but_an_outage_does_not_count() -> None:
    began = []

    async def sweep() -> None:
        began.append(time.monotonic())
        await asyncio.sleep(0.05)
        if len(began) < 3:
            raise errors.DatabaseUnavailable("gone")

    loop = asyncio.create_task(repeating.every(0.0, sweep, "sweeping", share_of_time=0.1))
    await until(lambda: len(began) == 4, what="the fourth sweep")
    await stopping.stop(loop)
    first, _, third, fourth = began
    assert third - first < fourth - third
    assert fourth - third > 0.4

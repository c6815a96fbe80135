"""Relays hear of a webhook that was written, and send it at once instead of at their next look."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from uuid import UUID

import asyncpg
import pytest
import redis.asyncio

from app import broker, lifecycle, publisher
from app import relay as relays
from app.broker import Broker
from app.core import repeating, stopping
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Budgets, Error, Failed, Succeeded, decide
from app.relay import Relay
from app.utils.webhook import Sender
from tests.conftest import settings_for
from tests.support.database import Counting, counting, events, started, submitted
from tests.support.receiver import Receiver
from tests.support.waiting import until

NEVER_SECONDS = 300.0
"""When a relay that hears nothing looks next."""
URL = "https://example.com/hook"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Counting]:
    async with counting(settings) as database:
        yield database


@pytest.fixture
async def wire(redis_url: str) -> AsyncIterator[Broker]:
    made = Broker(redis_url, client_name="test")
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def hearing(wire: Broker) -> AsyncIterator[list[float]]:
    """When it was told of webhooks, from the time on at which that can be heard."""
    heard: list[float] = []
    task = asyncio.create_task(wire.hear_of_webhooks(lambda: heard.append(time.monotonic())))
    await until(lambda: heard, what="the subscription")
    heard.clear()
    yield heard
    await stopping.stop(task)


@pytest.fixture
async def relay(
    db: Counting, postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Relay]:
    """A relay that delivers, and has looked for the last time unless it is told to."""
    monkeypatch.setattr("app.relay.TICK_SECONDS", NEVER_SECONDS)
    settings = settings_for(postgres_url, redis_url, TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True)
    wire = Broker(redis_url, client_name="test")
    async with Sender.from_settings(settings) as sender:
        made = Relay(settings, db, wire, sender)
        deliver = partial(relays._deliver, made)
        loops = [
            asyncio.create_task(repeating.every(NEVER_SECONDS, deliver, "delivering", at_once=made.told)),
            asyncio.create_task(repeating.every(relays.HEAR_AGAIN_SECONDS, made.hear, "hearing")),
        ]
        await until(lambda: made.looked_at > made.told_at + relays.LOCKED_SECONDS > 0.0, what="the first looks")
        yield made
        await stopping.stop(*loops)
    await wire.close()


async def ended(db: Database, **new: object) -> lifecycle.Ended:
    task_id = await submitted(db, **new)
    settled = await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded("1")))
    assert settled is not None
    assert settled.ended is not None
    return settled.ended


@pytest.mark.usefixtures("relay")
async def test_a_relay_that_is_told_sends_at_once(db: Counting, wire: Broker) -> None:
    with Receiver() as receiver:
        for number in range(1, 4):
            assert await publisher.announce_end(wire, await ended(db, webhook_url=receiver.url))
            await until(lambda: len(receiver.requests) == number, what="the webhook")  # noqa: B023  # asked at once


async def test_a_relay_that_redis_has_hung_up_on_hears_again(
    relay: Relay, db: Counting, wire: Broker, redis_url: str
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as plain:
        assert await plain.client_kill_filter(_type="pubsub") >= 1
    before = relay.told_at
    with Receiver() as receiver:
        await publisher.announce_end(wire, await ended(db, webhook_url=receiver.url))
        await until(lambda: receiver.requests, 30, what="the webhook")
    assert relay.told_at > before


async def test_a_row_that_was_locked_at_the_first_look_is_found_by_one_more(
    relay: Relay, db: Counting, wire: Broker, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.relay.LOCKED_SECONDS", 1.0)
    other = await asyncpg.connect(postgres_url)
    with Receiver() as receiver:
        end = await ended(db, webhook_url=receiver.url)
        async with other.transaction():
            await other.fetch("SELECT FROM webhook_delivery FOR UPDATE")
            await publisher.announce_end(wire, end)
            await until(lambda: relay.looked_at >= relay.told_at > time.monotonic() - 1.0, what="the first look")
            assert receiver.requests == []
        await until(lambda: receiver.requests, what="the webhook")
    await other.close()


async def test_a_storm_of_ends_is_few_looks(relay: Relay, db: Counting) -> None:
    db.asked, began = 0, time.monotonic()
    while (took := time.monotonic() - began) < 0.5:
        relay._hear()
        await asyncio.sleep(0)
    assert 2 <= db.asked <= took / relays.LOOK_SECONDS + 2


async def test_a_storm_is_told_in_few_messages_and_its_last_end_is_told_of(wire: Broker) -> None:
    async with hearing(wire) as heard:
        began = time.monotonic()
        while (took := time.monotonic() - began) < 0.3:
            wire.tell_of_webhooks()
            await asyncio.sleep(0)
        last = time.monotonic()
        await until(lambda: heard and heard[-1] >= last, what="the last of them")
        assert len(heard) <= took / broker.TELL_SECONDS + 3


async def test_only_who_has_a_webhook_is_told_of(wire: Broker, db: Counting) -> None:
    ends = [await ended(db), await ended(db, webhook_url=URL, webhook_events=("task.failed",))]
    async with hearing(wire) as heard:
        await publisher.announce_ends(wire, ends)
        await publisher.announce_end(wire, ends[0])
        await wire.ping()
        assert wire._telling is None
        assert heard == []
        await publisher.announce_ends(wire, [*ends, await ended(db, webhook_url=URL)])
        await until(lambda: heard, what="the one with a webhook")


async def _settled(db: Database, task_id: UUID) -> lifecycle.Ended | None:
    failed = decide(Budgets(max_retries=0), Failed(Error(type="E")))
    settled = await lifecycle.settle(db, (await started(db, task_id)).claim, failed)
    return None if settled is None else settled.ended


async def _lost(db: Database, task_id: UUID) -> lifecycle.Ended | None:
    claim = (await started(db, task_id, lease_seconds=-1.0)).claim
    settled = await lifecycle.reap(db, claim, decide(Budgets(max_retries=0), Failed(Error(type="E"))))
    return None if settled is None else settled.ended


async def _cancelled(db: Database, task_id: UUID) -> lifecycle.Ended | None:
    cancelled = await lifecycle.cancel(db, task_id, owner="")
    assert isinstance(cancelled, lifecycle.Settled)
    return cancelled.ended


async def _expired(db: Database, task_id: UUID) -> lifecycle.Ended | None:
    await db.execute("UPDATE task SET expires_at = now() WHERE id = $1", task_id)
    [found] = await lifecycle.expire(db, "default", limit=10)
    return found


@pytest.mark.parametrize("end", [_settled, _lost, _cancelled, _expired])
@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"webhook_url": URL},
        {"webhook_url": URL, "webhook_events": ("task.failed",)},
        {"webhook_url": URL, "webhook_events": ("task.revoked", "task.started")},
        {"webhook_url": URL, "webhook_events": ()},
    ],
    ids=["none", "every end", "failures", "revocations", "nothing"],
)
async def test_whoever_ends_a_task_knows_whether_it_wrote_a_webhook(
    db: Counting, end: Callable[[Database, UUID], Awaitable[lifecycle.Ended | None]], wanted: dict[str, object]
) -> None:
    task_id = await submitted(db, **wanted)
    found = await end(db, task_id)
    assert found is not None
    assert found.is_told == any(event in {"task.failed", "task.revoked"} for event in await events(db, task_id))

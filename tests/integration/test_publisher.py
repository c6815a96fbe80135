import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app import lifecycle
from app.broker import Broker
from app.core import ids
from app.core.config import Settings
from app.core.statuses import TaskStatus
from app.db import Database
from app.dev.embedded import EmbeddedRedis
from app.dev.running import running
from app.publisher import Publisher, announce_end
from tests.support.database import opened, row
from tests.support.waiting import until


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@contextlib.asynccontextmanager
async def ringing(db: Database, url: str) -> AsyncIterator[tuple[Publisher, Broker]]:
    broker = Broker(url, client_name="test")
    publisher = Publisher(db, broker)
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher, broker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await broker.close()


async def submit(db: Database, publisher: Publisher) -> lifecycle.NewTask:
    """As the API does it."""
    new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default")
    bell = await lifecycle.submit(db, new, hold_back=publisher.away("default"))
    if bell is not None:
        publisher.ring(bell)
    return new


async def test_what_is_rung_is_pushed_without_waiting(db: Database, redis_url: str) -> None:
    async with ringing(db, redis_url) as (publisher, broker):
        for _ in range(20):
            await submit(db, publisher)

        async def all_there() -> bool:
            return await broker.depth("default") == 20

        await until(all_there, what="twenty messages")
        assert not publisher.away("default")


async def test_what_is_rung_last_is_pushed_at_the_end(db: Database, redis_url: str) -> None:
    async with ringing(db, redis_url) as (publisher, _):
        await submit(db, publisher)
    broker = Broker(redis_url, client_name="test")
    assert await broker.depth("default") == 1
    await broker.close()


async def test_without_redis_the_rows_are_left_to_the_relay_until_it_answers_again(
    db: Database, tmp_path: Path
) -> None:
    with running(EmbeddedRedis(tmp_path)) as server:
        async with ringing(db, server.url) as (publisher, broker):
            server.kill()
            first = await submit(db, publisher)

            async def handed_over() -> bool:
                return publisher.away("default") and (await row(db, first.id))["published_at"] is None

            await until(handed_over, what="the row without a stamp")
            second = await submit(db, publisher)
            assert (await row(db, second.id))["published_at"] is None

            server.start()
            await until(lambda: not publisher.away("default"), what="Redis's return")
            third = await submit(db, publisher)
            assert (await row(db, third.id))["published_at"] is None, "it would overtake"
            bells = await lifecycle.take_due(db, "default", limit=10)
            assert [bell.task_id for bell in bells] == [first.id, second.id, third.id]
            await broker.publish("default", bells)

            await submit(db, publisher)

            async def pushed() -> bool:
                return await broker.depth("default") == 4

            await until(pushed, what="the fourth message")


async def test_a_full_queue_is_left_to_the_relay(db: Database, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.publisher.DEPTH_CAP", 2)
    async with ringing(db, redis_url) as (publisher, broker):
        for _ in range(3):
            await submit(db, publisher)
        await until(lambda: publisher.away("default"), what="the cap")
        assert not publisher.away("other")
        new = await submit(db, publisher)
        assert (await row(db, new.id))["published_at"] is None
        await broker._redis.delete("default")
        await until(lambda: not publisher.away("default"), what="room")


async def test_an_end_that_redis_does_not_take_is_no_error() -> None:
    broker = Broker("redis://127.0.0.1:1/0", client_name="test")
    ended = lifecycle.Ended(task_id=ids.uuid7(), status=TaskStatus.SUCCESS, result="1", error=None)
    await announce_end(broker, ended)
    await broker.close()

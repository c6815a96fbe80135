import asyncio
from collections.abc import AsyncIterator

import pytest
import redis.asyncio

from app import broker, lifecycle
from app.broker import Broker
from app.core import errors, ids
from app.core.config import Settings
from tests.support.network import black_hole, closed_port


def bell(position: int) -> lifecycle.Bell:
    return lifecycle.Bell(task_id=ids.uuid7(), name="sample.echo", queue="q", attempt=0, position=position)


@pytest.fixture
async def wire(settings: Settings) -> AsyncIterator[Broker]:
    opened = Broker(settings.redis_url.get_secret_value(), client_name="test")
    yield opened
    await opened.close()


@pytest.fixture
async def plain(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(settings.redis_url.get_secret_value()) as client:
        yield client


async def consumed(plain: redis.asyncio.Redis, queue: str) -> list[int]:
    """The positions in the order in which a worker would take them."""
    positions = []
    while raw := await plain.rpop(queue):
        assert isinstance(raw, bytes)
        positions.append(broker.decode(raw).position)
    return positions


async def test_a_batch_is_one_command_and_its_first_is_consumed_first(wire: Broker, plain: redis.asyncio.Redis) -> None:
    assert await wire.publish("q", [bell(1), bell(2), bell(3)]) == 3
    assert await wire.publish("q", [bell(4)]) == 4
    assert await wire.depth("q") == 4
    assert await consumed(plain, "q") == [1, 2, 3, 4]


async def test_what_is_overdue_goes_ahead_of_all_that_wait_in_its_own_order(
    wire: Broker, plain: redis.asyncio.Redis
) -> None:
    await wire.publish("q", [bell(10), bell(11)])
    await wire.publish("q", [bell(1), bell(2)], at_tail=True)

    assert await consumed(plain, "q") == [1, 2, 10, 11]


async def test_the_tail_is_the_position_that_is_consumed_next(wire: Broker, plain: redis.asyncio.Redis) -> None:
    assert await wire.tail("q") is None
    await wire.publish("q", [bell(5), bell(6)])

    async def positions() -> list[int]:
        return [one.position for one in await wire.tail("q") or []]

    assert await positions() == [5, 6]
    await plain.rpush("q", b"garbage", b"{}")
    assert await positions() == [5, 6], "garbage at the tail is passed over"
    await plain.rpush("q", *[b"garbage"] * broker.TAIL_DEPTH)
    assert await wire.tail("q") == []


async def test_a_push_is_never_repeated_behind_the_callers_back() -> None:
    with black_hole() as silent:
        wire = Broker(f"redis://127.0.0.1:{silent.port}/0", client_name="test")
        with pytest.raises(errors.BrokerUnavailable):
            await wire.publish("q", [bell(1)])
        await wire.close()

    assert silent.received.count(b"LPUSH") <= 1
    assert silent.connections <= 1


async def test_an_unreachable_redis_is_one_error_and_soon() -> None:
    wire = Broker(f"redis://127.0.0.1:{closed_port()}/0", client_name="test")

    async with asyncio.timeout(broker.COMMAND_TIMEOUT_SECONDS + 1):
        for call in (wire.ping(), wire.depth("q"), wire.tail("q"), wire.publish("q", [bell(1)])):
            with pytest.raises(errors.BrokerUnavailable):
                await call
    await wire.close()


async def test_the_copy_of_a_result_is_stored_and_announced(wire: Broker, plain: redis.asyncio.Redis) -> None:
    task_id = ids.uuid7()
    key = f"celery-task-meta-{task_id}"
    async with plain.pubsub() as heard:
        await heard.subscribe(key)
        await heard.get_message(timeout=2)
        meta = broker.encode_meta(task_id, "SUCCESS", result="[1]", error_type="", error_message="")
        await wire.put_results({task_id: meta})
        message = await heard.get_message(timeout=2)

    assert message is not None
    assert message["data"] == await plain.get(key) == meta
    assert 0 < await plain.ttl(key) <= broker.RESULT_TTL_SECONDS

"""taskiq: asyncio processes, a list in Redis, results in Redis."""

import asyncio
import os
import sys

import redis.asyncio
from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

QUEUE = "taskiq"
RESULTS = "result"

_results: "RedisAsyncResultBackend[int]" = RedisAsyncResultBackend(os.environ["REDIS_URL"], prefix_str=RESULTS)
broker = ListQueueBroker(os.environ["REDIS_URL"], queue_name=QUEUE).with_result_backend(_results)


@broker.task(task_name="noop")
async def noop(value: int) -> int:
    """Return the argument."""
    return value


async def fill(count: int) -> None:
    """Enqueue so many."""
    staged = ListQueueBroker(os.environ["REDIS_URL"], queue_name="staged")
    await staged.startup()
    for first in range(0, count, 100):
        kicks = (noop.kicker().with_broker(staged).kiq(1) for _ in range(min(100, count - first)))
        await asyncio.gather(*kicks)
    await staged.shutdown()
    async with redis.asyncio.Redis.from_url(os.environ["REDIS_URL"]) as client:
        await client.rename("staged", QUEUE)


if __name__ == "__main__":
    asyncio.run(fill(int(sys.argv[1])))

"""arq: one asyncio process, a sorted set in Redis, results in Redis."""

import asyncio
import os
import sys
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings

QUEUE = "arq:queue"
LOGS = {"version": 1, "loggers": {"arq": {"level": "WARNING"}}}
"""It would write two lines a task."""


async def noop(_: dict[Any, Any], value: int) -> int:
    """Return the argument."""
    return value


class WorkerSettings:
    """What its worker reads. Ten at a time, the default, is slower."""

    functions = (noop,)
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])
    queue_name = QUEUE
    max_jobs = 100


async def fill(count: int) -> None:
    """Enqueue so many."""
    pool = await create_pool(WorkerSettings.redis_settings, default_queue_name="staged")
    for first in range(0, count, 100):
        await asyncio.gather(*(pool.enqueue_job("noop", 1) for _ in range(min(100, count - first))))
    await pool.rename("staged", QUEUE)
    await pool.aclose()


if __name__ == "__main__":
    asyncio.run(fill(int(sys.argv[1])))

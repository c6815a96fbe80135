"""What Redis and Postgres themselves can do, driven by the leanest client there is.

    python -m benchmarks.suite.limits redis|commits SECONDS

It prints how many a second: messages that a bare loop takes from a list and
whose results it puts back, a hundred with each command; or commits of one row
over sixteen connections.
"""

import asyncio
import os
import sys
import time

import asyncpg
import redis.asyncio
import uvloop

MESSAGE = b'{"id": "9f6c5f0e-5a4b-4b63-8f1e-0a5e8b3b7a52", "task": "noop", "attempt": 1, "position": 123456}'
BATCH = 100
CONNECTIONS = 16


async def messages(seconds: float) -> float:
    """Messages a second that are popped and answered."""
    async with redis.asyncio.Redis.from_url(os.environ["REDIS_URL"]) as client:
        ends, took, done = time.perf_counter() + seconds, 0.0, 0
        while time.perf_counter() < ends:
            for _ in range(10):
                await client.lpush("bare", *[MESSAGE] * BATCH)
            began = time.perf_counter()
            while batch := await client.rpop("bare", BATCH):
                pipeline = client.pipeline(transaction=False)
                for _ in batch:
                    done += 1
                    pipeline.setex(f"bare-result-{done}", 3600, b"1")
                await pipeline.execute()
            took += time.perf_counter() - began
        return done / took


async def commits(seconds: float) -> float:
    """Rows a second, each with a commit of its own."""
    url = os.environ["DATABASE_URL"]
    setup = await asyncpg.connect(url)
    await setup.execute("DROP TABLE IF EXISTS committed; CREATE TABLE committed (id bigserial PRIMARY KEY, value text)")
    await setup.close()
    done = 0

    async def one_after_another(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        nonlocal done
        insert = await connection.prepare("INSERT INTO committed (value) VALUES ($1)")
        while time.perf_counter() < ends:
            await insert.fetch("something to say")
            done += 1

    connections = [await asyncpg.connect(url) for _ in range(CONNECTIONS)]
    began = time.perf_counter()
    ends = began + seconds
    await asyncio.gather(*(one_after_another(connection) for connection in connections))
    took = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    return done / took


if __name__ == "__main__":
    sys.stdout.write(str(uvloop.run({"redis": messages, "commits": commits}[sys.argv[1]](float(sys.argv[2])))))

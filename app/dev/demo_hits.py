"""The faults of a drill: each hits one process or store of one service, and knows when that is back."""

import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import redis.asyncio
import redis.exceptions

from app.core import errors
from app.db import Database, insist
from app.dev.demo_service import Process, Service, until

QUEUE = "default"
MEET_SECONDS = 30.0
"""How long a fault waits for what it is to hit."""
MOMENT_SECONDS = 5.0
FAILURES = (OSError, redis.exceptions.RedisError, errors.DatabaseUnavailable)
"""What a fault raises that does not find its victim, or one of the servers; a timeout is an OSError."""


@dataclass(frozen=True, slots=True)
class Blow:
    """A fault that was done: what it hit, and how to see that this is back."""

    hit: str
    is_back: Callable[[], Awaitable[bool]]


Strike = Callable[[], Awaitable[Blow]]


@dataclass(slots=True)
class Faults:
    """Every fault, done to one service."""

    service: Service
    db: Database
    quick: bool

    def all(self) -> list[tuple[str, Strike]]:
        """Name and deed of each, in their order."""
        return [
            ("FLUSHALL", self.flush),
            ("kill -9 pool child", self.kill_pool_child),
            ("kill -9 worker", self.kill_worker),
            ("kill -9 keeper", self.kill_keeper),
            ("kill -9 relay", self.kill_relay),
            ("kill -9 API", self.kill_api),
            ("kill -9 Redis", self.kill_redis),
            ("kill -9 Postgres", self.kill_postgres),
        ]

    async def load(self) -> tuple[int, int]:
        """How many tasks wait and run."""
        row = await insist(lambda: self.db.fetchrow(_LOAD), what="the drill")
        return (row["waiting"], row["running"]) if row else (0, 0)

    async def flush(self) -> Blow:
        """Empty Redis while messages wait there. It is back when nobody waits for a message that was lost."""
        before = await self.db.fetchval("SELECT clock_timestamp()")
        async with self._redis() as client:
            await until(lambda: _holds_messages(client), MEET_SECONDS, "a message in the queue")
            async with client.pipeline(transaction=True) as pipe:
                pipe.llen(QUEUE)
                pipe.flushall()
                messages, _ = await pipe.execute()

        async def is_back() -> bool:
            return not await self.db.fetchval(_PUBLISHED_BEFORE, before)

        return Blow(f"{messages} messages", is_back)

    async def kill_pool_child(self) -> Blow:
        """Kill a child of the pool in the middle of a task. It is back when the pool is full again."""
        victims: list[tuple[Process, str]] = []

        async def found() -> bool:
            running = {int(row["pid"]): str(row["id"]) for row in await self.db.fetch(_RUNNING)}
            victims[:] = [(child, running[child.pid]) for child in self.service.pool() if child.pid in running]
            return bool(victims)

        await until(found, MEET_SECONDS, "a pool child that runs a task")
        victim, task_id = victims[0]
        victim.kill()
        return Blow(f"pid {victim.pid}, running …{task_id[-12:]}", self._pool_without({victim}))

    async def kill_worker(self) -> Blow:
        """Kill the worker's main process; its children end with it. It is back when another beats, its pool full."""
        began, victim, pool = time.time(), self._needed("taskqueue worker"), self.service.pool()
        victim.kill()
        is_full = self._pool_without(set(pool))

        async def is_back() -> bool:
            return await is_full() and self.service.beats("worker", began)

        return Blow(f"pid {victim.pid}, pool of {len(pool)}", is_back)

    async def kill_keeper(self) -> Blow:
        """Kill the keeper beside the pool. It is back when there is another."""
        victim = self.service.keeper()
        if victim is None:
            raise ProcessLookupError("no keeper runs")
        victim.kill()

        async def is_back() -> bool:
            return self.service.keeper() not in {None, victim}

        return Blow(f"pid {victim.pid}", is_back)

    async def kill_relay(self) -> Blow:
        """Kill the relay while it delivers. It is back when another beats."""
        began, victim = time.time(), self._needed("taskqueue relay")
        deliveries = await self._delivering()
        victim.kill()

        async def is_back() -> bool:
            return self._replaced("taskqueue relay", victim) and self.service.beats("relay", began)

        return Blow(f"pid {victim.pid}, delivering {deliveries}", is_back)

    async def kill_api(self) -> Blow:
        """Kill gunicorn's master and its worker. It is back when another is ready."""
        master = self._needed("taskqueue api")
        family = self.service.family(master)
        for process in family:
            process.kill()

        async def is_back() -> bool:
            return self._replaced("taskqueue api", master) and await _is_ready(self.service.url)

        return Blow(f"pids {' '.join(str(process.pid) for process in family)}", is_back)

    async def kill_redis(self) -> Blow:
        """Kill Redis. It is back when another has loaded what the old one wrote down."""
        victim = self._needed("redis-server")
        victim.kill()

        async def is_back() -> bool:
            with contextlib.suppress(redis.exceptions.RedisError, OSError):
                async with self._redis() as client:
                    return self._replaced("redis-server", victim) and bool(await client.ping())
            return False

        return Blow(f"pid {victim.pid}", is_back)

    async def kill_postgres(self) -> Blow:
        """Kill the postmaster. It is back when another has recovered and answers."""
        victim = self._needed("postgres -D")
        deliveries = await self._delivering()
        victim.kill()

        async def is_back() -> bool:
            if self._replaced("postgres -D", victim):
                await self.db.ping()
                return True
            return False

        return Blow(f"pid {victim.pid}, delivering {deliveries}", is_back)

    def _redis(self) -> "redis.asyncio.Redis":
        return redis.asyncio.Redis.from_url(self.service.redis_url)

    def _needed(self, words: str) -> Process:
        found = self.service.main(words)
        if found is None:
            raise ProcessLookupError(f"no {words} runs")
        return found

    def _replaced(self, words: str, victim: Process) -> bool:
        return self.service.main(words) not in {None, victim}

    def _pool_without(self, victims: set[Process]) -> Callable[[], Awaitable[bool]]:
        async def is_full() -> bool:
            pool = set(self.service.pool())
            return len(pool) >= self.service.concurrency and not pool & victims

        return is_full

    async def _delivering(self) -> int:
        """Wait for a moment with deliveries under way, or without any, and say how many; it need not come."""
        seen = 0

        async def is_good_moment() -> bool:
            nonlocal seen
            seen = await self.db.fetchval(_DELIVERING)
            return bool(seen) is not self.quick

        with contextlib.suppress(TimeoutError):
            await until(is_good_moment, MOMENT_SECONDS, "a good moment")
        return seen


async def _holds_messages(client: "redis.asyncio.Redis") -> bool:
    return bool(await client.llen(QUEUE))


async def _is_ready(url: str) -> bool:
    try:
        async with httpx.AsyncClient(timeout=1.0, trust_env=False) as client:
            return (await client.get(f"{url}/readyz")).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


_LOAD = """
SELECT count(*) FILTER (WHERE status IN ('PENDING', 'RETRY')) AS waiting,
       count(*) FILTER (WHERE status = 'STARTED') AS running
  FROM task
"""
_RUNNING = "SELECT id::text, split_part(worker, '/', 2) AS pid FROM task WHERE status = 'STARTED' ORDER BY started_at"
_PUBLISHED_BEFORE = "SELECT count(*) FROM task WHERE status IN ('PENDING', 'RETRY') AND published_at < $1"
_DELIVERING = "SELECT count(*) FROM webhook_delivery WHERE status = 'delivering'"

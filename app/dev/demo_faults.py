"""`make demo-faults`: kill everything under 500 tasks, and count what was lost.

A service of its own is started and given tasks by a client that submits until
all of them are acknowledged. Meanwhile one fault after another hits it, each
where tasks wait and run; the next one comes when what was hit is back. When all
has ended, the rows, the acknowledgements and the webhooks are laid beside each
other. The exit code is 0 only if nothing was lost and nobody was told twice
under different ids.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import redis.asyncio
import redis.exceptions

from app.core import errors
from app.db import Database, insist
from app.dev import demo_ledger, linux
from app.dev.demo_ledger import Audit, Job, Ledger, Receiver
from app.dev.demo_service import Process, Service, following, until

TASKS = 500
FEWEST_TASKS = 20
"""Fewer do not meet every fault waiting and running."""
DEADLINE_SECONDS = 240.0
AUDIT_SECONDS = 20.0
BACK_SECONDS = 45.0
"""How long what was hit may take to be back; a lost message alone takes ten."""
MEET_SECONDS = 30.0
CONCURRENCY = 4
QUEUE = "default"
ANSWERS_AFTER_SECONDS = 0.05
EXIT_INTERRUPTED = 130

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        tasks: how many are to be acknowledged.
        seed: of everything that is left to chance here.
        keep: the service's directory, also after a good end.
        verbose: show what the service says.
        quick: for a small number: receivers answer at once, and the relay and Postgres are killed between
            two deliveries, since one that was under way is only sent again when its lease of a minute ends.
    """

    tasks: int
    seed: int
    keep: bool = False
    verbose: bool = False
    quick: bool = False


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
                messages, _ = await pipe.llen(QUEUE).flushall().execute()

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
        deliveries = await self._delivering()
        began, victim = time.time(), self._needed("taskqueue relay")
        victim.kill()

        async def is_back() -> bool:
            return self._replaced("taskqueue relay", victim) and self.service.beats("relay", began)

        return Blow(f"pid {victim.pid}, {deliveries} deliveries under way", is_back)

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
        deliveries = await self._delivering()
        victim = self._needed("postgres -D")
        victim.kill()

        async def is_back() -> bool:
            if self._replaced("postgres -D", victim):
                await self.db.ping()
                return True
            return False

        return Blow(f"pid {victim.pid}, {deliveries} deliveries under way", is_back)

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
        """Wait for a moment with a delivery under way, or without any; it need not come."""
        with contextlib.suppress(TimeoutError):
            await until(self._is_good_moment, MEET_SECONDS, "a good moment")
        return int(await self.db.fetchval(_DELIVERING))

    async def _is_good_moment(self) -> bool:
        return bool(await self.db.fetchval(_DELIVERING)) is not self.quick


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
_UNFINISHED = """
SELECT (SELECT count(*) FROM task WHERE finished_at IS NULL)
     + (SELECT count(*) FROM webhook_delivery WHERE status <> 'delivered')
"""


@dataclass(slots=True)
class Drill:
    """One run: the client, the faults, and what is told of both."""

    service: Service
    db: Database
    ledger: Ledger
    receiver: Receiver
    faults: Faults
    began: float
    complaints: list[str] = field(default_factory=list)

    async def run(self, portions: Sequence[Sequence[Job]]) -> None:
        """Submit a portion of the jobs, then one more for each fault, then wait for the end of everything."""
        _say(_LINE.format("at", "fault", "waiting", "running", "hit", "back after"))
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._left()):
                await self.ledger.submit(portions[0])
                for (name, strike), portion in zip(self.faults.all(), portions[1:], strict=True):
                    await self._meet(name, strike, portion)
                await until(self._is_over, DEADLINE_SECONDS, "the end of every task and webhook")
        except TimeoutError:
            self.complaints.append(f"the run was cut off after {DEADLINE_SECONDS:g} s")

    async def _meet(self, name: str, strike: Strike, portion: Sequence[Job]) -> None:
        """One fault while its portion is submitted, waits and runs."""
        wanted = len(self.ledger.acknowledged) + len(portion) // 2
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.ledger.submit(portion))
            while len(self.ledger.acknowledged) < wanted:
                await asyncio.sleep(0.01)
            await self._strike(name, strike)

    async def _strike(self, name: str, strike: Strike) -> None:
        try:
            await until(self._is_busy, MEET_SECONDS, "a moment with tasks that wait and run")
            waiting, running = await self.faults.load()
            at = time.monotonic()
            blow = await strike()
            struck = time.monotonic()
            await until(lambda: _unless_away(blow.is_back), BACK_SECONDS, "what was hit")
        except (TimeoutError, ProcessLookupError, errors.DatabaseUnavailable) as failed:
            self.complaints.append(f"{name}: {failed}")
            return
        back = f"{time.monotonic() - struck:.1f} s"
        _say(_LINE.format(f"{at - self.began:.1f} s", name, waiting, running, blow.hit, back))

    async def _is_busy(self) -> bool:
        waiting, running = await self.faults.load()
        return waiting > 0 and running > 0

    async def _is_over(self) -> bool:
        if self.ledger.acknowledged.keys() - self.receiver.task_ids:
            return False
        return not await insist(lambda: self.db.fetchval(_UNFINISHED), what="the drill")

    def _left(self) -> float:
        return DEADLINE_SECONDS - (time.monotonic() - self.began)


async def _unless_away(is_back: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await is_back()
    except errors.DatabaseUnavailable:
        return False


_LINE = "{:>8}  {:<19}{:>8}{:>9}  {:<36}{:>11}"


def _say(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


async def drill(options: Options, home: Path) -> list[str]:
    """Start a service in `home`, hit it, and print what was done and counted.

    Returns:
        What is wrong; nothing if all is well.
    """
    began = time.monotonic()
    chance = random.Random(options.seed)  # noqa: S311  # a seed, so that a run can be repeated
    service = Service(home, concurrency=CONCURRENCY)
    db = Database(service.database_url, max_connections=2, application_name="taskqueue-demo")
    wait = 0.0 if options.quick else ANSWERS_AFTER_SECONDS
    complaints: list[str] = []
    try:
        service.start()
        async with (
            following(service.log_file, wanted=options.verbose),
            Receiver(service.webhook_secret, answers_after_seconds=wait) as receiver,
        ):
            await service.wait_ready()
            _say(f"The service is ready after {time.monotonic() - began:.1f} s: {service.url}")
            ledger = Ledger(service.url, receiver.url, chance)
            faults = Faults(service, db, options.quick)
            run = Drill(service, db, ledger, receiver, faults, began, complaints)
            await run.run(demo_ledger.jobs(options.tasks, len(faults.all()) + 1, CONCURRENCY, chance))
            async with asyncio.timeout(AUDIT_SECONDS):
                found = await demo_ledger.audit(db, ledger, receiver)
            _tell(found, time.monotonic() - began)
            complaints += found.complaints
            if len(ledger.acknowledged) < options.tasks:
                complaints.append(f"{len(ledger.acknowledged)} of {options.tasks} tasks were acknowledged")
    except TimeoutError as late:
        complaints.append(str(late) or "Postgres did not answer the audit")
    finally:
        await db.close()
        complaints += [f"left behind: {process.command} (pid {process.pid})" for process in await service.stop()]
    return complaints


def _tell(found: Audit, seconds: float) -> None:
    _say("")
    for what, count in found.counts.items():
        _say(f"  {what:<26}{count:>7}")
    _say(f"  {'seconds in all':<26}{seconds:>7.1f}")


async def _until_interrupted(options: Options, home: Path) -> list[str]:
    """The drill, ended in order by SIGTERM as it is by Ctrl-C."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine that runs is in a task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await drill(options, home)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the drill.

    Args:
        argv: the words of the command line; those of the process unless given.

    Returns:
        The exit code: 0 if nothing was lost and every webhook came, 1 if not, 130 if it was interrupted.
    """
    options = _options(argv)
    if not linux.IS_LINUX:
        sys.stderr.write("demo-faults: it finds its victims in /proc, so it needs Linux\n")
        return 1
    logging.getLogger("app").addHandler(logging.NullHandler())  # an outage of ours is no news here
    home = Path(tempfile.mkdtemp(prefix="taskqueue-demo-"))
    _say(f"{options.tasks} tasks, seed {options.seed}")
    good = False
    try:
        complaints = asyncio.run(_until_interrupted(options, home))
        good = not complaints
    except (KeyboardInterrupt, asyncio.CancelledError):
        _say("interrupted: everything was ended")
        good = True  # nobody will want its log
        return EXIT_INTERRUPTED
    except errors.SettingsError as wrong:
        complaints = [str(wrong)]
    finally:
        if options.keep or not good:
            _say(f"\nThe service's log is {home / 'service.log'}, its data beside it")
        else:
            shutil.rmtree(home)
    for complaint in complaints:
        _say(f"WRONG: {complaint}")
    _say("\nNothing was lost." if good else "\nSee what is WRONG above.")
    return 0 if good else 1


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="demo-faults", description="Kill everything under load; count what was lost.")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"how many are acknowledged ({TASKS})")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)), help="of everything left to chance")
    parser.add_argument("--keep", action="store_true", help="keep the service's data and log")
    parser.add_argument("--verbose", action="store_true", help="show the service's log")
    parser.add_argument(
        "--quick", action="store_true", help="no fault in the middle of a delivery: those wait a minute"
    )
    given = parser.parse_args(argv)
    if given.tasks < FEWEST_TASKS:
        parser.error(f"--tasks must be {FEWEST_TASKS} or more")
    return Options(given.tasks, given.seed, given.keep, given.verbose, given.quick)


if __name__ == "__main__":
    sys.exit(main())

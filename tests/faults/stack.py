"""The whole service on a Redis and a Postgres of its own, which a test may kill, behind networks that it may cut.

    with stack(home, pristine, seed) as running:
        tasks = running.submit_many(100, "faults.work", 0.1)
        running.redis.kill()
        running.redis.start()
        running.finish("Redis kill -9", tasks)

One API, two workers with two children each, two relays. Every role has a network
of its own to each server. Whatever happens to the service, `audit` says
afterwards whether a promise was broken.
"""

import asyncio
import contextlib
import random
import re
import shutil
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import psutil
import redis

from app import migrations
from app.core.config import Settings
from app.dev import ports
from app.dev.embedded import NAME, EmbeddedPostgres, EmbeddedRedis
from app.dev.running import RunningServer
from app.worker import keeper
from tests.faults import audit
from tests.support.fault_tasks import LEDGER_VARIABLE
from tests.support.proxy import Proxy
from tests.support.receiver import Answer, Received, Receiver
from tests.support.service import Process, Service
from tests.support.waiting import wait_until

LEASE_SECONDS = 4.0
GRACE_SECONDS = 6.0
"""From SIGTERM to the end of a worker, which turns cold at half of it."""
CONCURRENCY = 2
QUEUE = "default"
START_SECONDS = 60.0
SUBMITTERS = 4
TRY_AGAIN_SECONDS = 0.1
SUBMIT_SECONDS = 90.0
"""How long a submit is repeated until it is acknowledged."""

# asyncpg asks for one row, so the answer to a statement is that row, without the tag of the command.
STAMPED = b"\x00\x02\x00\x00\x00\x01\x01\x00\x00\x00\x08"
"""How the row begins that a submit's INSERT returns: two columns, true and eight bytes of a position."""
CLAIMED = b"\x00\x00\x00\x07default"
"""How the row begins that a claim returns: with its queue."""

Role = Literal["api", "worker", "relay"]
Server = Literal["postgres", "redis"]
T = TypeVar("T")


class Pristine:
    """A Postgres directory with a migrated, empty database that notes every step of every task; made once, copied."""

    def __init__(self, home: Path) -> None:
        self._directory = home / "pristine"
        server = RunningServer(EmbeddedPostgres(self._directory))
        server.start()
        try:
            given = {"DATABASE_URL": server.url, "REDIS_URL": "redis://127.0.0.1:1/0", "TASKQUEUE_AUTH_MODE": "none"}
            migrations.migrate(Settings.model_validate(given))
            complete(_execute(server.url, audit.HISTORY))
            # Promise 6: whoever leaves a transaction open has his session ended, which the log tells `finish`.
            complete(_execute(server.url, f"ALTER DATABASE {NAME} SET idle_in_transaction_session_timeout = '1s'"))
        finally:
            server.stop()

    def copy(self, target: Path) -> None:
        """Copy it, for a server on a port of its own. The target may be there already: a disk of its own."""
        shutil.copytree(self._directory, target, dirs_exist_ok=True)
        (target / "port").unlink()
        for path in [target, *target.rglob("*")]:
            owner = (self._directory / path.relative_to(target)).stat()
            shutil.chown(path, owner.st_uid, owner.st_gid)


@dataclass(slots=True)
class Client:
    """Submits, from several threads at once, until it is told that what it submits is accepted.

    Attributes:
        acknowledged: the tasks that were accepted, by id, with the webhook that was asked for.
        refused: how many submits were not.
        broken: answers that a client should never get.
        slowest_seconds: the longest that the API took for an answer.
    """

    http: httpx.Client
    acknowledged: dict[str, str | None] = field(default_factory=dict)
    refused: int = 0
    broken: list[str] = field(default_factory=list)
    slowest_seconds: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def submit(self, wanted: dict[str, Any]) -> str:
        """Submit once more and once more until it is acknowledged; returns the id."""
        deadline = time.monotonic() + SUBMIT_SECONDS
        while True:
            task_id = self.try_once(wanted)
            if task_id is not None:
                return task_id
            assert time.monotonic() < deadline, f"no submit was acknowledged for {SUBMIT_SECONDS:g} s"
            time.sleep(TRY_AGAIN_SECONDS)

    def try_once(self, wanted: dict[str, Any]) -> str | None:
        """Submit once; None if it was not acknowledged."""
        began = time.monotonic()
        try:
            answer = self.http.post("/api/tasks/submit", json=wanted)
        except httpx.TransportError:
            answer = None
        with self.lock:
            self.slowest_seconds = max(self.slowest_seconds, time.monotonic() - began)
            if answer is not None and answer.status_code == 202:
                task_id = str(answer.json()["task_id"])
                self.acknowledged[task_id] = wanted.get("webhook_url")
                return task_id
            self.refused += 1
            if answer is not None and answer.status_code != 503:
                self.broken.append(f"{answer.status_code}: {answer.text[:200]}")
            return None


class Stack:
    """One running service. Every time is in seconds, every moment by `time.time()`, which Postgres has too."""

    def __init__(self, home: Path, pristine: Pristine, seed: str, **settings: str) -> None:
        self.home = home
        self.seed = seed
        self.chance = random.Random(seed)
        self.began = time.time()
        pristine.copy(home / "postgres")
        self.postgres = RunningServer(EmbeddedPostgres(home / "postgres", max_connections=120))
        self.redis = RunningServer(EmbeddedRedis(home / "redis"))
        self.receiver = Receiver(self._answer)
        self.answer: int | Answer = 200
        self.ledger = home / "ledger"
        self._settings = settings
        self._closing = contextlib.ExitStack()
        self._networks: dict[tuple[Server, Role], Proxy] = {}
        self._expected: set[int] = set()
        self.workers: list[Process] = []
        self.relays: list[Process] = []
        self.api: Process

    def start(self) -> None:
        """Start everything, and return once all of it works."""
        self._closing.callback(self.receiver.close)
        for server in (self.postgres, self.redis):
            self._closing.callback(server.stop)
            server.start()
        for role in ("api", "worker", "relay"):
            for name, server in (("postgres", self.postgres), ("redis", self.redis)):
                proxy = Proxy(server.url)
                self._closing.callback(proxy.close)
                self._networks[name, role] = proxy  # type: ignore[index]  # the words of the two loops
        [port] = ports.free_ports(1)
        self.service = Service(self._environment(port), self.home, {role: self._behind(role) for role in _ROLES})
        self._closing.callback(self.service.close)
        self.client = Client(self.service.http)
        self.api = self.service.start("api")
        self.workers = [self.start_worker() for _ in range(2)]
        self.relays = [self.start_relay() for _ in range(2)]
        self.wait_ready()

    def close(self) -> None:
        """End everything."""
        self._closing.close()

    def start_api(self, **changes: str) -> Process:
        """Start the API, in place of one that has gone; `changes` are variables that it sees otherwise."""
        self.api = self.service.start("api", **changes)
        return self.api

    def start_worker(self, **changes: str) -> Process:
        """Start one more worker; `changes` as in `start_api`."""
        return self.service.start("worker", TASKQUEUE_DATA_DIR=self._own_directory(), **changes)

    def start_relay(self, **changes: str) -> Process:
        """Start one more relay; `changes` as in `start_api`."""
        return self.service.start("relay", TASKQUEUE_DATA_DIR=self._own_directory(), **changes)

    def wait_ready(self) -> None:
        """Return once the API is ready and every worker and relay beats."""
        waiting = [*self.workers, *self.relays]
        wait_until(
            lambda: self.service.ready() and all(self._beats(one) for one in waiting), START_SECONDS, "the start"
        )

    def network(self, server: Server, role: Role) -> Proxy:
        """The network between one kind of process and one server."""
        return self._networks[server, role]

    def networks(self, server: Server) -> list[Proxy]:
        """All networks to one server."""
        return [self._networks[server, role] for role in _ROLES]

    def kill(self, process: Process) -> float:
        """SIGKILL a process and all that it started, as when its pod is gone; returns when."""
        self.expect_end(process)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        at = time.time()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait(10)
        return at

    def expect_end(self, process: Process) -> None:
        """Know that a process ends because of the test."""
        self._expected.add(process.pid)

    def kill_postgres(self) -> float:
        """SIGKILL every process of Postgres within a moment, so that what was not durable is gone; returns when."""
        assert self.postgres.pid is not None
        main = psutil.Process(self.postgres.pid)
        family = [main, *main.children(recursive=True)]
        at = time.time()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.postgres.kill()
        return at

    def replace_postgres(self, server: EmbeddedPostgres) -> None:
        """End Postgres well, and start another one on its data."""
        self.postgres.stop()
        self.postgres = RunningServer(server)
        self._closing.callback(self.postgres.stop)
        self.postgres.start()

    def fail_over(self, server: Server, successor: RunningServer) -> None:
        """Have everybody find another server in the place of one that is gone, this stack included."""
        setattr(self, server, successor)
        for network in self.networks(server):
            network.retarget(successor.url)

    # What is submitted, and what is known of it.

    def submit(self, task: str, *args: Any, webhook: bool = True, **fields: Any) -> str:
        """Submit one task, as often as it takes."""
        return self.client.submit(self._wanted(task, args, webhook, fields))

    def submit_many(self, count: int, task: str, *args: Any, webhook: bool = True, **fields: Any) -> list[str]:
        """Submit so many tasks, from several threads at once."""
        wanted = self._wanted(task, args, webhook, fields)
        with ThreadPoolExecutor(SUBMITTERS) as threads:
            return list(threads.map(lambda _: self.client.submit(wanted), range(count)))

    @contextlib.contextmanager
    def load(self, task: str, *args: Any, per_second: float) -> Iterator[None]:
        """Submit at this rate, from a thread of its own, while the block runs."""
        stop = threading.Event()

        def submit() -> None:
            wanted = self._wanted(task, args, True, {})
            while not stop.wait(1 / per_second):
                self.client.try_once(wanted)

        thread = threading.Thread(target=submit, name="load")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def fetch(self, sql: str, *args: object) -> list[asyncpg.Record]:
        """Ask Postgres itself, past every network."""
        return complete(_fetch(self.postgres.url, sql, *args))

    def execute(self, sql: str) -> None:
        """Have Postgres itself do something."""
        complete(_execute(self.postgres.url, sql))

    def bell(self) -> "redis.Redis":
        """A client of Redis itself, past every network."""
        return redis.Redis.from_url(self.redis.url)

    def statuses(self, tasks: Sequence[str]) -> dict[str, str]:
        """The statuses of these tasks, by their rows."""
        rows = self.fetch("SELECT id::text AS id, status FROM task WHERE id = ANY($1::uuid[])", list(tasks))
        return {row["id"]: row["status"] for row in rows}

    def reach(self, tasks: Sequence[str], *wanted: str, seconds: float = 30) -> None:
        """Wait until every one of these tasks has one of these statuses."""
        wait_until(
            lambda: set(self.statuses(tasks).values()) <= set(wanted), seconds, f"{'/'.join(wanted)} of {len(tasks)}"
        )

    def running(self, count: int, seconds: float = 30) -> list[str]:
        """Wait until so many tasks run, also by what they noted themselves; returns which."""

        def found() -> list[str]:
            rows = self.fetch("SELECT id::text AS id, attempt FROM task WHERE status = 'STARTED'")
            begun = {(one.task_id, one.attempt) for one in self.effects() if one.what == "begin"}
            running = [row["id"] for row in rows if (row["id"], row["attempt"]) in begun]
            return running if len(running) >= count else []

        return wait_until(found, seconds, f"{count} running tasks")

    def worker_of(self, task_id: str) -> Process:
        """The worker whose child runs a task."""
        pid = self.child_of(task_id).ppid()
        return next(one for one in self.workers if one.pid == pid)

    def child_of(self, task_id: str) -> psutil.Process:
        """The pool child that runs a task, or ran it last."""
        [row] = self.fetch("SELECT worker FROM task WHERE id = $1", task_id)
        return psutil.Process(int(row["worker"].rpartition("/")[2]))

    def effects(self) -> list[audit.Effect]:
        """What tasks noted of their runs, in the order in which they did."""
        return audit.effects(self.ledger.read_text() if self.ledger.exists() else "")

    def steps(self, tasks: Sequence[str] | None = None) -> list[audit.Step]:
        """Every step of these tasks, or of all, in their order."""
        rows = self.fetch(f"{audit.STEPS} ORDER BY seq")
        found = [audit.step(dict(row)) for row in rows]
        return found if tasks is None else [one for one in found if one.task_id in set(tasks)]

    def recovered(self, tasks: Sequence[str], since: float, seconds: float = 60) -> float:
        """Wait until all of these tasks have ended; returns how long after `since` the last was claimed (again).

        A task that needed no claim any more, because it ended in the run it had, took no time.
        """
        wait_until(lambda: set(self.statuses(tasks).values()) <= audit.TERMINAL, seconds, f"the end of {len(tasks)}")
        first: dict[str, float] = {}
        for one in self.steps(tasks):
            if one.status == "STARTED" and one.at >= since:
                first.setdefault(one.task_id, one.at)
        return max(first.values(), default=since) - since

    def messages_again(self, tasks: Sequence[str], since: float, seconds: float = 60) -> float:
        """Wait until none of these tasks waits with a message from before `since`; returns how long after it."""
        stale = """SELECT 1 FROM task WHERE id = ANY($1::uuid[]) AND status IN ('PENDING', 'RETRY')
                      AND COALESCE(published_at, run_at) < to_timestamp($2) LIMIT 1"""
        wait_until(lambda: not self.fetch(stale, list(tasks), since), seconds, f"new messages of {len(tasks)}")
        return time.time() - since

    def pushed_again(self) -> int:
        """How many messages the relays took for lost and pushed again, by what they logged."""
        logs = [one.log.read_text() for one in self.service.processes if one.command == "relay"]
        return sum(int(count) for log in logs for count in _PUSHED_AGAIN.findall(log))

    def depth(self) -> int:
        """How many messages are in the queue."""
        with self.bell() as client:
            return int(client.llen(QUEUE))

    # The end.

    def finish(
        self,
        fault: str,
        *,
        recovery_seconds: float,
        allowed_seconds: float,
        end_seconds: float = 60,
        workers: audit.Workers = "untouched",
        reclaims: bool = False,
        exhausts: bool = False,
        one_clock: bool = True,
        tracebacks: int = 0,
        posts: Sequence[audit.Post] | None = None,
    ) -> audit.Figures:
        """Wait for the end of everything, check every invariant, and return what to print.

        Args:
            fault: what was done, in a few words.
            recovery_seconds: the longest that anything took to go on.
            allowed_seconds: how long it may have taken.
            end_seconds: when every task and webhook must have ended, from now (I2).
            workers: what was done to them, which decides whether a lease may be lost, and runs may overlap.
            reclaims: whether claims that were not durable may have been lost with Postgres, so that an attempt
                may have been given out twice, under two tokens.
            exhausts: whether a webhook may be given up.
            one_clock: whether tasks go by the same clock as Postgres.
            tracebacks: how many the logs may show.
            posts: what came, if others than the stack's own receiver were told.
        """
        for proxy in self._networks.values():
            proxy.restore()
            proxy.bury()
        wait_until(
            lambda: not any(self._unfinished(exhausts=exhausts)),
            end_seconds,
            f"the end of everything (tasks, webhooks and messages at first: {self._unfinished(exhausts=exhausts)})",
        )
        self._probe()
        assert not self.client.broken, f"answers that no client should get: {self.client.broken[:3]}"
        found = audit.compare(
            acknowledged=self.client.acknowledged,
            rows=[dict(row) for row in self.fetch(audit.ROWS)],
            steps=self.steps(),
            effects=self.effects(),
            posts=self.posts() if posts is None else posts,
            workers=workers,
            reclaims=reclaims,
            exhausts=exhausts,
            one_clock=one_clock,
        )
        log = (self.postgres.server.directory / "log").read_text(errors="replace")
        breaches = [
            *found.breaches,
            *audit.idle_in_transaction(log),
            *self._rests(),
            *self._logged(tracebacks),
        ]
        assert not breaches, "\n".join(breaches)
        assert recovery_seconds <= allowed_seconds, f"took {recovery_seconds:.1f} s of {allowed_seconds:g} s to go on"
        return audit.Figures(
            fault=fault,
            acknowledged=len(self.client.acknowledged),
            ended=found.ended,
            lost=found.lost,
            changed=found.changed,
            run_twice=found.run_twice,
            webhooks=found.webhooks,
            recovery_seconds=recovery_seconds,
            allowed_seconds=allowed_seconds,
            seconds=time.time() - self.began,
            seed=self.seed,
        )

    def posts(self) -> list[audit.Post]:
        """Every webhook that came."""
        return [audit.post(one.headers["webhook-id"], one.body, one.answered) for one in self.receiver.requests]

    def _unfinished(self, *, exhausts: bool = False) -> tuple[int, int, int]:
        """Tasks, webhooks and messages that are still under way; a webhook that was given up is, unless it may be."""
        [row] = self.fetch(
            """SELECT (SELECT count(*) FROM task WHERE finished_at IS NULL) AS tasks,
                      (SELECT count(*) FROM webhook_delivery WHERE status <> ALL($1::text[])) AS webhooks""",
            ["delivered", "exhausted"] if exhausts else ["delivered"],
        )
        return row["tasks"], row["webhooks"], self.depth()

    def _probe(self) -> None:
        """I9: within 30 s every worker that lives has run something again."""
        living = {one.pid for one in self.workers if one.running()}
        served: set[int] = set()
        deadline = time.monotonic() + 30
        while idle := living - served:
            assert time.monotonic() < deadline, f"workers {idle} take no tasks any more"
            probes = self.submit_many(4 * len(living), "faults.work", 0.1, webhook=False)
            self.reach(probes, "SUCCESS")
            rows = self.fetch("SELECT DISTINCT worker FROM task WHERE id = ANY($1::uuid[])", probes)
            for row in rows:
                with contextlib.suppress(psutil.NoSuchProcess):
                    served.add(psutil.Process(int(row["worker"].rpartition("/")[2])).ppid())

    def _rests(self) -> Iterator[str]:
        """I8: nothing is left in Redis, connections are as many as they may be, and nobody ended unasked."""
        if self.depth():
            yield f"I8: {self.depth()} messages are left in Redis"
        concurrency = int(self.service.environment["TASKQUEUE_CONCURRENCY"])
        most = len(self.workers) * (concurrency + keeper.CONNECTIONS) + len(self.relays) * 8 + API_CONNECTIONS
        [row] = self.fetch("SELECT count(*) AS n FROM pg_stat_activity WHERE application_name LIKE 'taskqueue%'")
        if row["n"] > most:
            yield f"I8: {row['n']} connections to Postgres, of {most}"
        with self.bell() as client:
            connected = int(client.info("clients")["connected_clients"])
        if connected > REDIS_CONNECTIONS:
            yield f"I8: {connected} connections to Redis, of {REDIS_CONNECTIONS}"
        for one in self.service.processes:
            if not one.running() and one.pid not in self._expected:
                yield f"{one.command} ended unasked:\n{one.log.read_text()[-2000:]}"

    def _logged(self, allowed: int) -> Iterator[str]:
        found = [one for one in self.service.processes if self._tracebacks(one) > 0]
        if len(found) > allowed:
            yield f"tracebacks in the logs of {[str(one.log) for one in found]}:\n{found[0].log.read_text()[-3000:]}"

    def _tracebacks(self, process: Process) -> int:
        """How many it shows, but for those of a killed worker's children, whose last words nobody hears."""
        log = process.log.read_text()
        unheard = log.count("BrokenPipeError: [Errno 32]") if process.pid in self._expected else 0
        return log.count("Traceback (most recent") - unheard

    def _wanted(self, task: str, args: Sequence[Any], webhook: bool, fields: dict[str, Any]) -> dict[str, Any]:
        hook = {"webhook_url": f"{self.receiver.url}/hook"} if webhook else {}
        return {"task": task, "args": list(args), **hook, **fields}

    def _answer(self, _: Received) -> int | Answer:
        return self.answer

    def _own_directory(self) -> str:
        """A data directory for one process, which beats there."""
        return str(self.home / f"{len(self.service.processes)}")

    def _beats(self, process: Process) -> bool:
        assert process.running(), f"{process.command} ended at once:\n{process.log.read_text()}"
        number = self.service.processes.index(process)
        return (self.home / str(number) / "run" / f"{process.command}.beat").exists()

    def _behind(self, role: Role) -> dict[str, str]:
        return {
            "DATABASE_URL": self._networks["postgres", role].url,
            "REDIS_URL": self._networks["redis", role].url,
        }

    def _environment(self, port: int) -> dict[str, str]:
        return {
            "DATABASE_URL": self.postgres.url,
            "REDIS_URL": self.redis.url,
            "PORT": str(port),
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_TASK_MODULES": "tests.support.fault_tasks",
            "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
            # A receiver that is asked again after minutes would make the test wait as long.
            "TASKQUEUE_WEBHOOK_SCHEDULE": "0 1 2 5 5 5 10 10 10 10",
            "TASKQUEUE_METRICS_PORT": "0",
            "TASKQUEUE_CONCURRENCY": str(CONCURRENCY),
            "TASKQUEUE_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "TASKQUEUE_GRACE_SECONDS": f"{GRACE_SECONDS:g}",
            "TASKQUEUE_LOG_FORMAT": "console",
            LEDGER_VARIABLE: str(self.ledger),
            **self._settings,
        }


_PUSHED_AGAIN = re.compile(r"(\d+) messages of queue \S+ were lost and are pushed again")
_ROLES: tuple[Role, ...] = ("api", "worker", "relay")
API_CONNECTIONS = 10
REDIS_CONNECTIONS = 60


@contextlib.contextmanager
def stack(home: Path, pristine: Pristine, seed: str, **settings: str) -> Iterator[Stack]:
    """A stack that runs, and is ended with the block."""
    one = Stack(home, pristine, seed, **settings)
    try:
        one.start()
        yield one
    finally:
        one.close()


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, in a thread that has no event loop yet."""
    return asyncio.run(work)


async def _fetch(url: str, sql: str, *args: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(_plain(url), timeout=10)
    try:
        return await connection.fetch(sql, *args)
    finally:
        await connection.close()


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(_plain(url), timeout=10)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


def _plain(url: str) -> str:
    return urlunsplit(urlsplit(url)._replace(scheme="postgresql"))

"""`make soak MINUTES=20`: random faults every few seconds under load, for as long as one likes; a table at the end.

Tasks of every kind are submitted at a steady rate: quick and slow ones, ones
that fail and retry, that kill their process, that are due later, that expire,
that are cancelled. Meanwhile one fault after another hits the stack, in an order
drawn by the seed that meets all of them before it meets one again. When the time
is over everything is mended, and whatever is then still under way must end; the
audit is the one of the fault suite. The exit code is 0 only if every invariant
holds, and the run was worth its name: enough tasks were acknowledged, and in a
long one every fault has struck.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import httpx
import psutil

from app import broker
from tests.faults import audit
from tests.faults.stack import CLAIMED, QUEUE, STAMPED, Pristine, Role, Server, Stack, stack
from tests.support.service import Process
from tests.support.waiting import wait_until

CONCURRENCY = 4
SUBMITTERS = 4
PER_SECOND = 40.0
PAUSE_SECONDS = (1.0, 5.0)
"""Between the end of one fault and the next."""
OUTAGE_SECONDS = (0.2, 8.0)
END_SECONDS = 300.0
"""How long everything may take to end once nothing is broken any more."""
TRAP_SECONDS = 5.0
LEAST_SHARE = 0.4
"""Of the tasks that are to be submitted, how many must be acknowledged whatever is broken."""
LONG_MINUTES = 20.0
"""From here on a run that did not meet every fault is not good enough."""
CANCEL_ANSWERS = frozenset({200, 202, 409, 503})
REPEATED = 50

Fault = Callable[[], str | None]
"""Strikes, and says what it hit; None if it hit nothing."""

PACKETS: Mapping[str, tuple[bytes, Literal["client", "server"], Server, Role]] = {
    "API's push to Redis": (b"LPUSH", "client", "redis", "api"),
    "relay's push to Redis": (b"LPUSH", "client", "redis", "relay"),
    "message to a worker": (b'"attempt"', "server", "redis", "worker"),
    "answer to a submit": (STAMPED, "server", "postgres", "api"),
    "answer to a claim": (CLAIMED, "server", "postgres", "worker"),
    "answer to a settle": (b"SUCCESS", "server", "postgres", "worker"),
}
"""What is lost on its way, with the connection that carries it: the bytes it is known by, who sends it, and where."""


def job(chance: random.Random) -> tuple[str, list[Any], dict[str, Any]]:
    """A task to submit: its name, arguments and options."""
    draw = chance.random()
    if draw < 0.82:
        return "faults.work", [round(chance.expovariate(1 / 0.03), 3)], {}
    if draw < 0.90:
        return "faults.work", [0.0, chance.randint(1, 3)], {"max_retries": 5}
    if draw < 0.94:
        return "faults.work", [0.05], {"countdown": round(chance.uniform(0.5, 20), 1)}
    if draw < 0.95:
        return "faults.work", [round(chance.uniform(1.0, 6.0), 1)], {}
    if draw < 0.97:
        return "faults.work", [0.0], {"expires": round(chance.uniform(1, 10), 1)}
    if draw < 0.99:
        return "sample.fail", ["on purpose"], {"max_retries": 1}
    return "faults.die", [chance.choice((1, 99))], {}


@dataclass(slots=True)
class Soak:
    """One run: the load, the faults, and what is told of them."""

    running: Stack
    chance: random.Random
    began: float = field(default_factory=time.monotonic)
    stop: threading.Event = field(default_factory=threading.Event)
    struck: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    cancelled: int = 0
    _next: list[str] = field(default_factory=list)

    def run(self, minutes: float) -> None:
        """Load and faults for so long. What a submitter or canceller raises ends the run, and is raised here."""
        seeds = [self.chance.random() for _ in range(SUBMITTERS + 1)]
        with ThreadPoolExecutor(len(seeds)) as threads:
            clients: list[Future[None]] = [
                *(threads.submit(self._submit, random.Random(one)) for one in seeds[1:]),
                threads.submit(self._cancel, random.Random(seeds[0])),
            ]
            try:
                while time.monotonic() - self.began < minutes * 60 and not any(one.done() for one in clients):
                    self._strike()
                    self.stop.wait(self.chance.uniform(*PAUSE_SECONDS))
            finally:
                self.stop.set()
            for client in clients:
                client.result()

    def _submit(self, chance: random.Random) -> None:
        while not self.stop.wait(chance.expovariate(PER_SECOND / SUBMITTERS)):
            name, args, fields = job(chance)
            hook = {"webhook_url": f"{self.running.receiver.url}/hook"} if chance.random() < 0.9 else {}
            self.running.client.try_once({"task": name, "args": args, **fields, **hook})

    def _cancel(self, chance: random.Random) -> None:
        while not self.stop.wait(chance.uniform(0.5, 3.0)):
            with self.running.client.lock:
                recent = list(self.running.client.acknowledged)[-200:]
            if recent:
                with contextlib.suppress(httpx.TransportError):
                    answer = self.running.service.http.post(f"/api/tasks/{chance.choice(recent)}/cancel")
                    self.cancelled += answer.is_success
                    assert answer.status_code in CANCEL_ANSWERS, f"a cancel was answered {answer.status_code}"

    def names(self) -> tuple[str, ...]:
        """Every fault that there is."""
        return tuple(name for name, _ in self._faults())

    def _strike(self) -> None:
        if not self._next:
            self._next = list(self.names())
            self.chance.shuffle(self._next)
        name = self._next.pop()
        at = time.monotonic() - self.began
        hit = dict(self._faults())[name]()
        (self.missed if hit is None else self.struck)[name] += 1
        lasted = time.monotonic() - self.began - at
        what = "missed" if hit is None else hit
        say(f"{at:8.1f} s  {name:<34}{what:<40}{lasted:6.1f} s{len(self.running.client.acknowledged):>9}")

    def _faults(self) -> Iterator[tuple[str, Fault]]:
        yield "FLUSHALL", self._flush
        yield "kill -9 Redis, back from its file", lambda: self._kill_redis(keep=True)
        yield "kill -9 Redis, back empty", lambda: self._kill_redis(keep=False)
        yield "kill -9 Postgres", self._kill_postgres
        yield "network cut", lambda: self._part("cut")
        yield "network black hole", lambda: self._part("black hole")
        for packet in PACKETS:
            yield f"lost: {packet}", partial(self._lose, packet)
        yield "kill -9 pool child", self._kill_child
        yield "kill -9 keeper", self._kill_keeper
        yield "kill -9 worker's main process", lambda: self._kill_worker(whole=False)
        yield "kill -9 whole worker", lambda: self._kill_worker(whole=True)
        yield "kill -9 all workers", self._kill_workers
        yield "kill -9 relay", self._kill_relay
        yield "kill -9 API", self._kill_api
        yield "SIGTERM worker", lambda: self._terminate(then_kill=False)
        yield "SIGTERM, then SIGKILL worker", lambda: self._terminate(then_kill=True)
        yield "SIGSTOP worker", lambda: self._freeze(self.chance.choice(self.running.workers))
        yield "SIGSTOP relay", lambda: self._freeze(self.chance.choice(self.running.relays))
        yield "Redis full", self._fill_redis
        yield "messages repeated and shuffled", self._repeat
        yield "garbage in the queue", self._litter
        yield "receiver answers 500", self._refuse_webhooks

    def _outage(self) -> float:
        seconds = self.chance.uniform(*OUTAGE_SECONDS)
        self.stop.wait(seconds)
        return seconds

    def _flush(self) -> str | None:
        with self.running.bell() as client:
            depth, keys = client.llen(QUEUE), client.dbsize()
            client.flushall()
        return f"{depth} messages, {keys} keys" if keys else None

    def _kill_redis(self, *, keep: bool) -> str:
        self.running.redis.kill()
        self._outage()
        if not keep:
            for path in [*(self.running.home / "redis").glob("*.rdb"), *(self.running.home / "redis").glob("append*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.running.redis.start()
        return ""

    def _kill_postgres(self) -> str:
        self.running.kill_postgres()
        self._outage()
        self.running.postgres.start()
        return ""

    def _part(self, how: str) -> str:
        server: Server = self.chance.choice(("postgres", "redis"))
        role: Role = self.chance.choice(("api", "worker", "relay"))
        network, revive = self.running.network(server, role), self.chance.random() < 0.5
        if how == "cut":
            network.cut()
        else:
            network.black_hole()
        self._outage()
        network.restore(revive=revive)
        return f"{role} and {server}{', connections forgotten' if how != 'cut' and not revive else ''}"

    def _lose(self, packet: str) -> str | None:
        wanted, sender, server, role = PACKETS[packet]
        trap = self.running.network(server, role).trap(wanted, sender=sender, then="cut")
        trap.sprung.wait(TRAP_SECONDS)
        caught = trap.caught
        trap.sprung.set()  # a trap that has not sprung is not to do so in the middle of another fault
        return f"{len(caught)} bytes" if caught else None

    def _kill_child(self) -> str | None:
        children = [child for worker in self.running.workers for child in worker.children()]
        return _killed(self.chance.choice(children)) if children else None

    def _kill_keeper(self) -> str | None:
        keeper = self.chance.choice(self.running.workers).keeper()
        return None if keeper is None else _killed(keeper)

    def _kill_worker(self, *, whole: bool) -> str:
        victim = self.chance.choice(self.running.workers)
        if whole:
            self.running.kill(victim)
        else:
            self.running.expect_end(victim)
            victim.signal(signal.SIGKILL)
            victim.wait(10)
        self._replace(victim)
        return f"pid {victim.pid}"

    def _kill_workers(self) -> str:
        victims = list(self.running.workers)
        for victim in victims:
            self.running.kill(victim)
        self._outage()
        for victim in victims:
            self._replace(victim)
        return f"{len(victims)} workers"

    def _kill_relay(self) -> str:
        victim = self.chance.choice(self.running.relays)
        self.running.kill(victim)
        self._outage()
        self.running.relays[self.running.relays.index(victim)] = self.running.start_relay()
        return f"pid {victim.pid}"

    def _kill_api(self) -> str:
        self.running.kill(self.running.api)
        self._outage()
        self.running.start_api()
        return ""

    def _terminate(self, *, then_kill: bool) -> str:
        victim = self.chance.choice(self.running.workers)
        self.running.expect_end(victim)
        victim.signal(signal.SIGTERM)
        if then_kill:
            self.stop.wait(self.chance.uniform(0, 3))
            self.running.kill(victim)
        else:
            victim.wait(30)
        self._replace(victim)
        return f"pid {victim.pid}"

    def _replace(self, victim: Process) -> None:
        self.running.workers[self.running.workers.index(victim)] = self.running.start_worker()

    def _freeze(self, victim: Process) -> str:
        family = [psutil.Process(victim.pid), *psutil.Process(victim.pid).children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        self._outage()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.resume()
        return f"pid {victim.pid} and {len(family) - 1} below it"

    def _fill_redis(self) -> str:
        with self.running.bell() as client:
            client.config_set("maxmemory", "1mb")
            self._outage()
            client.config_set("maxmemory", "0")
        return ""

    def _repeat(self) -> str | None:
        """Those in the queue, and those that the newest tasks had, which most often have left it."""
        newest = self.running.fetch(
            "SELECT id::text AS id, name, COALESCE(position, 0) AS position FROM task ORDER BY id DESC LIMIT $1",
            REPEATED,
        )
        copies = [
            broker.encode(
                broker.Received(task_id=UUID(row["id"]), name=row["name"], attempt=0, position=row["position"]), QUEUE
            )
            for row in newest
        ]
        with self.running.bell() as client:
            messages: list[bytes | str] = [*client.lrange(QUEUE, 0, 200), *copies]
            self.chance.shuffle(messages)
            if messages:
                client.lpush(QUEUE, *messages)
                client.rpush(QUEUE, *messages[: len(messages) // 2])
        return f"{len(messages)} messages" if messages else None

    def _litter(self) -> str:
        litter: list[bytes | str] = [b"\xff\x00garbage", "{}", "[]", '{"headers":{}}', '{"body":{"__type__":"x"}}', ""]
        with self.running.bell() as client:
            client.rpush(QUEUE, *litter)
            client.lpush(QUEUE, *litter)
        return f"{2 * len(litter)} messages"

    def _refuse_webhooks(self) -> str:
        self.running.answer = 500
        seconds = self._outage()
        self.running.answer = 200
        return f"for {seconds:.1f} s"


def _killed(process: psutil.Process) -> str | None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        return f"pid {process.pid}"
    return None


def shortfalls(acknowledged: int, minutes: float, struck: Mapping[str, int], faults: Collection[str]) -> list[str]:
    """Why a run says too little, however well it ended.

    Args:
        acknowledged: how many tasks were.
        minutes: how long tasks were submitted, and faults struck.
        struck: how often each fault has hit something.
        faults: all that there are.
    """
    least = LEAST_SHARE * PER_SECOND * minutes * 60
    found = [f"{acknowledged} tasks were acknowledged, fewer than {least:.0f}"] if acknowledged < least else []
    never = [name for name in faults if not struck.get(name)]
    if never and minutes >= LONG_MINUTES:
        found.append(f"never struck: {', '.join(never)}")
    return found


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


def soak(home: Path, seed: str, minutes: float) -> bool:
    """Run it, and print what was done and counted; returns whether every invariant held."""
    settings = {"TASKQUEUE_CONCURRENCY": str(CONCURRENCY)}
    with stack(home, Pristine(home), seed, **settings) as running:
        one = Soak(running, running.chance)
        say(f"seed {seed}, {minutes:g} minutes; at, fault, what it hit, how long, tasks acknowledged so far")
        one.run(minutes)
        say("everything is mended; waiting for the end of all that is under way")
        mended = time.monotonic()
        try:
            wait_until(running.service.ready, 60, "the API")
            running.wait_ready()
            figures = running.finish(
                "soak",
                recovery_seconds=0,
                allowed_seconds=0,
                end_seconds=END_SECONDS,
                workers="cut off",
                reclaims=True,
            )
        except AssertionError as wrong:
            say(f"WRONG: {wrong}")
            return False
        _tell(one, running, figures, time.monotonic() - mended)
        wanting = shortfalls(figures.acknowledged, minutes, one.struck, one.names())
        for sentence in wanting:
            say(f"WRONG: {sentence}")
        return not wanting


def _tell(one: Soak, running: Stack, figures: audit.Figures, drained_seconds: float) -> None:
    say("")
    for name in one.names():
        missed = f", and missed {one.missed[name]} times" if one.missed[name] else ""
        say(f"  {name:<42}{one.struck[name]:>8}{missed}")
    statuses = Counter(running.statuses(list(running.client.acknowledged)).values())
    [row] = running.fetch("SELECT sum(attempt) AS runs, count(*) AS rows FROM task")
    counts: dict[str, object] = {
        "faults": sum(one.struck.values()),
        "tasks acknowledged": figures.acknowledged,
        **{f"ended {status}": count for status, count in sorted(statuses.items())},
        "lost": figures.lost,
        "terminal rows changed": figures.changed,
        "claims in all": row["runs"],
        "tasks run more than once": figures.run_twice,
        "rows nobody was told of": row["rows"] - figures.acknowledged,
        "submits not acknowledged": running.client.refused,
        "cancels accepted": one.cancelled,
        "tasks with a webhook": sum(hook is not None for hook in running.client.acknowledged.values()),
        "distinct webhook ids": len({post.webhook_id for post in running.posts()}),
        "webhook POSTs": figures.webhooks,
        "seconds to the end, once mended": round(drained_seconds, 1),
        "seconds in all": round(figures.seconds, 1),
    }
    say("")
    for name, count in counts.items():
        say(f"  {name:<42}{count!s:>8}")
    say(f"\nseed {figures.seed}: nothing was lost, nothing changed after its end, and every webhook came.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a soak; returns the exit code."""
    parser = argparse.ArgumentParser(prog="soak", description="Random faults under load, and an audit at the end.")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", default=str(int.from_bytes(os.urandom(3))))
    parser.add_argument("--keep", action="store_true", help="keep the data and the logs, also after a good end")
    given = parser.parse_args(argv)
    home = Path(tempfile.mkdtemp(prefix="taskqueue-soak-"))
    good = False
    try:
        good = soak(home, given.seed, given.minutes)
    finally:
        if given.keep or not good:
            say(f"data and logs are in {home}")
        else:
            shutil.rmtree(home, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

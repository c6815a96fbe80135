"""A Redis that forgets, dies, fills up, freezes, or can't be reached."""

import shutil
import time
from collections.abc import Callable
from typing import Literal

import psutil
import pytest

from tests.faults.audit import TERMINAL, Figures
from tests.faults.stack import QUEUE, Role, Stack
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

LOST_MESSAGE_SECONDS = 15
RECONNECT_SECONDS = 25
"""A worker notices a silent connection by its health check of 10 s, and tries again after steps of up to 10 s."""
SUBMIT_SECONDS = 1.5
"""The longest that a submit may take whatever Redis does: less than any of our commands waits for Redis."""
OUTAGE_SECONDS = 30
MESSAGE = b'"lang":"py"'
"""What only a message holds, of all that Redis says to a worker."""

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_flushall_with_a_backlog(running: Stack, report: Report) -> None:
    running.submit_many(600, "faults.work", 0.1)
    with running.bell() as client:
        client.flushall()
    at = time.time()
    missing = waiting(running)
    assert len(missing) > 100, "there is no backlog"
    recovery = running.messages_again(missing, at)
    figures = running.finish(
        f"FLUSHALL with {len(missing)} messages waiting",
        recovery_seconds=recovery,
        allowed_seconds=LOST_MESSAGE_SECONDS,
    )
    report(figures)
    assert figures.run_twice == 0
    # Those that were popped but not yet claimed are the only ones whose message was not lost.
    assert len(missing) - 8 <= running.pushed_again() <= len(missing)


@pytest.mark.slow
def test_flushall_while_a_few_tasks_wait_and_more_are_submitted(running: Stack, report: Report) -> None:
    """The list is never empty for long: what was lost is missed because the line has moved past it."""
    running.submit_many(4, "faults.work", 2.0)
    running.running(4)
    lost = running.submit_many(20, "faults.work", 0.1)
    with running.bell() as client:
        client.flushall()
    at = time.time()
    with running.load("faults.work", 0.2, per_second=10):
        recovery = running.messages_again(lost, at)
    figures = running.finish(
        "FLUSHALL while tasks are submitted", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
    )
    report(figures)
    assert figures.run_twice == 0
    # A child that has just become free may have had one of them.
    assert len(lost) - 4 <= running.pushed_again() <= len(lost)


def test_flushall_with_running_tasks(running: Stack, report: Report) -> None:
    tasks = running.submit_many(4, "faults.work", 3.0)
    running.running(4)
    with running.bell() as client:
        client.flushall()
    figures = running.finish("FLUSHALL with 4 running tasks", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0
    rows = running.fetch("SELECT attempt FROM task WHERE id = ANY($1::uuid[])", tasks)
    assert {row["attempt"] for row in rows} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("busy", "words"), [(4, "saturated"), (3, "partly busy")])
def test_redis_killed_and_restarted_from_its_file(running: Stack, report: Report, busy: int, words: str) -> None:
    """The running tasks end while it is away, which is when stock workers lose their slots or themselves."""
    tasks = running.submit_many(busy, "faults.work", 3.0)
    running.running(busy)
    if busy == 4:
        running.submit_many(40, "faults.work", 0.1)
    running.redis.kill()
    running.submit_many(10, "faults.work", 0.1)
    running.reach(tasks, *TERMINAL)
    running.redis.start()
    at = time.time()
    recovery = running.recovered(waiting(running), at)
    figures = running.finish(
        f"Redis kill -9, restarted from AOF, workers {words}",
        recovery_seconds=recovery,
        allowed_seconds=LOST_MESSAGE_SECONDS,
    )
    report(figures)
    assert figures.run_twice == 0
    assert running.client.slowest_seconds < SUBMIT_SECONDS


@pytest.mark.slow
def test_redis_killed_and_restarted_from_an_empty_disk(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.work", 3.0)
    running.running(4)
    running.submit_many(40, "faults.work", 0.1)
    running.redis.kill()
    for path in (running.home / "redis").glob("appendonly*"):  # one file, or since Redis 7 a directory
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    running.redis.start()
    with running.bell() as client:
        assert client.dbsize() == 0
    at = time.time()
    lost = waiting(running)
    assert len(lost) == 40
    recovery = running.messages_again(lost, at)
    figures = running.finish(
        "Redis kill -9, restarted from an empty disk", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
    )
    report(figures)
    assert figures.run_twice == 0


@pytest.mark.slow
@pytest.mark.parametrize("then", ["cut", "silence"])
def test_a_popped_message_whose_reply_is_lost(running: Stack, report: Report, then: Literal["cut", "silence"]) -> None:
    trap = running.network("redis", "worker").trap(MESSAGE, sender="server", then=then)
    lost = running.submit("faults.work")
    at = time.time()
    assert trap.sprung.wait(5)
    assert lost.encode() in trap.caught
    others = running.submit_many(20, "faults.work")
    recovery = running.recovered([lost, *others], at)
    assert recovery > 5, "the message was not lost"
    figures = running.finish(
        f"a popped message is lost: {then}", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
    )
    report(figures)
    assert figures.run_twice == 0


@pytest.mark.slow
@pytest.mark.parametrize(("how", "words"), [("cut", "refuses"), ("black_hole", "is silent")])
def test_redis_unreachable_under_load(running: Stack, report: Report, how: str, words: str) -> None:
    with running.load("faults.work", 0.1, per_second=8):
        running.running(1)
        for network in running.networks("redis"):
            getattr(network, how)()
        passes(OUTAGE_SECONDS)
        for network in running.networks("redis"):
            network.restore()
        at = time.time()
        left = waiting(running)
    recovery = running.recovered(left, at)
    report(
        running.finish(
            f"Redis {words} for {OUTAGE_SECONDS} s under load",
            recovery_seconds=recovery,
            allowed_seconds=RECONNECT_SECONDS,
        )
    )
    assert len(left) > OUTAGE_SECONDS
    assert running.client.refused == 0
    assert running.client.slowest_seconds < SUBMIT_SECONDS


@pytest.mark.slow
def test_a_full_redis(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.work", 1.0)
    early = running.submit_many(40, "faults.work", 0.1)
    with running.bell() as client:
        client.config_set("maxmemory", "1")
        late = running.submit_many(60, "faults.work", 0.05)
        running.reach(early, "SUCCESS")
        victim = running.workers.pop()
        running.kill(victim)
        running.workers.append(running.start_worker())
        running.wait_ready()
        assert waiting(running) == sorted(late)
        client.config_set("maxmemory", "0")
    at = time.time()
    recovery = running.recovered(late, at)
    figures = running.finish(
        "Redis is full", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS, workers="killed"
    )
    report(figures)
    assert figures.run_twice == 0
    assert running.client.refused == 0
    assert running.client.slowest_seconds < SUBMIT_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize("role", ["worker", "api", "relay"])
def test_half_open_connections(running: Stack, report: Report, role: Role) -> None:
    """What was connected stays silent for ever, as when a middlebox has forgotten it."""
    network = running.network("redis", role)
    network.black_hole()
    tasks = running.submit_many(10, "faults.work")
    tasks += running.submit_many(10, "faults.work", countdown=1)
    network.restore(revive=False)
    at = time.time()
    recovery = running.recovered(tasks, at)
    allowed = RECONNECT_SECONDS if role == "worker" else LOST_MESSAGE_SECONDS
    report(
        running.finish(
            f"half-open connections between {role} and Redis", recovery_seconds=recovery, allowed_seconds=allowed
        )
    )
    assert running.client.slowest_seconds < SUBMIT_SECONDS


@pytest.mark.slow
def test_a_frozen_redis(running: Stack, report: Report) -> None:
    assert running.redis.pid is not None
    frozen = psutil.Process(running.redis.pid)
    with running.load("faults.work", 0.1, per_second=8):
        running.running(1)
        frozen.suspend()
        try:
            passes(OUTAGE_SECONDS)
        finally:
            frozen.resume()
        at = time.time()
        left = waiting(running)
    recovery = running.recovered(left, at)
    report(
        running.finish(
            f"SIGSTOP of Redis for {OUTAGE_SECONDS} s", recovery_seconds=recovery, allowed_seconds=RECONNECT_SECONDS
        )
    )
    assert len(left) > OUTAGE_SECONDS
    assert running.client.refused == 0
    assert running.client.slowest_seconds < SUBMIT_SECONDS


@pytest.mark.slow
def test_a_key_of_another_type_in_place_of_the_queue(running: Stack, report: Report) -> None:
    with running.bell() as client:
        client.set(QUEUE, "not a list")
        tasks = running.submit_many(10, "faults.work")
        passes(5)
        assert waiting(running) == sorted(tasks)
        client.delete(QUEUE)
    at = time.time()
    recovery = running.recovered(tasks, at)
    report(
        running.finish(
            "a string in place of the queue", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
        )
    )
    assert running.client.refused == 0


def waiting(running: Stack) -> list[str]:
    """The tasks that wait now, in the order of their ids."""
    rows = running.fetch("SELECT id::text AS id FROM task WHERE status IN ('PENDING', 'RETRY') ORDER BY id")
    return [row["id"] for row in rows]


def passes(seconds: float) -> None:
    """Let so much time go by."""
    until = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until, seconds + 5, "the time")

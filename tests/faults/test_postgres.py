"""Postgres killed, restarted, cut off and failed over."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from uuid import UUID

import pytest

from app import broker
from tests.faults.audit import Figures
from tests.faults.stack import QUEUE, Stack
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

AGAIN_SECONDS = 5.0
"""How soon new tasks run once Postgres is back."""
LOST_SECONDS = 15.0
"""How soon a task runs whose message was lost."""
TERMINATE_ALL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
"""

pytestmark = pytest.mark.timeout(240)


def test_postgres_killed_under_load(running: Stack, report: Report) -> None:
    with load(running):
        acknowledge(running, 40)
        running.kill_postgres()
        lasting(running.chance.uniform(0.5, 2.0))
        before = list(running.client.acknowledged)
        running.postgres.start()
        back = time.time()
        acknowledge(running, 40)
    recovery = running.recovered(before, back)
    figures = running.finish(
        "Postgres kill -9 under load",
        recovery_seconds=recovery,
        allowed_seconds=LOST_SECONDS,
        workers="cut off",
        reclaims=True,
    )
    report(figures)


@pytest.mark.slow
def test_postgres_unreachable_for_half_a_minute(running: Stack, report: Report) -> None:
    through = running.submit_many(2, "faults.work", 40.0)
    within = running.submit_many(1, "faults.work", 6.0)
    running.running(3)
    for role in ("worker", "relay"):
        running.network("postgres", role).cut()
    popped = running.submit_many(6, "faults.work", 0.1)
    wait_until(lambda: running.depth() < len(popped), 10, "a message that was popped")
    lasting(30)
    assert set(running.statuses(popped).values()) == {"PENDING"}
    assert set(running.statuses(within).values()) == {"STARTED"}
    # The relays are back first, and find leases that ran out long ago.
    running.network("postgres", "relay").restore()
    lasting(1.5)
    running.network("postgres", "worker").restore()
    recovery = running.recovered(popped, time.time())
    figures = running.finish(
        "Postgres unreachable for 30 s",
        recovery_seconds=recovery,
        allowed_seconds=AGAIN_SECONDS,
        workers="cut off",
    )
    assert not billed(running, [*through, *within, *popped])
    assert figures.run_twice == 0
    report(figures)


@pytest.mark.slow
def test_postgres_killed_before_a_claim_was_durable(running: Stack, report: Report) -> None:
    # A claim is written out by the WAL writer, every 0.2 s. On a busy machine a kill is not so quick.
    running.execute("ALTER SYSTEM SET wal_writer_delay = '2s'")
    running.execute("SELECT pg_reload_conf()")
    forgotten = 0
    recovery = 0.0
    rounds = 6
    for number in range(rounds):
        wait_until(lambda: not any(running._unfinished()), 30, "the end of the round before")
        tasks = running.submit_many(2, "faults.work", 1.5)
        wait_until(lambda tasks=tasks: runs(running, tasks), 10, "a claim")  # type: ignore[misc]  # bound at once
        lasting(running.chance.uniform(0.005, 0.05))
        running.kill_postgres()
        if number < rounds - 1:
            # Another worker has the message too, and claims while the first still believes that it did.
            offer_again(running, tasks)
        running.postgres.start()
        back = time.time()
        forgotten += len(forgotten_claims(running, tasks))
        recovery = max(recovery, running.recovered(tasks, back))
    assert forgotten, "not one claim was lost with Postgres, so nothing was tried"
    figures = running.finish(
        "Postgres kill -9 before a claim is durable",
        recovery_seconds=recovery,
        allowed_seconds=LOST_SECONDS,
        workers="cut off",
        reclaims=True,
    )
    assert not settled_by_another_hand(running)
    report(figures)


def test_postgres_restarted_in_order(running: Stack, report: Report) -> None:
    through = running.submit_many(2, "faults.work", 8.0)
    running.running(2)
    with load(running):
        acknowledge(running, 10)
        running.postgres.restart()
        recovery = next_claim(running)
    figures = running.finish(
        "Postgres restarted in order under load",
        recovery_seconds=recovery,
        allowed_seconds=AGAIN_SECONDS,
        workers="cut off",
    )
    assert not billed(running, through)
    assert figures.run_twice == 0
    report(figures)


def test_every_connection_to_postgres_is_reset_again_and_again(running: Stack, report: Report) -> None:
    through = running.submit_many(2, "faults.work", 8.0)
    running.running(2)
    recovery = 0.0
    with load(running):
        for _ in range(6):
            acknowledge(running, 5)
            lasting(running.chance.uniform(0.0, 0.5))
            running.fetch(TERMINATE_ALL)
            recovery = max(recovery, next_claim(running))
    figures = running.finish(
        "every connection to Postgres reset, six times",
        recovery_seconds=recovery,
        allowed_seconds=AGAIN_SECONDS,
        workers="cut off",
    )
    assert not billed(running, [*through, *running.client.acknowledged])
    assert figures.run_twice == 0
    report(figures)


@contextlib.contextmanager
def load(running: Stack) -> Iterator[None]:
    """Submit, claim and finish some twenty tasks a second."""
    with contextlib.ExitStack() as threads:
        for _ in range(3):
            threads.enter_context(running.load("faults.work", 0.02, per_second=7))
        yield


def acknowledge(running: Stack, more: int) -> None:
    """Wait until so many more tasks were acknowledged."""
    known = len(running.client.acknowledged)
    wait_until(lambda: len(running.client.acknowledged) >= known + more, 30, f"{more} more acknowledged tasks")


def next_claim(running: Stack) -> float:
    """Wait until a task that is submitted now is claimed; returns how long that took."""
    began = time.time()
    return running.recovered([running.submit("faults.work", 0.0)], began)


def billed(running: Stack, tasks: Sequence[str]) -> list[str]:
    """Those that paid for what was not their fault."""
    rows = running.fetch(
        "SELECT id::text AS id FROM task WHERE id = ANY($1::uuid[]) AND (attempt, losses, crashes) <> (1, 0, 0)",
        list(tasks),
    )
    return [row["id"] for row in rows]


def runs(running: Stack, tasks: Sequence[str]) -> set[tuple[str, str]]:
    """The runs that began, each by its task and token."""
    return {(one.task_id, one.token) for one in running.effects() if one.what == "begin" and one.task_id in tasks}


def forgotten_claims(running: Stack, tasks: Sequence[str]) -> set[tuple[str, str]]:
    """The runs whose claims Postgres knows nothing of."""
    known = {(one.task_id, one.token) for one in running.steps(tasks) if one.status == "STARTED"}
    return runs(running, tasks) - known


def offer_again(running: Stack, tasks: Sequence[str]) -> None:
    """Push copies of the first messages of these tasks."""
    with running.bell() as client:
        for task_id in tasks:
            message = broker.Received(task_id=UUID(task_id), name="faults.work", attempt=0, position=0)
            client.rpush(QUEUE, broker.encode(message, QUEUE))


def settled_by_another_hand(running: Stack) -> list[str]:
    """Tasks that ended before the run that holds them had come to its end."""
    finished = {one.token: one.at for one in running.effects() if one.what == "end"}
    noted = {one.task_id for one in running.effects()}
    return [
        one.task_id
        for one in running.steps()
        if one.status == "SUCCESS"
        and one.task_id in noted
        and (one.token not in finished or finished[one.token] > one.at + 0.01)
    ]

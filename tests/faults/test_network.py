"""Networks that swallow packets without a word, and answers that are lost on their way."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from app.db import CONNECT_TIMEOUT_SECONDS, STATEMENT_TIMEOUT_SECONDS
from tests.faults.audit import Figures
from tests.faults.stack import CLAIMED, STAMPED, Stack
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

HOLE_SECONDS = STATEMENT_TIMEOUT_SECONDS + 3.0
AGAIN_SECONDS = STATEMENT_TIMEOUT_SECONDS + 3.0
"""How soon everything goes on after a black hole: what was swallowed by it is given up first."""
ANSWER_SECONDS = STATEMENT_TIMEOUT_SECONDS + CONNECT_TIMEOUT_SECONDS + 3.0
"""How soon the API answers whatever happens: the longest waits for a connection and for a statement, and some slack."""
LOST_SECONDS = 15.0

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_a_black_hole_between_api_and_postgres(running: Stack, report: Report) -> None:
    be_patient(running)
    network = running.network("postgres", "api")
    recovery = 0.0
    for revive in (True, False):
        network.black_hole()
        until = time.monotonic() + HOLE_SECONDS
        while time.monotonic() < until:
            assert not any(submit_at_once(running, 12)), "acknowledged without Postgres"
        network.restore(revive=revive)
        recovery = max(recovery, next_claim(running))
    assert running.client.slowest_seconds < ANSWER_SECONDS
    report(
        running.finish("black hole between API and Postgres", recovery_seconds=recovery, allowed_seconds=AGAIN_SECONDS)
    )


@pytest.mark.slow
def test_connections_that_a_middlebox_forgot_cost_one_timeout_in_all(running: Stack, report: Report) -> None:
    be_patient(running)
    network = running.network("postgres", "api")
    submit_at_once(running, 40)  # as many connections as the API may have
    network.black_hole()
    network.restore(revive=False)
    recovery = next_claim(running)
    report(
        running.finish(
            "connections of the API forgotten on their way", recovery_seconds=recovery, allowed_seconds=AGAIN_SECONDS
        )
    )


@pytest.mark.slow
def test_a_black_hole_between_workers_and_postgres(running: Stack, report: Report) -> None:
    network = running.network("postgres", "worker")
    recovery = 0.0
    for revive in (True, False):
        tasks = [*running.submit_many(2, "faults.work", 30.0), *running.submit_many(1, "faults.work", 3.0)]
        running.running(3)
        network.black_hole()
        tasks += running.submit_many(4, "faults.work", 0.1)
        lasting(HOLE_SECONDS)
        network.restore(revive=revive)
        recovery = max(recovery, running.recovered(tasks, time.time(), 90))
    report(
        running.finish(
            "black hole between workers and Postgres",
            recovery_seconds=recovery,
            allowed_seconds=AGAIN_SECONDS,
            workers="cut off",
        )
    )


@pytest.mark.slow
def test_a_black_hole_between_relays_and_postgres(running: Stack, report: Report) -> None:
    network = running.network("postgres", "relay")
    recovery = 0.0
    for revive in (True, False):
        through = running.submit_many(2, "faults.work", HOLE_SECONDS + 8)
        running.running(2)
        due = running.submit_many(4, "faults.work", 0.0, countdown=3)
        network.black_hole()
        lasting(HOLE_SECONDS)
        assert set(running.statuses(due).values()) == {"PENDING"}
        network.restore(revive=revive)
        recovery = max(recovery, running.recovered(due, time.time()))
        running.reach(through, "SUCCESS")
    figures = running.finish(
        "black hole between relays and Postgres", recovery_seconds=recovery, allowed_seconds=AGAIN_SECONDS
    )
    assert figures.run_twice == 0
    report(figures)


def test_the_answer_to_an_insert_is_lost(running: Stack, report: Report) -> None:
    trap = running.network("postgres", "api").trap(STAMPED, sender="server", then="cut")
    began = time.time()
    first = running.client.try_once(running._wanted("faults.work", [0.0], True, {}))
    assert trap.sprung.is_set()
    [row] = running.fetch("SELECT id::text AS id FROM task")
    assert first in {None, row["id"]}
    running.submit("faults.work", 0.0)
    recovery = running.recovered([row["id"]], began)
    assert len(running.fetch("SELECT 1 FROM task")) == 2
    report(
        running.finish("the answer to a submit's INSERT lost", recovery_seconds=recovery, allowed_seconds=LOST_SECONDS)
    )


def test_the_answer_to_a_claim_is_lost(running: Stack, report: Report) -> None:
    trap = running.network("postgres", "worker").trap(CLAIMED, sender="server", then="cut")
    [task] = running.submit_many(1, "faults.work", 0.5)
    began = time.time()
    running.reach([task], "SUCCESS")
    recovery = time.time() - began
    assert trap.sprung.is_set()
    assert [one.attempt for one in running.steps([task]) if one.status == "STARTED"] == [1]
    figures = running.finish("the answer to a claim lost", recovery_seconds=recovery, allowed_seconds=5)
    assert figures.run_twice == 0
    report(figures)


def test_the_answer_to_a_settle_is_lost(running: Stack, report: Report) -> None:
    trap = running.network("postgres", "worker").trap(b"SUCCESS", sender="server", then="cut")
    tasks = running.submit_many(3, "faults.work", 0.2)
    began = time.time()
    running.reach(tasks, "SUCCESS")
    wait_until(trap.sprung.is_set, 5, "the loss of an answer")

    def told() -> bool:
        with running.bell() as client:
            return all(client.exists(f"celery-task-meta-{task}") for task in tasks)

    wait_until(told, 10, "the copies of all three ends, which only their winners write")
    recovery = time.time() - began
    assert all([one.status for one in running.steps([task])] == ["PENDING", "STARTED", "SUCCESS"] for task in tasks)
    assert not [one.log for one in running.workers if "superseded" in one.log.read_text()]
    figures = running.finish("the answer to a settle lost", recovery_seconds=recovery, allowed_seconds=8)
    assert figures.run_twice == 0
    report(figures)


def test_the_answer_to_a_push_is_lost(running: Stack, report: Report) -> None:
    before = pushes(running)
    # redis-py's own way is to send a command again, up to ten times, and each of them would be applied.
    traps = [running.network("redis", "api").trap(b":1\r\n", sender="server", then="cut") for _ in range(5)]
    began = time.time()
    [task] = running.submit_many(1, "faults.work", 0.5)
    wait_until(traps[0].sprung.is_set, 5, "the loss of an answer")
    recovery = running.recovered([task], began)
    wait_until(lambda: not any(running._unfinished()), 20, "the end of everything")
    pushed = pushes(running) - before
    for trap in traps:
        trap.sprung.set()
    assert 1 <= pushed <= 2, "a push whose answer is lost is repeated once, by the relay"
    figures = running.finish("the answer to a push lost", recovery_seconds=recovery, allowed_seconds=LOST_SECONDS)
    assert figures.run_twice == 0
    report(figures)


def be_patient(running: Stack) -> None:
    """Have the client wait for every answer, however long the API takes."""
    running.service.http.timeout = httpx.Timeout(90)


def submit_at_once(running: Stack, count: int) -> Sequence[str | None]:
    """So many submits at the same time; None for each that was not acknowledged."""
    wanted = running._wanted("faults.work", [0.0], True, {})
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: running.client.try_once(wanted), range(count)))


def next_claim(running: Stack) -> float:
    """Wait until a task that is submitted now is claimed; returns how long that took."""
    began = time.time()
    return running.recovered([running.submit("faults.work", 0.0)], began)


def pushes(running: Stack) -> int:
    """How many messages were ever pushed, if each push was of one."""
    with running.bell() as client:
        stats = client.info("commandstats")
    return sum(int(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"]) for name in ("lpush", "rpush"))

"""A worker that takes several messages at once, and what becomes of them when one of their tasks is not short.

`eager_tasks` has it do so for tasks of any length, so that a slow machine does not change what happens here.
"""

import signal
import time
from collections.abc import Iterator
from uuid import UUID

import pytest
import redis

from app import broker
from app.broker import Received
from tests.support.service import Process, Service
from tests.support.waiting import wait_until

ENVIRONMENT = {
    "TASKQUEUE_TASK_MODULES": "tests.support.odd_tasks,tests.support.eager_tasks",
    "TASKQUEUE_CONCURRENCY": "1",
}
SOON_SECONDS = 5.0
"""Half of what the search for lost messages takes at least. It may not be what brings a task back here."""


@pytest.fixture
def plain(running: Service) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(running.environment["REDIS_URL"]) as client:
        yield client


@pytest.fixture
def worker(running: Service) -> Iterator[Process]:
    """A worker of this test alone, that has one child, and takes up to 50 messages at once."""
    started = running.start_worker()
    warm = submitted(running, *[("sample.echo", 1)] * 120)
    wait_until(lambda: left(running, warm) == 0, 30, "the end of what warms it up")
    yield started
    started.stop()


def submitted(running: Service, *tasks: tuple[object, ...]) -> list[UUID]:
    """Submit them at once, in this order."""
    wanted = [{"task": name, "args": args} for name, *args in tasks]
    answer = running.http.post("/api/tasks/batch", json={"tasks": wanted})
    assert answer.status_code == 202, answer.text
    return [UUID(each) for each in answer.json()["task_ids"]]


def left(running: Service, tasks: list[UUID]) -> int:
    found: int = running.value("SELECT count(*) FROM task WHERE id = ANY($1) AND finished_at IS NULL", tasks)
    return found


def put_back(plain: "redis.Redis") -> int:
    """How often a worker or a relay has put messages where they are taken from."""
    found: int = plain.info("commandstats").get("cmdstat_rpush", {"calls": 0})["calls"]
    return found


def taken_at_once(running: Service, worker: Process, *tasks: tuple[object, ...]) -> list[UUID]:
    """Submit them, and have the worker find them all in the queue."""
    worker.signal(signal.SIGSTOP)
    try:
        return submitted(running, *tasks)
    finally:
        worker.signal(signal.SIGCONT)


def test_what_was_taken_behind_a_long_task_is_run_by_another_worker_at_once(
    running: Service, worker: Process, plain: "redis.Redis"
) -> None:
    before = put_back(plain)
    first, long, *short = taken_at_once(
        running, worker, ("sample.echo", 0), ("sample.sleep", 30.0), *[("sample.echo", 1)] * 10
    )
    running.reaches(long, "STARTED")
    began = time.monotonic()
    wait_until(lambda: plain.llen("default") == len(short), SOON_SECONDS, "the return of the messages to the queue")
    assert put_back(plain) == before + 1, "they were taken along"
    assert time.monotonic() - began < SOON_SECONDS
    other = running.start("worker")
    try:
        wait_until(lambda: left(running, short) == 0, 20, "the end of the short tasks")
        views = [running.view(one) for one in short]
        assert running.status(long) == "STARTED"
        running.http.post(f"/api/tasks/{long}/cancel")
        running.ends(long)
    finally:
        other.stop()

    assert {view["attempt"] for view in views} == {1}
    assert running.status(first) == "SUCCESS"
    starts = [running.value("SELECT started_at FROM task WHERE id = $1", one) for one in short]
    assert starts == sorted(starts), "in their order"


def test_what_was_taken_behind_a_task_that_kills_its_process_runs_at_once(running: Service, worker: Process) -> None:
    before, killer, *behind = taken_at_once(
        running, worker, ("sample.echo", 1), ("odd.quit",), *[("sample.echo", 1)] * 5
    )
    wait_until(lambda: left(running, behind) == 0, SOON_SECONDS, "the end of those behind it")

    assert running.value("SELECT max(attempt) FROM task WHERE id = ANY($1)", [before, *behind]) == 1
    assert running.ends(killer)["error"]["type"] == "WorkerLost"


def test_a_worker_that_is_told_to_stop_puts_back_what_it_took_ahead(
    running: Service, worker: Process, plain: "redis.Redis"
) -> None:
    long, *behind = taken_at_once(running, worker, ("sample.sleep", 1.0), *[("sample.sleep", 0.2)] * 10)
    running.reaches(long, "STARTED")

    worker.signal(signal.SIGTERM)
    assert worker.wait(10) == 0
    assert running.status(long) == "SUCCESS"
    assert plain.llen("default") == len(behind)
    assert {running.status(one) for one in behind} == {"PENDING"}


def test_what_this_worker_does_not_know_is_handed_back_and_the_others_run(
    running: Service, worker: Process, plain: "redis.Redis"
) -> None:
    ours = submitted(running, *[("sample.sleep", 0.5)])
    running.reaches(ours[0], "STARTED")
    raw = [encoded(one) for one in range(3)]
    ours += submitted(running, *[("sample.echo", 1)] * 3)
    plain.rpush("default", *raw)

    wait_until(lambda: left(running, ours) == 0, SOON_SECONDS, "the end of the others")
    wait_until(lambda: worker.log.read_text().count("is not known here") == len(raw), 10, "the refusals")


def encoded(number: int) -> bytes:
    return broker.encode(Received(task_id=UUID(int=number), name="somebody.elses", attempt=0, position=0), "default")

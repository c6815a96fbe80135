"""Pauses and limits with a real worker of two slots and a real relay."""

import itertools
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import redis

from tests.support.service import Service
from tests.support.waiting import wait_until

OVERLAPS = """
SELECT count(*) FROM task a JOIN task b ON a.id < b.id AND a.started_at < b.finished_at AND b.started_at < a.finished_at
 WHERE a.id = ANY($1::uuid[]) AND b.id = ANY($1::uuid[])
"""
STARTS = """
SELECT ARRAY(SELECT extract(epoch FROM started_at)::float8 FROM task WHERE id = ANY($1::uuid[]) ORDER BY started_at)
"""
LEFT = "SELECT count(*) FROM task WHERE id = ANY($1::uuid[]) AND status <> 'SUCCESS'"


@pytest.fixture(autouse=True)
def unlimited(running: Service) -> Iterator[None]:
    """The service as the next test expects it."""
    yield
    ask(running, "PUT", "limits", {})
    ask(running, "POST", "resume")


def ask(running: Service, method: str, what: str = "", body: Any = None) -> dict[str, Any]:
    path = f"/api/queues/default/{what}".rstrip("/")
    answer = running.http.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def succeed(running: Service, tasks: list[UUID], seconds: float = 30) -> None:
    wait_until(lambda: running.value(LEFT, tasks) == 0, seconds, f"the end of {len(tasks)}")


def test_what_is_in_a_queue_when_it_is_paused_is_held_at_once_and_runs_when_it_is_resumed(running: Service) -> None:
    busy = [running.submit("sample.sleep", 1.0) for _ in range(2)]
    for task_id in busy:
        running.reaches(task_id, "STARTED")
    tasks = [running.submit("sample.echo", number) for number in range(40)]

    assert ask(running, "POST", "pause")["paused"]
    later = [running.submit("sample.echo", 0, countdown=0.5), running.submit("sample.echo", 1)]
    succeed(running, busy)  # what runs goes on
    wait_until(lambda: ask(running, "GET")["held"] == 42, 10, "the holding of all of them")
    found = ask(running, "GET")
    assert (found["depth"], found["waiting"], found["running"]) == (0, 0, 0)
    assert running.view(tasks[0])["held"] == "paused"
    with redis.Redis.from_url(running.environment["REDIS_URL"]) as plain:
        assert plain.llen("default") == 0, "nothing that a scaler would take for work"

    ask(running, "POST", "resume")
    succeed(running, [*tasks, *later])


def test_one_at_a_time_is_one_at_a_time_and_hands_over_promptly(running: Service) -> None:
    ask(running, "PUT", "limits", {"concurrency_limit": 1})
    tasks = [running.submit("sample.sleep", 0.05) for _ in range(15)]
    succeed(running, tasks)
    assert running.value(OVERLAPS, tasks) == 0
    starts = running.value(STARTS, tasks)
    # A relay alone would take a fifth of a second from one to the next.
    pauses = sorted(after - before for before, after in itertools.pairwise(starts))
    assert pauses[len(pauses) // 4] < 0.19


def test_each_key_runs_one_at_a_time_beside_the_others(running: Service) -> None:
    ask(running, "PUT", "limits", {"key_concurrency_limit": 1})
    keyed = {key: [running.submit("sample.sleep", 0.05, concurrency_key=key) for _ in range(6)] for key in "abc"}
    free = [running.submit("sample.echo", number) for number in range(6)]
    succeed(running, [*free, *(task_id for tasks in keyed.values() for task_id in tasks)])
    assert [running.value(OVERLAPS, tasks) for tasks in keyed.values()] == [0, 0, 0]


def test_a_rate_is_kept_whatever_waits(running: Service) -> None:
    ask(running, "PUT", "limits", {"rate_limit": {"count": 10, "seconds": 1}})
    tasks = [running.submit("sample.echo", number) for number in range(25)]
    succeed(running, tasks)
    starts = running.value(STARTS, tasks)
    assert starts[-1] - starts[0] == pytest.approx(2.4, abs=0.6)


def test_a_retry_and_a_cancel_of_limited_tasks_make_room(running: Service) -> None:
    ask(running, "PUT", "limits", {"concurrency_limit": 1})
    asleep, flaky, echo = (
        running.submit("sample.sleep", 60.0),
        running.submit("sample.flaky", 1),
        running.submit("sample.echo", 1),
    )
    running.reaches(asleep, "STARTED")
    wait_until(lambda: ask(running, "GET")["held"] == 2, 10, "the holding of two")
    assert running.http.post(f"/api/tasks/{asleep}/cancel").status_code == 202
    succeed(running, [flaky, echo])

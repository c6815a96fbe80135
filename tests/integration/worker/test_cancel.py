"""Cancelling a task: while it waits, while it runs, and while it does not listen."""

import json
import time
from uuid import UUID, uuid4

import pytest

from tests.support.receiver import Receiver
from tests.support.service import Service
from tests.support.waiting import wait_until

TOLD_SECONDS = 2.0
GRACE_SECONDS = 5.0


def cancel(running: Service, task_id: UUID) -> tuple[int, str]:
    answer = running.http.post(f"/api/tasks/{task_id}/cancel")
    said = answer.json()
    return answer.status_code, said["type"] if answer.is_error else said["status"]


def test_a_waiting_task_ends_at_once_and_asking_twice_is_asking_once(running: Service) -> None:
    with Receiver() as receiver:
        task_id = running.submit("sample.echo", 1, countdown=60, webhook_url=receiver.url)

        assert cancel(running, task_id) == (200, "REVOKED")
        assert cancel(running, task_id) == (200, "REVOKED")
        wait_until(lambda: receiver.requests, what="the webhook")
        [request] = receiver.requests

    assert json.loads(request.body)["type"] == "task.revoked"
    assert running.result(task_id)["error"] == {"type": "Cancelled", "message": "The task was cancelled"}


def test_a_running_task_is_told_within_two_seconds(running: Service) -> None:
    task_id = running.submit("sample.sleep", 60)
    running.reaches(task_id, "STARTED")
    began = time.monotonic()

    assert cancel(running, task_id) == (202, "STARTED")
    assert cancel(running, task_id)[0] in {200, 202}
    view = running.ends(task_id)

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("REVOKED", "Cancelled", 1)
    assert time.monotonic() - began < TOLD_SECONDS + 0.5
    assert cancel(running, task_id) == (200, "REVOKED")


def test_the_task_cleans_up_when_it_is_told(running: Service, tmp_path: object) -> None:
    mark = f"{tmp_path}/cleaned"
    task_id = running.submit("odd.cleans_up", mark)
    running.reaches(task_id, "STARTED")
    cancel(running, task_id)

    assert running.ends(task_id)["status"] == "REVOKED"
    with open(mark) as cleaned:  # noqa: PTH123  # plain text
        assert cleaned.read() == "TaskCancelled"


@pytest.mark.parametrize("name", ["odd.stubborn", "odd.hold_the_gil"])
def test_a_task_that_does_not_listen_is_killed_after_its_grace(running: Service, name: str) -> None:
    task_id = running.submit(name, time_limit=60)
    running.reaches(task_id, "STARTED")
    began = time.monotonic()
    cancel(running, task_id)

    view = running.ends(task_id)

    assert (view["status"], view["error"]["type"], view["attempt"]) == ("REVOKED", "Cancelled", 1)
    assert GRACE_SECONDS < time.monotonic() - began < TOLD_SECONDS + GRACE_SECONDS + 2
    assert running.ends(running.submit("sample.echo", 1))["status"] == "SUCCESS"


def test_a_task_between_two_attempts_ends_at_once(running: Service) -> None:
    task_id = running.submit("odd.retry", 60)
    running.reaches(task_id, "RETRY")

    assert cancel(running, task_id) == (200, "REVOKED")


def test_what_has_ended_cannot_be_cancelled(running: Service) -> None:
    task_id = running.submit("sample.echo", 1)
    running.ends(task_id)

    assert cancel(running, task_id) == (409, "/problems/task-ended")
    assert cancel(running, uuid4()) == (404, "/problems/task-not-found")
    assert running.status(task_id) == "SUCCESS"

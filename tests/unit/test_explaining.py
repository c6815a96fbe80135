"""What is said of a task, from facts alone."""

from dataclasses import replace
from typing import Any

import pytest

from app import lifecycle
from app.core.statuses import HeldFor, Reason, TaskStatus

PENDING = lifecycle.Facts(
    status=TaskStatus.PENDING,
    queue="reports",
    attempt=0,
    failures=0,
    max_retries=5,
    cancel_requested=False,
    due_in=-3.0,
    expires_in=None,
    published=True,
    held=None,
    ahead=12,
    running_for=None,
    lease_left=None,
    ended_ago=None,
    worker=None,
    progress=None,
    progress_message=None,
    error_type=None,
    error_message=None,
    consumers=2,
    slots=8,
    busy=8,
)
STARTED = replace(
    PENDING, status=TaskStatus.STARTED, attempt=2, ahead=None, running_for=40.4, lease_left=25.2, worker="host/7"
)
ENDED = replace(STARTED, status=TaskStatus.SUCCESS, lease_left=None, ended_ago=9.0)
AROUND = lifecycle.Surroundings(queue_known=True, depth=40, depth_cap=1000, lease_seconds=30.0)
LINE = "2 workers consume it, 8 of 8 slots busy"


@pytest.mark.parametrize(
    ("facts", "around", "reason", "sentence"),
    [
        ({}, {}, Reason.IN_LINE, f"It is in line in queue `reports`: about 12 tasks are before it, and {LINE}."),
        ({"ahead": 0}, {}, Reason.IN_LINE, f"It is in line in queue `reports`: no task is before it, and {LINE}."),
        (
            {"ahead": 10_001, "consumers": 1},
            {},
            Reason.IN_LINE,
            (
                "It is in line in queue `reports`: more than 10000 tasks are before it, and 1 worker consumes it,"
                " 8 of 8 slots busy."
            ),
        ),
        (
            {"ahead": 0},
            {"depth": 0},
            Reason.MESSAGE_GONE,
            "Its message has left the queue: it is being claimed, or was lost and will be pushed again.",
        ),
        ({"due_in": 40.2, "ahead": None}, {"depth": None}, Reason.NOT_DUE, "It waits: it is due in 40 s."),
        (
            {"status": TaskStatus.RETRY, "due_in": 40.2, "failures": 2, "error_type": "OSError"},
            {},
            Reason.NOT_DUE,
            "It waits: it is due in 40 s (retry 2 of 5, after OSError).",
        ),
        (
            {"status": TaskStatus.RETRY, "due_in": 4.0, "failures": 2, "error_type": "WorkerLost"},
            {},
            Reason.NOT_DUE,
            "It waits: it is due in 4 s, after it lost its process or its worker (WorkerLost).",
        ),
        (
            {"due_in": 9.0, "expires_in": 60.0},
            {},
            Reason.NOT_DUE,
            "It waits: it is due in 9 s. It expires in 60 s unless it starts.",
        ),
        (
            {"due_in": 9.0, "expires_in": -1.0},
            {},
            Reason.NOT_DUE,
            "It waits: it is due in 9 s. Its time has passed: a relay will end it as expired.",
        ),
        (
            {},
            {"queue_known": False},
            Reason.QUEUE_UNKNOWN,
            "It waits: queue `reports` is not among TASKQUEUE_QUEUES, so nobody looks after it.",
        ),
        (
            {"held": HeldFor.PAUSED, "ahead": 1, "consumers": 0},
            {"depth": None},
            Reason.HELD,
            "It is held: queue `reports` is paused, or is being worked off since it was; 1 task is held before it.",
        ),
        (
            {"held": HeldFor.KEY_CONCURRENCY, "expires_in": 5.0},
            {},
            Reason.HELD,
            (
                "It is held: as many tasks of its `concurrency_key` run in queue `reports` as may;"
                " about 12 tasks are held before it. It expires in 5 s unless it starts."
            ),
        ),
        ({}, {"depth": None}, Reason.REDIS_AWAY, "It waits: Redis does not answer, so no message can be taken."),
        (
            {"published": False},
            {"depth": None},
            Reason.REDIS_AWAY,
            "It waits: Redis does not answer, so it can't be published.",
        ),
        (
            {"consumers": 0},
            {},
            Reason.NO_CONSUMER,
            "It waits: no worker consumes queue `reports` (none was seen in the last 30 s).",
        ),
        (
            {"published": False, "ahead": 1},
            {},
            Reason.UNPUBLISHED,
            f"It waits: it is due, and a relay will publish it; 1 task is before it, and {LINE}.",
        ),
        (
            {"published": False},
            {"depth": 950},
            Reason.QUEUE_FULL,
            f"It waits: queue `reports` is full, with 950 messages in Redis; about 12 tasks are before it, and {LINE}.",
        ),
    ],
)
def test_of_a_task_that_waits(facts: dict[str, Any], around: dict[str, Any], reason: Reason, sentence: str) -> None:
    found = lifecycle.explain(replace(PENDING, **facts), replace(AROUND, **around))
    assert (found.reason, found.sentence) == (reason, sentence)


@pytest.mark.parametrize(
    ("facts", "reason", "sentence"),
    [
        (
            {},
            Reason.RUNNING,
            "It has been running for 40 s (attempt 2, on worker host/7); its lease ends in 25 s.",
        ),
        (
            {"progress": 0.4, "progress_message": "page 4 of 10"},
            Reason.RUNNING,
            (
                "It has been running for 40 s (attempt 2, on worker host/7): 40% done (page 4 of 10);"
                " its lease ends in 25 s."
            ),
        ),
        (
            {"cancel_requested": True},
            Reason.CANCEL_REQUESTED,
            "It has been running for 40 s (attempt 2, on worker host/7), and was asked to stop.",
        ),
        (
            {"lease_left": 12.0},
            Reason.WORKER_SILENT,
            (
                "Its worker has not been heard of for about 18 s (attempt 2, on worker host/7);"
                " its lease ends in 12 s, then it runs elsewhere."
            ),
        ),
        (
            {"lease_left": -3.0, "cancel_requested": True},
            Reason.WORKER_SILENT,
            "It lost its worker: the lease of attempt 2, on worker host/7, ended 3 s ago; a relay will take it back.",
        ),
    ],
)
def test_of_a_task_that_runs(facts: dict[str, Any], reason: Reason, sentence: str) -> None:
    found = lifecycle.explain(replace(STARTED, **facts), AROUND)
    assert (found.reason, found.sentence) == (reason, sentence)


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ({}, "It ended as SUCCESS 9 s ago, after 2 attempts."),
        ({"attempt": 1, "error_type": "OSError"}, "It ended as SUCCESS 9 s ago, after 1 attempt."),
        (
            {"status": TaskStatus.FAILURE, "error_type": "OSError", "error_message": "x" * 300},
            f"It ended as FAILURE 9 s ago, after 2 attempts: OSError: {'x' * 200}.",
        ),
        (
            {"status": TaskStatus.REVOKED, "attempt": 0, "error_type": "Cancelled", "error_message": ""},
            "It ended as REVOKED 9 s ago, before it was ever started: Cancelled.",
        ),
    ],
)
def test_of_a_task_that_has_ended(facts: dict[str, Any], sentence: str) -> None:
    found = lifecycle.explain(replace(ENDED, **facts), AROUND)
    assert (found.reason, found.sentence) == (Reason.ENDED, sentence)


def test_there_is_a_sentence_for_whatever_a_task_is_held_for() -> None:
    said = {lifecycle.explain(replace(PENDING, held=reason), AROUND).sentence for reason in HeldFor}
    assert len(said) == len(HeldFor)

"""The words for what happens to tasks."""

from uuid import UUID

import pytest

from app import lifecycle, tally
from app.core.metrics import catalogue
from app.core.statuses import TaskStatus
from app.lifecycle import Error

ERROR = Error(type="ValueError", message="no")
LIMIT = Error(type="TimeLimitExceeded", message="too long")


@pytest.mark.parametrize(
    ("outcome", "status", "word"),
    [
        (lifecycle.Succeeded("1"), TaskStatus.SUCCESS, "succeeded"),
        (lifecycle.Failed(ERROR), TaskStatus.FAILURE, "failed"),
        (lifecycle.Failed(LIMIT), TaskStatus.FAILURE, "timed_out"),
        (lifecycle.RetryAsked(ERROR, 1.0), TaskStatus.RETRY, "retried"),
        (lifecycle.RetryAsked(ERROR, 1.0), TaskStatus.FAILURE, "failed"),
        (lifecycle.RetryAsked(ERROR, 1.0), TaskStatus.REVOKED, "revoked"),
        (lifecycle.TimedOut(1.0), TaskStatus.FAILURE, "timed_out"),
        (lifecycle.Interrupted(), TaskStatus.PENDING, "released"),
        (lifecycle.Interrupted(), TaskStatus.REVOKED, "revoked"),
        (lifecycle.Crashed(), TaskStatus.RETRY, "lost"),
        (lifecycle.Lost(), TaskStatus.FAILURE, "lost"),
        (lifecycle.Misfit(ERROR), TaskStatus.RETRY, "refused"),
        (lifecycle.Cancelled(), TaskStatus.REVOKED, "revoked"),
    ],
)
def test_an_attempt_has_a_word_for_how_it_ended(outcome: lifecycle.Outcome, status: TaskStatus, word: str) -> None:
    assert tally.attempt_outcome(outcome, status) == word
    assert word in catalogue.ATTEMPT_OUTCOMES


@pytest.mark.parametrize(
    ("status", "error_type", "word"),
    [
        (TaskStatus.SUCCESS, None, "succeeded"),
        (TaskStatus.FAILURE, "ValueError", "failed"),
        (TaskStatus.FAILURE, "TimeLimitExceeded", "timed_out"),
        (TaskStatus.FAILURE, "WorkerLost", "lost"),
        (TaskStatus.FAILURE, "OutOfMemory", "lost"),
        (TaskStatus.FAILURE, "UnknownTask", "failed"),
        (TaskStatus.FAILURE, "Cancelled", "failed"),
        (TaskStatus.REVOKED, "Cancelled", "cancelled"),
        (TaskStatus.REVOKED, "Expired", "expired"),
    ],
)
def test_a_task_has_a_word_for_how_it_ended(status: TaskStatus, error_type: str | None, word: str) -> None:
    error = None if error_type is None else Error(type=error_type)
    ended = lifecycle.Ended(task_id=UUID(int=1), status=status, result=None, error=error)
    assert tally.task_outcome(ended) == word
    assert word in catalogue.TASK_OUTCOMES

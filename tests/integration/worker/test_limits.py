"""Soft time limits. There is one pool child, so that one task follows another in the same process."""

import signal
from pathlib import Path

from tests.integration.worker.conftest import outcome, spent
from tests.support.service import Service
from tests.support.waiting import wait_until

ENVIRONMENT = {"TASKQUEUE_CONCURRENCY": "1", "TASKQUEUE_LEASE_SECONDS": "30"}


def test_a_task_may_catch_its_soft_limit_and_return_undisturbed(running: Service, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    task_id = running.submit("odd.returns_when_told", str(mark))
    wait_until(mark.exists, what="the soft limit")
    # As a keeper would that took over in between, and did not know that the task was told.
    running.child_of(task_id).send_signal(signal.SIGUSR1)

    assert outcome(running.ends(task_id)) == ("SUCCESS", None, 1)
    assert 2.5 <= running.result(task_id)["result"] < 10, "told after 1 s, and not again in the 1.5 s that followed"


def test_a_soft_limit_that_is_let_through_ends_the_task(running: Service) -> None:
    task_id = running.submit("odd.lets_it_pass")

    view = running.ends(task_id)

    assert outcome(view) == ("FAILURE", "TimeLimitExceeded", 1)
    assert view["error"]["message"] == "The task ran longer than its soft limit"
    assert spent(running, task_id) == [1, 0, 0]
    traceback = running.value("SELECT error_traceback FROM task WHERE id = $1", task_id)
    assert "in lets_it_pass" in traceback, "it says where the task was"


def test_a_soft_limit_is_retried_where_the_task_retries_all_exceptions(running: Service) -> None:
    task_id = running.submit("odd.tries_again")

    assert outcome(running.ends(task_id)) == ("FAILURE", "TimeLimitExceeded", 2)
    assert spent(running, task_id) == [2, 0, 0]


def test_a_c_call_that_does_not_hear_of_its_soft_limit_is_ended_by_the_hard_one(running: Service) -> None:
    view = running.ends(running.submit("odd.holds_the_gil_softly"))

    assert outcome(view) == ("FAILURE", "TimeLimitExceeded", 1)
    assert view["error"]["message"] == "The task ran longer than 2 s"


def test_a_submit_s_own_limit_may_come_before_the_soft_one(running: Service) -> None:
    view = running.ends(running.submit("odd.returns_when_told", time_limit=0.5))

    assert outcome(view) == ("FAILURE", "TimeLimitExceeded", 1)
    assert view["error"]["message"] == "The task ran longer than 0.5 s"


def test_a_soft_limit_that_passes_as_the_task_ends_disturbs_neither_it_nor_the_next(running: Service) -> None:
    tasks = [running.submit("odd.ends_at_its_soft_limit"), running.submit("sample.sleep", 1.0)]

    views = [running.ends(task_id) for task_id in tasks]

    assert [outcome(view) for view in views] == [("SUCCESS", None, 1)] * 2
    assert running.result(tasks[0]) == {"result": {"pages": 3}}
    assert running.child_of(tasks[0]) == running.child_of(tasks[1]), "both ran in the same process"


def test_the_task_after_one_that_passed_its_soft_limit_is_not_disturbed(running: Service) -> None:
    tasks = [running.submit(name) for name in ("odd.lets_it_pass", "sample.sleep", "odd.returns_when_told")]

    views = [running.ends(task_id) for task_id in tasks]

    assert [view["status"] for view in views] == ["FAILURE", "SUCCESS", "SUCCESS"]
    assert len({running.child_of(task_id) for task_id in tasks}) == 1

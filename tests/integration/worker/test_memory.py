"""The allowance of memory that a task has, and what it leaves to the next one in its process."""

from tests.integration.worker.conftest import outcome, spent
from tests.support.service import Service

ENVIRONMENT = {
    "TASKQUEUE_CONCURRENCY": "1",
    "TASKQUEUE_LEASE_SECONDS": "30",
    "TASKQUEUE_TASK_MEMORY_MEBIBYTES": "256",
}


def test_a_task_that_takes_more_than_its_allowance_gets_a_memory_error(running: Service) -> None:
    hungry, modest = running.submit("sample.allocate", 600), running.submit("sample.allocate", 192)

    assert outcome(running.ends(hungry)) == ("FAILURE", "OutOfMemory", 1)
    assert spent(running, hungry) == [1, 0, 0], "its process lives on"
    assert outcome(running.ends(modest)) == ("SUCCESS", None, 1)


def test_what_earlier_tasks_kept_is_not_taken_from_the_next_and_does_not_add_up(running: Service) -> None:
    tasks = [running.submit("odd.keeps", 80) for _ in range(5)]

    views = [running.ends(task_id) for task_id in tasks]

    assert [outcome(view) for view in views] == [("SUCCESS", None, 1)] * 5
    pids = [running.result(task_id)["result"] for task_id in tasks]
    assert 1 < len(set(pids)) < 5, "a process is replaced when it held more than half of an allowance, not each time"


def test_a_task_that_takes_little_is_no_reason_to_replace_its_process(running: Service) -> None:
    tasks = [running.submit("sample.echo", number) for number in range(20)]

    for task_id in tasks:
        assert running.ends(task_id)["status"] == "SUCCESS"
    assert len({running.value("SELECT worker FROM task WHERE id = $1", task_id) for task_id in tasks}) == 1

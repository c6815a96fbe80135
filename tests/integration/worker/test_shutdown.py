"""How a worker ends, by signal and by force, and what becomes of what it ran."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import psutil
import pytest

from tests.integration.worker.conftest import outcome, spent
from tests.support.service import Process, Service
from tests.support.waiting import lasting, wait_until


@pytest.fixture
def worker(running: Service) -> Iterator[Process]:
    """A worker of this test alone, which it may end."""
    started = running.start_worker()
    yield started
    started.stop()


def test_an_idle_worker_ends_soon_after_sigterm(worker: Process) -> None:
    children = worker.children()
    keeper = worker.keeper()
    assert keeper is not None

    worker.signal(signal.SIGTERM)

    assert worker.wait(5) == 0
    wait_until(lambda: not any(map(_alive, [*children, keeper])), 5, "the end of its children and its keeper")


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_task_that_ends_within_the_grace_is_not_disturbed(running: Service, worker: Process) -> None:
    task_id = running.submit("sample.sleep", 1.0)
    running.reaches(task_id, "STARTED")

    worker.signal(signal.SIGTERM)
    worker.wait(6)

    view = running.view(task_id)
    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)


def test_a_task_that_outlives_the_grace_runs_elsewhere_within_seconds_at_no_cost(
    running: Service, worker: Process
) -> None:
    tasks = [running.submit("sample.sleep", 4.0) for _ in range(2)]
    for task_id in tasks:
        running.reaches(task_id, "STARTED")
    successor = running.start("worker")
    try:
        worker.signal(signal.SIGTERM)
        # The grace is 4 s, so it turns cold after 2.
        wait_until(lambda: all(running.view(one)["attempt"] == 2 for one in tasks), 8, "the second attempts")
        worker.wait(4)
        views = [running.ends(task_id) for task_id in tasks]
    finally:
        successor.stop()

    for view in views:
        assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 2, 0)
    assert "lost" not in worker.log.read_text()


def handed_back(running: Service, worker: Process, stop: Callable[[UUID], None]) -> None:
    """Stop a worker in some way while it runs a task, and see that another one ends that task at no cost."""
    task_id = running.submit("sample.sleep", 4.0)
    running.reaches(task_id, "STARTED")
    successor = running.start("worker")
    try:
        stop(task_id)
        worker.wait(8)
        view = running.ends(task_id)
    finally:
        successor.stop()

    assert outcome(view) == ("SUCCESS", None, 2)
    assert spent(running, task_id) == [0, 0, 0]


@pytest.mark.parametrize("whole_group", [False, True])
def test_a_task_of_a_worker_that_stops_at_once_is_handed_back(
    running: Service, worker: Process, whole_group: bool
) -> None:
    def stop(_: UUID) -> None:
        if whole_group:
            # As where a process manager tells every process of a unit by itself.
            os.killpg(worker.pid, signal.SIGTERM)
        else:
            worker.signal(signal.SIGQUIT)

    handed_back(running, worker, stop)


def test_a_task_of_a_worker_that_hears_of_its_stop_later_than_its_children_is_handed_back(
    running: Service, worker: Process
) -> None:
    def stop(task_id: UUID) -> None:
        worker.signal(signal.SIGSTOP)
        running.child_of(task_id).send_signal(signal.SIGTERM)
        lasting(0.5)
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGCONT)

    handed_back(running, worker, stop)


def test_a_killed_worker_s_tasks_run_again_without_waiting_for_their_lease(running: Service) -> None:
    worker = running.start_worker(TASKQUEUE_LEASE_SECONDS="30")
    task_id = running.submit("sample.sleep", 3.0, time_limit=60.0)
    running.reaches(task_id, "STARTED")
    children = worker.children()
    successor = running.start("worker")
    try:
        began = time.monotonic()
        worker.signal(signal.SIGKILL)
        wait_until(lambda: running.view(task_id)["attempt"] == 2, 25, "the second attempt")
        # A moment, and no part of the lease; the machine may have little time for it.
        assert time.monotonic() - began < 15
        view = running.ends(task_id)
    finally:
        successor.stop()

    assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 2, 0)
    spent = running.value("SELECT ARRAY[losses, crashes] FROM task WHERE id = $1", task_id)
    assert spent == [1, 0], "a fault of ours, not the task's"
    wait_until(lambda: not any(map(_alive, children)), 5, "the end of its children")


def test_a_worker_killed_with_its_keeper_is_missed_when_its_lease_ends(running: Service, worker: Process) -> None:
    task_id = running.submit("sample.sleep", 1.0)
    running.reaches(task_id, "STARTED")
    keeper = worker.keeper()
    assert keeper is not None
    began = time.monotonic()
    keeper.suspend()
    worker.signal(signal.SIGKILL)
    keeper.kill()
    successor = running.start("worker")
    try:
        view = running.ends(task_id, 20)
    finally:
        successor.stop()

    assert (view["status"], view["attempt"]) == ("SUCCESS", 2)
    assert time.monotonic() - began > 1

"""kill -9, SIGSTOP and SIGTERM of whatever works."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.audit import Figures
from tests.faults.conftest import SEED
from tests.faults.stack import GRACE_SECONDS, LEASE_SECONDS, Pristine, Stack, stack
from tests.support.service import Process
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

DEAD_WORKER_SECONDS = LEASE_SECONDS + 3
RELEASE_SECONDS = 3
LOST_MESSAGE_SECONDS = 15
TASK_MEMORY_MEBIBYTES = 128

pytestmark = pytest.mark.timeout(240)


def test_a_killed_child(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.work", 2.0)  # long enough to be hit in the middle
    running.submit_many(60, "faults.work", 0.1)
    [task_id, *_] = running.running(4)
    at = time.time()
    running.child_of(task_id).kill()
    recovery = running.recovered([task_id], at)
    report(running.finish("kill -9 of a pool child", recovery_seconds=recovery, allowed_seconds=DEAD_WORKER_SECONDS))
    assert spent(running, task_id) == (1, 0, 0)


@pytest.mark.slow
def test_a_killed_worker(running: Stack, report: Report) -> None:
    running.submit_many(6, "faults.work", 2.0)
    victim = running.workers[0]
    tasks = running_on(running, victim)
    at = running.kill(victim)
    recovery = running.recovered(tasks, at)
    figures = running.finish(
        "kill -9 of a worker", recovery_seconds=recovery, allowed_seconds=DEAD_WORKER_SECONDS, workers="killed"
    )
    report(figures)
    assert {spent(running, task_id) for task_id in tasks} == {(0, 1, 0)}


@pytest.mark.slow
def test_a_worker_whose_main_process_alone_is_killed(running: Stack, report: Report) -> None:
    """Its keeper outlives it, and settles what it left."""
    running.submit_many(6, "faults.work", 2.0)
    victim = running.workers[0]
    tasks = running_on(running, victim)
    children = victim.children()
    running.expect_end(victim)
    at = time.time()
    victim.signal(signal.SIGKILL)
    recovery = running.recovered(tasks, at)
    figures = running.finish(
        "kill -9 of a worker's main process",
        recovery_seconds=recovery,
        allowed_seconds=DEAD_WORKER_SECONDS,
        workers="killed",
    )
    report(figures)
    assert {spent(running, task_id) for task_id in tasks} == {(0, 1, 0)}
    assert not any(map(alive, children))


@pytest.mark.slow
def test_all_workers_killed(running: Stack, report: Report) -> None:
    running.submit_many(40, "faults.work", 0.5)
    tasks = running.running(4)
    victims = list(running.workers)
    at = time.time()
    for victim in victims:
        running.kill(victim)
    running.workers[:] = [running.start_worker() for _ in victims]
    wait_until(lambda: not still_started(running, tasks), DEAD_WORKER_SECONDS, "the end of the dead workers' leases")
    freed = max(one.at for one in running.steps(tasks) if one.before == "STARTED") - at
    figures = running.finish(
        "kill -9 of all workers", recovery_seconds=freed, allowed_seconds=DEAD_WORKER_SECONDS, workers="killed"
    )
    report(figures)


@pytest.mark.slow
def test_a_killed_keeper(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.work", 2.5 * LEASE_SECONDS)
    running.running(4)
    keepers = [worker.keeper() for worker in running.workers]
    for keeper in keepers:
        assert keeper is not None
        keeper.kill()
    at = time.time()
    wait_until(
        lambda: all(worker.keeper() not in {None, *keepers} for worker in running.workers), 10, "the next keepers"
    )
    figures = running.finish(
        "kill -9 of the keepers", recovery_seconds=time.time() - at, allowed_seconds=60, workers="cut off"
    )
    report(figures)
    assert figures.run_twice == 0


@pytest.mark.slow
def test_an_api_killed_between_commit_and_publish(running: Stack, report: Report) -> None:
    network = running.network("redis", "api")
    trap = network.trap(b"LPUSH", sender="client", then="silence")
    tasks = running.submit_many(5, "faults.work")
    assert trap.sprung.wait(5)
    network.black_hole()
    tasks += running.submit_many(5, "faults.work")
    at = running.kill(running.api)
    network.cut()
    network.restore()
    running.start_api()
    recovery = running.recovered(tasks, at)
    figures = running.finish(
        "kill -9 of the API between commit and publish", recovery_seconds=recovery, allowed_seconds=LOST_MESSAGE_SECONDS
    )
    report(figures)


@pytest.mark.slow
def test_a_relay_killed_between_stamp_and_publish(running: Stack, report: Report) -> None:
    network = running.network("redis", "relay")
    trap = network.trap(b"LPUSH", sender="client", then="silence")
    tasks = running.submit_many(40, "faults.work", countdown=2)
    assert trap.sprung.wait(10)
    for relay in list(running.relays):
        at = running.kill(relay)
    network.cut()
    network.restore()
    running.relays[:] = [running.start_relay() for _ in range(2)]
    recovery = running.recovered(tasks, at)
    figures = running.finish(
        "kill -9 of the relays between stamp and publish",
        recovery_seconds=recovery,
        allowed_seconds=LOST_MESSAGE_SECONDS,
    )
    report(figures)


@pytest.mark.slow
def test_sigterm_and_then_sigkill_while_tasks_are_published(running: Stack, report: Report) -> None:
    at = 0.0
    with running.load("faults.work", 0.3, per_second=12):
        for _ in range(6):
            running.running(2)
            victim = running.workers.pop(0)
            victim.signal(signal.SIGTERM)
            wait_until(passes(running.chance.uniform(0.0, 1.0)), 5, "the time")
            at = running.kill(victim)
            running.workers.append(running.start_worker())
            running.wait_ready()
    waiting = [
        task_id for task_id, status in running.statuses(list(running.client.acknowledged)).items() if not ended(status)
    ]
    recovery = running.recovered(waiting, at)
    # The last message that a killed worker had popped is only missed when the line has moved past it.
    figures = running.finish(
        "SIGTERM, then SIGKILL, 6 times", recovery_seconds=recovery, allowed_seconds=25, workers="killed"
    )
    report(figures)


@pytest.mark.slow
def test_sigterm_releases_what_outlives_the_grace(running: Stack, report: Report) -> None:
    # Two children of another worker are free to take over.
    running.workers.append(running.start_worker())
    running.wait_ready()
    running.submit_many(4, "faults.work", GRACE_SECONDS + 1)
    victim, tasks = fully_busy(running)
    running.expect_end(victim)
    victim.signal(signal.SIGTERM)
    assert victim.wait(GRACE_SECONDS + 1) == 0
    running.recovered(tasks, time.time())
    gaps = []
    for task_id in tasks:
        steps = running.steps([task_id])
        assert [one.status for one in steps] == ["PENDING", "STARTED", "PENDING", "STARTED", "SUCCESS"]
        gaps.append(steps[3].at - steps[2].at)
        assert spent(running, task_id) == (0, 0, 0)
    figures = running.finish(
        "SIGTERM, released near the end of the grace", recovery_seconds=max(gaps), allowed_seconds=RELEASE_SECONDS
    )
    report(figures)


@pytest.mark.slow
def test_a_worker_stopped_past_its_lease_that_then_goes_on(running: Stack, report: Report) -> None:
    running.submit_many(6, "faults.work", 1.5)
    zombie = running.workers[0]
    tasks = running_on(running, zombie)
    family = [psutil.Process(zombie.pid), *psutil.Process(zombie.pid).children(recursive=True)]
    for one in family:
        one.suspend()
    at = time.time()
    try:
        recovery = running.recovered(tasks, at)
    finally:
        for one in family:
            one.resume()
    before = running.fetch("SELECT id, status, attempt, finished_at FROM task ORDER BY id")
    figures = running.finish(
        "SIGSTOP past the lease, then SIGCONT",
        recovery_seconds=recovery,
        allowed_seconds=DEAD_WORKER_SECONDS,
        workers="cut off",
    )
    report(figures)
    after = {row["id"]: row for row in running.fetch("SELECT id, status, attempt, finished_at FROM task")}
    assert all(after[row["id"]] == row for row in before if ended(row["status"])), "the zombie wrote"
    assert figures.run_twice == len(tasks)


@pytest.mark.slow
def test_a_c_call_that_holds_the_gil_past_its_lease(running: Stack, report: Report) -> None:
    running.submit_many(4, "faults.hold_the_gil", int(3 * LEASE_SECONDS))
    running.running(4)
    figures = running.finish("a C call holds the GIL for three leases", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0


@pytest.mark.slow
def test_tasks_that_kill_their_own_process_do_not_harm_their_neighbours(running: Stack, report: Report) -> None:
    innocent, poison = [], []
    for _ in range(4):
        innocent += running.submit_many(20, "faults.work", 0.2)
        poison.append(running.submit("faults.die", 99, 0.1))
    figures = running.finish("poison: 4 in 84 tasks kill their process", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    rows = {row["id"]: row for row in running.fetch("SELECT id::text, status, attempt, error_type, crashes FROM task")}
    assert {(rows[one]["status"], rows[one]["error_type"], rows[one]["crashes"]) for one in poison} == {
        ("FAILURE", "WorkerLost", 3)
    }
    assert {(rows[one]["status"], rows[one]["attempt"]) for one in innocent} == {("SUCCESS", 1)}


@pytest.fixture
def frugal(tmp_path: Path, pristine: Pristine) -> Iterator[Stack]:
    """The whole service, whose tasks may take little memory."""
    settings = {"TASKQUEUE_TASK_MEMORY_MEBIBYTES": str(TASK_MEMORY_MEBIBYTES)}
    with stack(tmp_path, pristine, SEED, **settings) as started:
        yield started
        print(started.service.logs())  # noqa: T201  # pytest shows it with a failure only


def test_tasks_that_fill_the_memory_do_not_harm_their_neighbours(frugal: Stack, report: Report) -> None:
    innocent, greedy = [], []
    for _ in range(4):
        innocent += frugal.submit_many(20, "faults.work", 0.1)
        greedy.append(frugal.submit("sample.allocate", 32 * TASK_MEMORY_MEBIBYTES))
    figures = frugal.finish("4 in 84 tasks fill the memory", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0
    rows = {row["id"]: row for row in frugal.fetch("SELECT id::text, status, attempt, error_type, crashes FROM task")}
    assert {(rows[one]["status"], rows[one]["error_type"], rows[one]["crashes"]) for one in greedy} == {
        ("FAILURE", "OutOfMemory", 0)
    }
    assert {(rows[one]["status"], rows[one]["attempt"]) for one in innocent} == {("SUCCESS", 1)}


def test_a_cancel_that_arrives_as_the_task_settles(running: Stack, report: Report) -> None:
    answers: dict[str, tuple[int, str]] = {}
    for _ in range(12):
        tasks = running.submit_many(4, "faults.work", 0.1)
        running.reach(tasks, "STARTED", "SUCCESS")
        for task_id in tasks:
            wait_until(passes(running.chance.uniform(0.0, 0.04)), 5, "the time")
            answer = running.service.http.post(f"/api/tasks/{task_id}/cancel")
            answers[task_id] = answer.status_code, str(answer.json()["status"])
    figures = running.finish("cancel as the task settles, 48 times", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    final = running.statuses(list(answers))
    told = {(code, status, final[task_id]) for task_id, (code, status) in answers.items()}
    assert told <= {
        (409, "409", "SUCCESS"),
        (202, "STARTED", "SUCCESS"),
        (202, "STARTED", "REVOKED"),
        (200, "REVOKED", "REVOKED"),
    }
    assert {code for code, _, _ in told} >= {409, 202}, "no cancel came just in time, or none came just too late"


@pytest.mark.slow
def test_cancels_of_tasks_that_wait_retry_run_and_have_lost_their_worker(running: Stack, report: Report) -> None:
    held = running.submit("faults.work", countdown=600)
    retrying = running.submit("faults.work", 0.0, 5, max_retries=5)
    wait_until(lambda: [one for one in running.steps([retrying]) if one.status == "RETRY"][2:], 30, "three retries")
    cancelled = [held, retrying]
    orphans = running.submit_many(2, "faults.work", 30)
    running.reach(orphans, "STARTED")
    running.running(2)
    victims = {running.worker_of(one) for one in orphans}
    cancelled += orphans
    for task_id in cancelled:
        assert running.service.http.post(f"/api/tasks/{task_id}/cancel").status_code in {200, 202}
    at = time.time()
    for worker in victims:
        running.kill(worker)
        running.workers[running.workers.index(worker)] = running.start_worker()
    wait_until(lambda: set(running.statuses(cancelled).values()) == {"REVOKED"}, 30, "the end of the cancelled")
    took = time.time() - at
    figures = running.finish(
        "cancel: waiting, retrying, worker dead",
        recovery_seconds=took,
        allowed_seconds=DEAD_WORKER_SECONDS,
        workers="killed",
    )
    report(figures)


def running_on(running: Stack, worker: Process) -> list[str]:
    """Wait until every child of a worker runs a task; returns which."""

    def found() -> list[str]:
        tasks = [one for one in running.running(1) if running.worker_of(one) is worker]
        return tasks if len(tasks) == 2 else []

    return wait_until(found, 30, "a busy worker")


def fully_busy(running: Stack) -> tuple[Process, list[str]]:
    """Four tasks run on three workers of two children each: a worker that runs two of them, and which."""
    tasks = wait_until(lambda: running.running(4), 30, "four tasks that run")
    by_worker = {id(worker): [one for one in tasks if running.worker_of(one) is worker] for worker in running.workers}
    victim = max(running.workers, key=lambda worker: len(by_worker[id(worker)]))
    return victim, by_worker[id(victim)]


def spent(running: Stack, task_id: str) -> tuple[int, int, int]:
    """Crashes, losses and failures of a task."""
    [row] = running.fetch("SELECT crashes, losses, failures FROM task WHERE id::text = $1", task_id)
    return row["crashes"], row["losses"], row["failures"]


def still_started(running: Stack, tasks: list[str]) -> bool:
    """Whether one of these tasks is still in the attempt it was first seen in."""
    rows = running.fetch("SELECT 1 FROM task WHERE id = ANY($1::uuid[]) AND status = 'STARTED' AND attempt = 1", tasks)
    return bool(rows)


def ended(status: str) -> bool:
    return status in {"SUCCESS", "FAILURE", "REVOKED"}


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def passes(seconds: float) -> Callable[[], bool]:
    """A condition that comes true after so many seconds."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until

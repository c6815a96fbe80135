"""The neighbours of what goes wrong are not billed for it."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from app.worker import memory
from tests.integration.worker.conftest import outcome, spent
from tests.support.service import Process, Service
from tests.support.waiting import wait_until

CHILDREN = 4
# A lease so long that none runs out: who was lost, or died, is told by the keeper.
ENVIRONMENT = {"TASKQUEUE_CONCURRENCY": str(CHILDREN), "TASKQUEUE_LEASE_SECONDS": "30"}
CGROUP_MEBIBYTES = 256
LIMIT_FILES = {"memory.oom_control": "memory.limit_in_bytes", "memory.events": "memory.max"}
KEEPER_WORKS = """
SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'taskqueue-keeper'
"""


@pytest.fixture
def worker(running: Service) -> Process:
    """A worker, which the test may end."""
    newest = running.process("worker")
    return newest if newest.running() else running.start_worker()


@dataclass
class Innocents:
    """Tasks that run beside all of it, until they are let go."""

    running: Service
    gate: Path
    tasks: list[UUID]

    def end_well(self, *, attempt: int = 1, losses: int = 0) -> None:
        """Let them go, and see what they were billed."""
        self.gate.touch()
        for task_id in self.tasks:
            assert outcome(self.running.ends(task_id)) == ("SUCCESS", None, attempt)
            assert spent(self.running, task_id) == [0, 0, losses]


def innocents(running: Service, directory: Path, count: int = CHILDREN - 1) -> Innocents:
    """Have tasks run that wait to be let go."""
    gate = directory / "gate"
    tasks = [running.submit("odd.waits_for", str(gate)) for _ in range(count)]
    for task_id in tasks:
        running.reaches(task_id, "STARTED")
    return Innocents(running, gate, tasks)


@pytest.mark.usefixtures("worker")
def test_the_neighbours_of_a_task_that_kills_its_process_are_not_billed(running: Service, tmp_path: Path) -> None:
    beside = innocents(running, tmp_path)
    poison = running.submit("sample.crash")

    assert outcome(running.ends(poison)) == ("FAILURE", "WorkerLost", 3)
    assert spent(running, poison) == [0, 3, 0]
    beside.end_well()


@pytest.mark.usefixtures("worker")
def test_a_task_that_tells_its_own_process_to_stop_has_ended_it(running: Service, tmp_path: Path) -> None:
    beside = innocents(running, tmp_path, CHILDREN - 3)
    poisons = [running.submit("odd.signal_yourself", name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT")]

    for poison in poisons:
        assert outcome(running.ends(poison, 60)) == ("FAILURE", "WorkerLost", 3)
        assert spent(running, poison) == [0, 3, 0]
    beside.end_well()


@pytest.mark.usefixtures("worker")
def test_a_signal_that_a_task_has_survived_is_no_matter_of_the_next_one(running: Service, tmp_path: Path) -> None:
    beside = innocents(running, tmp_path)  # so that the two run in the same process
    survivor, next_one = running.submit("odd.ignore_signals_to_yourself"), running.submit("odd.raise", "exit")

    assert outcome(running.ends(survivor)) == ("SUCCESS", None, 1)
    assert outcome(running.ends(next_one)) == ("FAILURE", "SystemExit", 1)
    assert running.result(survivor) == {"result": running.child_of(next_one).pid}
    beside.end_well()


@contextlib.contextmanager
def memory_cgroup(mebibytes: int) -> Iterator[Path]:
    """A memory cgroup within this process's own, in either version. Skips the test where none can be made."""
    counter = memory.find_oom_counter()
    if counter is None:
        pytest.skip("there is no memory cgroup here")
    made = counter.parent / f"taskqueue-test-{os.getpid()}"
    try:
        made.mkdir()
        try:
            (made / LIMIT_FILES[counter.name]).write_text(str(mebibytes * memory.MEBIBYTE))
        except OSError:
            made.rmdir()
            raise
    except OSError as refused:
        pytest.skip(f"no memory cgroup can be made: {refused}")
    try:
        yield made
    finally:
        wait_until(lambda: _removed(made), what="the end of all processes in the cgroup")


def _removed(cgroup: Path) -> bool:
    with contextlib.suppress(OSError):
        cgroup.rmdir()
    return not cgroup.exists()


@pytest.fixture
def crammed(running: Service) -> Iterator[Process]:
    """A worker whose processes share a cgroup with little memory."""
    with memory_cgroup(CGROUP_MEBIBYTES) as cgroup:
        worker = running.start_worker()
        before = worker.keeper()
        assert before is not None
        for pid in (worker.pid, *(child.pid for child in worker.children())):
            (cgroup / "cgroup.procs").write_text(str(pid))
        # The next keeper is born in there.
        before.kill()
        wait_until(lambda: (found := worker.keeper()) and found.pid != before.pid, what="another keeper")
        yield worker
        worker.stop()


def test_the_neighbours_of_a_task_that_the_kernel_kills_for_its_memory_are_not_billed(
    running: Service, crammed: Process, tmp_path: Path
) -> None:
    beside = innocents(running, tmp_path)
    wait_until(lambda: running.value(KEEPER_WORKS), what="the keeper's first renewal")
    hungry = running.submit("odd.holds", CGROUP_MEBIBYTES * 2, 60.0)

    view = running.ends(hungry)

    assert outcome(view) == ("FAILURE", "OutOfMemory", 3)
    assert view["error"]["message"] == "The process that ran the task was killed for want of memory (3 times)"
    assert spent(running, hungry) == [0, 3, 0]
    beside.end_well()
    assert crammed.running()


def test_a_task_that_kills_its_worker_bills_nobody_for_a_crash(
    running: Service, worker: Process, tmp_path: Path
) -> None:
    beside = innocents(running, tmp_path)
    killer = running.submit("odd.kill_the_worker", str(tmp_path / "mark"))
    worker.wait(10)
    running.start_worker()

    assert outcome(running.ends(killer)) == ("SUCCESS", None, 2)
    assert spent(running, killer) == [0, 0, 1]
    beside.end_well(attempt=2, losses=1)


def test_a_worker_killed_children_first_bills_nobody_for_a_crash(
    running: Service, worker: Process, tmp_path: Path
) -> None:
    beside = innocents(running, tmp_path)
    for child in worker.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    worker.signal(signal.SIGKILL)
    worker.wait(10)
    running.start_worker()

    beside.end_well(attempt=2, losses=1)

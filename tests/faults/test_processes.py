"""kill -9 of whatever works."""

import time
from collections.abc import Callable

import pytest

from tests.faults.audit import Figures
from tests.faults.stack import LEASE_SECONDS, Stack

Report = Callable[[Figures], None]

pytestmark = pytest.mark.timeout(240)


def test_a_killed_child(running: Stack, report: Report) -> None:
    running.submit_many(60, "faults.work", 0.2)
    [task_id, *_] = running.running(1)
    at = time.time()
    running.child_of(task_id).kill()
    recovery = running.recovered([task_id], at)
    report(running.finish("kill -9 of a pool child", recovery_seconds=recovery, allowed_seconds=LEASE_SECONDS + 3))


def test_a_killed_worker(running: Stack, report: Report) -> None:
    running.submit_many(6, "faults.work", 2.0)
    running.running(4)
    victim = running.workers[0]
    tasks = [one for one in running.running(4) if running.worker_of(one) is victim]
    at = running.kill(victim)
    recovery = running.recovered(tasks, at)
    report(running.finish("kill -9 of a worker", recovery_seconds=recovery, allowed_seconds=LEASE_SECONDS + 3))

"""Pauses and limits, while what keeps them is killed."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import audit
from tests.faults.audit import Figures
from tests.faults.conftest import SEED
from tests.faults.stack import LEASE_SECONDS, QUEUE, Pristine, Stack, stack
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

DEAD_WORKER_SECONDS = LEASE_SECONDS + 3
RESUME_SECONDS = 3
STARTED = "SELECT count(*) AS n FROM task WHERE status = 'STARTED'"
ENDED = "SELECT count(*) AS n FROM task WHERE finished_at IS NOT NULL"

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]  # each takes half a minute or more


@pytest.fixture
def wide(tmp_path: Path, pristine: Pristine) -> Iterator[Stack]:
    """As `running`, with four slots in each worker."""
    with stack(tmp_path, pristine, SEED, TASKQUEUE_CONCURRENCY="4") as started:
        yield started
        print(started.service.logs())  # noqa: T201  # pytest shows it with a failure only


def test_a_limit_while_workers_and_relays_are_killed(wide: Stack, report: Report) -> None:
    ask(wide, "limits", {"concurrency_limit": 3})
    tasks = wide.submit_many(200, "faults.work", 0.2)
    recoveries = []
    for number in range(3):
        wait_until(lambda number=number: count(wide, ENDED) > 40 * (number + 1), 60, "the work")  # type: ignore[misc]
        hit = wide.running(1)[:1]
        victim, relay = wide.worker_of(hit[0]), wide.relays.pop(0)
        at = wide.kill(victim)
        wide.workers.remove(victim)
        wide.kill(relay)
        wide.workers.append(wide.start_worker())
        wide.relays.append(wide.start_relay())
        # The slot is free for the next; the task itself waits for its retry behind all the others.
        wide.reach(hit, "RETRY", *audit.TERMINAL)
        recoveries.append(next(one.at for one in wide.steps(hit) if one.before == "STARTED") - at)
    wide.reach(tasks, "SUCCESS", seconds=90)
    figures = wide.finish(
        "limit of 3 in 8 slots, workers and relays killed",
        recovery_seconds=max(recoveries),
        allowed_seconds=DEAD_WORKER_SECONDS,
        workers="killed",
    )
    report(figures)
    assert audit.at_once(wide.effects(), wide.steps()) == 3
    assert figures.run_twice, "no run was hit"


def test_a_pause_under_load_while_workers_are_killed(wide: Stack, report: Report) -> None:
    with wide.load("faults.work", 0.05, per_second=30):
        wide.running(2)
        ask(wide, "pause")
        wide.kill(wide.workers.pop(0))
        wide.workers.append(wide.start_worker())
        wait_until(lambda: count(wide, STARTED) == 0 and wide.depth() == 0, DEAD_WORKER_SECONDS + 5, "the pause")
        began = len(wide.effects())
        held = count(wide, "SELECT count(*) AS n FROM held_task")
        wide.kill(wide.relays.pop(0))
        wide.relays.append(wide.start_relay())
        wait_until(lambda: count(wide, "SELECT count(*) AS n FROM held_task") > held + 60, 20, "more submits")
        assert len(wide.effects()) == began, "nothing starts while it is paused"
        assert wide.depth() == 0
    at = time.time()
    ask(wide, "resume")
    first = wait_until(lambda: [one.at for one in wide.effects()[began:]], 10, "the first that runs again")[0]
    report(
        wide.finish(
            "a pause, workers and relays killed",
            recovery_seconds=first - at,
            allowed_seconds=RESUME_SECONDS,
            workers="killed",
        )
    )


def test_a_rate_of_twenty_a_second(wide: Stack, report: Report) -> None:
    ask(wide, "limits", {"rate_limit": {"count": 20, "seconds": 1}})
    ask(wide, "pause")  # Submits may come at a lower rate than this.
    wide.submit_many(260, "faults.work", 0.05)
    ask(wide, "resume")
    wait_until(lambda: count(wide, ENDED) == 260, 60, "the end of all")
    began = sorted(one.at for one in wide.effects() if one.what == "begin")
    within = sum(at < began[0] + 10 for at in began)
    report(wide.finish(f"20 a second: {within} in 10 s", recovery_seconds=0, allowed_seconds=1))
    assert within == pytest.approx(200, abs=8)


def ask(running: Stack, what: str, body: Any = None) -> None:
    """Pause, resume or limit the queue."""
    method = "PUT" if what == "limits" else "POST"
    answer = running.service.http.request(method, f"/api/queues/{QUEUE}/{what}", json=body)
    assert answer.status_code == 200, answer.text


def count(running: Stack, sql: str) -> int:
    [row] = running.fetch(sql)
    return int(row["n"])

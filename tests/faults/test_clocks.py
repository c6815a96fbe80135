"""Clocks that are wrong, and clocks that are set. All times come from Postgres's; a wait is measured by nobody's."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from app.dev.embedded import EmbeddedPostgres
from tests.faults.audit import Figures
from tests.faults.conftest import SEED
from tests.faults.stack import LEASE_SECONDS, Pristine, Stack, stack
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

TEN_MINUTES = 600
BACK_SECONDS = 15

SOURCE = Path(__file__).parents[1] / "support" / "clock.c"
COMPILER = shutil.which("cc")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler, for a library that shifts the clock"),
]


class Clock:
    """A clock that a test sets, for processes that are started with `variables`."""

    def __init__(self, home: Path) -> None:
        self._library, self._file = home / "clock.so", home / "clock"
        subprocess.run([str(COMPILER), "-shared", "-fPIC", "-O2", "-o", self._library, SOURCE], check=True)
        self.set(0)

    @property
    def variables(self) -> dict[str, str]:
        """What makes a process go by it."""
        return {"LD_PRELOAD": str(self._library), "TEST_CLOCK": str(self._file)}

    def set(self, seconds: int) -> None:
        """Set it so far ahead of the true time, at once, for every process that goes by it."""
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


class ClockedPostgres(EmbeddedPostgres):
    """A Postgres that goes by a clock of the test."""

    clock: Clock

    def popen_options(self) -> Mapping[str, Any]:
        options = super().popen_options()
        return {**options, "env": {**options["env"], **self.clock.variables}}


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """The clock of API, workers and relays."""
    return Clock(tmp_path)


@pytest.fixture
def clocked(tmp_path: Path, pristine: Pristine, clock: Clock) -> Iterator[Stack]:
    """The whole service, whose processes go by `clock`; the servers don't."""
    with stack(tmp_path, pristine, SEED, **clock.variables) as started:
        yield started
        print(started.service.logs())  # noqa: T201  # pytest shows it with a failure only


@pytest.mark.slow
def test_clocks_of_api_workers_and_relays_that_are_set(clocked: Stack, clock: Clock, report: Report) -> None:
    for seconds in (TEN_MINUTES, -TEN_MINUTES, 0):
        running = clocked.submit_many(4, "faults.work", 2 * LEASE_SECONDS)
        clocked.reach(running, "STARTED")
        clock.set(seconds)
        clocked.submit_many(10, "faults.work", 0.05)
        later = clocked.submit_many(3, "faults.work", countdown=3)
        clocked.submit_many(2, "faults.work", 0.0, 1)
        clocked.reach([*running, *later], "SUCCESS")
        for one in later:
            submitted, started = (step.at for step in clocked.steps([one])[:2])
            assert 1.9 < started - submitted < 12, "a countdown went by a clock that is wrong"
    orphan = clocked.submit("faults.work", 2.0)
    [_] = clocked.running(1)
    clock.set(TEN_MINUTES)
    at = clocked.kill(clocked.worker_of(orphan))
    clocked.workers[:] = [one for one in clocked.workers if one.running()]
    recovery = clocked.recovered([orphan], at)
    figures = clocked.finish(
        "clocks of API, workers, relays set 10 minutes on and back",
        recovery_seconds=recovery,
        allowed_seconds=LEASE_SECONDS + 3,
        workers="killed",
        one_clock=False,
    )
    report(figures)
    assert figures.run_twice == 2 * 3 + 1, "only those that fail once and the one whose worker died run again"


@pytest.mark.slow
def test_the_clock_of_postgres_is_set(running: Stack, report: Report) -> None:
    server = ClockedPostgres(running.home / "postgres", max_connections=120)
    server.clock = Clock(running.home / "postgres")
    running.replace_postgres(server)
    running.wait_ready()
    [row] = running.fetch("SELECT pg_postmaster_start_time() AS started")
    wait_until(lambda: time.time() > row["started"].timestamp() + LEASE_SECONDS + 2, 30, "a lease of Postgres")
    for seconds in (TEN_MINUTES, TEN_MINUTES - BACK_SECONDS):
        running.submit_many(4, "faults.work", 2 * LEASE_SECONDS)
        running.running(4)
        running.submit_many(20, "faults.work", 0.1)
        running.submit_many(4, "faults.work", 0.0, 1)
        server.clock.set(seconds)
        at = time.time()
        [row] = running.fetch("SELECT extract(epoch FROM clock_timestamp())::float8 AS now")
        assert abs(row["now"] - time.time() - seconds) < 5, "its clock was not set"
        running.submit_many(10, "faults.work", 0.1)
        unfinished = "SELECT 1 FROM task WHERE finished_at IS NULL LIMIT 1"
        wait_until(lambda: not running.fetch(unfinished), 90, f"the end of all tasks, {seconds} s ahead")  # noqa: B023  # called at once
    recovery = time.time() - at
    figures = running.finish(
        "the clock of Postgres set 10 minutes on, then 15 s back",
        recovery_seconds=recovery,
        allowed_seconds=2 * LEASE_SECONDS + BACK_SECONDS + 15,
        workers="cut off",
        one_clock=False,
    )
    report(figures)

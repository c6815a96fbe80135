"""A schedule of one second, while the relays that fire it are killed one after another."""

import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from tests.faults.audit import Figures
from tests.faults.stack import Stack
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

TIMES = 300
KILL_EVERY_SECONDS = 20.0
LATE_SECONDS = 3.0
"""How late a time may be fired: one relay always lives, and shares two cores with everything else."""

pytestmark = pytest.mark.timeout(600)


@pytest.mark.slow  # five minutes, because that many times prove something
def test_each_second_is_fired_once_though_relays_are_killed(running: Stack, report: Report) -> None:
    start = (datetime.now(UTC) + timedelta(seconds=2)).replace(microsecond=0)
    end = start + timedelta(seconds=TIMES - 1)
    wanted = {
        "every": 1,
        "start": start.isoformat(),
        "end": end.isoformat(),
        "submit": {"task": "faults.work", "args": [0.0]},
    }
    made = running.service.http.put("/api/schedules/each-second", json=wanted)
    assert made.status_code == 201, made.text
    kills = 0
    while time.time() + KILL_EVERY_SECONDS < end.timestamp():
        lasting(KILL_EVERY_SECONDS)
        running.kill(running.relays.pop(0))
        running.relays.append(running.start_relay())
        kills += 1
    wait_until(lambda: running.fetch("SELECT FROM schedule WHERE due_at IS NULL"), 30 + KILL_EVERY_SECONDS, "the end")

    rows = running.fetch("SELECT scheduled_for, created_at FROM task WHERE schedule = 'each-second'")
    times = [row["scheduled_for"] for row in rows]
    late = [(row["created_at"] - row["scheduled_for"]).total_seconds() for row in rows]
    assert sorted(times) == [start + timedelta(seconds=n) for n in range(TIMES)], "each time has one task"
    assert tuple(running.fetch("SELECT fired, skipped FROM schedule")[0]) == (TIMES, 0)
    running.wait_ready()
    report(
        running.finish(
            f"{len(rows)} of {TIMES} s fired, {kills} relays killed, {statistics.median(late):.2f} s late",
            recovery_seconds=max(late),
            allowed_seconds=LATE_SECONDS,
        )
    )

"""The fault drill in small: everything is killed under a few tasks, and the drill counts what was lost."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from app.dev import linux
from app.dev.demo_ledger import Job, Ledger, Posted, compare
from tests.support.waiting import wait_until

needs_proc = pytest.mark.skipif(not linux.IS_LINUX, reason="the drill finds its victims in /proc")

FAULTS = (
    "FLUSHALL",
    "kill -9 pool child",
    "kill -9 worker",
    "kill -9 keeper",
    "kill -9 relay",
    "kill -9 API",
    "kill -9 Redis",
    "kill -9 Postgres",
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a drill whose directory is made in `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def starting(*words: str) -> "subprocess.Popen[str]":
        with (tmp_path / "output").open("w") as output:
            drill = subprocess.Popen(
                [sys.executable, "-m", "app.dev.demo_faults", *words],
                env={**os.environ, "TMPDIR": str(tmp_path)},
                stdout=output,
                stderr=output,
                text=True,
            )
        started.append(drill)
        return drill

    yield starting
    for drill in started:
        if drill.poll() is None:
            drill.terminate()
        drill.wait(30)


def counted(output: str) -> dict[str, float]:
    return {what: float(count) for what, count in re.findall(r"^  (\S.*?) +([0-9.]+)$", output, flags=re.MULTILINE)}


def assert_nothing_is_left(directory: Path) -> None:
    assert sorted(path.name for path in directory.iterdir()) == ["output"]
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(directory) in " ".join(process.info["cmdline"] or [])
    ]


@needs_proc
@pytest.mark.faults
def test_nothing_is_lost_whatever_is_killed(start: Start, tmp_path: Path) -> None:
    drill = start("--tasks", "60", "--quick", "--seed", "7")
    code = drill.wait(110)
    output = (tmp_path / "output").read_text()
    assert code == 0, output
    for fault in FAULTS:
        assert re.search(rf"^ +[\d.]+ s  {re.escape(fault)} +[1-9]\d* +[1-9]\d* ", output, flags=re.MULTILINE), output
    counts = counted(output)
    assert counts["acknowledged"] == 60
    assert counts["ended SUCCESS"] + counts["ended FAILURE"] + counts["ended REVOKED"] == 60
    assert counts["lost"] == counts["ended twice"] == 0
    assert counts["distinct webhook ids"] == 60
    assert counts["webhook POSTs in all"] >= 60
    assert counts["runs in all"] > 60
    assert counts["tracebacks in the log"] == 0
    assert output.endswith("\nNothing was lost.\n")
    assert_nothing_is_left(tmp_path)


@needs_proc
@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_drill_leaves_nothing_behind(start: Start, tmp_path: Path, number: signal.Signals) -> None:
    drill = start("--tasks", "60", "--quick")
    wait_until(
        lambda: "The service is ready" in (tmp_path / "output").read_text() or drill.poll() is not None,
        deadline_seconds=60,
        what="ready",
    )
    drill.send_signal(number)
    # The service has 15 s to stop, and what it leaves behind has 5 more.
    try:
        assert drill.wait(30) == 130, (tmp_path / "output").read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"it goes on: {(tmp_path / 'output').read_text()}")
    assert_nothing_is_left(tmp_path)


# What follows shows that the drill can fail: an audit that finds no fault must not be one that can't.

TASK = "01890000-0000-7000-8000-000000000001"
FINISHED = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def row(**changes: object) -> dict[str, object]:
    ended = {"status": "SUCCESS", "attempt": 1, "result": '"a"', "error_type": None, "finished_at": FINISHED}
    return {**ended, "deliveries": 1, **changes}


def posted(webhook_id: str = "w", *, signed: bool = True, **changes: object) -> Posted:
    data = {
        "task_id": TASK,
        "status": "SUCCESS",
        "attempt": 1,
        "result": "a",
        "finished_at": "2026-01-31T12:00:00.000Z",
    }
    return Posted(webhook_id, json.dumps({"data": {**data, **changes}}).encode(), signed)


def complaints(rows: dict[str, dict[str, object]], *told: Posted) -> tuple[str, ...]:
    ledger = Ledger("", "", random.Random(0), acknowledged={TASK: Job("sample.echo", {"value": "a"}, "a")})
    return compare(rows, ledger, told).complaints


def test_the_audit_accepts_a_webhook_that_is_repeated_as_it_was() -> None:
    assert complaints({TASK: row()}, posted(), posted()) == ()


@pytest.mark.parametrize(
    ("rows", "told", "complaint"),
    [
        ({}, [], "acknowledged tasks have no row"),
        ({TASK: row(status="STARTED", finished_at=None)}, [], "acknowledged tasks have not ended"),
        ({TASK: row(), "extra": row(status="PENDING", finished_at=None)}, [posted()], "extra tasks have not ended"),
        ({TASK: row(deliveries=0)}, [], "no webhook delivery, or several"),
        ({TASK: row(deliveries=2)}, [posted()], "no webhook delivery, or several"),
        ({TASK: row()}, [], "told to nobody"),
        ({TASK: row()}, [posted("w"), posted("v")], "several webhook ids"),
        ({TASK: row()}, [posted(), posted(attempt=2)], "repeated with another body"),
        ({TASK: row(status="FAILURE", error_type="WorkerLost", result=None)}, [posted()], "not as their first webhook"),
        ({TASK: row(attempt=2)}, [posted()], "not as their first webhook"),
        ({TASK: row(result='"b"')}, [posted(result="b")], "returned what they should not"),
        ({TASK: row()}, [posted(signed=False)], "not signed"),
    ],
)
def test_the_audit_finds_what_is_wrong(rows: dict[str, dict[str, object]], told: list[Posted], complaint: str) -> None:
    assert any(complaint in said for said in complaints(rows, *told))


def test_the_audit_counts_what_was_lost_and_what_ended_twice() -> None:
    ledger = Ledger("", "", random.Random(0), acknowledged={TASK: Job("long_task", {}), "gone": Job("long_task", {})})
    counts = compare({TASK: row()}, ledger, [posted("w"), posted("v")]).counts
    assert (counts["acknowledged"], counts["lost"], counts["ended twice"]) == (2, 1, 1)

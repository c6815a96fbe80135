"""Disks that are full, and a Redis that takes no writes for another reason."""

import contextlib
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from tests.faults.audit import Figures
from tests.faults.conftest import SEED
from tests.faults.stack import Pristine, Stack, stack
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

LOST_SECONDS = 15.0

pytestmark = pytest.mark.timeout(240)


@pytest.mark.slow
def test_a_full_disk_under_postgres(tmp_path: Path, pristine: Pristine, report: Report) -> None:
    with disk(tmp_path / "postgres", mebibytes=160), shown(stack(tmp_path, pristine, SEED)) as running:
        running.submit_many(8, "faults.work", 0.5)
        with filled(tmp_path / "postgres" / "filler"):
            refused = running.client.refused
            wanted = {"task": "sample.echo", "args": [secrets.token_hex(50_000)]}
            wait_until(lambda: not running.client.try_once(wanted), 30, "a refused submit")
            for _ in range(20):
                running.client.try_once(wanted)
            assert running.client.refused > refused
        if not alive(running):
            running.postgres.kill()
            running.postgres.start()
        back = time.time()
        task = running.submit("faults.work", 0.0)
        recovery = running.recovered([task], back)
        figures = running.finish(
            "Postgres's disk is full", recovery_seconds=recovery, allowed_seconds=LOST_SECONDS, workers="cut off"
        )
        report(figures)


@pytest.mark.slow
def test_a_full_disk_under_redis(tmp_path: Path, pristine: Pristine, report: Report) -> None:
    with disk(tmp_path / "redis", mebibytes=4), shown(stack(tmp_path, pristine, SEED)) as running:
        running.submit_many(8, "faults.work", 0.2)
        with filled(tmp_path / "redis" / "filler"), running.bell() as client:
            running.submit_many(100, "faults.work", 0.0)
            wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "err", 20, "MISCONF")
            running.submit_many(30, "faults.work", 0.0)
            assert not running.client.refused
        back = time.time()
        task = running.submit("faults.work", 0.0)
        recovery = running.recovered([task, *running.client.acknowledged], back)
        report(running.finish("Redis's disk is full", recovery_seconds=recovery, allowed_seconds=LOST_SECONDS))


def test_a_redis_without_the_replicas_that_it_needs(running: Stack, report: Report) -> None:
    with running.bell() as client:
        client.config_set("min-replicas-to-write", 1)  # it refuses LPUSH, and BRPOP too
        running.submit_many(40, "faults.work", 0.0)
        assert not running.client.refused
        lasting(3)  # the first tries are of all rows; Postgres counts what was written a second late
        before = updates(running)
        lasting(5)
        assert updates(running) - before < 200, "the relays write the same rows again and again"
        client.config_set("min-replicas-to-write", 0)
    recovery = running.recovered(list(running.client.acknowledged), time.time())
    report(running.finish("Redis lacks its replicas", recovery_seconds=recovery, allowed_seconds=LOST_SECONDS))


def updates(running: Stack) -> int:
    """How often rows of tasks were updated, as Postgres counts."""
    [row] = running.fetch("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relname = 'task'")
    return int(row["n_tup_upd"])


@contextlib.contextmanager
def shown(started: contextlib.AbstractContextManager[Stack]) -> Iterator[Stack]:
    """As the fixture `running` does: what the processes logged is shown if the test fails."""
    with started as running:
        try:
            yield running
        finally:
            print(running.service.logs())  # noqa: T201  # pytest shows it with a failure only


@contextlib.contextmanager
def disk(path: Path, *, mebibytes: int) -> Iterator[None]:
    """A disk of that size, at a directory that is not there yet."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk can't be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def filled(path: Path) -> Iterator[None]:
    """Let a file take all that is left of its disk, while the block runs."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        path.unlink()


def alive(running: Stack) -> bool:
    """Whether Postgres got over it by itself."""
    with contextlib.suppress(OSError, asyncpg.PostgresError):
        return bool(running.fetch("SELECT 1"))
    return False

"""The keeper, when what it stands on gives way."""

import contextlib
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
import redis

from app import broker, celery_app, lifecycle
from app.core import metrics
from app.core.config import Settings
from app.lifecycle import Claim
from app.worker import slots
from app.worker.slots import Slots
from tests.support import database
from tests.support.service import ROOT, Service
from tests.support.waiting import until, wait_until

REFUSE_RENEWALS = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'no renewal' USING ERRCODE = 'check_violation';
END $$;
CREATE TRIGGER refuse BEFORE UPDATE ON task FOR EACH ROW
WHEN (OLD.status = 'STARTED' AND NEW.status = 'STARTED' AND NEW.lease_until > OLD.lease_until)
EXECUTE FUNCTION refuse();
"""
ADMIT_RENEWALS = "DROP TRIGGER refuse ON task; DROP FUNCTION refuse"


def test_a_renewal_that_postgres_refuses_is_not_the_last(running: Service) -> None:
    worker = running.process("worker")
    keeper = worker.keeper()
    assert keeper is not None
    task_id = running.submit("sample.sleep", 7.0)
    running.reaches(task_id, "STARTED")
    running.execute(REFUSE_RENEWALS)
    try:
        wait_until(lambda: "leases could not be renewed" in worker.log.read_text(), what="a refused renewal")
    finally:
        running.execute(ADMIT_RENEWALS)

    view = running.ends(task_id)
    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)
    now = worker.keeper()
    assert now is not None
    assert now.pid == keeper.pid, "it did not have to be replaced"


def test_a_forged_name_disables_no_refusals(running: Service) -> None:
    keeper = running.process("worker").keeper()
    assert keeper is not None
    with redis.Redis.from_url(running.environment["REDIS_URL"]) as plain:
        for name in ("a\x00b", "\ud800", "x" * 100_000, "no.such.task"):
            forged = lifecycle.Bell(task_id=uuid4(), name=name, queue="default", attempt=0, position=1)
            plain.lpush("default", broker.encode(forged, "default"))
        wait_until(lambda: plain.llen("default") == 0, what="an empty queue")

    task_id = running.submit("sample.sleep", 0.0, countdown=3600)
    running.value("UPDATE task SET name = 'next.release', run_at = now() WHERE id = $1", task_id)

    wait_until(lambda: running.value("SELECT refusals FROM task WHERE id = $1", task_id) >= 1, what="a refusal")
    now = running.process("worker").keeper()
    assert now is not None
    assert now.pid == keeper.pid


def test_a_keeper_that_does_not_look_any_more_is_replaced(running: Service) -> None:
    worker = running.process("worker")
    keeper = worker.keeper()
    assert keeper is not None
    task_id = running.submit("sample.sleep", 12.0)
    running.reaches(task_id, "STARTED")
    keeper.suspend()
    # As if the worker's lease were 30 s: the same keeper, with less to wait for.
    running.value("UPDATE task SET lease_until = now() + interval '30 s' WHERE id = $1", task_id)

    wait_until(lambda: (found := worker.keeper()) and found.pid != keeper.pid, 20, "another keeper")

    view = running.ends(task_id)
    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)


@pytest.fixture
def step(settings: Settings, memory: Slots, monkeypatch: pytest.MonkeyPatch) -> Iterator[celery_app.KeeperStep]:
    """What a worker looks after its keeper with: this process is the worker."""
    for name, value in {
        "DATABASE_URL": settings.postgres_dsn,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_METRICS_PORT": "0",
        "TASKQUEUE_LEASE_SECONDS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(celery_app, "_loaded", settings.model_copy(update={"lease_seconds": 1.0}))
    monkeypatch.setattr(celery_app, "_shared", memory)
    pipe = metrics.Pipe()
    monkeypatch.setattr(celery_app, "_pipe", pipe)
    one = celery_app.KeeperStep(None)
    yield one
    if one._process is not None:
        one._process.kill()
        one._process.communicate()
    pipe.close()


def started(step: celery_app.KeeperStep) -> psutil.Process:
    """The keeper that is there after another look at it."""
    step._ensure()
    assert step._process is not None
    return psutil.Process(step._process.pid)


def test_a_keeper_that_starts_is_given_longer_than_one_that_falls_silent(
    step: celery_app.KeeperStep, memory: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_app, "KEEPER_SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(celery_app, "KEEPER_START_SECONDS", 3600.0)
    keeper = started(step)
    begun = memory.keeper_beat
    keeper.suspend()
    wait_until(lambda: time.monotonic() - begun > 0.5, what="more than a silence")
    assert started(step) == keeper
    keeper.resume()
    # Nobody looks after it until it has looked itself: on a busy machine it may fall silent again.
    wait_until(lambda: memory.keeper_beat > begun, 60, "its first look")
    keeper.suspend()
    wait_until(lambda: time.monotonic() - memory.keeper_beat > 0.5, what="its silence")
    wait_until(lambda: started(step) != keeper, 60, "another keeper")


def test_a_keeper_that_never_comes_to_look_is_replaced(
    step: celery_app.KeeperStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_app, "KEEPER_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(celery_app, "KEEPER_START_SECONDS", 0.5)
    keeper = started(step)
    keeper.suspend()
    wait_until(lambda: started(step) != keeper, 60, "another keeper")


@contextlib.contextmanager
def alone(settings: Settings, memory: Slots, worker_pid: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A keeper whose worker is somebody else, or this process."""
    given = {
        "DATABASE_URL": settings.postgres_dsn,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_METRICS_PORT": "0",
        "TASKQUEUE_LOG_FORMAT": "console",
    }
    command = [sys.executable, "-m", "app.worker.keeper", str(memory.fd), str(worker_pid)]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **given},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[memory.fd],
            bufsize=0,
        ) as keeper,
    ):
        try:
            yield keeper
        finally:
            keeper.kill()
            print(log.read_text())  # noqa: T201  # pytest shows it with a failure only


@pytest.fixture
def memory() -> Iterator[Slots]:
    made = Slots.create(concurrency=1)
    yield made
    os.close(made.fd)


def test_a_keeper_that_comes_when_its_worker_has_gone_ends_soon(
    settings: Settings, memory: Slots, tmp_path: Path
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    with alone(settings, memory, gone.pid, tmp_path / "log") as keeper:
        # It waits for 10 s at most even for slots that are taken; there are none. Starting is most of this time.
        assert keeper.wait(8) == 0


async def test_a_keeper_goes_on_with_refusals_after_lines_it_cannot_use(
    settings: Settings, memory: Slots, tmp_path: Path
) -> None:
    async with database.opened(settings) as postgres:
        task_id = await database.submitted(postgres, name="next.release")
        position = (await database.row(postgres, task_id))["position"]
        with alone(settings, memory, os.getpid(), tmp_path / "log") as keeper:
            assert keeper.stdin is not None
            for line in (
                "garbage",
                "[]",
                '{"refuse": {}}',
                _refusal("seven", "next.release"),
                _refusal(task_id, "next\x00release"),
                _refusal(task_id, "\ud800"),
                _refusal(task_id, "next.release", attempt=10**12),
                _refusal(task_id, "next.release", position=10**30),
                _refusal(task_id, "next.release", position=position),
            ):
                keeper.stdin.write(f"{line}\n".encode())

            async def refused() -> bool:
                return bool((await database.row(postgres, task_id))["refusals"])

            await until(refused, what="the refusal")
            assert keeper.poll() is None


def _refusal(task_id: UUID | str, name: str, *, attempt: int = 0, position: int = 0) -> str:
    return json.dumps({"refuse": {"id": str(task_id), "attempt": attempt, "name": name, "position": position}})


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any worker."""
    with subprocess.Popen(["sleep", "60"]) as started:
        yield started
        started.kill()


async def test_a_slot_whose_pid_is_somebody_else_s_by_now_is_buried_and_nobody_is_killed(
    settings: Settings, memory: Slots, bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async with database.opened(settings) as postgres:
        task_id = await database.submitted(postgres)
        claimed = await database.started(postgres, task_id)
        # Long past its limit, so that whoever has this pid would be killed.
        _occupy(memory, bystander.pid, claimed.claim, limit_seconds=0.001)
        with alone(settings, memory, os.getpid(), tmp_path / "log"):
            await until(lambda: not memory.all(), what="the burial")
        row = await database.row(postgres, task_id)

    assert bystander.poll() is None
    assert (row["status"], row["crashes"], row["failures"]) == ("RETRY", 1, 0)


def _occupy(memory: Slots, pid: int, claim: Claim, *, limit_seconds: float) -> None:
    """Take the first slot as a process with this pid would have, which was started at another time."""
    born = slots._look_up(pid)[1] - 1
    times = 1.0, limit_seconds, 0.0
    record = slots._RECORD.pack(pid, born, claim.task_id.bytes, claim.attempt, claim.token.bytes, *times)
    start = slots._HEADER
    raw = record + slots._SUM.pack(zlib.crc32(record))
    memory._memory[start : start + len(raw)] = raw

"""The keeper, when what it stands on gives way."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest
import redis

from app import broker, celery_app, lifecycle
from app.core import metrics
from app.core.config import Settings
from app.worker.desk import Desk
from tests.support import database
from tests.support.keepers import alone, occupy
from tests.support.service import Service
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
def step(settings: Settings, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Iterator[celery_app.KeeperStep]:
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
    monkeypatch.setattr(celery_app, "_shared", desk)
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
    step.ensure()
    assert step._process is not None
    return psutil.Process(step._process.pid)


def test_a_keeper_that_starts_is_given_longer_than_one_that_falls_silent(
    step: celery_app.KeeperStep, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_app, "KEEPER_SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(celery_app, "KEEPER_START_SECONDS", 3600.0)
    keeper = started(step)
    begun = desk.slots.keeper_beat
    keeper.suspend()
    wait_until(lambda: time.monotonic() - begun > 0.5, what="more than a silence")
    assert started(step) == keeper
    keeper.resume()
    # Nobody looks after it until it has looked itself: on a busy machine it may fall silent again.
    wait_until(lambda: desk.slots.keeper_beat > begun, 60, "its first look")
    keeper.suspend()
    wait_until(lambda: time.monotonic() - desk.slots.keeper_beat > 0.5, what="its silence")
    wait_until(lambda: started(step) != keeper, 60, "another keeper")


def test_a_worker_whose_keepers_do_not_last_is_broken(
    step: celery_app.KeeperStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_app, "KEEPER_ENDS", 2)
    monkeypatch.setattr(step, "_ends", deque(maxlen=2))
    for number in range(2):
        assert step.works(), number
        keeper = started(step)
        keeper.kill()
        keeper.wait()
        step.ensure()
    assert not step.works()
    monkeypatch.setattr(celery_app, "KEEPER_START_SECONDS", 0.01)
    wait_until(step.works, what="a while without an end")


def test_a_keeper_that_never_comes_to_look_is_replaced(
    step: celery_app.KeeperStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(celery_app, "KEEPER_SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(celery_app, "KEEPER_START_SECONDS", 0.5)
    keeper = started(step)
    keeper.suspend()
    wait_until(lambda: started(step) != keeper, 60, "another keeper")


def test_a_keeper_that_comes_when_its_worker_has_gone_ends_soon(settings: Settings, desk: Desk, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()

    with alone(settings, desk, gone.pid, tmp_path / "log") as keeper:
        # It waits for 10 s at most even for slots that are taken; there are none. Starting is most of this time.
        assert keeper.wait(8) == 0


HANG_ENDS = (
    """
    CREATE FUNCTION hang() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); RETURN NEW; END $$
    """,
    """
    CREATE CONSTRAINT TRIGGER hang AFTER UPDATE ON task DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (NEW.status <> 'STARTED') EXECUTE FUNCTION hang()
    """,
)


@pytest.fixture
def child() -> Iterator[int]:
    """The id of a process that lives."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


async def test_leases_are_renewed_while_the_ends_of_others_hang(
    settings: Settings, desk: Desk, child: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKQUEUE_LEASE_SECONDS", "3")
    async with database.opened(settings) as db:
        overdue = [await database.started(db, await database.submitted(db)) for _ in range(desk.slots.count - 1)]
        healthy = (await database.started(db, await database.submitted(db), lease_seconds=10.0)).claim
        for statement in HANG_ENDS:
            await db.execute(statement)
        for slot, one in enumerate(overdue, 1):
            occupy(desk, child, one.claim, limit_seconds=0.1, slot=slot, lives=True)
        occupy(desk, child, healthy, limit_seconds=0.0, started=time.monotonic(), lives=True)

        async def renewed() -> bool:
            sql = "SELECT lease_until - now() AS left, lease_until - started_at AS held FROM task WHERE id = $1"
            [(left, held)] = await db.fetch(sql, healthy.task_id)
            assert left.total_seconds() > 0.0
            return bool(held.total_seconds() > 18.0)

        with alone(settings, desk, os.getpid(), tmp_path / "log"):
            await until(renewed, 60, "renewals of many seconds")


async def test_a_keeper_goes_on_with_refusals_after_lines_it_cannot_use(
    settings: Settings, desk: Desk, tmp_path: Path
) -> None:
    async with database.opened(settings) as postgres:
        task_id = await database.submitted(postgres, name="next.release")
        position = (await database.row(postgres, task_id))["position"]
        with alone(settings, desk, os.getpid(), tmp_path / "log") as keeper:
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
    settings: Settings, desk: Desk, bystander: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    async with database.opened(settings) as postgres:
        task_id = await database.submitted(postgres)
        claimed = await database.started(postgres, task_id)
        # Long past its limit, so that whoever has this pid would be killed.
        occupy(desk, bystander.pid, claimed.claim, limit_seconds=0.001)
        with alone(settings, desk, os.getpid(), tmp_path / "log"):
            await until(lambda: not desk.slots.all(), what="the burial")
        row = await database.row(postgres, task_id)

    assert bystander.poll() is None
    assert (row["status"], row["crashes"], row["failures"]) == ("RETRY", 1, 0)

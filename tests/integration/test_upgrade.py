"""Two releases at once: their envelopes, their tables, and their processes on one queue (docs/upgrading.md)."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import redis
from celery import Celery

from app import broker, lifecycle, migrations
from app.broker import Broker
from app.core.config import Settings
from app.dev import ports
from app.relay import Relay
from app.utils.webhook import Sender
from tests.conftest import settings_for
from tests.support import previous
from tests.support.database import opened
from tests.support.receiver import Receiver
from tests.support.servers import apart
from tests.support.service import Service, service
from tests.support.waiting import wait_until


def environment(postgres: str, redis_url: str) -> dict[str, str]:
    [port] = ports.free_ports(1)
    return {
        "DATABASE_URL": postgres,
        "REDIS_URL": redis_url,
        "PORT": str(port),
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_SAMPLE_TASKS": "true",
        "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
        "TASKQUEUE_WEBHOOK_SCHEDULE": "0,1,1",
        "TASKQUEUE_METRICS_PORT": "0",
        "TASKQUEUE_CONCURRENCY": "2",
        "TASKQUEUE_LEASE_SECONDS": "10",  # a keeper that starts under load must not be too late
        "TASKQUEUE_GRACE_SECONDS": "4",
        "TASKQUEUE_LOG_FORMAT": "console",
    }


# --- Envelopes.

EMPTY_BODY = "W1tdLCB7fSwge31d"


def envelope(task_id: UUID, position: int, **headers: Any) -> dict[str, Any]:
    """What every version of the envelope says."""
    said = {"lang": "py", "task": "sample.echo", "id": str(task_id), "root_id": str(task_id), "retries": 0}
    return {
        "body": EMPTY_BODY,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {**said, "ignore_result": True, "attempt": 0, "position": position, **headers},
        "properties": {
            "correlation_id": str(task_id),
            "delivery_mode": 2,
            "priority": 0,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "default"},
            "delivery_tag": str(uuid4()),
        },
    }


def with_celery_s_limit(task_id: UUID, position: int) -> dict[str, Any]:
    """As the first API wrote it: Celery's own limit, and none of ours (commit 26e7a43)."""
    return envelope(task_id, position, timelimit=[60.0, None])


def without_a_version(task_id: UUID, position: int) -> dict[str, Any]:
    """As it was before it had a version (commit aa07726)."""
    return envelope(task_id, position, timelimit=[None, None], time_limit=None)


def of_today(task_id: UUID, position: int) -> dict[str, Any]:
    message = broker.Received(task_id=task_id, name="sample.echo", attempt=0, position=position)
    return broker.envelope(message, "default")


def with_more_than_we_know(task_id: UUID, position: int) -> dict[str, Any]:
    """As a later release may write it, which only adds."""
    found = of_today(task_id, position)
    found["headers"] |= {"tenant": "acme", "deadline": {"at": [1, 2]}}
    found["properties"]["sealed"] = True
    return found


def of_the_next_version(task_id: UUID, position: int) -> dict[str, Any]:
    found = of_today(task_id, position)
    found["headers"] |= {"version": broker.ENVELOPE_VERSION + 1}
    return found


def of_stock_celery(task_id: UUID, _: int) -> dict[str, Any]:
    """What a program publishes that knows Celery alone: arguments in the body, and neither attempt nor place."""
    found = of_today(task_id, 0)
    found["headers"] = Celery("stock", set_as_current=False).amqp.as_task_v2(str(task_id), "sample.echo", [1]).headers
    found["body"] = "W1sxXSwge30sIHt9XQ=="
    return found


UNDERSTOOD = (with_celery_s_limit, without_a_version, of_today, with_more_than_we_know)
REFUSED = (of_the_next_version, of_stock_celery)


async def _submitted(settings: Settings, count: int) -> list[lifecycle.Bell]:
    """Rows that count as published; nothing was pushed."""
    bells = []
    async with opened(settings) as database:
        for number in range(count):
            new = lifecycle.NewTask(
                id=uuid4(), name="sample.echo", queue="default", args=f"[{number}]", time_limit=60.0
            )
            bells.append(await lifecycle.submit(database, new))
    return [bell for bell in bells if bell is not None]


async def _republished(settings: Settings) -> int:
    """How many messages a relay without patience misses, and pushes again."""
    wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with opened(settings) as database, Sender.from_settings(settings) as sender:
        relay = Relay(settings, database, wire, sender, grace_seconds=0.0)
        await relay.note_tail("default")
        found = await relay.publish_lost("default")
    await wire.close()
    return found


def test_envelopes_of_other_releases_are_understood_or_cost_nothing(
    postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = settings_for(postgres_url, redis_url)
    with service(environment(postgres_url, redis_url), tmp_path) as running, redis.Redis.from_url(redis_url) as plain:
        worker = running.start_worker()
        kinds = (*UNDERSTOOD, *REFUSED)
        bells = asyncio.run(_submitted(settings, len(kinds)))
        envelopes = [kind(bell.task_id, bell.position) for kind, bell in zip(kinds, bells, strict=True)]
        nobody = of_stock_celery(uuid4(), 0)
        plain.lpush("default", *[json.dumps(one) for one in (nobody, *reversed(envelopes))])

        def statuses(bells: Sequence[lifecycle.Bell]) -> list[str]:
            sql = "SELECT status || ' after ' || attempt FROM task WHERE id = $1"
            return [str(running.value(sql, bell.task_id)) for bell in bells]

        understood, left = bells[: len(UNDERSTOOD)], bells[len(UNDERSTOOD) :]
        wait_until(lambda: set(statuses(understood)) == {"SUCCESS after 1"}, 20, "what is understood")
        wait_until(lambda: plain.llen("default") == 0, what="an empty queue")
        assert set(statuses(left)) == {"PENDING after 0"}
        assert running.value("SELECT count(*) FROM task") == len(bells), "a message makes no task"

        wait_until(lambda: asyncio.run(_republished(settings)) == len(left), what="the search for lost messages")
        wait_until(lambda: set(statuses(left)) == {"SUCCESS after 1"}, what="the tasks whose message was refused")
        assert worker.running()
        assert worker.log.read_text().count("of a later release") == 1, running.logs()


# --- Tables.


def test_a_release_whose_migration_has_yet_to_run_waits_for_it(
    empty_postgres_url: str, redis_url: str, tmp_path: Path
) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    before, needed = (one.revision for one in migrations.revisions()[-2:])
    apart(lambda: migrations.migrate(settings, revision=before))
    with service(environment(empty_postgres_url, redis_url), tmp_path) as running:
        waiting = [running.start("worker"), running.start("relay")]
        running.start("api")
        line = f"the tables are at {before}, not at {needed}: run taskqueue migrate"
        wait_until(lambda: all(line in one.log.read_text() for one in waiting), 30, "the line that says so")

        def readiness() -> dict[str, Any]:
            try:
                found: dict[str, Any] = running.http.get("/readyz").json()["checks"]
            except httpx.TransportError:
                return {}
            return found

        wait_until(lambda: readiness().get("migrations") == "missing", 30, "an API that is not ready")
        assert running.http.get("/readyz").status_code == 503
        answer = running.http.post("/api/tasks/submit", json={"task": "sample.echo", "args": [1]})
        assert answer.status_code in {202, 503}, "either may be: it depends on what the migration adds"
        assert not any(running.beat(name).exists() for name in ("worker", "relay"))

        apart(lambda: migrations.migrate(settings))
        wait_until(running.ready, 30, "an API that is ready")
        task_id = running.submit("sample.echo", 2)
        assert running.ends(task_id, 30)["status"] == "SUCCESS"
        assert sum(line in text for one in waiting for text in one.log.read_text().splitlines()) == 2, "once each"


# --- Processes.


@pytest.fixture(params=["app", "app/migrations/versions"], ids=["the_previous_code", "the_previous_tables"])
def old_code(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The newest commit with other code; and the newest with other tables, which may be the same."""
    try:
        found = previous.commit(request.param)
        if request.param != "app" and found == previous.commit("app"):
            pytest.skip("the newest commit with other code is the newest with other tables")
        return previous.check_out(found, tmp_path)
    except previous.NoHistoryError as none:
        pytest.skip(f"no earlier release to be had: {none}")


@pytest.fixture
def two(old_code: Path, empty_postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[tuple[Service, Service]]:
    """The old release and the new one, on the same Postgres and Redis, that have seen neither."""
    directories = [tmp_path / "old", tmp_path / "new"]
    for directory in directories:
        directory.mkdir()
    with (
        service(environment(empty_postgres_url, redis_url), directories[0], code=old_code) as old,
        service(environment(empty_postgres_url, redis_url), directories[1]) as new,
    ):
        yield old, new
        print(old.logs(), new.logs())  # noqa: T201  # pytest shows it with a failure only


def stop(release: Service, *commands: str) -> None:
    for process in release.processes:
        if process.command in commands:
            process.stop()


def kill_the_worker(release: Service) -> None:
    release.process("worker").signal(signal.SIGKILL)


def rounds_end_well(told: Receiver, *fronts: Service, cancels: bool) -> None:
    """Whatever may become of a task becomes of it, whoever runs it, and its webhook arrives."""
    for front in fronts:
        expected: dict[UUID, tuple[str, int | None]] = {}
        for number in range(4):
            expected[front.submit("sample.echo", number, webhook_url=told.url)] = ("SUCCESS", 1)
        for _ in range(4):
            expected[front.submit("sample.flaky", 2, webhook_url=told.url)] = ("SUCCESS", 3)
        expected[front.submit("sample.fail", "no", max_retries=1, webhook_url=told.url)] = ("FAILURE", 2)
        expected[front.submit("sample.crash", webhook_url=told.url)] = ("FAILURE", 3)
        expected[front.submit("sample.echo", "late", countdown=0.5, webhook_url=told.url)] = ("SUCCESS", 1)
        if cancels:
            asleep = front.submit("sample.sleep", 60, webhook_url=told.url)
            front.reaches(asleep, "STARTED", seconds=30)
            assert front.http.post(f"/api/tasks/{asleep}/cancel").status_code in {200, 202}
            expected[asleep] = ("REVOKED", 1)
        for task_id, end in expected.items():
            view = front.ends(task_id, 40)
            assert (view["status"], view["attempt"]) == end, view
        arrive(told, expected)


def arrive(told: Receiver, tasks: Iterable[UUID]) -> None:
    """Wait until the receiver has heard of each of these."""
    wanted = {str(task_id) for task_id in tasks}
    wait_until(lambda: wanted <= {json.loads(one.body)["data"]["task_id"] for one in told.requests}, 20, "the webhooks")


def is_taken_over(told: Receiver, front: Service, leaving: Service, leave: Callable[[], None]) -> None:
    """What a worker of one release ran when it went, that of the other runs again, and finishes."""
    tasks = [front.submit("sample.sleep", 12, webhook_url=told.url) for _ in range(4)]
    for task_id in tasks:
        front.reaches(task_id, "STARTED", seconds=30)
    worker = leaving.process("worker").pid
    hit = {task_id for task_id in tasks if front.child_of(task_id).ppid() == worker}
    assert len(hit) == 2, "two slots each"
    leave()
    for task_id in tasks:
        view = front.ends(task_id, 60)
        assert (view["status"], view["attempt"]) == ("SUCCESS", 2 if task_id in hit else 1), view
    arrive(told, tasks)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rolling_upgrade_and_the_way_back(two: tuple[Service, Service]) -> None:
    old, new = two
    cancels = "/cancel" in (old.code / "app" / "routers" / "tasks.py").read_text()
    assert old.run("migrate") == 0
    with Receiver() as told:
        old.start_all()
        rounds_end_well(told, old, cancels=cancels)

        assert new.run("migrate") == 0
        rounds_end_well(told, old, cancels=cancels)

        new.start_all()
        rounds_end_well(told, old, new, cancels=cancels)

        # Crosswise: what one release submits and tells of, the other runs.
        is_taken_over(told, old, old, lambda: stop(old, "worker"))
        stop(new, "api", "relay")
        rounds_end_well(told, old, cancels=cancels)
        old.start_all("worker")
        stop(old, "api", "relay")
        new.start_all("api", "relay")
        is_taken_over(told, new, new, lambda: kill_the_worker(new))
        rounds_end_well(told, new, cancels=cancels)

        # And back: the code goes, the tables stay.
        stop(new, "api", "relay")
        assert old.run("migrate") == 0
        old.start_all("api", "relay")
        rounds_end_well(told, old, cancels=cancels)
    assert new.run("verify") == 0

"""One running service for all the tests of a module, which may say otherwise in its `ENVIRONMENT`."""

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest

from app.dev import ports
from app.worker.desk import Desk
from tests.support import servers
from tests.support.servers import Servers
from tests.support.service import Service, service


def environment(postgres: str, redis: str, port: int) -> dict[str, str]:
    return {
        "DATABASE_URL": postgres,
        "REDIS_URL": redis,
        "PORT": str(port),
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_SAMPLE_TASKS": "true",
        "TASKQUEUE_TASK_MODULES": "tests.support.odd_tasks",
        "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
        "TASKQUEUE_METRICS_PORT": "0",
        "TASKQUEUE_CONCURRENCY": "2",
        "TASKQUEUE_LEASE_SECONDS": "3",
        "TASKQUEUE_GRACE_SECONDS": "4",
        "TASKQUEUE_LOG_FORMAT": "console",
    }


@pytest.fixture(scope="module")
def module_service(
    request: pytest.FixtureRequest,
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    [port] = ports.free_ports(1)
    with servers.database(session_servers.postgres, template=migrated_template) as postgres:
        own: dict[str, str] = getattr(request.module, "ENVIRONMENT", {})
        settings = environment(postgres, next(session_redis_databases), port) | own
        with service(settings, tmp_path_factory.mktemp("service")) as running:
            running.start_all()
            yield running


@pytest.fixture
def running(module_service: Service) -> Iterator[Service]:
    """The service; what its processes logged is shown if the test fails."""
    yield module_service
    print(module_service.logs())  # noqa: T201  # pytest shows it with a failure only


def spent(running: Service, task_id: UUID) -> list[int]:
    """Failures, crashes and losses of a task."""
    found: list[int] = running.value("SELECT ARRAY[failures, crashes, losses] FROM task WHERE id = $1", task_id)
    return found


def outcome(view: dict[str, Any]) -> tuple[str, str | None, int]:
    """Status, type of error, and attempts, of what is known of a task."""
    return view["status"], (view["error"] or {}).get("type"), view["attempt"]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk.create(concurrency=1)
    yield made
    made.close()

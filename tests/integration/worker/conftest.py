"""One running service for all the tests of a module."""

from collections.abc import Iterator

import pytest

from app.dev import ports
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
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    [port] = ports.free_ports(1)
    with servers.database(session_servers.postgres, template=migrated_template) as postgres:
        settings = environment(postgres, next(session_redis_databases), port)
        with service(settings, tmp_path_factory.mktemp("service")) as running:
            running.start_all()
            yield running


@pytest.fixture
def running(module_service: Service) -> Iterator[Service]:
    """The service; what its processes logged is shown if the test fails."""
    yield module_service
    print(module_service.logs())  # noqa: T201  # pytest shows it with a failure only

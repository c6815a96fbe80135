"""A running service whose spans go to a collector of the test's."""

from collections.abc import Iterator

import pytest

from app.dev import ports
from tests.integration.worker.conftest import environment
from tests.support import otlp, servers
from tests.support.otlp import Collector
from tests.support.servers import Servers
from tests.support.service import Service, service

TRACED = {
    "TASKQUEUE_TASK_MODULES": "tests.support.traced_tasks,tests.support.odd_tasks",
    "TASKQUEUE_LOG_FORMAT": "json",
    "TASKQUEUE_WEBHOOK_SCHEDULE": "0 0.1 0.1",
    "OTEL_BSP_SCHEDULE_DELAY": "50",
}


@pytest.fixture(scope="module")
def module_collector() -> Iterator[Collector]:
    with otlp.collector() as one:
        yield one


@pytest.fixture(scope="module")
def module_service(  # noqa: PLR0917  # all of them fixtures
    request: pytest.FixtureRequest,
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
    module_collector: Collector,
) -> Iterator[Service]:
    [port] = ports.free_ports(1)
    with servers.database(session_servers.postgres, template=migrated_template) as postgres:
        own: dict[str, str] = getattr(request.module, "ENVIRONMENT", {})
        settings = environment(postgres, next(session_redis_databases), port) | TRACED
        settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": module_collector.url} | own
        with service(settings, tmp_path_factory.mktemp("service")) as running:
            running.start_all()
            yield running


@pytest.fixture
def running(module_service: Service) -> Iterator[Service]:
    """The service; what its processes logged is shown if the test fails."""
    yield module_service
    print(module_service.logs())  # noqa: T201  # pytest shows it with a failure only


@pytest.fixture
def collector(module_collector: Collector) -> Collector:
    return module_collector

"""What every test may ask for: a database, a Redis, settings."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from app import migrations
from app.core.config import Settings, variables
from tests.faults import audit
from tests.support import servers
from tests.support.servers import Servers, SessionServers

SESSION_SERVERS = pytest.StashKey[SessionServers]()


def pytest_configure(config: pytest.Config) -> None:
    for variable in variables():  # what a developer has set must not change what a test sees
        os.environ.pop(variable, None)
    config.stash[SESSION_SERVERS] = SessionServers()
    config.pluginmanager.register(_FaultLines(config))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[SESSION_SERVERS].close()


class _FaultLines:
    """Prints each line of the fault table as soon as it is known: a run that is interrupted has told of what it did."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.when == "call" and terminal is not None and not hasattr(self._config, "workerinput"):
            for name, text in report.user_properties:
                if name == "fault":
                    terminal.ensure_newline()
                    terminal.write_line(str(text))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the lines of the fault table, wherever their tests ran, and what of it was skipped."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    lines = [text for report in reports for name, text in getattr(report, "user_properties", ()) if name == "fault"]
    skipped = [
        audit.skipped(report.nodeid, report.longrepr)
        for report in terminalreporter.stats.get("skipped", ())
        if report.nodeid.startswith("tests/faults/")
    ]
    if lines or skipped:
        terminalreporter.section("faults")
    if lines:
        terminalreporter.write_line(audit.HEADER)
    for line in dict.fromkeys([*lines, *skipped]):
        terminalreporter.write_line(line)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell an xdist worker where the servers are (called in the controller, before the worker starts)."""
    started = node.config.stash[SESSION_SERVERS].started()
    node.workerinput["postgres"], node.workerinput["redis"] = started.postgres, started.redis


@pytest.fixture(scope="session")
def session_servers(request: pytest.FixtureRequest) -> Servers:
    given = getattr(request.config, "workerinput", None)
    if given is not None:
        return Servers(postgres=given["postgres"], redis=given["redis"])
    return request.config.stash[SESSION_SERVERS].started()


@pytest.fixture(scope="session")
def migrated_template(session_servers: Servers) -> Iterator[str]:
    """The name of a migrated database that others are copied from."""
    with servers.database(session_servers.postgres) as url:
        servers.apart(lambda: migrations.migrate(settings_for(url, session_servers.redis)))
        yield url.rpartition("/")[2]


@pytest.fixture(scope="session")
def session_redis_databases(session_servers: Servers, request: pytest.FixtureRequest) -> Iterator[str]:
    given = getattr(request.config, "workerinput", {"workerid": "gw0"})
    return servers.redis_databases(session_servers.redis, int(given["workerid"].removeprefix("gw")))


@pytest.fixture
def postgres_url(session_servers: Servers, migrated_template: str) -> Iterator[str]:
    """A migrated database of this test alone."""
    with servers.database(session_servers.postgres, template=migrated_template) as url:
        yield url


@pytest.fixture
def empty_postgres_url(session_servers: Servers) -> Iterator[str]:
    """A database of this test alone, without any table."""
    with servers.database(session_servers.postgres) as url:
        yield url


@pytest.fixture
def redis_url(session_redis_databases: Iterator[str]) -> str:
    """An empty Redis database of this test alone."""
    return next(session_redis_databases)


@pytest.fixture
def settings(postgres_url: str, redis_url: str) -> Settings:
    """Settings for this test's own servers: no authentication, the sample tasks registered."""
    return settings_for(postgres_url, redis_url)


def settings_for(postgres: str, redis: str, **others: object) -> Settings:
    given = {
        "DATABASE_URL": postgres,
        "REDIS_URL": redis,
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_SAMPLE_TASKS": True,
        **others,
    }
    return Settings.model_validate(given)

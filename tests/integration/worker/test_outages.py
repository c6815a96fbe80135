"""What becomes of running and waiting tasks while Postgres or Redis can't be reached."""

import contextlib
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import psutil
import pytest

from app.dev import ports
from tests.integration.worker.conftest import environment
from tests.support import servers
from tests.support.proxy import Proxy, proxied
from tests.support.servers import Servers
from tests.support.service import Service, service
from tests.support.stream import Stream
from tests.support.waiting import until, wait_until

GRACE_SECONDS = 4.0


@pytest.fixture(scope="module")
def database_url(session_servers: Servers, migrated_template: str) -> Iterator[str]:
    with servers.database(session_servers.postgres, template=migrated_template) as url:
        yield url


@pytest.fixture(scope="module")
def postgres_network(database_url: str) -> Iterator[Proxy]:
    """Between Postgres and the worker and the relay; the API has a network of its own."""
    with proxied(database_url) as network:
        yield network


@pytest.fixture(scope="module")
def redis_network(session_redis_databases: Iterator[str]) -> Iterator[Proxy]:
    """Between Redis and all the others."""
    with proxied(next(session_redis_databases)) as network:
        yield network


@pytest.fixture(scope="module")
def module_service(
    database_url: str, postgres_network: Proxy, redis_network: Proxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The service behind the two networks. Its lease is 3 s, its grace 4 s."""
    [port] = ports.free_ports(1)
    behind = {"DATABASE_URL": postgres_network.url}
    with service(
        environment(database_url, redis_network.url, port),
        tmp_path_factory.mktemp("service"),
        {"worker": behind, "relay": behind},
    ) as started:
        started.start_all()
        yield started
        for network in (postgres_network, redis_network):
            network.restore()


@pytest.fixture
def postgres(postgres_network: Proxy) -> Iterator[Proxy]:
    yield postgres_network
    postgres_network.restore()


@pytest.fixture
def redis(redis_network: Proxy) -> Iterator[Proxy]:
    yield redis_network
    redis_network.restore()


def passed(seconds: float, since: float) -> None:
    """Wait until so many seconds have passed since a moment of the monotonic clock."""
    wait_until(lambda: time.monotonic() - since >= seconds, seconds + 1, "the time")


def logged(running: Service, what: str, seen: int = 0) -> None:
    """Wait until the worker has logged something more often than `seen` times."""
    wait_until(lambda: count(running, what) > seen, 20, f"{what!r} in the worker's log")


def count(running: Service, what: str) -> int:
    return running.process("worker").log.read_text().count(what)


def test_a_task_that_finished_in_time_is_not_past_its_limit_because_postgres_was_away(
    running: Service, postgres: Proxy
) -> None:
    waits = count(running, "a settle waits for Postgres")
    task_id = running.submit("sample.sleep", 1.0, time_limit=2.0)
    began = time.monotonic()
    running.reaches(task_id, "STARTED")
    child = running.child_of(task_id)
    postgres.cut()
    logged(running, "a settle waits for Postgres", waits)
    # Frozen, so that all depends on the keeper: it must not use the time that has passed against this task.
    child.suspend()
    try:
        passed(6, began)
        postgres.restore()
        view = running.ends(task_id)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.resume()

    assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 1, 0)
    assert child.is_running(), "nor is its process killed"
    assert child.status() != psutil.STATUS_ZOMBIE


def test_a_task_goes_on_through_an_outage_of_postgres_longer_than_its_lease(running: Service, postgres: Proxy) -> None:
    task_id = running.submit("sample.sleep", 10.0)
    running.reaches(task_id, "STARTED")
    keeper = running.process("worker").keeper()
    assert keeper is not None
    postgres.cut()
    cut = time.monotonic()
    passed(6, cut)
    # Frozen, so that the relay sees the lease that ran out before the keeper can renew it.
    keeper.suspend()
    try:
        postgres.restore()
        passed(7.5, cut)
    finally:
        keeper.resume()

    view = running.ends(task_id)
    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)
    assert running.value("SELECT losses FROM task WHERE id = $1", task_id) == 0


def test_a_message_that_is_popped_while_postgres_is_away_is_not_dropped(running: Service, postgres: Proxy) -> None:
    worker = running.process("worker")
    waits = count(running, "a claim waits for Postgres")
    worker.signal(signal.SIGSTOP)
    try:
        before = [running.submit("sample.echo", number) for number in range(4)]
        postgres.cut()
    finally:
        worker.signal(signal.SIGCONT)
    logged(running, "a claim waits for Postgres", waits + 1)
    during = running.submit("sample.echo", 4)

    postgres.restore()

    # Sooner than the search for lost messages, which needs a grace of 10 s, could have brought them back.
    views = [running.ends(task_id, 8) for task_id in [*before, during]]
    assert [(view["status"], view["attempt"]) for view in views] == [("SUCCESS", 1)] * 5


def test_a_claim_in_a_black_hole_ends_with_its_timeout_and_is_repeated(running: Service, postgres: Proxy) -> None:
    children = running.process("worker").children()
    running.ends(running.submit("sample.echo", 0))
    postgres.black_hole()
    began = time.monotonic()
    tasks = [running.submit("sample.echo", number) for number in range(4)]
    passed(5, began)

    postgres.restore(revive=False)

    views = [running.ends(task_id, 20) for task_id in tasks]
    assert [(view["status"], view["attempt"]) for view in views] == [("SUCCESS", 1)] * 4
    assert time.monotonic() - began < 25
    assert all(child.is_running() for child in children)


def test_a_worker_whose_reports_wait_for_postgres_ends_with_its_grace(running: Service, postgres: Proxy) -> None:
    worker = running.process("worker")
    children = worker.children()
    waits = count(running, "a settle waits for Postgres")
    task_id = running.submit("sample.sleep", 1.0)
    running.reaches(task_id, "STARTED")
    postgres.cut()
    logged(running, "a settle waits for Postgres", waits)

    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    try:
        worker.wait(GRACE_SECONDS + 5)
        took = time.monotonic() - began
        wait_until(lambda: not any(map(_alive, children)), 5, "the end of its children")
        postgres.restore()
        # Its keeper is still there, and writes what was reported.
        view = running.ends(task_id)
    finally:
        postgres.restore()
        running.start_worker()

    assert GRACE_SECONDS - 1 < took < GRACE_SECONDS + 2
    assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 1, 0)
    spent = running.value("SELECT ARRAY[losses, crashes] FROM task WHERE id = $1", task_id)
    assert spent == [0, 0]


def _alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_a_submit_while_redis_is_away_is_accepted_at_once_and_runs_when_it_is_back(
    running: Service, redis: Proxy
) -> None:
    redis.cut()
    began = time.monotonic()
    tasks = [running.submit("sample.echo", number) for number in range(3)]
    assert time.monotonic() - began < 2
    assert {running.status(task_id) for task_id in tasks} == {"PENDING"}

    redis.restore()

    # Again sooner than the search for lost messages.
    views = [running.ends(task_id, 8) for task_id in tasks]
    assert [(view["status"], view["attempt"]) for view in views] == [("SUCCESS", 1)] * 3


@pytest.mark.parametrize("fault", ["cut", "black_hole"])
def test_a_worker_that_waits_for_redis_says_so_and_looks_after_its_keeper(
    running: Service, redis: Proxy, fault: str
) -> None:
    # Probes look at its files: it is not ready, and starting it again would help nobody.
    beat, wait = running.beat("worker"), running.beat("worker").with_suffix(".wait")
    task_id = running.submit("sample.sleep", 14.0)
    running.reaches(task_id, "STARTED")
    getattr(redis, fault)()
    seen = time.time()
    # One that hears nothing learns after some time, from its sockets, that nobody is there.
    wait_until(lambda: wait.exists() and wait.stat().st_mtime > seen, 40, "its saying that it waits")
    last_beat, keeper = beat.stat().st_mtime, running.process("worker").keeper()
    assert keeper is not None
    keeper.kill()
    wait_until(
        lambda: (found := running.process("worker").keeper()) and found.pid != keeper.pid, 20, "the keeper after it"
    )
    assert beat.stat().st_mtime == last_beat

    redis.restore()

    wait_until(lambda: beat.stat().st_mtime > last_beat, 20, "its beat")
    view = running.ends(task_id, 40)
    assert (view["status"], view["attempt"], view["failures"]) == ("SUCCESS", 1, 0)


def test_a_relay_that_waits_for_postgres_says_so(running: Service, postgres: Proxy) -> None:
    beat, wait = running.beat("relay"), running.beat("relay").with_suffix(".wait")
    postgres.cut()
    seen = time.time()
    wait_until(lambda: wait.exists() and wait.stat().st_mtime > seen, 20, "its saying that it waits")
    last_beat = beat.stat().st_mtime
    postgres.restore()
    wait_until(lambda: beat.stat().st_mtime > last_beat, 20, "its beat")


@pytest.mark.parametrize("fault", ["cut", "black_hole"])
async def test_what_a_task_logs_while_redis_is_away_is_told_when_its_attempt_has_ended(
    running: Service, redis: Proxy, tmp_path: Path, fault: str
) -> None:
    mark = tmp_path / "go on"
    task_id = running.submit("odd.talks", str(mark), 2)
    async with httpx.AsyncClient(base_url=running.http.base_url, timeout=30) as client:
        stream = Stream(client, task_id)
        await until(lambda: len(stream.logged()) == 2, 20, "the lines that Redis brings")
        getattr(redis, fault)()
        mark.touch()
        events = await stream.ended()
    assert [number for _, number, _ in stream.logged()] == [1, 2, 3, 4]
    assert (events[-1][0], events[-1][2]["status"]) == ("end", "SUCCESS")
    view = running.view(task_id)
    began, ended = (datetime.fromisoformat(view[name]) for name in ("started_at", "finished_at"))
    assert (ended - began).total_seconds() < 15, "nor does the task wait for Redis"


@pytest.mark.parametrize(("revive", "freeze"), [(True, True), (False, False)], ids=["answers late", "forgotten"])
def test_a_task_goes_on_through_a_black_hole_longer_than_its_lease(
    running: Service, postgres: Proxy, revive: bool, freeze: bool
) -> None:
    task_id = running.submit("sample.sleep", 14.0)
    running.reaches(task_id, "STARTED")
    keeper = running.process("worker").keeper()
    assert keeper is not None
    postgres.black_hole()
    began = time.monotonic()
    passed(5, began)
    if freeze:
        keeper.suspend()
    postgres.restore(revive=revive)
    passed(6.5, began)
    if freeze:
        keeper.resume()

    view = running.ends(task_id, 40)

    assert (view["status"], view["attempt"]) == ("SUCCESS", 1)
    assert running.value("SELECT losses FROM task WHERE id = $1", task_id) == 0

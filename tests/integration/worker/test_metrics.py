"""What the three processes export while tasks run, fail, crash and are killed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from app.dev import ports
from tests.integration.worker.conftest import environment
from tests.support import servers
from tests.support.receiver import Receiver
from tests.support.scraping import Scrape
from tests.support.servers import Servers
from tests.support.service import Service, service
from tests.support.waiting import wait_until

SECONDS = 60.0
PATIENT = {"TASKQUEUE_LEASE_SECONDS": "120"}
"""A worker that gives its keeper 40 s to start, however busy the machine is: a third of a lease."""


class Watched:
    """A running service, and where its processes show their metrics."""

    def __init__(self, running: Service, metrics_ports: dict[str, int]) -> None:
        self.running = running
        self.ports = metrics_ports
        self.before: dict[str, Scrape] = {}

    def begin(self) -> None:
        """Count from here: other tests have used this service."""
        self.before = {process: self.look(process) for process in self.ports}

    def grown(self, process: str, name: str, **labels: str) -> float:
        """By how much the sum of some series has grown since `begin`."""
        return self.look(process).total(name, **labels) - self.before[process].total(name, **labels)

    def look(self, process: str) -> Scrape:
        return Scrape(self.ports[process])

    def reaches(self, process: str, wanted: float, name: str, **labels: str) -> None:
        """Wait until the sum of some series has grown by what it should, and no more."""
        wait_until(lambda: self.grown(process, name, **labels) >= wanted, SECONDS, f"{name} {labels}")
        assert self.grown(process, name, **labels) == wanted, (name, labels)


ATTEMPTS = "taskqueue_task_attempts_total"
"""Each test waits for those that it has made: they are counted a moment after they have ended."""


def answers(port: int) -> bool:
    try:
        Scrape(port)
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def watched(
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    http, *others = ports.free_ports(4)
    metrics_ports = dict(zip(("api", "worker", "relay"), others, strict=True))
    changes = {name: {"TASKQUEUE_METRICS_PORT": str(port)} for name, port in metrics_ports.items()}
    with servers.database(session_servers.postgres, template=migrated_template) as postgres:
        given = environment(postgres, next(session_redis_databases), http) | PATIENT
        with service(given, tmp_path_factory.mktemp("service"), changes) as running:
            running.start_all()
            for port in others:
                wait_until(lambda port=port: answers(port), SECONDS, "the metrics")  # type: ignore[misc]
            yield Watched(running, metrics_ports)
            print(running.logs())  # noqa: T201  # pytest shows it with a failure only


def test_every_outcome_is_counted_once(watched: Watched) -> None:
    running = watched.running
    watched.begin()
    with Receiver() as receiver:
        good = [running.submit("sample.echo", n, webhook_url=receiver.url) for n in range(3)]
        flaky = running.submit("sample.flaky", 1)
        failed = running.submit("odd.raise", "memory")
        timed_out = running.submit("sample.sleep", 60.0, time_limit=0.5)
        crashing = running.submit("odd.log", "die", max_retries=0)
        waiting = running.submit("sample.sleep", 60.0, countdown=3600)
        assert running.http.post(f"/api/tasks/{waiting}/cancel").status_code == 200
        for one in (*good, flaky, failed, timed_out):
            running.ends(one, SECONDS)
        finished = "taskqueue_tasks_finished_total"
        watched.reaches("worker", 3, ATTEMPTS, task="sample.echo", outcome="succeeded", queue="default")
        watched.reaches("worker", 3, finished, task="sample.echo", outcome="succeeded")
        watched.reaches("worker", 1, ATTEMPTS, task="sample.flaky", outcome="retried")
        watched.reaches("worker", 1, ATTEMPTS, task="sample.flaky", outcome="succeeded")
        watched.reaches("worker", 1, finished, task="sample.flaky", outcome="succeeded")
        watched.reaches("worker", 1, ATTEMPTS, task="odd.raise", outcome="failed")
        watched.reaches("worker", 1, ATTEMPTS, task="sample.sleep", outcome="timed_out")
        watched.reaches("worker", 1, finished, task="sample.sleep", outcome="timed_out")
        wait_until(lambda: watched.grown("worker", ATTEMPTS, task="odd.log", outcome="lost") >= 1, SECONDS, "the crash")
        running.ends(crashing, SECONDS)
        watched.reaches("worker", 3, ATTEMPTS, task="odd.log", outcome="lost")
        watched.reaches("worker", 1, finished, task="odd.log", outcome="lost")
        watched.reaches("api", 1, finished, task="sample.sleep", outcome="cancelled")
        watched.reaches("relay", 3, "taskqueue_webhook_deliveries_total", outcome="delivered")
        watched.reaches("relay", 3, "taskqueue_webhook_attempts_total", outcome="success")
        watched.reaches("relay", 3, "taskqueue_webhook_delivery_delay_seconds_count")

    started = watched.grown("worker", "taskqueue_task_attempts_started_total")
    assert started == watched.grown("worker", ATTEMPTS) == 3 + 2 + 1 + 1 + 3
    assert watched.grown("worker", "taskqueue_task_exceptions_total", exception="WorkerLost", task="odd.log") == 3
    assert watched.grown("worker", "taskqueue_task_exceptions_total", exception="SampleError", task="sample.flaky") == 1
    assert watched.grown("worker", "taskqueue_task_queue_wait_seconds_count", task="sample.echo") == 3
    assert (
        watched.grown("worker", "taskqueue_task_run_duration_seconds_count", task="sample.echo", outcome="succeeded")
        == 3
    )
    limit = watched.grown("worker", "taskqueue_task_run_duration_seconds_sum", task="sample.sleep", outcome="timed_out")
    assert 0.5 <= limit < 10
    end_to_end = watched.grown("worker", "taskqueue_task_end_to_end_seconds_sum", task="sample.flaky")
    assert end_to_end > 0.0
    now = watched.look("worker")
    assert now.total("taskqueue_worker_slots", pool="default") == 2
    assert now.total("taskqueue_worker_queue_info", pool="default", queue="default") == 1
    assert now.total("process_resident_memory_bytes") > 0


def test_counters_are_there_before_anything_has_happened(watched: Watched) -> None:
    """Else the first of a kind would be no increase."""
    found = watched.look("worker")
    for outcome in ("succeeded", "lost", "timed_out"):
        assert found.of("taskqueue_task_attempts_total", task="sample.large", queue="default", outcome=outcome)
    assert watched.look("api").of("taskqueue_tasks_submitted_total", task="sample.large", outcome="accepted")
    assert watched.look("api").of("taskqueue_submit_rejected_total", reason="backpressure")
    assert watched.look("relay").of("taskqueue_reconciler_recovered_total", reason="stale_running")


def test_requests_are_measured_by_their_route(watched: Watched) -> None:
    running = watched.running
    watched.begin()
    task_id = running.submit("sample.sleep", 0.0)
    running.ends(task_id, SECONDS)
    watched.reaches("worker", 1, ATTEMPTS, task="sample.sleep", outcome="succeeded")
    assert running.http.get("/api/nowhere/at/all").status_code == 404
    assert running.http.post("/api/tasks/submit", json={"task": "nobody"}).status_code == 422
    assert running.http.request("PROPFIND", "/healthz").status_code == 405

    found = watched.look("api")
    name = "http_server_request_duration_seconds_count"
    assert found.total(name, http_route="/api/tasks/{id}/status", http_response_status_code="200") >= 1
    assert found.total(name, http_route="/api/tasks/submit", http_request_method="POST") >= 1
    assert found.total(name, http_route="/api/tasks/submit", http_response_status_code="422") >= 1
    assert found.total(name, http_route="", http_response_status_code="404") >= 1
    assert found.total(name, http_request_method="_OTHER") >= 1
    assert str(task_id) not in found.text
    assert found.total("taskqueue_submit_rejected_total", reason="unknown_task") >= 1
    assert found.total("http_server_active_requests") == 0
    assert found.of("taskqueue_db_pool_connections", state="idle")
    assert found.total("taskqueue_outbox_published_total", outcome="sent", kind="task") >= 1
    assert found.total("taskqueue_submit_payload_bytes_count", task="sample.sleep") >= 1


def test_only_the_relay_exports_the_state_of_the_queues(watched: Watched) -> None:
    names = ("taskqueue_queue_depth", "taskqueue_tasks", "taskqueue_queue_oldest_message_age_seconds")
    wait_until(
        lambda: all(watched.look("relay").of(name, queue="default") for name in names), SECONDS, "the relay's export"
    )
    found = watched.look("relay")
    assert {one.labels["state"] for one in found.of("taskqueue_tasks")} == {"PENDING", "SCHEDULED", "HELD", "STARTED"}
    assert found.total("taskqueue_queue_latency_objective_seconds", queue="default") == 30
    assert found.of("taskqueue_state_exporter_last_success_timestamp_seconds")
    assert found.of("taskqueue_relay_sweep_duration_seconds_count", sweep="publish")
    for process in ("api", "worker"):
        elsewhere = watched.look(process)
        assert not [name for name in names if elsewhere.of(name)]


def test_what_happens_while_the_keeper_is_away_is_counted(watched: Watched) -> None:
    worker = watched.running.process("worker")
    keeper = worker.keeper()
    assert keeper is not None
    watched.begin()
    # Stopped, it hears nothing; killed, the next one hears what was asked meanwhile.
    keeper.send_signal(signal.SIGSTOP)
    submitted = [watched.running.submit("sample.large", 10) for _ in range(5)]
    keeper.kill()
    for one in submitted:
        watched.running.ends(one, SECONDS)
    wait_until(lambda: answers(watched.ports["worker"]), SECONDS, "the next keeper")
    watched.reaches("worker", 5, ATTEMPTS, task="sample.large", outcome="succeeded")
    assert watched.look("worker").total("taskqueue_metric_events_dropped_total") == 0


def test_messages_of_tasks_that_are_held_are_no_redeliveries(watched: Watched) -> None:
    running = watched.running
    watched.begin()
    busy = [running.submit("sample.sleep", 1.0) for _ in range(2)]
    for task_id in busy:
        running.reaches(task_id, "STARTED", seconds=SECONDS)
    waiting = [running.submit("sample.sleep", 0.0) for _ in range(5)]
    assert running.http.post("/api/queues/default/pause").is_success
    try:
        for task_id in busy:
            running.ends(task_id, SECONDS)
        wait_until(lambda: running.http.get("/api/queues/default").json()["held"] == 5, SECONDS, "five that are held")
    finally:
        assert running.http.post("/api/queues/default/resume").is_success
    for task_id in waiting:
        running.ends(task_id, SECONDS)
    watched.reaches("worker", 7, ATTEMPTS, task="sample.sleep", outcome="succeeded")
    assert watched.grown("worker", "taskqueue_task_redeliveries_total") == 0


def test_a_keeper_that_is_replaced_is_counted(watched: Watched) -> None:
    name = "taskqueue_worker_keeper_starts_total"
    before = watched.look("worker").total(name)
    keeper = watched.running.process("worker").keeper()
    assert keeper is not None
    keeper.kill()

    def counted() -> bool:
        return answers(watched.ports["worker"]) and watched.look("worker").total(name) != before

    wait_until(counted, SECONDS, "the next keeper")
    assert watched.look("worker").total(name) == before + 1
    watched.running.ends(watched.running.submit("sample.sleep", 0.0), SECONDS)


def replace_children(watched: Watched, rounds: int) -> None:
    """Kill both children of the pool, and wait until they are replaced, so many times."""
    worker, name = watched.running.process("worker"), "taskqueue_worker_child_starts_total"
    for _ in range(rounds):
        watched.begin()
        for child in worker.children():
            child.kill()
        watched.reaches("worker", 2, name)


def stays_flat(watched: Watched, rounds: int) -> None:
    running = watched.running
    worker = psutil.Process(running.process("worker").pid)
    keeper = running.process("worker").keeper()
    assert keeper is not None
    running.ends(running.submit("sample.sleep", 0.0), SECONDS)
    replace_children(watched, 1)
    before, files = watched.look("worker").series(), worker.num_fds() + keeper.num_fds()

    replace_children(watched, rounds)
    running.ends(running.submit("sample.sleep", 0.0), SECONDS)
    watched.reaches("worker", 1, ATTEMPTS, task="sample.sleep", outcome="succeeded")

    assert watched.look("worker").series() == before
    # A connection may be in the making.
    assert worker.num_fds() + keeper.num_fds() <= files + 4
    written = {path.name for path in Path(running.directory).rglob("*") if path.suffix == ".db"}
    assert written == set()
    assert running.process("worker").keeper() == keeper


def test_children_that_come_and_go_leave_no_series_and_no_files(watched: Watched) -> None:
    stays_flat(watched, rounds=2)


@pytest.mark.slow  # two hundred children die, and Celery takes a second or more to replace two
@pytest.mark.timeout(840)
def test_two_hundred_children_leave_no_series_and_no_files(watched: Watched) -> None:
    stays_flat(watched, rounds=100)

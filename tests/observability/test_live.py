"""Every expression of the dashboards and the rules, asked of a real Prometheus that has watched the real service.

What it has seen: a success, a retry, a failure, a crash, webhooks that were taken
and not, a submit that was refused, and a Redis that was away for a while.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.dev import environment, ports
from tests.integration.worker.conftest import environment as variables
from tests.observability import expressions
from tests.support import otlp, servers
from tests.support.otlp import Collector
from tests.support.prometheus import MISSING, Prometheus
from tests.support.proxy import Proxy, proxied
from tests.support.receiver import Receiver
from tests.support.servers import Servers
from tests.support.service import Service, service
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(600),
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
]

SECONDS = 120.0
CHOICES = {
    "$__rate_interval": "10m",
    "$__range": "10m",
    "$namespace": "local",
    "$queue": ".*",
    "$task": ".*",
    "$job": ".*",
}

HEALTHY = {
    "TaskqueueSubmitErrorBudgetBurn": "no submit was answered with a 5xx: Redis is not needed for one",
    "TaskqueueStartLatencyErrorBudgetBurn": "no attempt began 30 s late",
    "TaskqueueQueueStalled": "attempts begin",
    "TaskqueueQueueHasNoWorkers": "there is a worker",
    "TaskqueueQueueLatencyHigh": "the queue is not late",
    "TaskqueueQueueGrowing": "the queue is short",
    "TaskqueueWorkerPoolSaturated": "the worker has room",
    "TaskqueueWorkerLost": "a child has died, but no worker",
    "TaskqueueTaskStuckRunning": "no task has a limit",
    "TaskqueueTaskFailureRatioHigh": "20 tasks have not ended",
    "TaskqueueOutboxLagHigh": "Redis was away for less than a minute",
    "TaskqueueWebhookFailureRatioHigh": "50 webhooks were not sent",
    "TaskqueueWebhookBacklogOld": "webhooks are sent",
    "TaskqueueTargetDown": "every process answers",
    "TaskqueueStateExporterStale": "the relay works",
    "TaskqueueMetricsMissing": "the targets are there",
}
"""Alerts whose expressions have no value, and why that is right here. What they are made of has values all the same."""
EMPTY_PANELS = {
    "taskqueue-queues / Longest running attempt, and the limit / B": "no task of the queue has a limit for all of them",
}
"""Expressions of panels that have no value, and why that is right here."""
MAY_OR_MAY_NOT = {
    "TaskqueueRetryStorm": "one in a few attempts is retried, and how many there are depends on the crash",
    "TaskqueueOutboxPublishErrors": "how often a push was tried while Redis was away depends on the machine",
    "TaskqueueDeadLetterGrowing": "failed tasks are counted once a minute, so its hour may have one value only",
}
"""Alerts whose expressions have a value or none; not looked at any further."""
NEVER_SEEN = {
    "taskqueue_task_time_limit_seconds": "a task without a limit waits in the queue, so the queue has none",
    'http_response_status_code=~"5.."': "no submit was answered with a 5xx: Redis is not needed for one",
}
"""Parts of selectors that rightly find nothing, and why."""


class Watched:
    """The service, its network to Redis, and what watches it."""

    def __init__(self, running: Service, redis: Proxy, prometheus: Prometheus, collector: Collector) -> None:
        self.running = running
        self.redis = redis
        self.prometheus = prometheus
        self.collector = collector


@pytest.fixture(scope="module")
def watched(
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("observed")
    http, *others = ports.free_ports(4)
    metrics_ports = dict(zip(environment.PROCESSES, others, strict=True))
    changes = {name: {environment.METRICS_PORT: str(port)} for name, port in metrics_ports.items()}
    (directory / environment.TARGETS_FILE).write_text(environment.targets(metrics_ports))
    with (
        servers.database(session_servers.postgres, template=migrated_template) as postgres,
        proxied(next(session_redis_databases)) as redis,
        Prometheus(directory, directory / environment.TARGETS_FILE, _quick(directory)) as prometheus,
        otlp.collector() as collector,
        service(
            variables(postgres, redis.url, http) | SETTINGS | {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url},
            tmp_path_factory.mktemp("service"),
            changes,
        ) as running,
    ):
        running.start_all()
        prometheus.reaches('count(up{job=~"taskqueue-.+"} == 1) == 3', SECONDS)
        # Two looks at least at what was there before anything happened: else nothing could be seen to grow.
        prometheus.reaches("min(count_over_time(taskqueue_build_info[1m])) >= 2", SECONDS)
        watched = Watched(running, redis, prometheus, collector)
        _live_a_little(watched)
        yield watched


SETTINGS = {
    "TASKQUEUE_WEBHOOK_SCHEDULE": "0,1",
    "TASKQUEUE_LEASE_SECONDS": "10",
    "OTEL_BSP_SCHEDULE_DELAY": "100",
}


def _quick(directory: Path) -> list[Path]:
    """The rules, evaluated each second."""
    copies = []
    for path in expressions.RULES:
        text = path.read_text()
        copies.append(directory / path.name)
        copies[-1].write_text(text.replace("interval: 30s", "interval: 1s"))
    assert "interval: 1s" in (directory / "recording.yaml").read_text()
    return copies


def _live_a_little(watched: Watched) -> None:
    """Everything that is to be seen on a dashboard happens once."""
    running, prometheus = watched.running, watched.prometheus
    with Receiver() as taking, Receiver(lambda _: 500) as refusing:
        crashed = running.submit("sample.crash", max_retries=0)
        succeeded = running.submit("sample.echo", 1, webhook_url=taking.url)
        retried = running.submit("sample.flaky", 1)
        failed = running.submit("sample.fail", max_retries=0, webhook_url=refusing.url)
        assert running.http.post("/api/tasks/submit", json={"task": "nobody.knows"}).status_code == 422
        assert running.http.get("/nowhere").status_code == 404
        assert running.ends(succeeded, SECONDS)["status"] == "SUCCESS"
        assert running.ends(retried, SECONDS)["attempt"] == 2
        assert running.ends(failed, SECONDS)["status"] == "FAILURE"
        prometheus.reaches('taskqueue_webhook_deliveries_total{outcome="delivered"} > 0', SECONDS)
        prometheus.reaches('taskqueue_webhook_deliveries_total{outcome="exhausted"} > 0', SECONDS)
        prometheus.reaches('sum(taskqueue_task_attempts_total{outcome="lost"}) > 0', SECONDS)
        running.http.post(f"/api/tasks/{crashed}/cancel")
        watched.redis.cut()
        waiting = running.submit("sample.echo", 2)
        prometheus.reaches('sum(taskqueue_outbox_published_total{outcome="error"}) > 0', SECONDS)
        prometheus.reaches('taskqueue_state_exporter_errors_total{source="redis"} > 0', SECONDS)
        wait_until(lambda: not prometheus.values("taskqueue_queue_depth"), SECONDS, "no depth of an unread queue")
        watched.redis.restore()
        assert running.ends(waiting, SECONDS)["status"] == "SUCCESS"
        # What can't be known beforehand, such as the name of an exception, is seen to grow the second time.
        failed = running.submit("sample.fail", max_retries=0)
        assert running.ends(failed, SECONDS)["status"] == "FAILURE"
        prometheus.reaches("taskqueue_queue_depth", SECONDS)


def _chosen(text: str) -> str:
    for variable, value in CHOICES.items():
        text = text.replace(variable, value)
    return text


def test_every_panel_has_something_to_show(watched: Watched) -> None:
    asked = list(expressions.of_panels())
    assert len(asked) > 80
    empty = [one for one in asked if one.where not in EMPTY_PANELS]
    assert len(asked) - len(empty) == len(EMPTY_PANELS)

    def shown() -> bool:
        nonlocal empty
        empty = [one for one in empty if not watched.prometheus.values(_chosen(one.text))]
        return not empty

    try:
        wait_until(shown, 30.0, "something on every panel")
    except AssertionError:
        pytest.fail("\n".join(f"{one.where}: {_chosen(one.text)}" for one in empty))


def test_the_points_of_latency_panels_lead_to_traces(watched: Watched) -> None:
    marked = list(expressions.with_exemplars())
    assert marked
    for one in marked:
        end = time.time()
        found = watched.prometheus.ask("query_exemplars", query=_chosen(one.text), start=str(end - 600), end=str(end))
        traces = {point["labels"]["trace_id"] for series in found for point in series["exemplars"]}
        assert traces, one.where
        # The newest of them may be on its way to the collector still.
        wait_until(lambda: traces <= {span.trace for span in watched.collector.spans}, 30, one.where)  # noqa: B023  # now


def test_every_variable_has_values_to_choose(watched: Watched) -> None:
    for one, label in expressions.of_variables():
        found = watched.prometheus.ask(f"label/{label}/values", **{"match[]": _chosen(one.text)})
        assert found, one.where


def test_every_rule_that_records_has_a_value(watched: Watched) -> None:
    for rule in expressions.rules("record"):
        watched.prometheus.reaches(rule["expr"])
        watched.prometheus.reaches(rule["record"])


def test_every_alert_can_be_asked_and_is_made_of_what_there_is(watched: Watched) -> None:
    for alert in expressions.rules("alert"):
        name, expression = alert["alert"], alert["expr"]
        found = watched.prometheus.values(expression)
        assert name in HEALTHY or name in MAY_OR_MAY_NOT or found, expression
        assert not (name in HEALTHY and found), expression
        for selector in expressions.selectors(expression):
            if not any(part in selector for part in NEVER_SEEN):
                watched.prometheus.reaches(selector)


def test_what_went_wrong_has_woken_somebody(watched: Watched) -> None:
    watched.prometheus.reaches('ALERTS{alertname="TaskqueueWorkerProcessLost",alertstate="firing"}')
    [alert] = [
        one
        for one in watched.prometheus.ask("alerts")["alerts"]
        if one["labels"]["alertname"] == "TaskqueueWorkerProcessLost"
    ]
    assert alert["labels"]["task"] == "sample.crash"
    assert alert["annotations"]["summary"] == "A process died under sample.crash"
    assert alert["annotations"]["dashboard_url"] == (
        "/d/taskqueue-tasks?var-namespace=local&var-queue=default&var-task=sample.crash"
    )


def test_what_is_said_to_be_empty_is_there_to_be_empty() -> None:
    names = {alert["alert"] for alert in expressions.rules("alert")}
    assert set(HEALTHY) | set(MAY_OR_MAY_NOT) <= names
    assert not set(HEALTHY) & set(MAY_OR_MAY_NOT)
    written = " ".join(alert["expr"] for alert in expressions.rules("alert"))
    written += " ".join(rule["expr"] for rule in expressions.rules("record"))
    assert [part for part in NEVER_SEEN if part not in written] == []

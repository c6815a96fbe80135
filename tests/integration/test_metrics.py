"""The API's metrics, on their own port."""

import socket
import subprocess
import sys
import urllib.request

import httpx
import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics

from app.core import errors, metrics
from tests.support.service import ROOT


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def test_metrics_are_served_until_closed() -> None:
    port = free_port()
    metrics.submitted("long_task", "default")
    close = metrics.serve(port, "api")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'taskqueue_tasks_submitted_total{task="long_task",queue="default",outcome="accepted"}' in text
    assert "taskqueue_build_info{" in text
    close()
    metrics.serve(port, "api")()


def test_both_formats_are_what_the_parsers_of_the_standards_read() -> None:
    metrics.request_ended("GET", '/odd/"\\\n', "200", 0.2, "0" * 31 + "1")
    metrics.request_ended("GET", '/odd/"\\\n', "200", 70.0, None)
    metrics.accepted_payload("odd", 10)
    metrics.submitted("odd", "default")
    port = free_port()
    close = metrics.serve(port, "api")
    address = f"http://127.0.0.1:{port}/metrics"
    answer = httpx.get(address, headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    modern = {one.name: one for one in openmetrics.text_string_to_metric_families(answer.text)}  # type: ignore[no-untyped-call]  # as it is
    answer = httpx.get(address)
    assert answer.headers["content-type"].startswith("text/plain")
    plain = {one.name: one for one in parser.text_string_to_metric_families(answer.text)}
    close()
    name = "http_server_request_duration_seconds"
    found = {
        one.labels["le"]: one
        for one in modern[name].samples
        if one.name.endswith("_bucket") and one.labels["http_route"] == '/odd/"\\\n'
    }
    assert [found[bound].value for bound in ("0.1", "0.25", "10.0", "+Inf")] == [0, 1, 1, 2]
    assert found["0.25"].exemplar is not None
    assert (found["0.25"].exemplar.labels, found["0.25"].exemplar.value) == ({"trace_id": "0" * 31 + "1"}, 0.2)
    assert {(one.name, frozenset(one.labels.items()), one.value) for one in modern[name].samples} == {
        (one.name, frozenset(one.labels.items()), one.value) for one in plain[name].samples
    }
    assert plain["taskqueue_submit_payload_bytes"].type == "histogram"
    assert modern["taskqueue_tasks_submitted"].type == plain["taskqueue_tasks_submitted"].type == "counter"
    assert "process_resident_memory_bytes" in modern


def test_a_look_at_a_worker_with_a_hundred_tasks_is_quick() -> None:
    # In a process of its own, whose metrics are these alone. The quickest look counts: others may have had to wait.
    code = "from benchmarks.metrics import TARGET_LOOK_SECONDS, looks; print(min(looks(100, 5)) / TARGET_LOOK_SECONDS)"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0 < float(said.stdout) < 1


def test_a_port_that_is_taken_stops_the_process_with_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104  # where the metrics would listen
        taken.listen()
        with pytest.raises(errors.SettingsError, match="TASKQUEUE_METRICS_PORT is wrong: "):
            metrics.serve(taken.getsockname()[1], "api")


def test_port_zero_serves_none() -> None:
    metrics.serve(0, "api")()

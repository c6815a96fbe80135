"""The API's metrics, on their own port."""

import socket
import urllib.request

import pytest

from app.core import errors, metrics


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def test_metrics_are_served_until_closed() -> None:
    port = free_port()
    metrics.submitted("long_task", "default")
    close = metrics.serve(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'taskqueue_tasks_submitted_total{outcome="accepted",queue="default",task="long_task"}' in text
    assert "taskqueue_build_info{" in text
    close()
    metrics.serve(port)()


def test_a_port_that_is_taken_stops_the_process_with_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104  # where the metrics would listen
        taken.listen()
        with pytest.raises(errors.SettingsError, match="TASKQUEUE_METRICS_PORT is wrong: "):
            metrics.serve(taken.getsockname()[1])


def test_port_zero_serves_none() -> None:
    metrics.serve(0)()

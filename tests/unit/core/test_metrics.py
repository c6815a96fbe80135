"""What is counted, under which names, and how children tell it."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core import errors, metrics
from app.core.errors import FieldError
from app.core.metrics import catalogue, forwarding, happenings, page
from app.core.metrics.instruments import BY_NAME, Few, Gauges
from tests.support.scraping import sampled

ROOT = Path(__file__).parents[3]
SUFFIXES = {"counter": "_total", "gauge": "", "histogram": ""}


def value(name: str, **labels: str) -> float:
    return sampled(name, **labels) or 0.0


@pytest.fixture(autouse=True)
def nothing_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "_dropped", 0)


@pytest.fixture
def pipe() -> Iterator[metrics.Pipe]:
    made = metrics.Pipe()
    made.forward()
    yield made
    made.close()


def test_the_page_is_what_the_catalogue_says() -> None:
    assert (ROOT / "docs/metrics.md").read_text() == page.page(), "run make metrics"


def test_names_follow_the_conventions_of_prometheus() -> None:
    names = [metric.name for metric in catalogue.METRICS]
    assert len(set(names)) == len(names)
    for metric in catalogue.METRICS:
        assert re.fullmatch(r"(taskqueue|http_server)_[a-z_]+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert not metric.name.endswith("_count"), metric.name
        assert (metric.buckets == ()) == (metric.kind != "histogram"), metric.name
        assert list(metric.buckets) == sorted(metric.buckets), metric.name
        assert metric.says.endswith(".")
        assert metric.do.endswith(".")
        assert not {"pod", "user", "url", "task_id", "trace_id", "le"} & set(metric.labels), metric.name


def test_every_call_that_the_catalogue_names_exists() -> None:
    text = (ROOT / "docs/openapi.json").read_text()
    named = re.findall(r"`(?:GET|POST) (/api/[^`?]+)", " ".join(metric.do for metric in catalogue.METRICS))
    assert named
    assert [path for path in named if f'"{path}"' not in text] == []


def test_what_a_child_tells_is_counted_where_it_is_read(pipe: metrics.Pipe) -> None:
    name, labels = "taskqueue_task_attempts_total", {"task": "a.b", "queue": "q", "outcome": "failed"}
    before = value(name, **labels)
    metrics.attempt_started("a.b", "q", 0.5)
    metrics.attempt_ended("a.b", "q", "failed", "ValueError", 0.25)
    assert value(name, **labels) == before
    assert metrics.Reader(pipe.reader).absorb() == 2
    forwarding._outlet = None
    assert value(name, **labels) == before + 1
    assert metrics.Reader(pipe.reader).absorb() == 0


def test_a_line_that_is_read_in_two_parts_is_counted_once(pipe: metrics.Pipe) -> None:
    reader = metrics.Reader(pipe.reader)
    before = value("taskqueue_task_redeliveries_total", queue="halves")
    os.write(pipe.writer, b'["redelivered","hal')
    assert reader.absorb() == 0
    os.write(pipe.writer, b'ves"]\n')
    assert reader.absorb() == 1
    assert value("taskqueue_task_redeliveries_total", queue="halves") == before + 1


@pytest.mark.parametrize(
    "line",
    [b"garbage", b"[]", b'["_no_such"]', b'["redelivered"]', b'["redelivered","a","b"]', b"\xff\x00", b"{}", b"7"],
)
def test_a_line_that_nobody_understands_spoils_no_other(pipe: metrics.Pipe, line: bytes) -> None:
    before = value("taskqueue_task_redeliveries_total", queue="after")
    os.write(pipe.writer, line + b'\n["redelivered","after"]\n')
    metrics.Reader(pipe.reader).absorb()
    assert value("taskqueue_task_redeliveries_total", queue="after") == before + 1


def test_with_nobody_to_read_events_are_dropped_and_counted(pipe: metrics.Pipe) -> None:
    reader, name = metrics.Reader(pipe.reader), "taskqueue_metric_events_dropped_total"
    for _ in range(60_000):
        metrics.redelivered("full")
    before = value(name)
    assert reader.absorb() > 0
    metrics.redelivered("full")
    while reader.absorb():
        pass
    assert value(name) - before > 0
    assert value(name) - before + value("taskqueue_task_redeliveries_total", queue="full") == 60_001


def test_a_file_that_a_task_opened_in_the_place_of_the_pipe_is_not_written_to(tmp_path: Path) -> None:
    made = metrics.Pipe()
    made.forward()
    with (tmp_path / "own").open("wb") as own:
        os.dup2(own.fileno(), made.writer)
        metrics.redelivered("stranger")
    made.close()
    assert (tmp_path / "own").read_bytes() == b""


def test_silenced_nothing_is_counted() -> None:
    before = value("taskqueue_task_redeliveries_total", queue="silent")
    metrics.silence()
    try:
        metrics.redelivered("silent")
    finally:
        forwarding._outlet = None
    assert value("taskqueue_task_redeliveries_total", queue="silent") == before


def test_names_beyond_the_first_so_many_are_one() -> None:
    few = Few(2, others="unknown")
    assert [few(word) for word in ("a", "b", "c", "a", "", "d")] == ["a", "b", "unknown", "a", "unknown", "unknown"]


@pytest.mark.parametrize("name", ["a b", "x" * 65, "", 'a"b', "\ud800", "1a"])
def test_an_exception_that_has_no_proper_name_is_another_one(name: str) -> None:
    before = value("taskqueue_task_exceptions_total", task="odd", exception="other")
    metrics.attempt_ended("odd", "q", "failed", name, None)
    assert value("taskqueue_task_exceptions_total", task="odd", exception="other") == before + 1


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (errors.ValidationFailed([FieldError("/kwargs/x", "wrong")]), "validation"),
        (errors.ValidationFailed([FieldError("/task", "No such task")]), "unknown_task"),
        (errors.ValidationFailed([FieldError("/tasks/3/task", "No such task")]), "unknown_task"),
        (errors.MalformedBody("no JSON"), "validation"),
        (errors.Unauthenticated(shown=True), "unauthenticated"),
        (errors.Forbidden("tasks:write"), "forbidden"),
        (errors.QuotaExceeded("spent"), "rate_limited"),
        (errors.PayloadTooLarge("large"), "payload_too_large"),
        (errors.IdempotencyKeyReused(), "idempotency_conflict"),
        (errors.ServiceUnavailable("full"), "backpressure"),
    ],
)
def test_a_refusal_has_a_word(problem: errors.RequestError, reason: str) -> None:
    assert happenings.reason_of(problem) == reason
    assert reason in catalogue.REJECTIONS


def test_every_refusal_has_a_word_of_the_catalogue() -> None:
    assert set(happenings._REASONS.values()) <= set(catalogue.REJECTIONS)


def test_a_group_that_can_not_be_read_is_gone_and_not_zero() -> None:
    name = "taskqueue_queue_depth"
    with metrics.collecting("redis", "test") as show:
        show(name, 7, "here")
        show(name, 0, "empty")
    assert sampled(name, queue="here") == 7
    assert sampled(name, queue="empty") == 0
    failed = value("taskqueue_state_exporter_errors_total", source="redis")
    with pytest.raises(errors.BrokerUnavailable), metrics.collecting("redis", "test"):
        raise errors.BrokerUnavailable
    assert sampled(name, queue="here") is None
    assert value("taskqueue_state_exporter_errors_total", source="redis") == failed + 1


def test_a_queue_that_is_not_there_any_more_is_not_shown() -> None:
    name = "taskqueue_queue_depth"
    for queue in ("old", "new"):
        with metrics.collecting("redis", "renamed") as show:
            show(name, 1, queue)
    assert sampled(name, queue="old") is None
    with metrics.collecting("redis", "renamed"):
        pass


def test_a_gauge_is_shown_with_the_labels_that_it_has() -> None:
    gauges = Gauges()
    with pytest.raises(ValueError, match="no gauge with 2 labels"):
        gauges.show("taskqueue_queue_depth", ("a", "b"), 1.0)
    with pytest.raises(ValueError, match="no gauge with 1 labels"):
        gauges.show("taskqueue_task_redeliveries_total", ("a",), 1.0)
    assert BY_NAME["taskqueue_queue_depth"].kind == "gauge"


def test_the_time_limit_of_a_queue_is_the_longest_and_none_if_a_task_has_none() -> None:
    def limit() -> float | None:
        return sampled("taskqueue_task_time_limit_seconds", queue="limited")

    metrics.expect_runs("limit.a", "limited", 10.0)
    metrics.expect_runs("limit.b", "limited", 60.0)
    assert limit() == 60
    metrics.expect_runs("limit.c", "limited", None)
    assert limit() is None


def test_what_is_expected_is_there_and_empty_and_is_not_begun_anew() -> None:
    metrics.expect_runs("awaited", "tomorrow", 1.0)
    called = "taskqueue_task_queue_wait_seconds_count"
    assert sampled(called, task="awaited", queue="tomorrow") == 0
    metrics.attempt_started("awaited", "tomorrow", 0.5)
    metrics.expect_runs("awaited", "tomorrow", 1.0)
    assert sampled(called, task="awaited", queue="tomorrow") == 1
    assert sampled("taskqueue_metric_events_dropped_total") is not None
    metrics.expect_requests()
    assert sampled("taskqueue_api_turned_away_total", reason="scope") is not None
    assert sampled("taskqueue_outbox_publish_delay_seconds_count", kind="task") is not None
    metrics.expect_sweeps(["success"])
    assert sampled("taskqueue_webhook_delivery_delay_seconds_count") is not None
    assert sampled("taskqueue_webhook_attempt_duration_seconds_count", outcome="success") is not None

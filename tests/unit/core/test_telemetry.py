"""Logs that people and machines can read, and a trace context for every task."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry import trace

from app.core import collector, telemetry
from app.core.config import Settings
from tests.conftest import settings_for

SENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FRESH = re.compile("00-[0-9a-f]{32}-[0-9a-f]{16}-00")


def offline(**others: object) -> Settings:
    return settings_for("postgresql://nowhere/none", "redis://nowhere/0", **others)


@pytest.fixture(autouse=True)
def root_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    for handler in [own for own in root.handlers if isinstance(own, telemetry._Stderr)]:
        root.removeHandler(handler)
    root.setLevel(level)


def test_json_logs_are_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(offline(TASKQUEUE_LOG_FORMAT="json"), "api")
    try:
        Path("no such page").read_text()
    except OSError:
        logging.getLogger("app.x").exception("it %s\nhere", "failed", extra={"task_id": "abc", "other": {1}})
    (line,) = capsys.readouterr().err.splitlines()
    said = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", said["time"])
    assert (said["level"], said["process"], said["logger"]) == ("ERROR", "api", "app.x")
    assert (said["message"], said["task_id"], said["other"]) == ("it failed\nhere", "abc", "{1}")
    assert "FileNotFoundError" in said["exception"]


def test_json_logs_name_the_trace(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(offline(TASKQUEUE_LOG_FORMAT="json"), "api")
    context = trace.SpanContext(trace_id=1, span_id=2, is_remote=False)
    with trace.use_span(trace.NonRecordingSpan(context)):
        logging.getLogger("app.x").info("here")
    assert json.loads(capsys.readouterr().err)["trace_id"] == f"{1:032x}"


def test_console_logs_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(offline(TASKQUEUE_LOG_FORMAT="console"), "api")
    logging.getLogger("app.x").info("it works")
    logging.getLogger("app.x").debug("unheard")
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO +app\.x it works\n", capsys.readouterr().err)


def test_without_a_terminal_logs_are_json_and_servers_join_them(capsys: pytest.CaptureFixture[str]) -> None:
    server = logging.getLogger("uvicorn.error")
    server.addHandler(logging.StreamHandler(io.StringIO()))
    server.propagate = False
    for _ in range(2):
        telemetry.configure_logging(offline(), "api")
    server.warning("once")
    assert [json.loads(line)["logger"] for line in capsys.readouterr().err.splitlines()] == ["uvicorn.error"]


def test_urls_that_are_called_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging(offline(TASKQUEUE_LOG_LEVEL="DEBUG"), "relay")
    logging.getLogger("httpx").info("HTTP Request: POST https://example.com/secret")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "sent",
    [None, "", "nonsense", SENT.upper(), SENT + "0", SENT + "-more", "ff" + SENT[2:], SENT[:-1],
     "00-" + "0" * 32 + SENT[35:], SENT[:36] + "0" * 16 + "-01"],
)  # fmt: skip
def test_what_is_no_trace_context_is_replaced_by_a_new_one(sent: str | None) -> None:
    headers = {} if sent is None else {"traceparent": sent}
    first, second = telemetry.current_traceparent(headers), telemetry.current_traceparent(headers)
    assert FRESH.fullmatch(first)
    assert first != second


@pytest.mark.parametrize(("sent", "kept"), [(SENT, SENT), (f" {SENT} ", SENT), ("01" + SENT[2:] + "-more", SENT)])
def test_a_trace_context_that_was_sent_goes_on(sent: str, kept: str) -> None:
    assert telemetry.current_traceparent({"traceparent": sent}) == kept


def test_the_span_of_the_request_comes_first() -> None:
    context = trace.SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert telemetry.current_traceparent({"traceparent": SENT}) == f"00-{1:032x}-{2:016x}-01"


@pytest.mark.parametrize("endpoint", ["http://otel:4318", "http://otel:4318/", "http://otel:4318/v1/traces"])
def test_traces_go_to_the_collectors_own_path(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert collector.traces_url(endpoint) == "http://otel:4318/v1/traces"


def test_without_a_collector_nothing_is_traced() -> None:
    before = trace.get_tracer_provider()
    telemetry.configure(offline(), "api")
    assert trace.get_tracer_provider() is before

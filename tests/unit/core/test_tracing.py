"""Spans that find each other without anything being stored, and what decides whether they are recorded."""

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, ParentBased, Sampler

from app.core import collector, telemetry, tracing

TASK = UUID("01a20052-0fac-7683-91bf-d784f53d9d18")
HOOK = UUID("dc10c911-1a35-4b51-9d41-588d7d47a185")
SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"
FACTS = (
    '{"type": "task.succeeded", "timestamp": "2026-01-31T12:00:00.000Z",'
    f' "data": {{"task_id": "{TASK}", "attempt": 2, "created_at": null}}}}'
)


@pytest.fixture
def exported() -> Iterator[InMemorySpanExporter]:
    """What this process records, with ids as everywhere."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(id_generator=collector.Ids(), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.record(provider.get_tracer("test"))
    yield exporter
    tracing.record(None)


def attempt(number: int, traceparent: str | None = SAMPLED) -> tracing.Attempt:
    return tracing.Attempt(task_id=TASK, number=number, task="t", queue="q", traceparent=traceparent)


def ids(spans: tuple[ReadableSpan, ...]) -> list[int]:
    return [one.get_span_context().span_id for one in spans]  # type: ignore[union-attr]  # every span has one


def test_an_attempt_is_found_by_whoever_knows_its_number(exported: InMemorySpanExporter) -> None:
    for number in (1, 2):
        span = attempt(number).begin(waited_seconds=1.5)
        tracing.end(span, outcome="succeeded", status="SUCCESS", error_type=None)
    first, second = exported.get_finished_spans()
    assert first.links == ()
    assert [link.context.span_id for link in second.links] == ids((first,))
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == SAMPLED[36:52]
    assert first.attributes == {
        "messaging.system": "celery", "messaging.operation.name": "process", "messaging.operation.type": "process",
        "messaging.destination.name": "q", "messaging.message.id": str(TASK), "taskqueue.task.name": "t",
        "taskqueue.attempt": 1, "taskqueue.queue_wait_ms": 1500.0, "taskqueue.outcome": "succeeded",
        "taskqueue.task.status": "SUCCESS",
    }  # fmt: skip


def test_an_attempt_that_began_by_a_clock_that_is_ahead_has_taken_no_time(exported: InMemorySpanExporter) -> None:
    ahead = datetime.fromtimestamp(time.time() + 60, UTC)
    tracing.end(attempt(1).begin(began=ahead), outcome="lost", status="RETRY", error_type="WorkerLost")
    [span] = exported.get_finished_spans()
    assert (span.end_time, span.status.description) == (span.start_time, "WorkerLost")


@pytest.mark.parametrize("traceparent", [None, "", "x", UNSAMPLED])
def test_what_was_not_sampled_is_not_recorded_anywhere(exported: InMemorySpanExporter, traceparent: str | None) -> None:
    span = attempt(1, traceparent).begin()
    tracing.end(span, outcome="succeeded", status="SUCCESS", error_type=None)
    hook = tracing.Webhook(traceparent, webhook_id=HOOK, attempt=1, url="https://a.example/x")
    hook.end(status_code=200, error_type=None, event="task.succeeded", facts=FACTS)
    with tracing.send("q", [attempt(1, traceparent)]), tracing.create("q") as made:
        assert made is None
    assert hook.traceparent == traceparent
    assert exported.get_finished_spans() == ()
    # The context goes on all the same.
    with tracing.current(span):
        assert telemetry.current_traceparent({})[3:35] == (traceparent or "")[3:35] or traceparent != UNSAMPLED


def test_a_webhook_belongs_to_the_attempt_that_caused_it(exported: InMemorySpanExporter) -> None:
    for number in (1, 2):
        hook = tracing.Webhook(SAMPLED, webhook_id=HOOK, attempt=number, url="https://u:p@a.example/x?sig=1")
        hook.end(status_code=None, error_type="timeout", event="task.succeeded", facts=FACTS)
    tracing.end(attempt(2).begin(), outcome="succeeded", status="SUCCESS", error_type=None)
    event, first, second, process = exported.get_finished_spans()
    assert [one.name for one in (event, first, second, process)] == ["create webhook", "POST", "POST", "process q"]
    assert [one.parent and one.parent.span_id for one in (event, first, second)] == ids((process, event, event))
    assert [link.context.span_id for link in second.links] == ids((first,))
    assert event.start_time == event.end_time == int(datetime(2026, 1, 31, 12, tzinfo=UTC).timestamp() * 1e9)
    assert "sig" not in str(dict(first.attributes or {}))
    assert "p@" not in str(dict(first.attributes or {}))


def test_the_webhook_of_a_revoked_task_belongs_to_its_submit(exported: InMemorySpanExporter) -> None:
    hook = tracing.Webhook(SAMPLED, webhook_id=HOOK, attempt=1, url="https://a.example/")
    hook.end(status_code=200, error_type=None, event="task.revoked", facts=FACTS)
    event = exported.get_finished_spans()[0]
    assert event.parent is not None
    assert f"{event.parent.span_id:016x}" == SAMPLED[36:52]


def test_a_webhook_that_was_broken_off_is_not_told_of(exported: InMemorySpanExporter) -> None:
    tracing.Webhook(SAMPLED, webhook_id=HOOK, attempt=1, url="https://a.example/")
    assert exported.get_finished_spans() == ()


def test_a_push_that_fails_is_told_of_in_every_trace(exported: InMemorySpanExporter) -> None:
    other = SAMPLED.replace("0af7", "1af7")
    messages = [attempt(1), attempt(2), attempt(1, other), attempt(1, UNSAMPLED)]
    with pytest.raises(OSError, match="gone"), tracing.send("q", messages):
        raise OSError("gone")
    spans = exported.get_finished_spans()
    assert {(one.attributes or {}).get("messaging.batch.message_count") for one in spans} == {None, 2}
    assert {(one.attributes or {})["error.type"] for one in spans} == {"OSError"}


@pytest.mark.parametrize(
    ("caller", "inner", "wanted"),
    [
        (None, ALWAYS_ON, True), (None, ALWAYS_OFF, False),
        (SAMPLED, ALWAYS_ON, True), (SAMPLED, ALWAYS_OFF, False), (UNSAMPLED, ALWAYS_ON, False),
    ],
)  # fmt: skip
def test_no_caller_decides_that_a_request_is_recorded(caller: str | None, inner: Sampler, wanted: bool) -> None:
    sampler = collector.AtTheDoor(ParentBased(inner))
    parent = tracing.parsed(caller)
    trace_id = parent.trace_id if parent else 7
    assert sampler.wants(parent, trace_id) is wanted
    context = tracing._under(parent) if parent else None
    asked = sampler.should_sample(context, trace_id, "POST", trace.SpanKind.SERVER)
    assert (asked.decision is Decision.RECORD_AND_SAMPLE) is wanted
    # Within the service, what was decided once holds.
    within = sampler.should_sample(context, trace_id, "x", trace.SpanKind.CONSUMER)
    assert (within.decision is Decision.RECORD_AND_SAMPLE) is (caller == SAMPLED or wanted)


@pytest.mark.usefixtures("exported")
def test_what_is_not_recorded_here_tells_no_worker_to_record() -> None:
    assert telemetry.current_traceparent({"traceparent": SAMPLED}) == UNSAMPLED


def test_fields_are_bound_for_a_block(capsys: pytest.CaptureFixture[str]) -> None:
    with telemetry.bound(task_id="a"), telemetry.bound(attempt=1):
        assert telemetry._bound.get() == {"task_id": "a", "attempt": 1}
    assert telemetry._bound.get() == {}
    assert capsys.readouterr().err == ""


def test_a_collector_that_is_not_there_holds_up_no_exit() -> None:
    pipeline = collector.pipeline("test", endpoint="http://127.0.0.1:9")
    pipeline.provider.get_tracer("x").start_span("y").end()
    began = time.monotonic()
    pipeline.shutdown(2.0)
    assert time.monotonic() - began < 8
    assert pipeline.sampler.get_description().startswith("AtTheDoor")


def test_without_a_collector_the_sdk_is_not_even_loaded() -> None:
    # That of metrics is, by redis-py, wherever it is installed.
    code = (
        "import sys\n"
        "import app.celery_app, app.relay, app.worker.keeper\n"
        "from app.main import create_app\n"
        "from tests.conftest import settings_for\n"
        "create_app(settings_for('postgresql://nowhere/none', 'redis://nowhere/0'))\n"
        "paid = ('opentelemetry.sdk.trace', 'opentelemetry.exporter', 'opentelemetry.instrumentation')\n"
        "loaded = [one for one in sys.modules if one.startswith(paid)]\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

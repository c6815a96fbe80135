"""Spans on their way from a child to the keeper."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app.worker import spans

RESOURCE = Resource({"service.name": "taskqueue-worker"})


@pytest.fixture
def line() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = spans.pair()
    yield ends
    for end in ends:
        end.close()


def made(line: socket.socket, **attributes: Any) -> ReadableSpan:
    """A span that is sent when it ends."""
    provider = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    provider.add_span_processor(spans.Sender(line))
    other = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))
    span = provider.get_tracer("scope", "1.0").start_span(
        "name", kind=SpanKind.CONSUMER, attributes=attributes, links=[Link(other, {"a": 1})]
    )
    span.add_event("happened", {"b": [1, 2]})
    span.set_status(Status(StatusCode.ERROR, "why"))
    span.end()
    assert isinstance(span, ReadableSpan)
    return span


def test_a_span_arrives_as_it_was(line: tuple[socket.socket, socket.socket]) -> None:
    into, out = line
    sent = made(into, text="ä", number=3, fraction=0.5, flag=True, several=["a", "b"])
    got = spans.decode(out.recv(1_000_000), RESOURCE)
    # What the collector gets is the same, byte for byte.
    assert encode_spans([got]).SerializeToString() == encode_spans([sent]).SerializeToString()


def test_no_span_spoils_the_batch_of_others(line: tuple[socket.socket, socket.socket]) -> None:
    into, out = line
    made(into, surrogate="\ud800", huge=2**70, several=[2**70])
    got = spans.decode(out.recv(1_000_000), RESOURCE)
    assert encode_spans([got]).SerializeToString()
    assert dict(got.attributes or {}) == {"surrogate": "?", "huge": str(2**70), "several": [str(2**70)]}


def test_a_span_that_is_too_large_comes_without_its_attributes(line: tuple[socket.socket, socket.socket]) -> None:
    into, out = line
    made(into, text="x" * 1_000_000)
    got = spans.decode(out.recv(1_000_000), RESOURCE)
    assert (got.name, dict(got.attributes or {}), got.events) == ("name", {}, ())


def test_a_keeper_that_does_not_read_holds_up_nobody(line: tuple[socket.socket, socket.socket]) -> None:
    into, _ = line
    for _ in range(3_000):
        made(into)


def test_a_line_that_is_gone_holds_up_nobody(line: tuple[socket.socket, socket.socket]) -> None:
    into, out = line
    out.close()
    made(into)
    spans.flush(into, 10.0)

"""How the spans of a pool's children come to the collector: through the keeper.

A child hands each span over as soon as it has ended, in one datagram, and keeps
none: killed the next moment, it takes along no more than what has not ended. It
talks to no collector, so none can hold up a task or the end of a child; and
what batching, encoding and sending cost is spent outside of it.

What the keeper can't take at once is dropped: a task never waits for its spans.
"""

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app.core.collector import Pipeline

MOST_BYTES = 131_072
"""Of one span; a larger one loses its attributes and events."""
BUFFER_BYTES = 4 * 1024 * 1024
"""What the kernel is asked to keep for the keeper, if it allows as much."""
_FLUSH, _FLUSHED = b"?", b"!"
_LARGEST = 2**63 - 1

log = logging.getLogger(__name__)


def pair() -> tuple[socket.socket, socket.socket]:
    """The ends of the line from the children to the keeper: where spans are put in, and where they come out."""
    # Where there is no SEQPACKET, datagrams do as well, but that the kernel keeps few of them.
    kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
    ends = socket.socketpair(socket.AF_UNIX, kind)
    for end in ends:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return ends


class Sender(SpanProcessor):
    """The child's end."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line

    def on_end(self, span: ReadableSpan) -> None:
        """Hand a span over, or drop it. Never waits, never raises."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        try:
            raw = encode(span)
            if len(raw) > MOST_BYTES:
                raw = encode(span, whole=False)
            self._line.send(raw, socket.MSG_DONTWAIT)
        except (OSError, ValueError, TypeError, RecursionError) as lost:
            log.debug("a span was dropped: %s", type(lost).__name__)

    def force_flush(self, timeout_millis: int | None = None) -> bool:
        """There is never anything left to send."""
        del timeout_millis
        return True


def flush(line: socket.socket, seconds: float) -> None:
    """Have the keeper send all that it was handed, and wait for that, but no longer than so many seconds.

    For the worker's main process, once its children are gone: with it ends its container, and the keeper too.
    """
    with contextlib.suppress(OSError):
        line.settimeout(seconds)
        line.send(_FLUSH)
        line.recv(len(_FLUSHED))


class Receiver:
    """The keeper's end: gives what comes to the processor of its own spans."""

    def __init__(self, line: socket.socket, pipeline: Pipeline, processor: BatchSpanProcessor) -> None:
        self._line = line
        self._pipeline = pipeline
        self._processor = processor
        self._thread = threading.Thread(target=self._receive, name="spans", daemon=True)
        self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait until everybody has gone who could send anything, and all is read; but no longer than that."""
        self._thread.join(seconds)

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            while raw := self._line.recv(2 * MOST_BYTES):
                if raw == _FLUSH:
                    if self._pipeline.answers():
                        self._processor.force_flush()
                    self._line.send(_FLUSHED)
                    continue
                try:
                    self._processor.on_end(decode(raw, self._pipeline.provider.resource))
                except Exception:
                    log.exception("a span could not be read")


def encode(span: ReadableSpan, *, whole: bool = True) -> bytes:
    """A span in one datagram."""
    scope = span.instrumentation_scope
    fields = {
        "name": span.name,
        "context": _numbers(span.context),
        "parent": _numbers(span.parent),
        "kind": span.kind.value,
        "times": [span.start_time, span.end_time],
        "status": [span.status.status_code.value, span.status.description],
        "scope": None if scope is None else [scope.name, scope.version, scope.schema_url],
        "links": [[_numbers(link.context), _plain(link.attributes)] for link in span.links],
        "attributes": _plain(span.attributes) if whole else {},
        "events": [[one.name, one.timestamp, _plain(one.attributes)] for one in span.events] if whole else [],
    }
    # A lone surrogate in one span would keep all others of its batch from being sent.
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"), default=str).encode("utf-8", "replace")


def decode(raw: bytes, resource: Resource) -> ReadableSpan:
    """A span that was handed over, as one of this resource."""
    told: dict[str, Any] = json.loads(raw)
    code, description = told["status"]
    return ReadableSpan(
        name=told["name"],
        context=_context(told["context"]),
        parent=_context(told["parent"]),
        resource=resource,
        attributes=told["attributes"],
        events=[Event(name, attributes, timestamp) for name, timestamp, attributes in told["events"]],
        links=[Link(found, attributes) for one, attributes in told["links"] if (found := _context(one)) is not None],
        kind=SpanKind(told["kind"]),
        status=Status(StatusCode(code), description),
        start_time=told["times"][0],
        end_time=told["times"][1],
        instrumentation_scope=InstrumentationScope(*told["scope"]) if told["scope"] is not None else None,
    )


def _numbers(one: SpanContext | None) -> list[int] | None:
    return None if one is None else [one.trace_id, one.span_id, int(one.is_remote), one.trace_flags]


def _context(numbers: Sequence[int] | None) -> SpanContext | None:
    if numbers is None:
        return None
    trace_id, span_id, is_remote, flags = numbers
    return SpanContext(trace_id, span_id, is_remote=bool(is_remote), trace_flags=TraceFlags(flags))


def _plain(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Attributes as OTLP can say them: it has no integers of more than 64 bits."""
    return {str(name): _fitting(value) for name, value in (attributes or {}).items()}


def _fitting(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_fitting(one) for one in value]
    return str(value) if type(value) is int and not -_LARGEST <= value <= _LARGEST else value

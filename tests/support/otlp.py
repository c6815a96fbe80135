"""A collector on loopback: what it is sent over OTLP/HTTP, as spans that tests can ask about."""

import contextlib
import gzip
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.support.waiting import wait_until


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One span, with its ids in hexadecimal digits.

    `parent` is empty for a root; `links` are ids of spans, `events` names, and `message` says why it is an error.
    """

    service: str
    scope: str
    name: str
    kind: str
    trace: str
    id: str
    parent: str
    links: tuple[tuple[str, str], ...]
    events: tuple[str, ...]
    error: bool
    message: str
    seconds: float
    ended_at: float
    attributes: Mapping[str, Any]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle of a batch is no news."""


class Collector:
    """What arrived so far."""

    def __init__(self, answer: Callable[[], int]) -> None:
        self.requests = 0
        self.duplicates: list[Span] = []
        self._answer = answer
        self._spans: dict[tuple[str, str], Span] = {}
        self._guard = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def spans(self) -> list[Span]:
        """All of them, as they arrived."""
        with self._guard:
            return list(self._spans.values())

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of a trace, in the order in which they began to be told of."""
        return [one for one in self.spans if one.trace == trace_id]

    def wait_for(
        self, trace_id: str, done: Callable[[list[Span]], object], seconds: float = 20, what: str = "the trace"
    ) -> list[Span]:
        """Wait until a trace is as it should be."""
        try:
            wait_until(lambda: done(self.trace(trace_id)), seconds, what)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{drawn(self.trace(trace_id))}") from None
        return self.trace(trace_id)

    def orphans(self) -> list[Span]:
        """Spans whose parent was never told of."""
        with self._guard:
            return [one for one in self._spans.values() if one.parent and (one.trace, one.parent) not in self._spans]

    def _take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _values(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                for raw in scope.spans:
                    one = _span(str(service), scope.scope.name, raw)
                    with self._guard:
                        if (one.trace, one.id) in self._spans:
                            self.duplicates.append(one)
                        self._spans[one.trace, one.id] = one

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.requests += 1
                status = collector._answer()
                if status == 200:
                    assert self.path == "/v1/traces"
                    collector._take(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                """The spans are the log."""

        return Handler

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def collector(answer: Callable[[], int] = lambda: 200) -> Iterator[Collector]:
    """A collector for the length of a block. `answer` says the status of each answer, and may take its time."""
    one = Collector(answer)
    one.start()
    try:
        yield one
    finally:
        one.close()


def drawn(spans: list[Span]) -> str:
    """A trace as people read it."""
    lines: list[str] = []

    def draw(parent: str, depth: int) -> None:
        for one in sorted(spans, key=lambda span: span.ended_at - span.seconds):
            if one.parent == parent:
                said = " ".join(f"{name}={value}" for name, value in sorted(one.attributes.items()))
                lines.append(f"{'  ' * depth}{one.name} [{one.kind} {one.service}] {one.id} {said}")
                draw(one.id, depth + 1)

    known = {one.id for one in spans}
    for root in dict.fromkeys(one.parent for one in spans if one.parent not in known):
        lines.append(f"under {root or 'nothing'}:")
        draw(root, 1)
    return "\n".join(lines)


def _span(service: str, scope: str, raw: trace_pb2.Span) -> Span:
    return Span(
        service=service,
        scope=scope,
        name=raw.name,
        kind=trace_pb2.Span.SpanKind.Name(raw.kind).removeprefix("SPAN_KIND_"),
        trace=raw.trace_id.hex(),
        id=raw.span_id.hex(),
        parent=raw.parent_span_id.hex(),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in raw.links),
        events=tuple(event.name for event in raw.events),
        error=raw.status.code == trace_pb2.Status.STATUS_CODE_ERROR,
        message=raw.status.message,
        seconds=(raw.end_time_unix_nano - raw.start_time_unix_nano) / 1e9,
        ended_at=raw.end_time_unix_nano / 1e9,
        attributes=_values(raw.attributes),
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def settled_down(one: Collector, seconds: float = 0.4) -> None:
    """Wait until nothing has come for a while."""
    seen, since = one.requests, time.monotonic()

    def quiet() -> bool:
        nonlocal seen, since
        if one.requests != seen:
            seen, since = one.requests, time.monotonic()
        return time.monotonic() - since > seconds

    wait_until(quiet, 30, "an end of the spans")

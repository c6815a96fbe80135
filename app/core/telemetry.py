"""Traces and logs: where they go, and the trace context that a task carries.

Nothing is traced unless a collector is set, but every task has a `traceparent`,
so that its webhooks, its attempts and their log lines can be told to belong together.
What is recorded, `tracing` says.
"""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from opentelemetry import trace

import app as package
from app.core import ids, tracing
from app.core.config import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from fastapi.telemetry import TelemetryConfig
    from opentelemetry.sdk.trace import SpanProcessor

    from app.core.collector import Pipeline

NOT_BY_FASTAPI: "TelemetryConfig" = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's telemetry of its own is off, so that no request has two spans, whatever the environment says."""
FLUSH_SECONDS = 2.0
"""How long a process that ends waits for its collector, if that has answered the last time."""
# Not their access logs: a line for each request of each poller would bury the rest, and metrics count them.
_SERVERS = ("uvicorn", "uvicorn.error", "gunicorn.error", "celery")
# Their INFO names the URL of each webhook, which may hold a secret.
_TALKATIVE = ("httpx", "httpcore")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


_pipeline: "Pipeline | None" = None
_bound: ContextVar[Mapping[str, object]] = ContextVar("bound", default={})  # noqa: B039  # never changed in place


def configure(settings: Settings, process_name: str, *, hand_to: "SpanProcessor | None" = None) -> None:
    """Send traces to the collector, if one is set. The other `OTEL_…` variables hold as OpenTelemetry says.

    Args:
        settings: with the endpoint.
        process_name: such as `api`; the service's name is `taskqueue-api` unless OTEL_SERVICE_NAME is set.
        hand_to: what takes the spans of this process to the collector in its place.
    """
    global _pipeline  # noqa: PLW0603  # one collector per process
    if settings.otlp_endpoint is None:
        return
    # Imported here: without a collector no process pays for it.
    from app.core import collector  # noqa: PLC0415

    endpoint = settings.otlp_endpoint if hand_to is None else None
    _pipeline = collector.pipeline(process_name, endpoint=endpoint, processor=hand_to)
    tracing.record(_pipeline.provider.get_tracer("taskqueue", package.__version__))
    # For spans that a task's own code makes. Who has brought a provider along keeps it.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        trace.set_tracer_provider(_pipeline.provider)


def pipeline() -> "Pipeline | None":
    """What records the spans of this process; None without a collector."""
    return _pipeline


def shutdown() -> None:
    """Send what has not been sent yet, for `FLUSH_SECONDS` at most: a dead collector must not hold up the end."""
    global _pipeline  # noqa: PLW0603  # as above
    if _pipeline is not None:
        tracing.record(None)
        _pipeline.shutdown(FLUSH_SECONDS)
        _pipeline = None


def instrument(api: "FastAPI") -> None:
    """Record the requests of `api`, if a collector is set (`server_spans.instrument`)."""
    if _pipeline is None:
        return
    from app.core import server_spans  # noqa: PLC0415  # as in configure

    server_spans.instrument(api, _pipeline)


def current_traceparent(headers: Mapping[str, str]) -> str:
    """The W3C trace context to go on with: this request's span, else what the caller sent, else a new one.

    Source: W3C Trace Context, section 3.2. A new one says that nothing was recorded (flags 00).

    Args:
        headers: of the request; `traceparent` is read.
    """
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        return tracing.written(context)
    sent = headers.get("traceparent")
    caller = tracing.parsed(sent) if sent else None
    if caller is None:
        return f"00-{ids.random_bytes().hex()}-{ids.random_bytes()[:8].hex()}-00"
    # Where requests are recorded this one is not: whatever its caller says, nothing of its tasks is.
    return f"{tracing.written(caller)[:-2]}00" if tracing.recording() else tracing.written(caller)


@contextlib.contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Put these fields into every JSON line that is logged in the block, or by what it starts."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def configure_logging(settings: Settings, process_name: str) -> None:
    """Log to stderr through one handler on the root: JSON lines, or text for people.

    Args:
        settings: level and format.
        process_name: such as `api`; it stands in each JSON line.
    """
    root = logging.getLogger()
    for handler in [own for own in root.handlers if isinstance(own, _Stderr)]:
        root.removeHandler(handler)
    people = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    handler = _Stderr()
    handler.setFormatter(_Console() if people else _Json(process_name))
    root.addHandler(handler)
    root.setLevel(settings.log_level)
    for name in _SERVERS:
        server = logging.getLogger(name)
        server.handlers.clear()
        server.propagate = True
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


def say(logger: str, message: str) -> None:
    """Log a line at INFO from within a signal handler: nothing is locked, and nothing buffered."""
    record = logging.makeLogRecord({"name": logger, "levelno": logging.INFO, "levelname": "INFO", "msg": message})
    root = logging.getLogger()
    for handler in [own for own in root.handlers if isinstance(own, _Stderr)]:
        if root.isEnabledFor(logging.INFO):
            os.write(2, f"{handler.format(record)}\n".encode())


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever stderr is at that moment."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError


class _Console(logging.Formatter):
    """`12:00:00.123 INFO    app.relay published 3 tasks`."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        moment = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        line = f"{moment}.{int(record.msecs):03d} {record.levelname:<7} {record.name} {record.message}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    """One object a line: time, level, process, logger, message, the trace, what is `bound`, and what `extra` said."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = process_name

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process_name,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            line |= {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}
        line |= _bound.get()
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in line}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)

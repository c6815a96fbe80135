"""Traces and logs: where they go, and the trace context that a task carries.

Nothing is traced unless a collector is set, but every task has a `traceparent`,
so that its webhooks and its attempts can be told to belong together.
"""

import json
import logging
import os
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from opentelemetry import trace

import app as package
from app.core.config import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

# Anchored at the end: the patterns are searched for anywhere in the URL.
UNTRACED_URLS = "/healthz$,/readyz$"
FLUSH_SECONDS = 2.0
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# Not their access logs: a line for each request of each poller would bury the rest, and metrics count them.
_SERVERS = ("uvicorn", "uvicorn.error", "gunicorn.error", "celery")
# Their INFO names the URL of each webhook, which may hold a secret.
_TALKATIVE = ("httpx", "httpcore")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def configure(settings: Settings, process_name: str) -> None:
    """Send traces to the collector, if one is set. The other `OTEL_…` variables hold as OpenTelemetry says.

    Args:
        settings: with the endpoint.
        process_name: such as `api`; the service's name is `taskqueue-api` unless OTEL_SERVICE_NAME is set.
    """
    if settings.otlp_endpoint is None:
        return
    # Imported here: without a collector no process pays for them.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": f"taskqueue-{process_name}"}
    resource = Resource.create(named | {"service.version": package.__version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=_traces_url(settings.otlp_endpoint))))
    trace.set_tracer_provider(provider)


def _traces_url(endpoint: str) -> str | None:
    # What stands in the environment the exporter reads itself; `.env` it does not know.
    if any(name in os.environ for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")):
        return None
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


def shutdown() -> None:
    """Send what has not been sent yet, for `FLUSH_SECONDS` at most: a dead collector must not hold up the end."""
    stop = getattr(trace.get_tracer_provider(), "shutdown", None)
    if stop is not None:
        flushing = threading.Thread(target=stop, name="traces", daemon=True)
        flushing.start()
        flushing.join(FLUSH_SECONDS)


def instrument_api(api: "FastAPI", settings: Settings) -> None:
    """Trace every request but the probes', if a collector is set."""
    if settings.otlp_endpoint is None:
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor  # noqa: PLC0415  # as in configure

    FastAPIInstrumentor.instrument_app(api, excluded_urls=UNTRACED_URLS, exclude_spans=["send", "receive"])


def current_traceparent(headers: Mapping[str, str]) -> str:
    """The W3C trace context to go on with: this request's span, else what the caller sent, else a new one.

    Source: W3C Trace Context, section 3.2. A new one says that nothing was recorded (flags 00).

    Args:
        headers: of the request; `traceparent` is read.
    """
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"
    sent = headers.get("traceparent", "").strip()
    found = _TRACEPARENT.fullmatch(sent)
    # Version 00 ends after the flags; a later one may go on, and is read as far as we know it.
    if found is not None and (found[4] is None or not sent.startswith("00")):
        return f"00-{found[1]}-{found[2]}-{int(found[3], 16) & 1:02x}"
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"


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
    """One object a line: time, level, process, logger, message, the trace, and whatever `extra` said."""

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
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD and name not in line}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, default=str)

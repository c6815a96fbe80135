"""The way to a collector: OpenTelemetry's SDK, as this service uses it.

Imported only where a collector is set: without one, no process pays for it.
"""

import logging
import os
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import set_global_textmap
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

import app as package
from app.core import tracing

EXPORT_SECONDS = 2.0
"""How long one batch may take, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise: the SDK's own 10 s outlast an exit."""
_TIMEOUTS = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT")
_REQUESTS = "opentelemetry.instrumentation.fastapi"
_RAISED = "exception"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

log = logging.getLogger(__name__)


class Ids(RandomIdGenerator):
    """Gives spans the ids that they are to have (`tracing.given_span_id`), and draws those of others.

    From the system's numbers: a task may seed Python's own, and would be given the ids of another then.
    """

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def generate_span_id(self) -> int:
        """The id of the next span."""
        return tracing.given_span_id.get() or self._random.getrandbits(64) or 1

    def generate_trace_id(self) -> int:
        """The id of the next trace."""
        given = tracing.given_trace_id.get()
        if given:
            # One trace is called so, whatever else begins in the same request.
            tracing.given_trace_id.set(0)
        return given or self._random.getrandbits(128) or 1


class AtTheDoor(Sampler):
    """The sampler of OTEL_TRACES_SAMPLER, but that nobody outside decides what is recorded here.

    A request that says it is recorded is sampled as one that says nothing, by its
    trace's id; within the service what was decided once holds (W3C Trace Context,
    "Denial of service").
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(  # noqa: PLR0917  # the SDK's signature
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """As `Sampler.should_sample`."""
        parent = get_current_span(parent_context).get_span_context()
        if kind is SpanKind.SERVER and parent.is_valid and parent.is_remote and parent.trace_flags.sampled:
            parent_context = Context()
        return self._inner.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        """As `Sampler.get_description`."""
        return f"AtTheDoor{{{self._inner.get_description()}}}"

    def wants(self, caller: SpanContext | None, trace_id: int) -> bool:
        """Whether a request is recorded, given what it says of itself: asked before anything is spent on it."""
        if caller is not None and not caller.trace_flags.sampled:
            return False
        return self._inner.should_sample(Context(), trace_id, "", SpanKind.SERVER).decision is not Decision.DROP


class _Exporter(OTLPSpanExporter):
    """Knows whether the collector took what it was sent last."""

    answers = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = super().export([_discreet(one) for one in spans])
        takes = result is SpanExportResult.SUCCESS
        if takes and not self.answers:
            log.info("the collector takes spans again")
        self.answers = takes
        return result


def _discreet(span: ReadableSpan) -> ReadableSpan:
    """A span without what a request's unexpected error said, which may hold values: its class is told, the log has it.

    OpenTelemetry's instrumentation of FastAPI records messages and tracebacks, and can't be asked not to.
    """
    scope = span.instrumentation_scope
    if scope is None or scope.name != _REQUESTS or not (span.events or span.status.description):
        return span
    kinds = [event.attributes["exception.type"] for event in span.events if event.attributes and event.name == _RAISED]
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes={**(span.attributes or {}), **({tracing.ERROR_TYPE: kinds[-1]} if kinds else {})},
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=scope,
    )


def _exporter(endpoint: str) -> _Exporter:
    timeout = None if any(name in os.environ for name in _TIMEOUTS) else EXPORT_SECONDS
    # What stands in the environment the exporter reads itself; `.env` it does not know.
    known = any(name in os.environ for name in _ENDPOINTS)
    exporter = _Exporter(endpoint=None if known else traces_url(endpoint), timeout=timeout)
    # It says why once, and not every few seconds for as long as the collector is away.
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(lambda _: exporter.answers)
    return exporter


def traces_url(endpoint: str) -> str:
    """Where an OTLP endpoint takes traces."""
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What records the spans of one process.

    Attributes:
        provider: makes the tracers.
        sampler: of the provider.
        processor: takes spans that have ended; None where they are handed to another process.
    """

    provider: TracerProvider
    sampler: AtTheDoor
    processor: BatchSpanProcessor | None

    def answers(self) -> bool:
        """Whether the collector took what it was sent last."""
        return self.processor is None or getattr(self.processor.span_exporter, "answers", True)

    def shutdown(self, seconds: float) -> None:
        """Send what has not been sent yet, for so long at most, and hardly at all to a collector that is silent."""
        thread = threading.Thread(target=self.provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(seconds if self.answers() else 0.0)


def pipeline(process_name: str, *, endpoint: str | None, processor: SpanProcessor | None = None) -> Pipeline:
    """What records the spans of this process. To be made after the last fork.

    Args:
        process_name: such as `api`; the service's name is `taskqueue-api` unless OTEL_SERVICE_NAME is set.
        endpoint: of the collector.
        processor: where spans go instead.
    """
    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": f"taskqueue-{process_name}"}
    resource = Resource.create(named | {"service.version": package.__version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, id_generator=Ids())
    sampler = AtTheDoor(provider.sampler)
    provider.sampler = sampler
    batches = None if endpoint is None else BatchSpanProcessor(_exporter(endpoint))
    for one in (batches, processor):
        if one is not None:
            provider.add_span_processor(one)
    if "OTEL_PROPAGATORS" not in os.environ:
        # No baggage: what callers say of themselves is nothing for the receivers of others.
        set_global_textmap(TraceContextTextMapPropagator())
    return Pipeline(provider, sampler, batches)

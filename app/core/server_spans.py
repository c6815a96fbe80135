"""The API's requests, as OpenTelemetry's instrumentation of FastAPI records them.

Imported only where a collector is set: without one nothing is instrumented.
"""

import os
import secrets

from fastapi import FastAPI
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.metrics import NoOpMeterProvider
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core import tracing
from app.core.collector import AtTheDoor, Pipeline

UNTRACED_URLS = "^[a-z]+://[^/]*/(healthz|readyz|metrics)$"
"""Searched for in the whole URL, so that a schedule may be called `healthz`."""
_STABLE_NAMES = ("OTEL_SEMCONV_STABILITY_OPT_IN", "http")


def instrument(api: FastAPI, pipeline: Pipeline) -> None:
    """Record a span for each request of `api` that is sampled, but for none of a probe. To be called once, at the end.

    What was added to `api` until then is inside of the spans.
    """
    # Attributes are called as those of our own spans, unless the operator wants the old names (or both).
    os.environ.setdefault(*_STABLE_NAMES)
    FastAPIInstrumentor.instrument_app(
        api,
        tracer_provider=pipeline.provider,
        meter_provider=NoOpMeterProvider(),  # Prometheus is told of requests by `measuring`
        excluded_urls=UNTRACED_URLS,
        exclude_spans=["send", "receive"],
    )
    instrumented = api.build_middleware_stack

    def build_middleware_stack() -> ASGIApp:
        return _Door(instrumented(), pipeline.sampler)

    api.build_middleware_stack = build_middleware_stack  # type: ignore[method-assign]  # as the instrumentation does


class _Door:
    """Stands before the instrumentation, and decides what it is asked to record: most requests are not sampled.

    It would spend on those nearly as much as on the others before it asked the sampler.
    """

    def __init__(self, app: ASGIApp, sampler: AtTheDoor) -> None:
        self._app = app
        self._sampler = sampler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        caller = tracing.parsed(sent.decode("latin-1"))
        trace_id = caller.trace_id if caller is not None else secrets.randbits(128) or 1
        if not self._sampler.wants(caller, trace_id) or not _readable(scope):
            with suppress_http_instrumentation():
                await self._app(scope, receive, send)
            return
        # The instrumentation asks the sampler again, about the trace that it begins, and must hear the same.
        token = tracing.given_trace_id.set(0 if caller is not None else trace_id)
        try:
            await self._app(scope, receive, send)
        finally:
            tracing.given_trace_id.reset(token)


def _readable(scope: Scope) -> bool:
    """Whether the instrumentation can read all of a request: it raises over some bytes that are not UTF-8."""
    try:
        scope["query_string"].decode()
        for _, value in scope["headers"]:
            value.decode()
    except UnicodeDecodeError:
        return False
    return True

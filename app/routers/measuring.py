"""Measures every request: how long it took, by method, route and status."""

import time

from fastapi import FastAPI
from opentelemetry import trace
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core import metrics

METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})
OTHER_METHOD = "_OTHER"
"""A method is what a client says; this is what OpenTelemetry calls those that nobody knows."""


def install(api: FastAPI) -> None:
    """Measure the requests of `api`."""
    api.add_middleware(_Measured)


class _Measured:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else OTHER_METHOD
        status = ""

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        began = time.perf_counter()
        metrics.requests_active(method, 1)
        try:
            await self._app(scope, receive, told)
        except Exception:
            # Whoever renders the answer to what nobody expected stands outside of all others.
            status = status or "500"
            raise
        finally:
            metrics.requests_active(method, -1)
            # The route is known once one has matched: its template, whatever the path.
            metrics.request_ended(method, _route(scope), status, time.perf_counter() - began, _trace_id())


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", ""))


def _trace_id() -> str | None:
    """Of the trace that this request is part of, if that is recorded: an example of what the histogram says."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid and context.trace_flags.sampled else None

"""Tasks that add spans of their own, as their authors would: with OpenTelemetry's API, and no word of ours."""

import logging
import random
import time

from opentelemetry import trace

from app.catalog import task
from app.worker.sample_tasks import echo


@task("traced.parent")
def parent() -> str:
    """Make a span of its own, log within it, and submit another task from it."""
    random.seed(7)  # as many a task does that must be repeatable: ids must not repeat with it
    with trace.get_tracer("reports").start_as_current_span("render", attributes={"pages": 3, "odd": "\ud800"}):
        logging.getLogger("reports").info("rendering")
        return str(echo.delay("from within").id)


@task("traced.sleep")
def sleep(seconds: float) -> str:
    """Sleep, with a span that ends before."""
    with trace.get_tracer("reports").start_as_current_span("before"):
        pass
    time.sleep(seconds)
    return "slept"

"""Prometheus metrics, in one place, on a port of their own.

The relay alone exports the state of the queues, so that replicas of the API
don't add up to a multiple of it; with two relays, take the maximum.

No label has a value that a client can make up: tasks and queues are counted
only once they are known.
"""

import contextlib
import platform
from collections.abc import Callable, Iterator
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

import app
from app.core import errors

REGISTRY = CollectorRegistry()

_SUBMITTED = Counter(
    "taskqueue_tasks_submitted",
    "Tasks that were accepted.",
    ["task", "queue", "outcome"],
    registry=REGISTRY,
)
_REJECTED = Counter(
    "taskqueue_submit_rejected", "Submits that were refused, by kind of problem.", ["reason"], registry=REGISTRY
)
_BUILD = Gauge("taskqueue_build_info", "What runs here; always 1.", ["version", "python"], registry=REGISTRY)
_BUILD.labels(version=app.__version__, python=platform.python_version()).set(1)


def submitted(task: str, queue: str, outcome: str = "accepted") -> None:
    """Count a submit that was answered with a task: `accepted`, or there already: `replayed`, `deduplicated`."""
    _SUBMITTED.labels(task=task, queue=queue, outcome=outcome).inc()


@contextlib.contextmanager
def counting_rejections() -> Iterator[None]:
    """Count whatever problem leaves the block, by its kind."""
    try:
        yield
    except errors.RequestError as problem:
        _REJECTED.labels(reason=problem.slug).inc()
        raise
    except errors.DatabaseUnavailable:
        _REJECTED.labels(reason=errors.ServiceUnavailable.slug).inc()
        raise


_TURNED_AWAY = Counter(
    "taskqueue_api_turned_away",
    "Requests that were not let in: for their credentials, a scope that their key has not, or its quota.",
    ["reason"],
    registry=REGISTRY,
)


def turned_away(reason: Literal["credentials", "scope", "quota"]) -> None:
    """Count a request that was not let in."""
    _TURNED_AWAY.labels(reason=reason).inc()


_QUEUE_DEPTH = Gauge(
    "taskqueue_queue_depth", "Messages that wait in Redis. Aggregate with max.", ["queue"], registry=REGISTRY
)
_TASKS = Gauge("taskqueue_tasks", "Unfinished tasks. Aggregate with max.", ["queue", "state"], registry=REGISTRY)

_PAUSED = Gauge(
    "taskqueue_queue_paused", "1 while a queue is paused, else 0. Aggregate with max.", ["queue"], registry=REGISTRY
)

_SLOTS = Gauge("taskqueue_worker_slots", "Tasks that this worker can run at once.", ["pool"], registry=REGISTRY)
_BUSY_SLOTS = Gauge("taskqueue_worker_busy_slots", "Tasks that this worker runs.", ["pool"], registry=REGISTRY)


def show_pool(pool: str, *, slots: int, busy: int) -> None:
    """Show how much of a worker's pool is in use."""
    _SLOTS.labels(pool=pool).set(slots)
    _BUSY_SLOTS.labels(pool=pool).set(busy)


def show_queue(queue: str, *, depth: int, waiting: int, held: int, running: int, paused: bool) -> None:
    """Show the state of a queue: messages in Redis; waiting, held and running tasks in Postgres."""
    _QUEUE_DEPTH.labels(queue=queue).set(depth)
    _TASKS.labels(queue=queue, state="waiting").set(waiting)
    _TASKS.labels(queue=queue, state="held").set(held)
    _TASKS.labels(queue=queue, state="running").set(running)
    _PAUSED.labels(queue=queue).set(paused)


_OLDEST = Gauge(
    "taskqueue_queue_oldest_message_age_seconds",
    "Since when the task that is next in line has been due. Aggregate with max.",
    ["queue"],
    registry=REGISTRY,
)


def show_oldest(queue: str, seconds: float) -> None:
    """Show since when the task that is next in a queue has been due; 0 for an empty queue."""
    _OLDEST.labels(queue=queue).set(seconds)


_CIRCUITS_OPEN = Gauge(
    "taskqueue_webhook_circuits_open",
    "Receivers that get nothing but probes, as this relay sees it. Aggregate with max.",
    registry=REGISTRY,
)
_WEBHOOKS = Gauge(
    "taskqueue_webhooks",
    "Webhooks that could be sent now, counted up to 100,000. Aggregate with max.",
    ["state"],
    registry=REGISTRY,
)


def show_circuits(count: int) -> None:
    """Show how many receivers get nothing but probes."""
    _CIRCUITS_OPEN.set(count)


def show_webhooks(due: int) -> None:
    """Show how many webhooks could be sent now."""
    _WEBHOOKS.labels(state="due").set(due)


def hide_queues() -> None:
    """Take the queues' series away: their source does not answer, and a 0 would look like an empty queue."""
    _QUEUE_DEPTH.clear()
    _OLDEST.clear()
    _TASKS.clear()
    _WEBHOOKS.clear()
    _PAUSED.clear()


def serve(port: int) -> Callable[[], None]:
    """Serve the metrics on all addresses, in a thread of their own.

    Args:
        port: TCP port; 0 serves none.

    Returns:
        What ends it.

    Raises:
        SettingsError: if the port can't be had.
    """
    if port == 0:
        return lambda: None
    try:
        server, thread = start_http_server(port, registry=REGISTRY)
    except OSError as taken:
        raise errors.SettingsError(f"TASKQUEUE_METRICS_PORT is wrong: {taken.strerror or 'no such port'}") from taken

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close

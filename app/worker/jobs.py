"""A bundle as a job of Celery's pool: how the main process hands it to a child, and how the child runs it.

Celery's consumer finds this by the `Strategy` of a task. It hands over as many jobs as there are children.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from celery.app import trace
from celery.worker import state
from celery.worker.request import Request

from app import broker
from app.worker import bundles
from app.worker.bundles import Bundle, Offer


class Job(Request):  # type: ignore[misc]  # Celery ships no types
    """Celery's own request, for all messages of a bundle: one job of the pool, without limits, events and results."""

    def __init__(self, message: Any, consumer: Any, **options: Any) -> None:
        super().__init__(message, headers=message.headers, body=((), {}, {}), decoded=True, **options)
        self.bundle: Bundle = message.bundle
        self._consumer = consumer
        self._handed = time.monotonic()
        self._timer: Any = None

    def execute_using_pool(self, pool: Any, **_: Any) -> Any:
        """Hand the bundle to a child. Stands in for Celery's, which asks first whether the task was revoked."""
        self._handed = time.monotonic()
        if len(self.bundle.messages) > 1:
            self._timer = self._consumer.timer.call_after(bundles.WAIT_SECONDS, self._wait_is_over)
        return pool.apply_async(
            run,
            args=self.bundle.job(),
            accept_callback=self.on_accepted,
            callback=self.on_success,
            error_callback=self.on_failure,
            correlation_id=self.id,
        )

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A child has taken the bundle."""
        self.bundle.accepted = True
        super().on_accepted(pid, time_accepted)

    def on_success(self, run: int, **_: Any) -> None:
        """A child is done with the bundle, and has run so many of its messages. What it left is put back."""
        self._done(successful=True)
        if run:
            now = time.monotonic()
            self.bundle.pace.ended(run, now - self._handed, now)
        self.bundle.keep(run)

    def on_failure(self, *_: Any, **__: Any) -> None:
        """The child was lost, or ended. The keeper settles what it ran; what it had not begun is put back."""
        self._done(successful=False)
        self.bundle.withdraw()

    def _done(self, *, successful: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            # It knows this job, which is to go at once, and its bundle with it.
            self._timer = None
        state.task_ready(self, successful=successful)
        self.acknowledge()

    def _wait_is_over(self) -> None:
        self._timer = None
        if self.bundle.withdraw():
            self.bundle.pace.hold(time.monotonic(), bundles.HOLD_SECONDS)


def strategy(task: Any, app: Any, consumer: Any) -> Callable[..., None]:
    """What a worker does with a message for `task`: Celery's `worker.strategy.default`, but for what is not used here.

    That is other protocols, ETAs, expiry, revokes, rate limits, events, and the signal that a message was received.
    """

    def received(message: Any, _: Any, ack: Any, reject: Any, callbacks: Any) -> None:
        request = Job(
            message,
            consumer,
            on_ack=ack,
            on_reject=reject,
            app=app,
            task=task,
            hostname=consumer.hostname,
            connection_errors=consumer.connection_errors,
        )
        state.task_reserved(request)
        for callback in callbacks:
            callback(request)
        consumer.on_task_request(request)

    return received


def run(cell: int | None, offers: Sequence[Offer]) -> int:
    """In a child: run one message after the other, each in Celery's own tracer, until the bundle is closed.

    Returns:
        How many were run.
    """
    for number, offer in enumerate(offers):
        if cell is not None and not bundles.begin(cell, number + 1):
            return number
        _trace(offer)
    return len(offers)


def _trace(offer: Offer) -> None:
    """What Celery's `Request` and `fast_trace_task` make of a message, without its body."""
    request: dict[str, Any] = {
        "lang": "py",
        "task": offer.name,
        "id": offer.task_id,
        "root_id": offer.task_id,
        "correlation_id": offer.task_id,
        "reply_to": None,
        "retries": offer.attempt,
        "timelimit": [None, None],
        "time_limit": offer.time_limit,
        "ignore_result": True,
        "version": broker.ENVELOPE_VERSION,
        "attempt": offer.attempt,
        "position": offer.position,
        "delivery_info": {"exchange": "", "routing_key": offer.queue, "priority": 0, "redelivered": False},
        "properties": {"correlation_id": offer.task_id, "priority": 0},
    }
    if offer.traceparent is not None:
        request["traceparent"] = offer.traceparent
    trace.fast_trace_task(offer.name, offer.task_id, request, ((), {}, {}), None, None)

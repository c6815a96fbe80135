"""What happens to requests, tasks, messages and webhooks. Each may be called anywhere: see `forwarding`."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from app.core import errors
from app.core.metrics import catalogue
from app.core.metrics.forwarding import event
from app.core.metrics.instruments import COUNTS, DISTRIBUTIONS, GAUGES, Few

TurnedAway = Literal["credentials", "scope", "quota"]
"""What a request lacked that was not let in."""
UNKNOWN = "unknown"
TASKS_AT_MOST = 1000
QUEUES_AT_MOST = 200
EXCEPTIONS_AT_MOST = 100
EXCEPTION_NAME_LIMIT = 64

_task = Few(TASKS_AT_MOST, others=UNKNOWN)
_queue = Few(QUEUES_AT_MOST, others=UNKNOWN)
_exception = Few(EXCEPTIONS_AT_MOST, others="other")

_SUBMITTED = COUNTS["taskqueue_tasks_submitted_total"]
_PAYLOAD = DISTRIBUTIONS["taskqueue_submit_payload_bytes"]
_REJECTED = COUNTS["taskqueue_submit_rejected_total"]
_TURNED_AWAY = COUNTS["taskqueue_api_turned_away_total"]
_PUBLISHED = COUNTS["taskqueue_outbox_published_total"]
_PUBLISH_DELAY = DISTRIBUTIONS["taskqueue_outbox_publish_delay_seconds"]
_BATCH_SIZE = DISTRIBUTIONS["taskqueue_outbox_batch_size"]
_STARTED = COUNTS["taskqueue_task_attempts_started_total"]
_ATTEMPTS = COUNTS["taskqueue_task_attempts_total"]
_FINISHED = COUNTS["taskqueue_tasks_finished_total"]
_EXCEPTIONS = COUNTS["taskqueue_task_exceptions_total"]
_WAIT = DISTRIBUTIONS["taskqueue_task_queue_wait_seconds"]
_RUN = DISTRIBUTIONS["taskqueue_task_run_duration_seconds"]
_END_TO_END = DISTRIBUTIONS["taskqueue_task_end_to_end_seconds"]
_REDELIVERIES = COUNTS["taskqueue_task_redeliveries_total"]
_CHILD_STARTS = COUNTS["taskqueue_worker_child_starts_total"]
_KEEPER_STARTS = COUNTS["taskqueue_worker_keeper_starts_total"]
_DROPPED = COUNTS["taskqueue_metric_events_dropped_total"]
_RECOVERED = COUNTS["taskqueue_reconciler_recovered_total"]
_WEBHOOK_ATTEMPTS = COUNTS["taskqueue_webhook_attempts_total"]
_WEBHOOK_DURATION = DISTRIBUTIONS["taskqueue_webhook_attempt_duration_seconds"]
_DELIVERIES = COUNTS["taskqueue_webhook_deliveries_total"]
_DELIVERY_DELAY = DISTRIBUTIONS["taskqueue_webhook_delivery_delay_seconds"]
_SWEEPS = DISTRIBUTIONS["taskqueue_relay_sweep_duration_seconds"]
_SWEEP_ERRORS = COUNTS["taskqueue_relay_sweep_errors_total"]
_REQUESTS = DISTRIBUTIONS["http_server_request_duration_seconds"]


@event
def submitted(task: str, queue: str, outcome: str = "accepted") -> None:
    """Count a submit that was answered with a task: `accepted`, or there already: `replayed`, `deduplicated`."""
    _SUBMITTED.count(_task(task), _queue(queue), outcome)


@event
def accepted_payload(task: str, size_bytes: int) -> None:
    """Note how large the arguments of an accepted task are."""
    _PAYLOAD.observe(size_bytes, _task(task))


@event
def rejected(reason: str) -> None:
    """Count a submit that was refused."""
    _REJECTED.count(reason)


_REASONS: dict[type[errors.RequestError], str] = {
    errors.Unauthenticated: "unauthenticated",
    errors.Forbidden: "forbidden",
    errors.QuotaExceeded: "rate_limited",
    errors.TooManyAtOnce: "rate_limited",
    errors.PayloadTooLarge: "payload_too_large",
    errors.IdempotencyKeyReused: "idempotency_conflict",
    errors.ServiceUnavailable: "backpressure",
    errors.TaskNotRegistered: "unknown_task",
    errors.TaskNotFound: "not_found",
    errors.ResultExpired: "not_found",
}


def reason_of(problem: errors.RequestError) -> str:
    """Why a submit was refused, in the word of `taskqueue_submit_rejected_total`."""
    if isinstance(problem, errors.ValidationFailed) and any(
        fault.pointer.rpartition("/")[2] == "task" for fault in problem.errors
    ):
        return "unknown_task"
    return _REASONS.get(type(problem), "validation")


@contextlib.contextmanager
def counting_rejections() -> Iterator[None]:
    """Count whatever problem leaves the block, by its kind."""
    try:
        yield
    except errors.RequestError as problem:
        rejected(reason_of(problem))
        raise
    except errors.DatabaseUnavailable:
        rejected("unavailable")
        raise


@event
def turned_away(reason: TurnedAway) -> None:
    """Count a request that was not let in."""
    _TURNED_AWAY.count(reason)


@event
def request_ended(method: str, route: str, status: str, seconds: float, trace_id: str | None = None) -> None:
    """Count a request that was answered; `trace_id` of its trace, if that is recorded."""
    _REQUESTS.observe(seconds, method, route, status, trace_id=trace_id)


def requests_active(method: str, difference: int) -> None:
    """A request more is being answered, or one less."""
    GAUGES.add("http_server_active_requests", (method,), difference)


@event
def published(messages: int, outcome: Literal["sent", "error"], delays_seconds: list[float]) -> None:
    """Count messages that were pushed with one command, or were not.

    Args:
        messages: how many.
        outcome: what became of them.
        delays_seconds: since when each that was pushed the first time had been due.
    """
    _PUBLISHED.count("task", outcome, by=messages)
    if outcome == "sent":
        _BATCH_SIZE.observe(messages)
    for delay in delays_seconds:
        _PUBLISH_DELAY.observe(max(0.0, delay), "task")


@event
def attempt_started(task: str, queue: str, waited_seconds: float) -> None:
    """Count an attempt that begins, and note since when its task could have started."""
    labels = _task(task), _queue(queue)
    _STARTED.count(*labels)
    _WAIT.observe(max(0.0, waited_seconds), *labels)


@event
def attempt_ended(task: str, queue: str, outcome: str, exception: str | None, run_seconds: float | None) -> None:
    """Count an attempt that has ended.

    Args:
        task: its name.
        queue: where it waited.
        outcome: one of `ATTEMPT_OUTCOMES`.
        exception: the class it failed with, if it did.
        run_seconds: how long its code ran, if that is known.
    """
    labels = _task(task), _queue(queue), outcome
    _ATTEMPTS.count(*labels)
    if exception is not None:
        # A class can be made with any name, and any number of them.
        proper = exception.isidentifier() and len(exception) <= EXCEPTION_NAME_LIMIT
        _EXCEPTIONS.count(labels[0], _exception(exception if proper else ""))
    if run_seconds is not None:
        _RUN.observe(max(0.0, run_seconds), *labels)


@event
def task_finished(task: str, queue: str, outcome: str, seconds: float) -> None:
    """Count a task that has ended, so many seconds after its submit; `outcome` is one of `TASK_OUTCOMES`."""
    labels = _task(task), _queue(queue), outcome
    _FINISHED.count(*labels)
    _END_TO_END.observe(max(0.0, seconds), *labels)


@event
def redelivered(queue: str) -> None:
    """Count a message that claimed nothing."""
    _REDELIVERIES.count(_queue(queue))


@event
def child_started(pool: str) -> None:
    """Count a process that a pool has started."""
    _CHILD_STARTS.count(pool)


@event
def keeper_started(pool: str, times: int) -> None:
    """Show how many keepers a worker has started so far: its main process knows, which outlives them."""
    _KEEPER_STARTS.reach(pool, value=times)


@event
def events_dropped(count: int) -> None:
    """Count events that nobody read."""
    _DROPPED.count(by=count)


@event
def recovered(reason: str, count: int) -> None:
    """Count what a relay has put right."""
    _RECOVERED.count(reason, by=count)


@event
def webhook_attempted(outcome: str, seconds: float) -> None:
    """Count a POST."""
    _WEBHOOK_ATTEMPTS.count(outcome)
    _WEBHOOK_DURATION.observe(seconds, outcome)


@event
def webhooks_ended(outcome: Literal["delivered", "exhausted"], count: int, delay_seconds: float | None) -> None:
    """Count webhooks that ended; with the time from the event to the 2xx if there was one."""
    _DELIVERIES.count(outcome, by=count)
    if delay_seconds is not None:
        _DELIVERY_DELAY.observe(max(0.0, delay_seconds))


@event
def swept(sweep: str, seconds: float, failed: bool) -> None:
    """Note how long a sweep took, and whether it failed."""
    _SWEEPS.observe(seconds, sweep)
    _SWEEP_ERRORS.count(sweep, by=float(failed))


# A counter that appears with its first event has no increase that anybody could see: what can be known is there from
# the start, at 0.


_limits: dict[str, list[float | None]] = {}


@event
def expect_runs(task: str, queue: str, limit_seconds: float | None) -> None:
    """A task whose queue this is can run here, for so long; None is for ever."""
    labels = _task(task), _queue(queue)
    _DROPPED.count(by=0.0)
    _STARTED.count(*labels, by=0.0)
    _WAIT.expect(*labels)
    for outcome in catalogue.ATTEMPT_OUTCOMES:
        _ATTEMPTS.count(*labels, outcome, by=0.0)
    for outcome in catalogue.TASK_OUTCOMES:
        _FINISHED.count(*labels, outcome, by=0.0)
    _REDELIVERIES.count(labels[1], by=0.0)
    limits = _limits.setdefault(labels[1], [])
    limits.append(limit_seconds)
    known = [limit for limit in limits if limit is not None]
    if len(known) == len(limits):
        GAUGES.show_group(f"limit of {labels[1]}", {("taskqueue_task_time_limit_seconds", labels[1:]): max(known)})
    else:
        GAUGES.hide_group(f"limit of {labels[1]}")


def expect_submits(task: str, queue: str) -> None:
    """A task can be submitted here, to this queue."""
    _SUBMITTED.count(_task(task), _queue(queue), "accepted", by=0.0)


def expect_requests() -> None:
    """Requests are answered here."""
    for reason in catalogue.REJECTIONS:
        _REJECTED.count(reason, by=0.0)
    for turned in get_args(TurnedAway):
        _TURNED_AWAY.count(turned, by=0.0)
    expect_messages()


def expect_messages() -> None:
    """Messages are pushed here."""
    for outcome in ("sent", "error"):
        _PUBLISHED.count("task", outcome, by=0.0)
    _PUBLISH_DELAY.expect("task")
    _BATCH_SIZE.expect()


def expect_sweeps(webhook_outcomes: Iterable[str]) -> None:
    """Sweeps are made here, and webhooks are sent."""
    expect_messages()
    for reason in catalogue.RECOVERIES:
        _RECOVERED.count(reason, by=0.0)
    for outcome in webhook_outcomes:
        _WEBHOOK_ATTEMPTS.count(outcome, by=0.0)
        _WEBHOOK_DURATION.expect(outcome)
    for outcome in ("delivered", "exhausted"):
        _DELIVERIES.count(outcome, by=0.0)
    _DELIVERY_DELAY.expect()

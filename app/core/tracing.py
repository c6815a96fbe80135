"""One trace for each submit: its spans, what they are called, and how they find each other.

    POST /api/tasks/submit     SERVER    the API, as `server_spans` has it recorded
    └ create <queue>           PRODUCER  the API, around the INSERT: the context that the task's row keeps
      ├ send <queue>           CLIENT    each push of its message: the API after the commit, a relay later
      ├ process <queue>        CONSUMER  the first attempt
      ├ process <queue>        CONSUMER  the second, linked to the first
      │ └ create webhook       PRODUCER  the event, when the attempt was settled
      │   ├ POST               CLIENT    the first attempt to deliver it, whose context the receiver gets
      │   └ POST               CLIENT    the second, linked to the first

Attempts are siblings, so that a trace grows no deeper by retries, and each is
written by whoever ended the attempt: its child, the keeper if the child is dead,
the reaper if all of the worker is. The id of a span that others must find is not
drawn but follows from what it is about, so that nothing has to be stored: the
webhook of an attempt, and the attempt after it, know it wherever they run.

Nothing is recorded before `record` was called, which only a process with a
collector does. Context goes on all the same: a task's `traceparent` is that of
its subtasks, and stands in the lines that it logs.

Source: OpenTelemetry semantic conventions, "Messaging spans" and "HTTP spans".
"""

import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b
from typing import Protocol
from urllib.parse import urlsplit
from uuid import UUID

from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
)

SYSTEM = "messaging.system"
OPERATION = "messaging.operation.name"
OPERATION_TYPE = "messaging.operation.type"
DESTINATION = "messaging.destination.name"
MESSAGE_ID = "messaging.message.id"
BATCH_COUNT = "messaging.batch.message_count"
ERROR_TYPE = "error.type"
METHOD = "http.request.method"
RESENDS = "http.request.resend_count"
STATUS_CODE = "http.response.status_code"
URL = "url.full"
SERVER_ADDRESS = "server.address"
SERVER_PORT = "server.port"
TASK_ID = "taskqueue.task.id"
TASK_NAME = "taskqueue.task.name"
ATTEMPT = "taskqueue.attempt"
OUTCOME = "taskqueue.outcome"
STATUS = "taskqueue.task.status"
QUEUE_WAIT = "taskqueue.queue_wait_ms"
SCHEDULE = "taskqueue.schedule"
EVENT = "taskqueue.webhook.event"

_CELERY = "celery"
_WEBHOOKS = "webhook"
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_PORTS = {"http": 80, "https": 443}

Attributes = Mapping[str, str | int | float | bool]

given_trace_id: ContextVar[int] = ContextVar("given_trace_id", default=0)
"""What the next trace that begins here is called; 0: the SDK draws a number (`collector.Ids`)."""
given_span_id: ContextVar[int] = ContextVar("given_span_id", default=0)
"""As `given_trace_id`, of the next span."""

_tracer: Tracer | None = None


class Message(Protocol):
    """A message that is pushed. `lifecycle.Bell` is one."""

    @property
    def traceparent(self) -> str | None: ...  # noqa: D102  # a field, described by the class that has it


def record(tracer: Tracer | None) -> None:
    """Record spans with this from here on; with None, none any more."""
    global _tracer  # noqa: PLW0603  # one collector per process
    _tracer = tracer


def recording() -> bool:
    """Whether this process has a collector."""
    return _tracer is not None


def parsed(traceparent: str | None) -> SpanContext | None:
    """The context of a `traceparent`; None if it is none (W3C Trace Context, section 3.2)."""
    sent = (traceparent or "").strip()
    found = _TRACEPARENT.fullmatch(sent)
    # Version 00 ends after the flags; a later one may go on, and is read as far as we know it.
    if found is None or (found[4] is not None and sent.startswith("00")):
        return None
    flags = TraceFlags(int(found[3], 16) & TraceFlags.SAMPLED)
    return SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=flags)


def written(one: SpanContext) -> str:
    """The `traceparent` of a context."""
    return f"00-{one.trace_id:032x}-{one.span_id:016x}-{one.trace_flags & TraceFlags.SAMPLED:02x}"


def trace_id_of(traceparent: str | None) -> str | None:
    """The trace that a `traceparent` names, as 32 hexadecimal digits; None if it names none."""
    found = parsed(traceparent)
    return None if found is None else f"{found.trace_id:032x}"


def trace_id_in(traceparent: str) -> str:
    """As `trace_id_of`, of one that this service has `written`."""
    return traceparent[3:35]


@contextlib.contextmanager
def create(
    queue: str,
    *,
    task: str | None = None,
    task_id: UUID | None = None,
    count: int = 1,
    reruns: str | None = None,
    schedule: str | None = None,
) -> Iterator[str | None]:
    """A span around the statement that stores tasks; yields the `traceparent` that they are to keep.

    It is a child of what is recorded just now; if nothing is, there is none, and None is yielded.

    Args:
        queue: of the tasks, the first one's if there are several.
        task: its name, if there is one.
        task_id: likewise.
        count: how many.
        reruns: the `traceparent` of the task that runs again, which is linked to.
        schedule: whose turn it is; then the span begins a trace.
    """
    root = schedule is not None
    if _tracer is None or not (root or trace.get_current_span().is_recording()):
        yield None
        return
    said: dict[str, str | int] = {}
    if task_id is not None:
        said[MESSAGE_ID] = str(task_id)
    if task is not None:
        said[TASK_NAME] = task
    if count > 1:
        said[BATCH_COUNT] = count
    if schedule is not None:
        said[SCHEDULE] = schedule
    before = parsed(reruns)
    span = _start(
        f"create {queue}",
        SpanKind.PRODUCER,
        Context() if root else None,
        _messaging("create", queue) | said,
        linked=before,
    )
    with _told(span):
        yield written(span.get_span_context())


@contextlib.contextmanager
def send(queue: str, messages: Sequence[Message]) -> Iterator[None]:
    """A span in each trace whose messages are pushed with one command."""
    if _tracer is None:
        yield
        return
    sampled: dict[str, int] = {}
    for message in messages:
        # Only this service writes it, so its end is known.
        if message.traceparent is not None and message.traceparent.endswith("-01"):
            sampled[message.traceparent] = sampled.get(message.traceparent, 0) + 1
    with contextlib.ExitStack() as stack:
        for traceparent, count in sampled.items():
            parent = parsed(traceparent)
            if parent is not None:
                said = {BATCH_COUNT: count} if count > 1 else {}
                span = _start(f"send {queue}", SpanKind.CLIENT, _under(parent), _messaging("send", queue) | said)
                stack.enter_context(_told(span))
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt, as its span knows it.

    Attributes:
        number: 1 for the first.
        task: its name.
        traceparent: what the row of its task keeps.
    """

    task_id: UUID
    number: int
    task: str
    queue: str
    traceparent: str | None

    def begin(self, *, waited_seconds: float = 0.0, began: datetime | None = None) -> Span:
        """Its span, which whoever settles the attempt must `end`; others leave it.

        Where nothing is recorded it is one that only hands the context on.

        Args:
            waited_seconds: from being due to its claim.
            began: when, if it was not just now.
        """
        parent = parsed(self.traceparent)
        if parent is None:
            return INVALID_SPAN
        if _tracer is None or not parent.trace_flags.sampled:
            return NonRecordingSpan(parent)
        said: dict[str, str | int | float] = {
            MESSAGE_ID: str(self.task_id),
            TASK_NAME: self.task,
            ATTEMPT: self.number,
            QUEUE_WAIT: round(waited_seconds * 1000, 3),
        }
        return _start(
            f"process {self.queue}",
            SpanKind.CONSUMER,
            _under(parent),
            _messaging("process", self.queue) | said,
            span_id=_attempt_id(self.task_id, self.number),
            linked=_sibling(parent, _attempt_id(self.task_id, self.number - 1)) if self.number > 1 else None,
            start_time=None if began is None else _nanoseconds(began),
        )

    def fields(self) -> dict[str, object]:
        """What a log line about it names."""
        found: dict[str, object] = {"task_id": str(self.task_id), "attempt": self.number, "queue": self.queue}
        trace_id = trace_id_of(self.traceparent)
        if trace_id is not None:
            found["trace_id"] = trace_id
        # Only this service writes it, so its end is known.
        if _tracer is not None and self.traceparent is not None and self.traceparent.endswith("-01"):
            found["span_id"] = f"{_attempt_id(self.task_id, self.number):016x}"
        return found


def end(span: Span, *, outcome: str, status: str, error_type: str | None, at: int | None = None) -> None:
    """End the span of an attempt.

    Args:
        span: from `Attempt.begin`.
        outcome: of the attempt (`AttemptOutcome`).
        status: of its task now.
        error_type: why it did not succeed, if it did not. What the error says is the task's own business.
        at: when the function came to its end, by `time.time_ns`; now unless given.
    """
    if not span.is_recording():
        return
    span.set_attributes({OUTCOME: outcome, STATUS: status})
    if error_type is not None:
        _failed(span, error_type)
    # Postgres's clock may have told when it began, and be ahead of this one.
    span.end(max(at or time.time_ns(), getattr(span, "start_time", 0)))


class Webhook:
    """The spans of one attempt to deliver a webhook.

    Attributes:
        traceparent: what its receiver gets.
    """

    def __init__(self, traceparent: str | None, *, webhook_id: UUID, attempt: int, url: str) -> None:
        """Begin.

        Args:
            traceparent: of its task, or of whoever asked for a test.
            webhook_id: the same for every attempt.
            attempt: 1 for the first.
            url: where to; only its origin is told, since the rest may hold a secret.
        """
        self.traceparent = traceparent
        self._span: Span | None = None
        parent = parsed(traceparent)
        if _tracer is None or parent is None or not parent.trace_flags.sampled:
            return
        self._task = parent
        self._event = _sibling(parent, _span_id("webhook", webhook_id, 0))
        self._said = {MESSAGE_ID: str(webhook_id)}
        target = urlsplit(url)
        self._span = _start(
            "POST",
            SpanKind.CLIENT,
            _under(self._event),
            self._said
            | {
                METHOD: "POST",
                URL: f"{target.scheme}://{target.netloc.rpartition('@')[2]}",
                SERVER_ADDRESS: target.hostname or "",
                SERVER_PORT: target.port or _PORTS.get(target.scheme, 0),
                RESENDS: attempt - 1,
            },
            span_id=_span_id("webhook", webhook_id, attempt),
            linked=_sibling(parent, _span_id("webhook", webhook_id, attempt - 1)) if attempt > 1 else None,
        )
        self.traceparent = written(self._span.get_span_context())
        self._first = attempt == 1

    def end(self, *, status_code: int | None, error_type: str | None, event: str, facts: str | None = None) -> None:
        """Tell of an attempt that counts. One that is broken off, or spends nothing, is not told of.

        Args:
            status_code: of the receiver's answer.
            error_type: what went wrong, unless it was delivered.
            event: such as `task.succeeded`.
            facts: the JSON of the event; None for a test, which no task has caused.
        """
        span = self._span
        if span is None:
            return
        if self._first:
            self._tell_of_the_event(event, facts)
        if status_code is not None:
            span.set_attribute(STATUS_CODE, status_code)
        if error_type is not None:
            _failed(span, error_type)
        span.end()

    def _tell_of_the_event(self, event: str, facts: str | None) -> None:
        """The span of the event itself, which was written with the statement that moved the task: it took no time."""
        parent, moment = self._task, time.time_ns()
        if facts is not None:
            told = json.loads(facts)
            task_id, attempt = UUID(told["data"]["task_id"]), int(told["data"]["attempt"])
            moment = _nanoseconds(datetime.fromisoformat(told["timestamp"]))
            # A cancel or an expiry is nobody's doing in the trace but the submitter's.
            if attempt > 0 and event != "task.revoked":
                parent = _sibling(parent, _attempt_id(task_id, attempt))
        span = _start(
            f"create {_WEBHOOKS}",
            SpanKind.PRODUCER,
            _under(parent),
            self._said | {OPERATION: "create", OPERATION_TYPE: "create", DESTINATION: _WEBHOOKS, EVENT: event},
            span_id=self._event.span_id,
            start_time=moment,
        )
        span.end(moment)


@contextlib.contextmanager
def current(span: Span) -> Iterator[None]:
    """Make a span that of whatever happens in the block: its code's own spans, its subtasks, its log lines."""
    token = context.attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        context.detach(token)


@contextlib.contextmanager
def _told(span: Span) -> Iterator[None]:
    """End a span with its block."""
    try:
        yield
    except BaseException as failed:
        _failed(span, type(failed).__name__)
        raise
    finally:
        span.end()


def _failed(span: Span, error_type: str) -> None:
    span.set_attribute(ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR, error_type))


def _start(
    name: str,
    kind: SpanKind,
    parent: Context | None,
    attributes: Attributes,
    *,
    span_id: int = 0,
    linked: SpanContext | None = None,
    start_time: int | None = None,
) -> Span:
    assert _tracer is not None  # noqa: S101  # asked before
    token = given_span_id.set(span_id)
    try:
        return _tracer.start_span(
            name,
            parent,
            kind,
            attributes,
            links=() if linked is None or not linked.trace_flags.sampled else (Link(linked),),
            start_time=start_time,
        )
    finally:
        given_span_id.reset(token)


def _messaging(operation: str, queue: str) -> dict[str, str | int | float]:
    return {SYSTEM: _CELERY, OPERATION: operation, OPERATION_TYPE: operation, DESTINATION: queue}


def _under(parent: SpanContext) -> Context:
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


def _sibling(one: SpanContext, span_id: int) -> SpanContext:
    return SpanContext(one.trace_id, span_id, is_remote=True, trace_flags=_SAMPLED)


def _attempt_id(task_id: UUID, number: int) -> int:
    return _span_id("attempt", task_id, number)


def _span_id(kind: str, about: UUID, number: int) -> int:
    """The span of something: the same wherever it is asked for, and nothing else's."""
    digest = blake2b(about.bytes + number.to_bytes(8, "big"), digest_size=8, person=kind.encode())
    return int.from_bytes(digest.digest(), "big") or 1


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1e6) * 1000

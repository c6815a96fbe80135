"""What travels in and out of the state machine."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from app import delivery
from app.core.statuses import TaskStatus
from app.core.tracing import Attempt
from app.db import Record
from app.lifecycle.rules import Budgets, Claim, Error


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTask:
    """A task to be submitted. JSON travels as text, so that nothing is parsed twice.

    Attributes:
        id: a UUIDv7, made by whoever submits.
        owner: on whose behalf; empty where nobody has to say.
        args: a JSON array.
        kwargs: a JSON object.
        webhook_events: what the receiver is to hear of; None for how the task ends.
        delay_seconds: from now until it is due; ignored when `due_at` is set.
        due_at: when it is due, with a time zone.
        expires_in_seconds: from now until it is not worth running any more; or `expires_at`.
        time_limit: seconds that one attempt may take.
        concurrency_key: with which others of its queue and owner it shares the limits for each key; empty for none.
        failures: what it has spent already of `max_retries`, as Celery's `apply_async(retries=…)` says.
        unique_key: a digest of what no two unfinished tasks may share; None for one of many.
        unique_for_seconds: how old an unfinished task with this digest may be, to be answered in place of this one.
    """

    id: UUID
    name: str
    queue: str
    args: str = "[]"
    kwargs: str = "{}"
    tags: tuple[str, ...] = ()
    webhook_url: str | None = None
    webhook_events: tuple[str, ...] | None = None
    max_retries: int = 3
    time_limit: float | None = None
    delay_seconds: float = 0.0
    due_at: datetime | None = None
    expires_in_seconds: float | None = None
    expires_at: datetime | None = None
    traceparent: str | None = None
    rerun_of: UUID | None = None
    failures: int = 0
    owner: str = ""
    unique_key: bytes | None = None
    unique_for_seconds: float | None = None
    concurrency_key: str = ""

    @property
    def size_bytes(self) -> int:
        """Of its arguments, as they are stored."""
        return sum(len(text) if text.isascii() else len(text.encode()) for text in (self.args, self.kwargs))

    @property
    def stored_key(self) -> str:
        """Its `concurrency_key` with its owner: what another owner calls the same is another's, and delays nobody."""
        return f"{self.owner}\x1f{self.concurrency_key}" if self.concurrency_key else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitKey:
    """What a submit that may come again is known by.

    Attributes:
        owner: whose it is.
        route: where it was posted to.
        key: what the client called it.
        fingerprint: SHA-256 of what was posted.
    """

    owner: str
    route: str
    key: str
    fingerprint: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """What came of a submit of several tasks, or of one that may come again.

    Attributes:
        task_ids: one for each that was wanted, in their order.
        bells: the messages to push now.
        created: ids of the tasks that were made; the others were there already.
    """

    task_ids: tuple[UUID, ...]
    bells: tuple["Bell", ...]
    created: frozenset[UUID]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """The first submit under a key.

    Attributes:
        fingerprint: of what was posted then.
        task_ids: what was answered.
    """

    fingerprint: bytes
    task_ids: tuple[UUID, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bell:
    """A message to push, for a row that was just stamped as published.

    Attributes:
        position: its place in line.
        overdue: it has been in line before, so it is pushed at the tail, where it is next.
        due_seconds: since when it has been due; None if it had a message before.
    """

    task_id: UUID
    name: str
    queue: str
    attempt: int
    position: int
    time_limit: float | None = None
    traceparent: str | None = None
    overdue: bool = False
    due_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A task that this process may run, until its lease ends.

    Attributes:
        args: JSON text of an array.
        kwargs: JSON text of an object.
        waited_seconds: from being due to this claim.
        limited_with: its `stored_key` if it is in a limited queue, where others may wait for its end; else None.
    """

    claim: Claim
    name: str
    queue: str
    args: str
    kwargs: str
    budgets: Budgets
    time_limit: float | None
    traceparent: str | None
    waited_seconds: float
    limited_with: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a task ended: what waiters and Celery's result backend hear.

    Attributes:
        result: JSON text; None unless it succeeded.
        name: of the task. This and what follows are for the metrics, and known to whoever ends a task.
        queue: where it waited.
        seconds: from its submit to its end.
        is_told: whether somebody is to hear of it by webhook. Known to whoever ends a task.
    """

    task_id: UUID
    status: TaskStatus
    result: str | None
    error: Error | None
    name: str = field(default="", compare=False)
    queue: str = field(default="", compare=False)
    seconds: float = field(default=0.0, compare=False)
    is_told: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A transition that was written.

    Attributes:
        status: where the task went; a task whose cancel was asked for goes nowhere but REVOKED.
        ended: set if that is its end.
        name: of the task, for the metrics.
        queue: where it waited.
        attempt: whose span is to be ended, where somebody else than its process has ended it.
        began: when that attempt did.
    """

    status: TaskStatus
    ended: Ended | None
    name: str = field(default="", compare=False)
    queue: str = field(default="", compare=False)
    attempt: Attempt | None = None
    began: datetime | None = None


@dataclass(frozen=True, slots=True)
class Log:
    """What an attempt's code has logged, as much of it as is kept.

    Attributes:
        lines: JSON text of an array of objects, the oldest first: `after` (seconds since the attempt began),
            `level`, `logger`, `message`.
        dropped: how many lines came before those.
    """

    lines: str
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """What a renewal found: whether the claim still holds, and whether its task is to be cancelled."""

    claim: Claim
    held: bool
    cancel_requested: bool


def bells_of(rows: Iterable[Record]) -> list[Bell]:
    """The messages of rows that were just stamped, in line."""
    bells = [
        Bell(
            task_id=row["id"],
            name=row["name"],
            queue=row["queue"],
            attempt=row["attempt"],
            position=row["position"],
            time_limit=row["time_limit"],
            traceparent=row["traceparent"],
            overdue=row["overdue"],
            due_seconds=row.get("due_seconds"),
        )
        for row in rows
    ]
    return sorted(bells, key=lambda bell: bell.position)


def budgets_of(row: Record) -> Budgets:
    """What a row has spent."""
    return Budgets(
        failures=row["failures"],
        crashes=row["crashes"],
        losses=row["losses"],
        refusals=row["refusals"],
        max_retries=row["max_retries"],
    )


def ended_of(row: Record) -> Ended:
    """How the task of a row ended."""
    error = None
    # What failed attempts said stays in the row of a task that succeeds; it is not its end.
    if row["error_type"] is not None and row["status"] != "SUCCESS":
        error = Error(type=row["error_type"], message=row["error_message"] or "", traceback=row["error_traceback"])
    created, finished = row.get("created_at"), row.get("finished_at")
    status = TaskStatus(row["status"])
    return Ended(
        task_id=row["id"],
        status=status,
        result=row["result"],
        error=error,
        name=row.get("name", ""),
        queue=row.get("queue", ""),
        seconds=(finished - created).total_seconds() if created and finished else 0.0,
        is_told=delivery.is_told(status, row.get("webhook_url"), row.get("webhook_events")),
    )


def settled_of(row: Record) -> Settled:
    """What a statement has made of a row."""
    ended = ended_of(row) if row["finished_at"] else None
    return Settled(status=TaskStatus(row["status"]), ended=ended, name=row.get("name", ""), queue=row.get("queue", ""))

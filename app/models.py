"""The tables. The database repeats the law of `lifecycle` in its CHECKs: no path around the code breaks it.

A row of `task` is the task: its arguments, its budgets and its end. Redis holds
at most a hint to it. A row of `webhook_delivery` is one event that somebody
is to hear of, and one of `webhook_attempt` a try to tell them. `webhook_secret`
holds what signs an owner's webhooks, sealed, and `webhook_test` a test event
for as long as somebody waits to hear what came of it. A row of `api_key` is all
that is kept of a key: enough to know it again. A row of `schedule` says when
tasks are submitted by themselves, and one of `schedule_run` that it was done.
"""

from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Sequence,
    SmallInteger,
    Text,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlmodel import Field, SQLModel

from app.core.scopes import Scope
from app.core.statuses import (
    TERMINAL,
    WAITING,
    AttemptOutcome,
    CatchUp,
    DeliveryStatus,
    HeldFor,
    JobKind,
    JobStatus,
    Overlap,
    TaskStatus,
    WebhookEvent,
)

task_position = Sequence("task_position", metadata=SQLModel.metadata)
"""Publish positions: each message's place in line, so that a lost one is missed."""

event_position = Sequence("event_position", metadata=SQLModel.metadata)
"""The places of events in line, for those who ask for them."""


def _words(values: Iterable[StrEnum]) -> str:
    return ", ".join(f"'{value}'" for value in sorted(str(value) for value in values))


_WAITING = f"status IN ({_words(WAITING)})"


class Task(SQLModel, table=True):  # type: ignore[no-redef]  # pydantic's plugin trips over the field `kwargs`
    """One task that a client submitted."""

    __tablename__ = "task"
    __table_args__ = (
        CheckConstraint(f"status IN ({_words(TaskStatus)})", name="task_status_known"),
        CheckConstraint("(status = 'STARTED') = (lease_until IS NOT NULL)", name="task_leased_iff_started"),
        CheckConstraint("status <> 'STARTED' OR token IS NOT NULL", name="task_fenced_while_started"),
        CheckConstraint(
            f"(status IN ({_words(TERMINAL)})) = (finished_at IS NOT NULL)", name="task_finished_iff_terminal"
        ),
        CheckConstraint("(status = 'SUCCESS') = (result IS NOT NULL)", name="task_result_iff_success"),
        CheckConstraint("status NOT IN ('FAILURE', 'REVOKED') OR error_type IS NOT NULL", name="task_error_named"),
        CheckConstraint("failures BETWEEN 0 AND max_retries + 1", name="task_failures_in_budget"),
        CheckConstraint("max_retries BETWEEN 0 AND 100", name="task_max_retries_range"),
        CheckConstraint("attempt >= 0 AND crashes >= 0 AND losses >= 0 AND refusals >= 0", name="task_counts_positive"),
        CheckConstraint("progress BETWEEN 0 AND 1", name="task_progress_fraction"),
        CheckConstraint("length(queue) BETWEEN 1 AND 64", name="task_queue_length"),
        CheckConstraint("length(name) BETWEEN 1 AND 255", name="task_name_length"),
        CheckConstraint("length(webhook_url) <= 2048", name="task_webhook_url_length"),
        CheckConstraint(f"webhook_events <@ ARRAY[{_words(WebhookEvent)}]", name="task_webhook_events_known"),
        CheckConstraint("length(traceparent) <= 64", name="task_traceparent_length"),
        # Waiting rows without a message: held back (with a position), or to be published when due (without).
        Index(
            "task_unpublished", "queue", "run_at", "id", postgresql_where=text(f"{_WAITING} AND published_at IS NULL")
        ),
        Index(
            "task_handed_back",
            "queue",
            "position",
            postgresql_where=text(f"{_WAITING} AND published_at IS NULL AND position IS NOT NULL"),
        ),
        # Waiting rows that should have a message, in the order of the line: the search for lost ones.
        Index("task_published", "queue", "position", postgresql_where=text(f"{_WAITING} AND published_at IS NOT NULL")),
        # `lease_until` is in no index, so that a renewal is a heap-only update.
        Index("task_started", "queue", "id", postgresql_where=text("status = 'STARTED'")),
        Index(
            "task_expiring",
            "queue",
            "expires_at",
            postgresql_where=text(f"{_WAITING} AND expires_at IS NOT NULL"),
        ),
        Index("task_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        # Lists: each status of an owner's in the order of creation, which `lifecycle.listing` merges; the ends of an
        # owner's in theirs; and what failed, by its error. A success is in the first two only.
        Index("task_listed", "owner", "status", "created_at", "id"),
        Index("task_ended", "owner", "finished_at", "id", postgresql_where=text("finished_at IS NOT NULL")),
        Index(
            "task_errors",
            "owner",
            "error_type",
            "created_at",
            "id",
            postgresql_where=text("error_type IS NOT NULL AND status <> 'SUCCESS'"),
        ),
        {"postgresql_with": {"fillfactor": 85, "autovacuum_vacuum_scale_factor": 0.02}},
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    """A UUIDv7 made by whoever submits; also the Celery task id."""
    name: str = Field(sa_column=Column(Text, nullable=False))
    queue: str = Field(sa_column=Column(Text, nullable=False))
    args: list[Any] = Field(sa_column=Column(JSON, nullable=False))
    kwargs: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    tags: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False, server_default=text("'{}'")))
    webhook_url: str | None = Field(default=None, sa_column=Column(Text))
    webhook_events: list[str] | None = Field(default=None, sa_column=Column(ARRAY(Text)))
    """What its submitter wants to hear of; NULL: how it ended."""
    event_sequence: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """How many of its events were told."""
    owner: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """On whose behalf it was submitted; empty where nobody has to say who they are."""
    concurrency_key: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """With which others of its queue it shares the limits for each key, after the name of its owner; empty for
    none. Its length is bounded where it comes in: a CHECK would be paid for by each claim and settle."""
    rerun_of: UUID | None = Field(default=None, sa_column=Column(Uuid))
    """The ended task that this one runs again."""
    schedule: str | None = Field(default=None, sa_column=Column(Text))
    """The name of the schedule that submitted it."""
    scheduled_for: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """For which of its times, whenever that was."""
    traceparent: str | None = Field(default=None, sa_column=Column(Text))
    """The W3C trace context of the submit, which every attempt and webhook continues."""

    status: TaskStatus = Field(
        default=TaskStatus.PENDING, sa_column=Column(Text, nullable=False, server_default=text("'PENDING'"))
    )
    attempt: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """Counts claims and only grows; with `token` it is the fence."""
    token: UUID | None = Field(default=None, sa_column=Column(Uuid))
    """Random, written by each claim: an attempt number can be given out twice when Postgres dies, this can't."""
    lease_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    worker: str | None = Field(default=None, sa_column=Column(Text))
    cancel_requested: bool = Field(
        default=False, sa_column=Column(Boolean, nullable=False, server_default=text("false"))
    )

    max_retries: int = Field(default=3, sa_column=Column(SmallInteger, nullable=False, server_default=text("3")))
    failures: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Runs that failed; spends `max_retries`."""
    crashes: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Deaths of the task's own process."""
    losses: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Leases that expired because a whole worker or node was lost: not the task's fault."""
    refusals: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Workers that took its message and did not know the task."""
    time_limit: float | None = Field(default=None, sa_column=Column(Float))
    """Seconds that one attempt may take."""

    position: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Its message's place in line; kept when the message is pushed again."""
    published_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When a message was last pushed for it; NULL: none is under way, and it gets one when it is due. Infinity: it is
    held, and gets none before its queue allows it, so whatever looks for rows without a message leaves it alone."""
    run_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    expires_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    started_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When its newest attempt began."""
    finished_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))

    progress: float | None = Field(default=None, sa_column=Column(Float))
    progress_message: str | None = Field(default=None, sa_column=Column(Text))
    result: Any | None = Field(default=None, sa_column=Column(JSON))
    error_type: str | None = Field(default=None, sa_column=Column(Text))
    error_message: str | None = Field(default=None, sa_column=Column(Text))
    error_traceback: str | None = Field(default=None, sa_column=Column(Text))


class IdempotencyKey(SQLModel, table=True):
    """A request that may come again: what it was, and what it made, tasks or a job. Written with them, at once."""

    __tablename__ = "idempotency_key"
    __table_args__ = (
        Index("idempotency_key_created", "created_at"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    owner: str = Field(sa_column=Column(Text, primary_key=True))
    route: str = Field(sa_column=Column(Text, primary_key=True))
    key: str = Field(sa_column=Column(Text, primary_key=True))
    fingerprint: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """SHA-256 of the request, as far as it counts."""
    task_ids: list[UUID] = Field(sa_column=Column(ARRAY(Uuid), nullable=False))
    """What was answered, in its order."""
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))


class UniqueTask(SQLModel, table=True):
    """The newest task that asked to be the only one of its kind. A table of its own, so that no other pays for it."""

    __tablename__ = "unique_task"
    __table_args__ = (
        # A submit writes NULL over a rival that it had not seen, which undoes all of it (`lifecycle.batch`).
        CheckConstraint("task_id IS NOT NULL", name="unique_task_is_nobody_elses"),
        Index("unique_task_task", "task_id"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    digest: bytes = Field(sa_column=Column(LargeBinary, primary_key=True))
    """SHA-256 of owner, name and arguments."""
    task_id: UUID | None = Field(default=None, sa_column=Column(Uuid))


class TaskAttempt(SQLModel, table=True):
    """An attempt that has ended, and its last log lines.

    One that succeeded and logged nothing has no row: that of its task says all there is. It goes with its task.
    """

    __tablename__ = "task_attempt"
    __table_args__ = (
        CheckConstraint("number >= 1", name="task_attempt_numbered"),
        CheckConstraint(f"outcome IN ({_words(AttemptOutcome)})", name="task_attempt_outcome_known"),
        CheckConstraint("octet_length(log::text) <= 32768", name="task_attempt_log_size"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    task_id: UUID = Field(sa_column=Column(ForeignKey("task.id", ondelete="CASCADE"), primary_key=True, nullable=False))
    number: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False, nullable=False))
    """The task's `attempt` at that time."""
    started_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    ended_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    worker: str | None = Field(default=None, sa_column=Column(Text))
    outcome: AttemptOutcome = Field(sa_column=Column(Text, nullable=False))
    error_type: str | None = Field(default=None, sa_column=Column(Text))
    error_message: str | None = Field(default=None, sa_column=Column(Text))
    error_traceback: str | None = Field(default=None, sa_column=Column(Text))
    log: Any | None = Field(default=None, sa_column=Column(JSON))
    """The last lines that its code logged, an array of objects; NULL: none."""
    log_dropped: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default=text("0")))
    """Lines before those."""


class Worker(SQLModel, table=True):
    """A worker that consumes queues, as it says itself every few seconds."""

    __tablename__ = "worker"

    name: str = Field(sa_column=Column(Text, primary_key=True))
    """Host and process id."""
    queues: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False))
    slots: int = Field(sa_column=Column(Integer, nullable=False))
    busy: int = Field(sa_column=Column(Integer, nullable=False))
    seen_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))


class Job(SQLModel, table=True):
    """Something to be done to every task that passes a filter: in steps, by any relay."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint(f"kind IN ({_words(JobKind)})", name="job_kind_known"),
        CheckConstraint(f"status IN ({_words(JobStatus)})", name="job_status_known"),
        CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="job_finished_iff_not_running"),
        Index("job_running", "stepped_at", postgresql_where=text("status = 'running'")),
        Index("job_finished", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index("job_stepped", "owner", "stepped_at", postgresql_where=text("stepped_at > created_at")),
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    owner: str = Field(sa_column=Column(Text, nullable=False))
    kind: JobKind = Field(sa_column=Column(Text, nullable=False))
    filter: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """Which tasks, as `lifecycle.jobs` writes it."""
    status: JobStatus = Field(
        default=JobStatus.RUNNING, sa_column=Column(Text, nullable=False, server_default=text("'running'"))
    )
    acted: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    """Tasks that it was done to."""
    passed_over: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    """Tasks that had moved on in between."""
    mark_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """With `mark_id`, where the next step goes on."""
    mark_id: UUID | None = Field(default=None, sa_column=Column(Uuid))
    token: UUID | None = Field(default=None, sa_column=Column(Uuid))
    """Random, written by whoever takes a step: the fence."""
    lease_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    traceparent: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    stepped_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    """When its newest step was taken: jobs take turns."""
    finished_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))


class JobPlace(SQLModel, table=True):
    """One of the few places that an owner has for jobs, and which job took it last: it is free unless that one runs."""

    __tablename__ = "job_place"

    owner: str = Field(sa_column=Column(Text, primary_key=True))
    slot: int = Field(sa_column=Column(SmallInteger, primary_key=True, autoincrement=False))
    job_id: UUID = Field(sa_column=Column(Uuid, nullable=False))


class QueueSetting(SQLModel, table=True):
    """What holds for one queue. Without a row, and where a column is NULL, nothing is limited."""

    __tablename__ = "queue_setting"
    __table_args__ = (
        CheckConstraint("length(queue) BETWEEN 1 AND 64", name="queue_setting_queue_length"),
        CheckConstraint("concurrency_limit > 0 AND key_concurrency_limit > 0", name="queue_setting_concurrency"),
        CheckConstraint("rate_count > 0 AND rate_seconds > 0", name="queue_setting_rate"),
        CheckConstraint("key_rate_count > 0 AND key_rate_seconds > 0", name="queue_setting_key_rate"),
        CheckConstraint("(rate_count IS NULL) = (rate_seconds IS NULL)", name="queue_setting_rate_whole"),
        CheckConstraint("(key_rate_count IS NULL) = (key_rate_seconds IS NULL)", name="queue_setting_key_rate_whole"),
    )

    queue: str = Field(sa_column=Column(Text, primary_key=True))
    paused: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=text("false")))
    concurrency_limit: int | None = Field(default=None, sa_column=Column(Integer))
    """How many of its tasks may run at once."""
    rate_count: int | None = Field(default=None, sa_column=Column(Integer))
    """How many may start within `rate_seconds`, at even distances."""
    rate_seconds: float | None = Field(default=None, sa_column=Column(Float))
    key_concurrency_limit: int | None = Field(default=None, sa_column=Column(Integer))
    """As `concurrency_limit`, of those that have the same `concurrency_key`."""
    key_rate_count: int | None = Field(default=None, sa_column=Column(Integer))
    key_rate_seconds: float | None = Field(default=None, sa_column=Column(Float))
    updated_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))


class HeldTask(SQLModel, table=True):
    """A task that is held, or whose turn has come and who is not claimed yet.

    A table of its own, since every index on `task` is paid for by each claim and settle, limited or not. Where the
    two differ the task is right: a row here whose task does not wait any more is removed when it is looked at.
    """

    __tablename__ = "held_task"
    __table_args__ = (
        CheckConstraint(f"reason IN ({_words(HeldFor)})", name="held_task_reason_known"),
        Index("held_task_line", "queue", "line", "run_at", "task_id", postgresql_where=text("let_go_at IS NULL")),
        Index("held_task_let_go", "queue", "concurrency_key", postgresql_where=text("let_go_at IS NOT NULL")),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    task_id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    queue: str = Field(sa_column=Column(Text, nullable=False))
    concurrency_key: str = Field(sa_column=Column(Text, nullable=False))
    line: str = Field(sa_column=Column(Text, nullable=False))
    """Whom it waits for: those of the same `concurrency_key`, or all of its queue if empty."""
    reason: HeldFor = Field(sa_column=Column(Text, nullable=False))
    run_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    """Since when it has been due: the order of the line."""
    let_go_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When its turn came, and a message was pushed. It goes before those that are held, and its room is kept."""


class QueueRate(SQLModel, table=True):
    """When the next task of a queue, or of one key in it, may start under the rate limit."""

    __tablename__ = "queue_rate"
    __table_args__ = ({"postgresql_with": {"fillfactor": 50, "autovacuum_vacuum_scale_factor": 0.02}},)

    queue: str = Field(sa_column=Column(Text, primary_key=True))
    key: str = Field(sa_column=Column(Text, primary_key=True))
    """A `concurrency_key`; empty for the queue as a whole."""
    next_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))


class TaskTombstone(SQLModel, table=True):
    """A task that was removed after its retention, so that its id is known to have been there."""

    __tablename__ = "task_tombstone"
    __table_args__ = (
        Index("task_tombstone_pruned", "pruned_at"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    pruned_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    owner: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """That of the task: nobody else hears that there was one."""


class WebhookDelivery(SQLModel, table=True):
    """One event of one task, to be delivered to one URL. Its id is the `webhook-id` of every attempt."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        CheckConstraint(f"status IN ({_words(DeliveryStatus)})", name="delivery_status_known"),
        CheckConstraint("(status = 'delivering') = (lease_until IS NOT NULL)", name="delivery_leased_iff_delivering"),
        CheckConstraint("(status = 'delivered') = (delivered_at IS NOT NULL)", name="delivery_dated"),
        Index("webhook_delivery_event", "task_id", "sequence", unique=True),
        Index("webhook_delivery_due", "next_at", postgresql_where=text("status = 'pending'")),
        # From one receiver to the next, and for each what is due.
        Index(
            "webhook_delivery_receiver",
            "owner",
            "origin",
            "next_at",
            postgresql_where=text("status = 'pending' AND origin IS NOT NULL"),
        ),
        # Those that an earlier release has written, which no search from receiver to receiver comes upon.
        Index("webhook_delivery_nameless", "next_at", postgresql_where=text("status = 'pending' AND origin IS NULL")),
        Index("webhook_delivery_happened", "owner", "created_at", "id"),
        # The events of an owner in line, and those that have no place in it yet.
        Index("webhook_delivery_line", "owner", "position", postgresql_where=text("position IS NOT NULL")),
        Index("webhook_delivery_unnumbered", "created_at", "sequence", postgresql_where=text("position IS NULL")),
        Index("webhook_delivery_leased", "lease_until", postgresql_where=text("status = 'delivering'")),
        # As for tasks: what was sent must not lie for long before what is due.
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    task_id: UUID = Field(sa_column=Column(ForeignKey("task.id", ondelete="CASCADE"), nullable=False))
    position: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Its place among the events of all tasks, given by a relay once it is committed."""
    event: str = Field(sa_column=Column(Text, nullable=False))
    sequence: int = Field(sa_column=Column(Integer, nullable=False))
    """Its place among the events of its task, so that a receiver can drop stale ones."""
    url: str = Field(sa_column=Column(Text, nullable=False))
    owner: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """That of its task. Empty also where an earlier release has written it."""
    origin: str | None = Field(default=None, sa_column=Column(Text))
    """Scheme, host and port of the URL: with the owner, what a receiver is known by. NULL: of an earlier release."""
    facts: str | None = Field(default=None, sa_column=Column(Text))
    """The JSON of the event without its outcome, as it was when it happened. NULL: written by an earlier release."""
    outcome: str | None = Field(default=None, sa_column=Column(Text))
    """The member that says what came of it, as JSON; NULL if nothing has yet."""
    status: DeliveryStatus = Field(
        default=DeliveryStatus.PENDING, sa_column=Column(Text, nullable=False, server_default=text("'pending'"))
    )
    attempt: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Counts claims; one that was handed back is given back."""
    earlier_attempts: int = Field(default=0, sa_column=Column(SmallInteger, nullable=False, server_default=text("0")))
    """Attempts made before the schedule began anew."""
    scheduled_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    """When the schedule began, or began anew."""
    token: UUID | None = Field(default=None, sa_column=Column(Uuid))
    lease_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    next_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    delivered_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    last_status_code: int | None = Field(default=None, sa_column=Column(SmallInteger))
    last_error: str | None = Field(default=None, sa_column=Column(Text))
    """Why the newest attempt failed, one of the words of `utils.webhook`."""


class WebhookAttempt(SQLModel, table=True):
    """One POST of a delivery, and what came of it. It goes with its delivery, and that with its task."""

    __tablename__ = "webhook_attempt"
    __table_args__ = (
        CheckConstraint("octet_length(excerpt) <= 4096", name="attempt_excerpt_length"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    delivery_id: UUID = Field(
        sa_column=Column(ForeignKey("webhook_delivery.id", ondelete="CASCADE"), primary_key=True, nullable=False)
    )
    number: int = Field(sa_column=Column(SmallInteger, primary_key=True, autoincrement=False, nullable=False))
    """The delivery's `attempt` at that time."""
    started_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    duration_seconds: float = Field(sa_column=Column(Float, nullable=False))
    status_code: int | None = Field(default=None, sa_column=Column(SmallInteger))
    error: str | None = Field(default=None, sa_column=Column(Text))
    excerpt: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """The beginning of an answer other than 2xx."""


class WebhookSecret(SQLModel, table=True):
    """What signs the webhooks of one owner. It goes some time after it has expired."""

    __tablename__ = "webhook_secret"
    __table_args__ = (
        CheckConstraint("slot BETWEEN 1 AND 5", name="secret_slot_range"),
        CheckConstraint("kind IN ('ed25519', 'hmac')", name="secret_kind_known"),
        # Also the bound: a slot is taken once, however many ask for it at the same time.
        Index("webhook_secret_owner", "owner", "slot", unique=True),
        Index("webhook_secret_expiring", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    owner: str = Field(sa_column=Column(Text, nullable=False))
    slot: int = Field(sa_column=Column(SmallInteger, nullable=False))
    """Which of the owner's few places it has."""
    sealed: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """The secret, as `utils.sealing` stores it."""
    kind: str = Field(sa_column=Column(Text, nullable=False))
    fingerprint: str = Field(sa_column=Column(Text, nullable=False))
    """What its holder recognises it by."""
    public_key: str | None = Field(default=None, sa_column=Column(Text))
    """`whpk_…`, if it is the private half of a pair."""
    default_until: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """Until when the secrets of the settings sign beside it, if it took over from them."""
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    expires_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When its grace ends; NULL as long as nothing has taken its place."""


class WebhookTest(SQLModel, table=True):
    """A test event, from the wish to send it until whoever wished has heard what came of it: seconds."""

    __tablename__ = "webhook_test"
    __table_args__ = (
        CheckConstraint("length(url) <= 2048", name="test_url_length"),
        CheckConstraint("octet_length(excerpt) <= 4096", name="test_excerpt_length"),
        CheckConstraint("(ended_at IS NOT NULL) = (outcome IS NOT NULL)", name="test_ended_with_an_outcome"),
        Index("webhook_test_created", "created_at"),
    )

    id: UUID = Field(sa_column=Column(Uuid, primary_key=True))
    """Its `webhook-id`."""
    owner: str = Field(sa_column=Column(Text, nullable=False))
    url: str = Field(sa_column=Column(Text, nullable=False))
    event: str = Field(sa_column=Column(Text, nullable=False))
    traceparent: str | None = Field(default=None, sa_column=Column(Text))
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    token: UUID | None = Field(default=None, sa_column=Column(Uuid))
    """Of the relay that sends it; NULL until one does."""
    ended_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    outcome: str | None = Field(default=None, sa_column=Column(Text))
    status_code: int | None = Field(default=None, sa_column=Column(SmallInteger))
    retry_after_seconds: float | None = Field(default=None, sa_column=Column(Float))
    duration_seconds: float | None = Field(default=None, sa_column=Column(Float))
    excerpt: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    headers: dict[str, str] | None = Field(default=None, sa_column=Column(JSON))
    """Those of the request."""
    body: str | None = Field(default=None, sa_column=Column(Text))


class ApiKey(SQLModel, table=True):
    """One key to the API. The key itself is not kept: whoever reads this table can't use what they find."""

    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("octet_length(digest) = 32", name="api_key_digest_length"),
        CheckConstraint("length(owner) <= 64", name="api_key_owner_length"),
        CheckConstraint("length(name) <= 64", name="api_key_name_length"),
        CheckConstraint(f"cardinality(scopes) > 0 AND scopes <@ ARRAY[{_words(Scope)}]", name="api_key_scopes_known"),
    )

    id: str = Field(sa_column=Column(Text, primary_key=True))
    """Stands in the key, and may be told: it opens nothing."""
    digest: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    """HMAC-SHA256 of the whole key, keyed by what `master` names."""
    master: str = Field(sa_column=Column(Text, nullable=False))
    """Which TASKQUEUE_SECRET_KEY the digest was made with (`derived.key_id`)."""
    owner: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """Whose tasks it submits and sees."""
    scopes: list[str] = Field(sa_column=Column(ARRAY(Text), nullable=False))
    name: str = Field(default="", sa_column=Column(Text, nullable=False, server_default=text("''")))
    """What people call it."""
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    expires_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    revoked_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    last_used_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When it last opened something, to a minute or so."""


class Schedule(SQLModel, table=True):
    """When a task is submitted by itself. `version` is the fence of everybody who decides about it."""

    __tablename__ = "schedule"
    __table_args__ = (
        CheckConstraint("(cron IS NULL) <> (every_seconds IS NULL)", name="schedule_cron_or_interval"),
        CheckConstraint("every_seconds >= 1", name="schedule_interval_range"),
        CheckConstraint("jitter_seconds >= 0", name="schedule_jitter_range"),
        CheckConstraint(f"catch_up IN ({_words(CatchUp)})", name="schedule_catch_up_known"),
        CheckConstraint(f"overlap IN ({_words(Overlap)})", name="schedule_overlap_known"),
        CheckConstraint("(next_run IS NULL) = (due_at IS NULL)", name="schedule_due_iff_next"),
        # Times that have not come must not be fired, and are not lost by a decision that comes too early.
        CheckConstraint("due_at >= next_run", name="schedule_due_after_next"),
        CheckConstraint("NOT paused OR due_at IS NULL", name="schedule_not_due_while_paused"),
        Index("schedule_due", "due_at", postgresql_where=text("due_at IS NOT NULL")),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    owner: str = Field(sa_column=Column(Text, primary_key=True, nullable=False))
    name: str = Field(sa_column=Column(Text, primary_key=True, nullable=False))
    task: str = Field(sa_column=Column(Text, nullable=False))
    submit: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    """What is submitted each time, as the body of a submit says it."""
    cron: str | None = Field(default=None, sa_column=Column(Text))
    time_zone: str = Field(sa_column=Column(Text, nullable=False))
    every_seconds: float | None = Field(default=None, sa_column=Column(Float))
    anchor: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False))
    """The first time of an interval."""
    start_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    end_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    jitter_seconds: float = Field(sa_column=Column(Float, nullable=False))
    catch_up: CatchUp = Field(sa_column=Column(Text, nullable=False))
    overlap: Overlap = Field(sa_column=Column(Text, nullable=False))
    paused: bool = Field(sa_column=Column(Boolean, nullable=False))
    version: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    """Grows with every write."""
    next_run: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """The first time for which nothing has been decided; NULL: none is left, or it is paused."""
    due_at: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """When a relay is to decide about it: `next_run` and its jitter, or the next try after an error."""
    last_run: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    """The newest time for which a task was submitted."""
    last_task_id: UUID | None = Field(default=None, sa_column=Column(Uuid))
    fired: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    skipped: int = Field(default=0, sa_column=Column(BigInteger, nullable=False, server_default=text("0")))
    """Times at which the last task had not ended."""
    last_error: str | None = Field(default=None, sa_column=Column(Text))
    failing_since: datetime | None = Field(default=None, sa_column=Column(DateTime(timezone=True)))
    created_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    updated_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))
    """When its owner last said what it is to do."""


class ScheduleRun(SQLModel, table=True):
    """A time for which a schedule has submitted a task: there is one for each, whoever tries to.

    It stands apart from the task, so that no other task pays for an index over it.
    """

    __tablename__ = "schedule_run"
    __table_args__ = (
        Index("schedule_run_fired", "fired_at"),
        {"postgresql_with": {"autovacuum_vacuum_scale_factor": 0.02}},
    )

    owner: str = Field(sa_column=Column(Text, primary_key=True, nullable=False))
    schedule: str = Field(sa_column=Column(Text, primary_key=True, nullable=False))
    scheduled_for: datetime = Field(sa_column=Column(DateTime(timezone=True), primary_key=True, nullable=False))
    task_id: UUID = Field(sa_column=Column(Uuid, nullable=False))
    fired_at: datetime = Field(sa_column=Column(DateTime(timezone=True), nullable=False, server_default=func.now()))

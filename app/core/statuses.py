"""The words for where a task and a webhook are. The tables and everything that reads a row speak them.

They stand apart from the tables, so that a worker, its keeper and the relay,
which never map a row to an object, need not load an object mapper to start.
"""

from enum import StrEnum


class TaskStatus(StrEnum):
    """The six public statuses, in Celery's own words."""

    PENDING = "PENDING"
    """Not claimed yet, or handed back by a worker that stopped."""
    STARTED = "STARTED"
    """A worker holds its lease."""
    RETRY = "RETRY"
    """An attempt was spent; it runs again when `run_at` has come."""
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"
    """Cancelled, or expired before it ran."""


WAITING = frozenset({TaskStatus.PENDING, TaskStatus.RETRY})
TERMINAL = frozenset({TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.REVOKED})


class AttemptOutcome(StrEnum):
    """How an attempt ended, whatever that meant for its task."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Its code raised, or it ran past its time limit."""
    RELEASED = "released"
    """Its worker stopped and handed the task back."""
    CRASHED = "crashed"
    """Its process died."""
    LOST = "lost"
    """Its worker was lost."""
    REFUSED = "refused"
    """The arguments did not fit the task as its worker has it."""
    CANCELLED = "cancelled"


class JobKind(StrEnum):
    """What is done to many tasks."""

    CANCEL = "cancel"
    RERUN = "rerun"


class JobStatus(StrEnum):
    """How far that has come."""

    RUNNING = "running"
    DONE = "done"
    CANCELLED = "cancelled"
    """Somebody stopped it; what it has done stays done."""


class Reason(StrEnum):
    """Why a task is where it is."""

    ENDED = "ended"
    RUNNING = "running"
    CANCEL_REQUESTED = "cancel_requested"
    """It runs, and was asked to stop."""
    WORKER_SILENT = "worker_silent"
    """It should be running, but its lease is not renewed any more."""
    NOT_DUE = "not_due"
    QUEUE_UNKNOWN = "queue_unknown"
    """No relay looks after its queue."""
    REDIS_AWAY = "redis_away"
    QUEUE_FULL = "queue_full"
    """It waits for room in Redis."""
    NO_CONSUMER = "no_consumer"
    UNPUBLISHED = "unpublished"
    """It is due, and a relay will publish it."""
    MESSAGE_GONE = "message_gone"
    """Its message has left the queue: it is being claimed, or was lost."""
    IN_LINE = "in_line"
    HELD = "held"
    """Its queue is paused, or as many run or have started as may."""


class HeldFor(StrEnum):
    """Why a waiting task that is due has no message, and gets none before its queue allows it."""

    PAUSED = "paused"
    """The queue is paused, or was and is being worked off."""
    CONCURRENCY = "concurrency"
    """As many tasks of the queue run as may."""
    RATE = "rate"
    """As many tasks of the queue have started as may in a while."""
    KEY_CONCURRENCY = "key_concurrency"
    """As `CONCURRENCY`, of those with the same `concurrency_key`."""
    KEY_RATE = "key_rate"
    """As `RATE`, of those with the same `concurrency_key`."""


class WebhookEvent(StrEnum):
    """What somebody may hear of."""

    SUCCEEDED = "task.succeeded"
    FAILED = "task.failed"
    REVOKED = "task.revoked"
    STARTED = "task.started"
    """An attempt has begun; only if it was asked for."""
    RETRYING = "task.retrying"
    """An attempt was spent, and another will follow; only if it was asked for."""


ENDS = frozenset({WebhookEvent.SUCCEEDED, WebhookEvent.FAILED, WebhookEvent.REVOKED})
"""What is told unless the submitter chose."""


class DeliveryStatus(StrEnum):
    """What became of a webhook."""

    PENDING = "pending"
    """To be sent when `next_at` has come."""
    DELIVERING = "delivering"
    """A relay holds its lease and is sending it."""
    DELIVERED = "delivered"
    EXHAUSTED = "exhausted"
    """Every attempt of the schedule failed, or the receiver can never be reached."""


class CatchUp(StrEnum):
    """What a schedule does about the times that it has missed, because no relay ran or it could not be fired."""

    NONE = "none"
    ONE = "one"
    """The newest is fired, unless one that was not missed is."""
    ALL = "all"
    """Each is fired, up to a limit."""


class Overlap(StrEnum):
    """What a schedule does at a time at which its last task has not ended."""

    ALLOW = "allow"
    SKIP = "skip"

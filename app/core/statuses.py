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

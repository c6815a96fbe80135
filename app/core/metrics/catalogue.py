"""Every metric there is: its name, its labels, who exports it, what it says, and what to do about it.

The instruments are made from this list, and so is `docs/metrics.md`. No label has a
value that a client can make up: tasks, queues and exceptions are counted under
their names only while these are few, and the state of the queues is asked for
those that the settings name.
"""

from app.core.metrics import cluster, work
from app.core.metrics.metric import Metric, Process

__all__ = [
    "ATTEMPT_OUTCOMES", "METRICS", "PARTS", "RECOVERIES", "REJECTIONS", "SOURCES", "STATES", "TASK_OUTCOMES", "Metric",
    "Process",
]  # fmt: skip

ATTEMPT_OUTCOMES = ("succeeded", "retried", "failed", "timed_out", "revoked", "lost", "released", "refused")
TASK_OUTCOMES = ("succeeded", "failed", "timed_out", "cancelled", "expired", "lost")
REJECTIONS = (
    "validation", "unauthenticated", "forbidden", "rate_limited", "payload_too_large", "idempotency_conflict",
    "unknown_task", "backpressure", "unavailable", "not_found",
)  # fmt: skip
RECOVERIES = ("stale_running", "lost_message", "stuck_outbox")
STATES = ("PENDING", "SCHEDULED", "HELD", "STARTED")
SOURCES = ("postgres", "redis")

PARTS = {
    "Requests": work.REQUESTS,
    "Submits": work.SUBMITS,
    "Messages": work.MESSAGES,
    "Tasks": work.TASKS,
    "Workers": work.WORKERS,
    "The state of queues and webhooks": cluster.STATE,
    "The relay": cluster.RELAYS,
    "Webhooks": cluster.WEBHOOKS,
}
"""The metrics by what they are about."""
METRICS = tuple(metric for part in PARTS.values() for metric in part)

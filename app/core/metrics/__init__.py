"""Prometheus metrics, in one place, on a port of their own.

`catalogue` lists them; `happenings` counts, `state` shows what is now, and both
speak of tasks and queues, not of instruments. A worker's children have none:
what they count is forwarded to the keeper (`forwarding`).

What several processes count is added up. The state of the queues is exported by
the relay alone, so that replicas of the API don't add up to a multiple of it;
with two relays, take the maximum.
"""

from app.core.metrics.exposition import serve
from app.core.metrics.forwarding import Pipe, Reader, silence
from app.core.metrics.happenings import (
    UNKNOWN,
    accepted_payload,
    attempt_ended,
    attempt_started,
    child_started,
    counting_rejections,
    expect_messages,
    expect_requests,
    expect_runs,
    expect_submits,
    expect_sweeps,
    keeper_started,
    published,
    recovered,
    redelivered,
    rejected,
    request_ended,
    requests_active,
    submitted,
    swept,
    task_finished,
    turned_away,
    webhook_attempted,
    webhooks_ended,
)
from app.core.metrics.state import (
    collecting,
    pool_name,
    show_circuits,
    show_heartbeat,
    show_pool,
    watch_line,
    watch_pool,
)

__all__ = [
    "UNKNOWN",
    "Pipe",
    "Reader",
    "accepted_payload",
    "attempt_ended",
    "attempt_started",
    "child_started",
    "collecting",
    "counting_rejections",
    "expect_messages",
    "expect_requests",
    "expect_runs",
    "expect_submits",
    "expect_sweeps",
    "keeper_started",
    "pool_name",
    "published",
    "recovered",
    "redelivered",
    "rejected",
    "request_ended",
    "requests_active",
    "serve",
    "show_circuits",
    "show_heartbeat",
    "show_pool",
    "silence",
    "submitted",
    "swept",
    "task_finished",
    "turned_away",
    "watch_line",
    "watch_pool",
    "webhook_attempted",
    "webhooks_ended",
]

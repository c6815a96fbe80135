"""What is told of a task: the statement that writes an event, and the JSON that is sent.

The words of an event are put down by the statement that makes it happen, once,
in two parts: the facts, and what came of it (`"result": …` or `"error": …`). So
a later change of the task changes no byte of it, and `thin` is a body without
the second part. A result stands there as the text that is stored, so that no
number loses a digit; one that is large is a link.
"""

from collections.abc import Collection
from typing import Literal, Protocol

from app.core.statuses import ENDS, TERMINAL, TaskStatus, WebhookEvent

INLINE_BYTES = 65_536
"""Of a result that is sent as it is; a larger one is a link to `GET /api/tasks/{id}/result`."""

_EVENT_OF = {
    TaskStatus.SUCCESS: WebhookEvent.SUCCEEDED,
    TaskStatus.FAILURE: WebhookEvent.FAILED,
    TaskStatus.REVOKED: WebhookEvent.REVOKED,
    TaskStatus.STARTED: WebhookEvent.STARTED,
    TaskStatus.RETRY: WebhookEvent.RETRYING,
}
_TOLD = (
    "id", "name", "status", "attempt", "result", "error_type", "error_message", "created_at", "finished_at",
    "webhook_url", "webhook_events", "event_sequence", "owner",
)  # fmt: skip
_PLACE = ', "created_at": '
"""Where the outcome is put into the facts. It is there once: within a JSON text, a quotation mark has a backslash."""


def told_columns(alias: str = "") -> str:
    """The columns of `task` that `intend` needs, for RETURNING; with the alias of the table if it has one."""
    return ", ".join(f"{alias}.{column}" if alias else column for column in _TOLD)


def _event(status: str, of: Collection[TaskStatus]) -> str:
    words = " ".join(f"WHEN '{one}' THEN '{_EVENT_OF[one]}'" for one in sorted(of))
    return f"CASE {status} {words} END"


def _wanted(event: str, source: str = "") -> str:
    dot = f"{source}." if source else ""
    ends = ", ".join(sorted(ENDS))
    chosen = f"COALESCE({dot}webhook_events, '{{{ends}}}')"
    return f"COALESCE({dot}webhook_url IS NOT NULL AND {event} = ANY ({chosen}), false)"


def tells(status: str, of: Collection[TaskStatus] = TERMINAL) -> str:
    """1 if somebody is to hear that a task gets this status, else 0: what `event_sequence` grows by.

    The number is counted in the row of the task: two statements that want the same row then never give
    the same number, however late the second sees what the first has written.

    Args:
        status: the new status, as SQL over the columns of `task`.
        of: the statuses that are told of by this statement.
    """
    return f"{_wanted(f'({_event(status, of)})')}::int"


def intend(source: str, of: Collection[TaskStatus] = TERMINAL) -> str:
    """The body of a CTE that writes the event of every task that another CTE has moved.

    A second event of the same sequence is a bug, and the unique index (task_id,
    sequence) fails the statement.

    Args:
        source: the name of a CTE with the columns `told_columns()`. Its rows whose task has
            another status, or whose submitter did not choose the event, are passed over.
        of: the statuses that are told of by this statement; the same as for `tells`.
    """
    # `source` is a name that our own statements use, never input.
    event = f"({_event(f'{source}.status', of)})"
    return f"""
    INSERT INTO webhook_delivery (id, task_id, owner, event, sequence, url, origin, facts, outcome)
    SELECT gen_random_uuid(), {source}.id, {source}.owner, {event}, {source}.event_sequence, {source}.webhook_url,
           {origin_of(f"{source}.webhook_url")}, {facts_of(source, event, f"{source}.event_sequence")},
           {outcome_of(source)}
      FROM {source}
     WHERE {_wanted(event, source)}
    """


def is_told(status: TaskStatus, url: str | None, chosen: Collection[str] | None) -> bool:
    """Whether a statement that has given a task this status wrote a delivery: `_wanted`, of a row that was read.

    Args:
        status: that it has now.
        url: `webhook_url`.
        chosen: `webhook_events`.
    """
    return url is not None and _EVENT_OF.get(status) in (ENDS if chosen is None else chosen)


def origin_of(url: str) -> str:
    """SQL for scheme, host and port of a URL that was admitted, and is in its normal form."""
    return f"substring({url} FROM '^[a-z]+://[^/?#]+')"


def facts_of(source: str, event: str, sequence: str) -> str:
    """SQL for the JSON of an event, without its outcome."""
    return f"""
           '{{"type": "' || {event} || '", "timestamp": ' || {_instant(f"COALESCE({source}.finished_at, now())")}
           || ', "data": {{"task_id": "' || {source}.id || '", "task": ' || to_json({source}.name)
           || ', "status": "' || {source}.status || '", "attempt": ' || {source}.attempt
           || ', "sequence": ' || {sequence} || '{_PLACE}' || {_instant(f"{source}.created_at")}
           || ', "finished_at": ' || COALESCE({_instant(f"{source}.finished_at")}, 'null') || '}}}}'"""


def outcome_of(source: str) -> str:
    """SQL for the member that says what came of it; NULL for a task that has only begun."""
    return f"""
           CASE WHEN {source}.status IN ('FAILURE', 'REVOKED', 'RETRY') THEN
                '"error": {{"type": ' || to_json({source}.error_type) || ', "message": '
                || to_json(COALESCE({source}.error_message, '')) || '}}'
                WHEN {source}.status <> 'SUCCESS' THEN NULL
                WHEN octet_length({source}.result::text) <= {INLINE_BYTES} THEN '"result": ' || {source}.result
                ELSE '"result_url": "/api/tasks/' || {source}.id || '/result"' END"""


def _instant(moment: str) -> str:
    """SQL for ISO 8601 in UTC with milliseconds, as JSON: `"2026-01-31T12:00:00.000Z"`."""
    return f"""'"' || to_char({moment} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') || '"'"""


class Told(Protocol):
    """An event as it was put down."""

    @property
    def facts(self) -> str:
        """Its JSON, without the outcome."""
        ...

    @property
    def outcome(self) -> str | None:
        """The member that says what came of it, as JSON."""
        ...


def body(told: Told, payload: Literal["full", "thin"]) -> bytes:
    """The JSON that is signed and sent, the same bytes on every attempt (Standard Webhooks, "Payload").

    Args:
        told: the event.
        payload: `full` has the result, or a link to it, or the error; `thin` has none of them.
    """
    if payload == "thin" or told.outcome is None:
        return told.facts.encode()
    return told.facts.replace(_PLACE, f", {told.outcome}{_PLACE}", 1).encode()

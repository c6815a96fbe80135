"""What is told of a task: the statement that writes an event, and the JSON that is sent."""

import json
from datetime import UTC, datetime
from typing import Literal

from app.delivery.outbox import Claimed


def intend(source: str) -> str:
    """The body of a CTE that writes the event of every task that another CTE has ended.

    A task ends once, so a second event of the same sequence is a bug, and the
    unique index (task_id, sequence) fails the statement.

    Args:
        source: the name of a CTE with the columns `id`, `status` and `webhook_url` of
            `task`. Its rows that are not terminal, or have no URL, are passed over.
    """
    # `source` is a name that our own statements use, never input.
    return f"""
    INSERT INTO webhook_delivery (id, task_id, event, sequence, url)
    SELECT gen_random_uuid(), {source}.id,
           CASE {source}.status WHEN 'SUCCESS' THEN 'task.succeeded'
                                WHEN 'FAILURE' THEN 'task.failed'
                                ELSE 'task.revoked' END,
           1, {source}.webhook_url
      FROM {source}
     WHERE {source}.webhook_url IS NOT NULL AND {source}.status IN ('SUCCESS', 'FAILURE', 'REVOKED')
    """


def body(claimed: Claimed, payload: Literal["full", "thin"]) -> bytes:
    """The JSON that is signed and sent, the same bytes on every attempt (Standard Webhooks, "Payload").

    The stored result is spliced in as the text it is, so that no number loses a digit.

    Args:
        claimed: what to tell of.
        payload: `full` has the result, or the error; `thin` has neither.
    """
    data = {
        "task_id": json.dumps(str(claimed.task_id)),
        "task": json.dumps(claimed.task),
        "status": json.dumps(claimed.status),
        "attempt": json.dumps(claimed.task_attempt),
        "sequence": json.dumps(claimed.sequence),
    }
    if payload == "full":
        data |= _end(claimed)
    data["created_at"] = json.dumps(_instant(claimed.created_at))
    data["finished_at"] = json.dumps(_instant(claimed.finished_at))
    event = {
        "type": json.dumps(claimed.event),
        "timestamp": json.dumps(_instant(claimed.finished_at)),
        "data": _object(data),
    }
    return _object(event).encode()


def _end(claimed: Claimed) -> dict[str, str]:
    if claimed.status == "SUCCESS":
        return {"result": claimed.result or "null"}
    error = {"type": claimed.error_type, "message": claimed.error_message or ""}
    return {"error": json.dumps(error)}


def _object(members: dict[str, str]) -> str:
    """A JSON object of members that are JSON already."""
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in members.items()) + "}"


def _instant(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds: `2026-01-31T12:00:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

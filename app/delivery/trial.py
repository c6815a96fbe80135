"""Test events: somebody wants to know, now, what becomes of a webhook to a URL.

The API may not call anybody, relays may: so the wish is a row, which a relay takes
as soon as it sees it, and which ends with what came of the POST. Nobody waits for
long, so a wish that no relay took at once is void, and one that was heard is gone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from app.core.statuses import TaskStatus, WebhookEvent
from app.db import Database
from app.delivery.outbox import kept_excerpt
from app.utils.webhook import Outcome, Receipt

TEST = "webhook.test"
"""The type of a test event that resembles no other."""
PICKUP_SECONDS = 5.0
"""How old a wish may be that a relay still takes."""
OWNER_AT_ONCE = 3
"""Test events of one owner that one relay sends at once: whose receivers never answer must not take its whole room."""

_STATUS_OF: Mapping[str, TaskStatus] = {
    WebhookEvent.SUCCEEDED: TaskStatus.SUCCESS,
    WebhookEvent.FAILED: TaskStatus.FAILURE,
    WebhookEvent.REVOKED: TaskStatus.REVOKED,
    WebhookEvent.STARTED: TaskStatus.STARTED,
    WebhookEvent.RETRYING: TaskStatus.RETRY,
}
_UNFINISHED = frozenset({WebhookEvent.STARTED, WebhookEvent.RETRYING})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A test event that this relay is to send.

    Attributes:
        id: the `webhook-id`.
        event: `TEST`, or the event that it resembles.
        created_at: when it was asked for, by Postgres's clock; `claimed_at` is when it was taken.
        token: fences `end_trial`.
    """

    id: UUID
    owner: str
    url: str
    event: str
    traceparent: str | None
    created_at: datetime
    claimed_at: datetime
    token: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What came of a test event.

    Attributes:
        outcome: one of the words of `utils.webhook.Outcome`.
        headers: of the request; none if it came to no request.
        body: likewise, empty.
    """

    outcome: Outcome
    status_code: int | None
    retry_after_seconds: float | None
    duration_seconds: float
    excerpt: str
    headers: Mapping[str, str]
    body: str


def trial_body(trial: Trial, payload: Literal["full", "thin"]) -> bytes:
    """The JSON of a test event: that of the event it resembles, or one that speaks of no task.

    `data.test` is true in it, and nowhere else.
    """
    moment = trial.created_at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    status = _STATUS_OF.get(trial.event)
    if status is None:
        data: dict[str, object] = {"test": True, "message": "A test of this receiver; nothing happened to any task"}
    else:
        data = {
            "test": True,
            "task_id": str(trial.id),
            "task": TEST,
            "status": status.value,
            "attempt": 1,
            "sequence": 1,
        }
        if payload == "full":
            data |= _came_of(status)
        data |= {"created_at": moment, "finished_at": None if trial.event in _UNFINISHED else moment}
    return json.dumps({"type": trial.event, "timestamp": moment, "data": data}).encode()


def _came_of(status: TaskStatus) -> dict[str, object]:
    if status is TaskStatus.STARTED:
        return {}
    if status is TaskStatus.SUCCESS:
        return {"result": "A test"}
    return {"error": {"type": "Cancelled" if status is TaskStatus.REVOKED else "TestError", "message": "A test"}}


_ASK = """
INSERT INTO webhook_test (id, owner, url, event, traceparent) VALUES ($1, $2, $3, $4, $5)
"""


async def ask_trial(db: Database, trial_id: UUID, *, owner: str, url: str, event: str, traceparent: str | None) -> None:
    """Ask the relays to send a test event to a URL that was admitted."""
    await db.execute(_ASK, trial_id, owner, url, event, traceparent)


# Nobody takes one that somebody else is about to take; nothing is claimed here that is not sent at once. The table
# holds what is waited for right now, so counting each owner's costs nothing.
_CLAIM = f"""
WITH asked AS (
    SELECT id, row_number() OVER (PARTITION BY owner ORDER BY created_at) AS place FROM webhook_test
     WHERE created_at > now() - make_interval(secs => $2) AND token IS NULL
), taken AS (
    SELECT t.id FROM webhook_test t JOIN asked ON asked.id = t.id
     WHERE t.token IS NULL AND place + cardinality(array_positions($3::text[], t.owner)) <= {OWNER_AT_ONCE}
     ORDER BY t.created_at LIMIT $1 FOR UPDATE OF t SKIP LOCKED
)
UPDATE webhook_test t SET token = gen_random_uuid() FROM taken WHERE t.id = taken.id
RETURNING t.id, t.owner, t.url, t.event, t.traceparent, t.created_at, now() AS claimed_at, t.token
"""


async def claim_trials(db: Database, *, limit: int, sending: Sequence[str] = ()) -> list[Trial]:
    """Take test events that were asked for just now; no other relay gets them.

    Args:
        db: where.
        limit: test events at most, and of one owner no more than `OWNER_AT_ONCE` with those in `sending`.
        sending: the owner of each that is on its way from this relay.
    """
    return [Trial(**dict(row)) for row in await db.fetch(_CLAIM, limit, PICKUP_SECONDS, list(sending))]


_END = """
UPDATE webhook_test
   SET ended_at = now(), outcome = $3, status_code = $4, retry_after_seconds = $5, duration_seconds = $6, excerpt = $7,
       headers = $8::text::json, body = $9
 WHERE id = $1 AND token = $2 AND ended_at IS NULL
"""


async def end_trial(db: Database, trial: Trial, receipt: Receipt, body: bytes) -> None:
    """Write what came of a test event, for whoever waits for it."""
    await db.execute(
        _END,
        trial.id,
        trial.token,
        receipt.outcome.value,
        receipt.status_code,
        receipt.retry_after_seconds,
        receipt.duration_seconds,
        kept_excerpt(receipt.excerpt),
        json.dumps(dict(receipt.request_headers)),
        body.decode() if receipt.request_headers else "",
    )


_HEAR = """
DELETE FROM webhook_test WHERE id = $1 AND ended_at IS NOT NULL
RETURNING outcome, status_code, retry_after_seconds, duration_seconds, excerpt, headers::text AS headers, body
"""


async def hear_trial(db: Database, trial_id: UUID) -> Tried | None:
    """What came of a test event; None if nothing has yet. It can be heard once."""
    row = await db.fetchrow(_HEAR, trial_id)
    if row is None:
        return None
    columns = dict(row)
    headers = json.loads(columns.pop("headers") or "{}")
    return Tried(outcome=Outcome(columns.pop("outcome")), headers=headers, **columns)


async def withdraw_trial(db: Database, trial_id: UUID) -> bool:
    """Take back a test event that no relay has taken.

    Returns:
        False if one has: it is being sent, or was.
    """
    sql = "DELETE FROM webhook_test WHERE id = $1 AND token IS NULL RETURNING id"
    return await db.fetchval(sql, trial_id) is not None


async def prune_trials(db: Database, *, older_than_seconds: float, limit: int) -> int:
    """Remove test events that nobody came back for."""
    sql = """
    DELETE FROM webhook_test WHERE id IN (
        SELECT id FROM webhook_test WHERE created_at < now() - make_interval(secs => $1)
         ORDER BY created_at LIMIT $2 FOR UPDATE SKIP LOCKED)
    RETURNING id
    """
    return len(await db.fetch(sql, older_than_seconds, limit))

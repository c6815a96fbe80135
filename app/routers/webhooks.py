"""What became of a task's webhook: how far it has come, and every attempt."""

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query

from app import delivery, lifecycle, schemas
from app.core import errors
from app.routers import problems
from app.routers.state import Resources, State
from app.routers.tasks import ONE, PATH, TaskId, absent

PAGE = 50

WEBHOOK = f"{PATH}{ONE}/webhook"

router = APIRouter(tags=["webhooks"])

AttemptCursor = Annotated[
    str, Query(alias="cursor", pattern=r"^[0-9]{1,9}\.[0-9]{1,5}$", description="The `next_cursor` of the page before.")
]
Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page at most.")]


@router.get(WEBHOOK, responses=problems.responses(404, 410, 422, 503))
async def read_webhook(task_id: TaskId, state: Resources) -> schemas.WebhookState:
    """How far the newest webhook of the task has come. A task without one is a `404` that says so."""
    url = await _url(task_id, state)
    return _shown(task_id, url, await delivery.state_of(state["db"], task_id))


@router.get(f"{WEBHOOK}/attempts", responses=problems.responses(404, 410, 422, 503))
async def read_attempts(
    task_id: TaskId, state: Resources, cursor: AttemptCursor = "0.0", limit: Limit = PAGE
) -> schemas.AttemptPage:
    """Every POST of the task's webhooks, the oldest event first: when, how long, and what was answered."""
    await _url(task_id, state)
    sequence, _, number = cursor.partition(".")
    after = (int(sequence), int(number))
    found = await delivery.attempts(state["db"], task_id, after=after, limit=limit + 1)
    page = found[:limit]
    more = f"{page[-1].sequence}.{page[-1].number}" if len(found) > limit else None
    return schemas.AttemptPage(data=[_attempt(one) for one in page], next_cursor=more)


async def _url(task_id: UUID, state: State) -> str:
    """Where the task's webhooks go. Raises why there is no such place."""
    found = await lifecycle.view(state["db"], task_id)
    if found is None:
        raise await absent(task_id, state)
    if found.webhook_url is None:
        raise errors.NoWebhook
    return found.webhook_url


def _shown(task_id: UUID, url: str, found: delivery.State | None) -> schemas.WebhookState:
    if found is None:
        return schemas.WebhookState(task_id=task_id, url=schemas.shown_url(url))
    return schemas.WebhookState(
        task_id=task_id,
        url=schemas.shown_url(url),
        webhook_id=found.id,
        event=found.event,
        sequence=found.sequence,
        status=found.status,
        attempt=found.attempt,
        next_at=found.next_at,
        delivered_at=found.delivered_at,
        last_status_code=found.last_status_code,
        last_error=found.last_error,
    )


def _attempt(one: delivery.Attempt) -> schemas.AttemptRead:
    return schemas.AttemptRead(
        webhook_id=one.delivery_id,
        event=one.event,
        sequence=one.sequence,
        number=one.number,
        started_at=one.started_at,
        duration_seconds=round(one.duration_seconds, 6),
        status_code=one.status_code,
        error=one.error,
        excerpt=one.excerpt,
    )

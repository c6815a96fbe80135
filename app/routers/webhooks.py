"""What became of a task's webhook, every attempt, sending it again, and the events for whoever asks."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response

from app import delivery, lifecycle, schemas
from app.core import errors
from app.core.statuses import DeliveryStatus
from app.routers import body, door, problems
from app.routers.state import Resources, State
from app.routers.tasks import ONE, PATH, TaskId, absent

PAGE = 50

STEP = 1000
"""Webhooks that one statement looks at."""
STEPS = 10
"""Such statements of one request."""
REDELIVERIES_AT_ONCE = 4
"""Such requests of all owners that one process works on; of one owner, one."""
_EPOCH = datetime.fromtimestamp(0, UTC)
_STATES = {
    "undelivered": (DeliveryStatus.EXHAUSTED, DeliveryStatus.PENDING),
    "exhausted": (DeliveryStatus.EXHAUSTED,),
    "delivered": (DeliveryStatus.DELIVERED,),
}
WEBHOOK = f"{PATH}{ONE}/webhook"

router = APIRouter(tags=["webhooks"])

AttemptCursor = Annotated[
    str, Query(alias="cursor", pattern=r"^[0-9]{1,9}\.[0-9]{1,5}$", description="The `next_cursor` of the page before.")
]
EventCursor = Annotated[str, Query(pattern=r"^[0-9]{1,18}$", description="The `next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page at most.")]


@router.get(WEBHOOK, responses=problems.responses(404, 410, 422, 503))
async def read_webhook(task_id: TaskId, state: Resources, caller: door.Reader) -> schemas.WebhookState:
    """How far the newest webhook of the task has come. A task without one is a `404` that says so."""
    url = await _url(task_id, state, caller)
    return _shown(task_id, url, await delivery.state_of(state["db"], task_id, owner=caller.owner))


@router.get(f"{WEBHOOK}/attempts", responses=problems.responses(404, 410, 422, 503))
async def read_attempts(
    task_id: TaskId, state: Resources, caller: door.Reader, cursor: AttemptCursor = "0.0", limit: Limit = PAGE
) -> schemas.AttemptPage:
    """Every POST of the task's webhooks, the oldest event first: when, how long, and what was answered."""
    await _url(task_id, state, caller)
    sequence, _, number = cursor.partition(".")
    after = (int(sequence), int(number))
    found = await delivery.attempts(state["db"], task_id, owner=caller.owner, after=after, limit=limit + 1)
    page = found[:limit]
    more = f"{page[-1].sequence}.{page[-1].number}" if len(found) > limit else None
    return schemas.AttemptPage(data=[_attempt(one) for one in page], next_cursor=more)


@router.post(f"{WEBHOOK}/redeliver", status_code=202, responses=problems.responses(404, 409, 410, 422, 503))
async def redeliver(task_id: TaskId, state: Resources, caller: door.WebhookKeeper) -> schemas.WebhookState:
    """Send the newest webhook of the task again, from the start of the schedule. Asking twice is asking once."""
    url = await _url(task_id, state, caller)
    became = await delivery.redeliver(state["db"], task_id, owner=caller.owner)
    if became is delivery.Redelivery.NOTHING:
        raise errors.WebhookNotDue("There is no event to tell of this task yet")
    if became is delivery.Redelivery.UNDER_WAY:
        raise errors.WebhookNotDue("The webhook is being sent at this moment")
    if became is delivery.Redelivery.SPENT:
        raise errors.WebhookNotDue(f"The webhook was attempted {delivery.ATTEMPTS_AT_MOST:,} times, the most there are")
    return _shown(task_id, url, await delivery.state_of(state["db"], task_id, owner=caller.owner))


async def _redelivery_turn(state: Resources, caller: door.WebhookKeeper) -> AsyncIterator[None]:
    with state["redelivery_turns"].turn(caller.owner):
        yield


@router.post(
    "/api/webhooks/redeliver",
    dependencies=[Depends(_redelivery_turn)],
    responses=problems.responses(400, 413, 415, 422, 429, 503),
    openapi_extra=body.declared(schemas.RedeliverRequest, required=True),
)
async def redeliver_all(request: Request, state: Resources, caller: door.WebhookKeeper) -> schemas.Redelivered:
    """Send again what receivers missed between two times. Asking twice sends nothing twice that is not sent yet."""
    wanted = await body.wanted(request, schemas.RedeliverRequest)
    place = None if wanted.cursor is None else _mark(wanted.cursor)
    redelivered = 0
    for _ in range(STEPS):
        step = await delivery.redeliver_batch(
            state["db"],
            owner=caller.owner,
            since=wanted.since,
            until=wanted.until,
            statuses=_STATES[wanted.state],
            after=place,
            limit=STEP,
        )
        redelivered, place = redelivered + step.redelivered, step.end
        if place is None:
            break
    return schemas.Redelivered(redelivered=redelivered, next_cursor=None if place is None else _cursor(place))


@router.get("/api/events", response_model=schemas.EventPage, responses=problems.responses(422, 503))
async def read_events(state: Resources, caller: door.Reader, after: EventCursor = "0", limit: Limit = PAGE) -> Response:
    """What webhooks tell, for whoever asks: a receiver that was away for long misses nothing.

    Without `after` it begins with the oldest event of the tasks that are kept.
    """
    found = await delivery.events(state["db"], owner=caller.owner, after=int(after), limit=limit)
    payload = state["settings"].webhook_payload
    # The stored text goes out as it is, as it does in the webhook.
    data = [f'{{"webhook_id": "{one.id}", "body": {delivery.body(one, payload).decode()}}}' for one in found]
    end = found[-1].position if found else int(after)
    page = f'{{"data": [{", ".join(data)}], "next_cursor": "{end}"}}'
    return Response(page, media_type="application/json")


def _mark(cursor: str) -> delivery.Mark:
    microseconds, _, number = cursor.partition(".")
    return delivery.Mark(_EPOCH + timedelta(microseconds=int(microseconds)), UUID(hex=number))


def _cursor(mark: delivery.Mark) -> str:
    return f"{(mark.created_at - _EPOCH) // timedelta(microseconds=1)}.{mark.id.hex}"


async def _url(task_id: UUID, state: State, caller: door.Caller) -> str:
    """Where the task's webhooks go. Raises why there is no such place."""
    found = await lifecycle.view(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
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

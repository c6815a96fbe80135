"""Test events: what becomes of a webhook to this URL, now.

Nothing is sent from here. The API has no way out to strangers, and needs none: a
relay, which has one, takes the wish from its row, and this route waits until the answer
is there. So the same process, network, rules and keys are tried that real
webhooks go through.
"""

import asyncio
import time
from uuid import UUID

from fastapi import APIRouter, Request

from app import delivery, schemas, trials
from app.core import errors, ids, telemetry
from app.core.errors import FieldError
from app.db import Database
from app.routers import body, door, problems
from app.routers.state import Resources
from app.utils import guard, webhook

OWNER_WAITS = 2
"""Test events of one owner that this process waits for at once."""
ALL_WAIT = 8
"""Those of all owners."""
LOOK_SECONDS = 0.1
"""How often somebody who waits looks whether the answer is there."""
PATIENCE_SECONDS = webhook.DEADLINE_SECONDS + trials.REPORT_SECONDS
"""How long after a relay has taken it."""

router = APIRouter(tags=["webhooks"])


@router.post(
    "/api/webhooks/test",
    responses=problems.responses(400, 413, 415, 422, 429, 503),
    openapi_extra=body.declared(schemas.TestRequest, required=True),
)
async def send_test(request: Request, state: Resources, caller: door.WebhookKeeper) -> schemas.TestRead:
    """Send one signed test event now, once, and say what happened: also what did not go well is a `200` here."""
    wanted = await body.wanted(request, schemas.TestRequest)
    try:
        url = guard.admit_url(wanted.url, state["rules"])
    except ValueError as refused:
        raise errors.ValidationFailed([FieldError("/url", str(refused))]) from None
    trial_id = ids.uuid7()
    with state["trial_turns"].turn(caller.owner):
        await delivery.ask_trial(
            state["db"],
            trial_id,
            owner=caller.owner,
            url=url,
            event=wanted.event,
            traceparent=telemetry.current_traceparent(request.headers),
        )
        return _shown(trial_id, await _heard(state["db"], trial_id))


async def _heard(db: Database, trial_id: UUID) -> delivery.Tried:
    """What came of it, once it is there."""
    began = time.monotonic()
    while time.monotonic() - began < delivery.PICKUP_SECONDS:
        if (tried := await _looked(db, trial_id)) is not None:
            return tried
    if await delivery.withdraw_trial(db, trial_id):
        raise errors.ServiceUnavailable("No relay took the test event: is one running?", retry_after_seconds=5)
    while time.monotonic() - began < delivery.PICKUP_SECONDS + PATIENCE_SECONDS:
        if (tried := await _looked(db, trial_id)) is not None:
            return tried
    raise errors.ServiceUnavailable(
        "The relay that sent the test event did not say what came of it; it may have arrived", retry_after_seconds=5
    )


async def _looked(db: Database, trial_id: UUID) -> delivery.Tried | None:
    await asyncio.sleep(LOOK_SECONDS)
    return await delivery.hear_trial(db, trial_id)


def _shown(trial_id: UUID, tried: delivery.Tried) -> schemas.TestRead:
    return schemas.TestRead(
        webhook_id=trial_id,
        outcome=tried.outcome,
        status_code=tried.status_code,
        retry_after_seconds=tried.retry_after_seconds,
        duration_seconds=round(tried.duration_seconds, 6),
        excerpt=tried.excerpt,
        advice=trials.advice(tried.outcome, tried.status_code),
        request=schemas.TestSent(headers=dict(tried.headers), body=tried.body) if tried.headers else None,
    )

"""Why a task is where it is."""

from fastapi import APIRouter

from app import lifecycle, publisher, schemas
from app.core import errors
from app.core.statuses import TERMINAL, WAITING
from app.routers import door, problems
from app.routers.state import Resources, State
from app.routers.tasks import ONE, PATH, TaskId, absent

router = APIRouter(prefix=PATH, tags=["tasks"])


@router.get(f"{ONE}/explain", responses=problems.responses(404, 410, 422, 503))
async def explain(task_id: TaskId, state: Resources, caller: door.Reader) -> schemas.ExplanationRead:
    """Why the task is where it is, from facts only: what it waits for, where it runs, or how it ended."""
    known = await lifecycle.facts(state["db"], task_id, caller.owner)
    if known is None:
        raise await absent(task_id, state, caller)
    settings = state["settings"]
    around = lifecycle.Surroundings(
        queue_known=known.queue in settings.queues,
        depth=await _depth(known, state),
        depth_cap=publisher.DEPTH_CAP,
        lease_seconds=settings.lease_seconds,
    )
    found = lifecycle.explain(known, around)
    return schemas.ExplanationRead(
        status=known.status, reason=found.reason, explanation=found.sentence, facts=_facts(known, around)
    )


async def _depth(known: lifecycle.Facts, state: State) -> int | None:
    """Messages of its queue, if it is in line; None if Redis does not answer."""
    if not known.in_line:
        return None
    try:
        return await state["broker"].depth(known.queue)
    except errors.BrokerUnavailable:
        return None


def _facts(known: lifecycle.Facts, around: lifecycle.Surroundings) -> schemas.FactsRead:
    waits = known.status in WAITING
    runs = not waits and known.status not in TERMINAL
    progress = None
    if runs and known.progress is not None:
        progress = schemas.ProgressRead(fraction=known.progress, message=known.progress_message)
    return schemas.FactsRead(
        due_in=_rounded(known.due_in) if waits else None,
        expires_in=_rounded(known.expires_in) if waits else None,
        ahead=known.ahead,
        queue_depth=around.depth,
        consumers=known.consumers if waits else None,
        running_for=_rounded(known.running_for) if runs else None,
        lease_left=_rounded(known.lease_left) if runs else None,
        worker=known.worker if runs else None,
        progress=progress,
        ended_ago=_rounded(known.ended_ago) if not waits and not runs else None,
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)

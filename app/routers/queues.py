"""The queues: what waits and runs in each, pausing them, and limiting what may run of them.

They concern everybody's tasks, so all of it is for administrators.
"""

from typing import Annotated

from fastapi import APIRouter, Path, Request

from app import lifecycle, schemas
from app.core import errors
from app.routers import body, door, problems
from app.routers.state import Resources, State

PATH = "/api/queues"
ONE = "/{name}"

router = APIRouter(prefix=PATH, tags=["queues"])

QueueName = Annotated[str, Path(alias="name", description="One of `TASKQUEUE_QUEUES`.")]


_LIMITS_BODY = body.declared(schemas.LimitsRequest, required=True)


@router.get("", responses=problems.responses(422, 503))
async def read_queues(state: Resources, _: door.Admin) -> schemas.QueuePage:
    """Every queue there is."""
    return schemas.QueuePage(data=await _read(state, state["settings"].queues))


@router.get(ONE, responses=problems.responses(404, 422, 503))
async def read_queue(name: QueueName, state: Resources, _: door.Admin) -> schemas.QueueRead:
    """One queue: what waits and runs in it, and what holds for it."""
    return await _one(name, state)


@router.post(f"{ONE}/pause", responses=problems.responses(404, 422, 503))
async def pause(name: QueueName, state: Resources, _: door.Admin) -> schemas.QueueRead:
    """Let no task of the queue start any more. Those that run go on, and submits are accepted."""
    await lifecycle.pause_queue(state["db"], _known(name, state))
    return await _one(name, state)


@router.post(f"{ONE}/resume", responses=problems.responses(404, 422, 503))
async def resume(name: QueueName, state: Resources, _: door.Admin) -> schemas.QueueRead:
    """Let the tasks of the queue start again, those first that have waited for longest."""
    await lifecycle.resume_queue(state["db"], _known(name, state))
    return await _one(name, state)


@router.put(
    f"{ONE}/limits",
    responses=problems.responses(400, 404, 413, 415, 422, 503),
    openapi_extra=_LIMITS_BODY,
)
async def put_limits(name: QueueName, request: Request, state: Resources, _: door.Admin) -> schemas.QueueRead:
    """Limit what may run of the queue from now on. What is not named is not limited any more."""
    queue = _known(name, state)
    wanted = await body.wanted(request, schemas.LimitsRequest, required=True)
    limits = lifecycle.Limits(
        concurrency=wanted.concurrency_limit,
        rate=_rate(wanted.rate_limit),
        key_concurrency=wanted.key_concurrency_limit,
        key_rate=_rate(wanted.key_rate_limit),
    )
    await lifecycle.limit_queue(state["db"], queue, limits)
    return await _one(name, state)


def _known(name: str, state: State) -> str:
    """The name, if it is one of a queue. Raises QueueNotFound if not."""
    if name not in state["settings"].queues:
        raise errors.QueueNotFound
    return name


async def _one(name: str, state: State) -> schemas.QueueRead:
    [found] = await _read(state, [_known(name, state)])
    return found


async def _read(state: State, names: list[str] | tuple[str, ...]) -> list[schemas.QueueRead]:
    found = await lifecycle.queue_states(state["db"], names)
    depths = await state["publisher"].depths(names)
    return [_shown(one, depths.get(one.queue)) for one in found]


def _shown(one: lifecycle.QueueState, depth: int | None) -> schemas.QueueRead:
    return schemas.QueueRead(
        name=one.queue,
        paused=one.paused,
        concurrency_limit=one.limits.concurrency,
        rate_limit=_shown_rate(one.limits.rate),
        key_concurrency_limit=one.limits.key_concurrency,
        key_rate_limit=_shown_rate(one.limits.key_rate),
        depth=depth,
        waiting=one.waiting,
        held=one.held,
        running=one.running,
        oldest_seconds=None if one.oldest_seconds is None else round(one.oldest_seconds, 3),
        ended_per_second=round(one.ended_per_second, 3),
    )


def _rate(asked: schemas.RateLimit | None) -> lifecycle.Rate | None:
    return None if asked is None else lifecycle.Rate(asked.count, asked.seconds)


def _shown_rate(rate: lifecycle.Rate | None) -> schemas.RateLimit | None:
    return None if rate is None else schemas.RateLimit(count=rate.count, seconds=rate.seconds)

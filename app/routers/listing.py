"""Finding tasks: lists with filters, newest first, and how many there are."""

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request, Response

from app import lifecycle, schemas
from app.core import errors
from app.core.errors import FieldError
from app.routers import door, problems
from app.routers.state import Resources

PATH = "/api/tasks"

_EPOCH = datetime.fromtimestamp(0, UTC)
_LINKED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Some tasks.",
        "headers": {"Link": {"description": "The next page, as `rel=next`.", "schema": {"type": "string"}}},
    }
}

router = APIRouter(tags=["tasks"])


@router.get(PATH, responses=_LINKED | problems.responses(422, 503))
async def list_tasks(
    request: Request,
    response: Response,
    state: Resources,
    caller: door.Reader,
    asked: Annotated[schemas.TaskQuery, Query()],
) -> schemas.TaskPage:
    """Tasks, newest first: by when they were submitted, or by when they ended if only that is asked for.

    A page looks at 1,000 tasks at most. Where few of them are meant it may be short, or empty, and still have a
    `next_cursor`: go on until that is null.
    """
    wanted = filter_of(asked)
    after = None if asked.cursor is None else _mark(asked.cursor, wanted)
    found = await lifecycle.page(state["db"], caller.owner, wanted, after=after, limit=asked.limit)
    cursor = None if found.end is None else _cursor(found.end, wanted)
    if cursor is not None:
        following = request.url.include_query_params(cursor=cursor)
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
    return schemas.TaskPage(data=[_summary(one) for one in found.tasks], next_cursor=cursor)


@router.get(f"{PATH}/counts", responses=problems.responses(422, 503))
async def count_tasks(state: Resources, caller: door.Reader) -> schemas.CountsRead:
    """How many tasks have each status: exactly up to 10,000, and beyond that `at_least` so many."""
    found = await lifecycle.counts(state["db"], caller.owner)
    data = {status: schemas.CountRead(count=one.tasks, at_least=not one.exact) for status, one in found.items()}
    return schemas.CountsRead(data=data)


def filter_of(asked: schemas.TaskFilter) -> lifecycle.Filter:
    """What was asked for, as the state machine knows it."""
    return lifecycle.Filter(
        statuses=frozenset(asked.status),
        name=asked.task,
        queue=asked.queue,
        tag=asked.tag,
        error_type=asked.error_type,
        created_after=asked.created_after,
        created_before=asked.created_before,
        finished_after=asked.finished_after,
        finished_before=asked.finished_before,
    )


def _mark(cursor: str, wanted: lifecycle.Filter) -> lifecycle.Mark:
    order, moment = cursor[0], cursor[1:]
    microseconds, _, number = moment.partition(".")
    try:
        at = _EPOCH + timedelta(microseconds=int(microseconds))
    except OverflowError:
        at = None
    if order != wanted.order or at is None:
        raise errors.ValidationFailed([FieldError("/cursor", "Not the next_cursor of a page of these tasks")])
    return lifecycle.Mark(at, UUID(hex=number))


def _cursor(mark: lifecycle.Mark, wanted: lifecycle.Filter) -> str:
    return f"{wanted.order}{(mark.at - _EPOCH) // timedelta(microseconds=1)}.{mark.id.hex}"


def _summary(found: lifecycle.Found) -> schemas.TaskSummary:
    error = found.error
    return schemas.TaskSummary(
        task_id=found.id,
        status=found.status,
        task=found.name,
        queue=found.queue,
        attempt=found.attempt,
        failures=found.failures,
        max_retries=found.max_retries,
        tags=list(found.tags),
        cancel_requested=found.cancel_requested,
        rerun_of=found.rerun_of,
        created_at=found.created_at,
        run_at=found.run_at,
        started_at=found.started_at,
        finished_at=found.finished_at,
        error=None if error is None else schemas.ErrorRead(type=error.type, message=error.message),
    )

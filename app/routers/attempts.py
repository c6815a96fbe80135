"""What became of each attempt of a task, with its traceback and its last log lines."""

from typing import Annotated

from fastapi import APIRouter, Query

from app import lifecycle, schemas
from app.routers import door, problems
from app.routers.state import Resources
from app.routers.tasks import ONE, PATH, TaskId, absent

PAGE = 50

router = APIRouter(prefix=PATH, tags=["tasks"])

Cursor = Annotated[str, Query(pattern=r"^[0-9]{1,9}$", description="The `next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Attempts of a page at most.")]


@router.get(f"{ONE}/attempts", responses=problems.responses(404, 410, 422, 503))
async def read_task_attempts(
    task_id: TaskId, state: Resources, caller: door.Reader, cursor: Cursor = "0", limit: Limit = PAGE
) -> schemas.RunPage:
    """Every attempt of the task, the first one first: when and where it ran, how it ended, and what it logged last.

    The lines of an attempt are there once it has ended. If its process was killed, they are lost.
    """
    found = await lifecycle.attempts(state["db"], task_id, caller.owner, after=int(cursor), limit=limit + 1)
    if found is None:
        raise await absent(task_id, state, caller)
    page = found[:limit]
    more = str(page[-1].number) if len(found) > limit else None
    return schemas.RunPage(data=[_shown(one) for one in page], next_cursor=more)


def _shown(one: lifecycle.Attempt) -> schemas.RunRead:
    error = one.error
    return schemas.RunRead(
        number=one.number,
        started_at=one.started_at,
        ended_at=one.ended_at,
        worker=one.worker,
        outcome=one.outcome,
        error=None
        if error is None
        else schemas.TraceRead(type=error.type, message=error.message, traceback=error.traceback),
        log=[
            schemas.LogLine(at=line.at, level=line.level, logger=line.logger, message=line.message)
            for line in one.lines
        ],
        log_dropped=one.dropped,
    )

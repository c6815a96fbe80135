"""Schedules: tasks that are submitted by themselves."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response

from app import intake, lifecycle, schedules, schemas
from app.core import errors
from app.core.errors import FieldError
from app.routers import body, door, problems
from app.routers.state import Resources, State

PATH = "/api/schedules"
ONE = "/{name}"
NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}$"
PAGE = 50
NEXT_RUNS = 5
WRITES = 5
"""How often a write is tried that another one gets ahead of, such as that of a relay that fires."""

router = APIRouter(prefix=PATH, tags=["schedules"])

Name = Annotated[str, Path(pattern=NAME, description="1 to 128 letters, digits and `_ . : -`.")]
Cursor = Annotated[str, Query(pattern=NAME, description="The `next_cursor` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Items of a page at most.")]

_NO_ANCHOR = datetime.min.replace(tzinfo=UTC)
"""The anchor is no word of the owner's (`schedules.planned`)."""
_PUT_BODY = body.declared(schemas.ScheduleRequest, required=True)
_CREATED: dict[int | str, dict[str, Any]] = {
    201: {
        "model": schemas.ScheduleRead,
        "description": "The schedule is new.",
        "headers": {"Location": {"description": "Where it can be read.", "schema": {"type": "string"}}},
    }
}


@router.put(ONE, responses=_CREATED | problems.responses(400, 409, 413, 415, 422, 503), openapi_extra=_PUT_BODY)
async def put_schedule(
    name: Name, request: Request, response: Response, state: Resources, caller: door.Writer
) -> schemas.ScheduleRead:
    """Make a schedule, or replace the one of this name. What says the same as before moves none of its times.

    A `webhook_url` as this API shows it, without the query that may hold a token, is the one that is there already.
    """
    wanted = await body.wanted(request, schemas.ScheduleRequest)
    for _ in range(WRITES):
        over = await schedules.get(state["db"], caller.owner, name)
        definition = _definition(wanted, state, caller, over=over)
        planned, next_run = schedules.planned(definition, await lifecycle.clock(state["db"]), over=over)
        written = await schedules.put(state["db"], caller.owner, name, planned, next_run, over=over)
        if written is not None:
            if over is None:
                response.status_code = 201
                response.headers["Location"] = f"{PATH}/{name}"
            return _read(written)
    if over is None:
        raise errors.ScheduleConflict(f"There are {schedules.SCHEDULES_LIMIT} schedules, as many as there may be")
    raise errors.ScheduleConflict("The schedule is being written by others; try again")


@router.get(ONE, responses=problems.responses(404, 422, 503))
async def read_schedule(name: Name, state: Resources, caller: door.Reader) -> schemas.ScheduleRead:
    """A schedule, what it submits, and its next times."""
    found = await schedules.get(state["db"], caller.owner, name)
    if found is None:
        raise errors.ScheduleNotFound
    return _read(found)


@router.get("", responses=problems.responses(422, 503))
async def read_schedules(
    state: Resources, caller: door.Reader, cursor: Cursor | None = None, limit: Limit = PAGE
) -> schemas.SchedulePage:
    """The schedules, by name."""
    found = await schedules.page(state["db"], caller.owner, after=cursor or "", limit=limit + 1)
    rows = found[:limit]
    more = rows[-1].name if len(found) > limit else None
    return schemas.SchedulePage(data=[schemas.ScheduleRow(**_row(one)) for one in rows], next_cursor=more)


@router.delete(ONE, status_code=204, responses=problems.responses(404, 422, 503))
async def delete_schedule(name: Name, state: Resources, caller: door.Writer) -> None:
    """Remove a schedule. The tasks that it has submitted stay."""
    if not await schedules.delete(state["db"], caller.owner, name):
        raise errors.ScheduleNotFound


def _definition(
    wanted: schemas.ScheduleRequest, state: State, caller: door.Caller, *, over: schedules.Schedule | None
) -> schedules.Definition:
    """What the body says, or all that is wrong with it.

    Args:
        wanted: the body.
        state: the rules that it is checked by.
        caller: whose schedule it is.
        over: what it replaces; None for a new one.
    """
    asked = wanted.submit if over is None else _with_whole_url(wanted.submit, over)
    faults = []
    if wanted.cron is None and wanted.every is None:
        faults.append(FieldError("/cron", "One of cron and every is required"))
    try:
        new = intake.new_task(asked, state["settings"], state["rules"], owner=caller.owner, traceparent="")
    except errors.ValidationFailed as invalid:
        faults += [FieldError(f"/submit{fault.pointer}", fault.detail) for fault in invalid.errors]
    if faults:
        raise errors.ValidationFailed(faults)
    submit = asked.model_dump(mode="json", exclude_unset=True)
    if new.webhook_url is not None:
        submit["webhook_url"] = new.webhook_url
    timing = schedules.Timing(
        cron=wanted.cron,
        time_zone=wanted.time_zone,
        every_seconds=wanted.every,
        anchor=_NO_ANCHOR,
        start_at=wanted.start,
        end_at=wanted.end,
        jitter_seconds=wanted.jitter,
    )
    return schedules.Definition(
        timing=timing,
        catch_up=wanted.catch_up,
        overlap=wanted.overlap,
        paused=wanted.paused,
        task=new.name,
        submit=json.dumps(submit, ensure_ascii=False, allow_nan=False),
    )


def _with_whole_url(asked: schemas.SubmitRequest, over: schedules.Schedule) -> schemas.SubmitRequest:
    """With the URL that is there already, if what is asked for is how that is shown: it was read, and is sent back."""
    kept = json.loads(over.definition.submit).get("webhook_url")
    if kept is None or asked.webhook_url != schemas.shown_url(kept):
        return asked
    return asked.model_copy(update={"webhook_url": kept})


def _row(found: schedules.Schedule) -> dict[str, Any]:
    definition, timing = found.definition, found.definition.timing
    return {
        "name": found.name,
        "task": definition.task,
        "cron": timing.cron,
        "every": timing.every_seconds,
        "time_zone": timing.time_zone,
        "jitter": timing.jitter_seconds,
        "start": timing.start_at,
        "end": timing.end_at,
        "catch_up": definition.catch_up,
        "overlap": definition.overlap,
        "paused": definition.paused,
        "next_run": found.next_run,
        "last_run": found.last_run,
        "last_task_id": found.last_task_id,
        "fired": found.fired,
        "skipped": found.skipped,
        "last_error": found.last_error,
        "failing_since": found.failing_since,
        "created_at": found.created_at,
        "updated_at": found.updated_at,
    }


def _read(found: schedules.Schedule) -> schemas.ScheduleRead:
    submit = json.loads(found.definition.submit)
    if submit.get("webhook_url") is not None:
        submit["webhook_url"] = schemas.shown_url(submit["webhook_url"])
    next_runs = found.definition.timing.upcoming(found.next_run, NEXT_RUNS)
    return schemas.ScheduleRead(**_row(found), next_runs=next_runs, submit=submit)

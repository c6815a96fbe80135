"""Submit, status, result, and all that is known of a task."""

import json
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse

from app import catalog, lifecycle, schemas
from app.core import errors, ids, metrics, telemetry
from app.core.errors import FieldError
from app.core.statuses import TaskStatus
from app.routers import body, door, problems
from app.routers.state import Resources, State
from app.utils import guard

PATH = "/api/tasks"
ONE = "/{id}"
RETRY_AFTER_SECONDS = 1

router = APIRouter(prefix=PATH, tags=["tasks"])

TaskId = Annotated[UUID, Path(alias="id", description="The `task_id` that the submit answered.")]

_LOCATION = {"Location": {"description": "Where the task can be read.", "schema": {"type": "string"}}}
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"description": "Stored: the task will run.", "headers": _LOCATION}}
_CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {"model": schemas.StatusRead, "description": "The task runs; its code will be told."}
}
_NOT_READY: dict[int | str, dict[str, Any]] = {
    202: {
        "model": schemas.NotReady,
        "description": "The task has not ended.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    }
}


@router.post(
    "/submit",
    status_code=202,
    responses=_ACCEPTED | problems.responses(400, 413, 415, 422, 503),
    openapi_extra=body.declared(schemas.SubmitRequest, required=False),
)
async def submit(request: Request, response: Response, state: Resources, caller: door.Writer) -> schemas.TaskCreated:
    """Store a task and answer at once. Whoever has the id can rely on the task being run."""
    with metrics.counting_rejections():
        wanted = await body.wanted(request, schemas.SubmitRequest)
        new = _new_task(wanted, state, owner=caller.owner, traceparent=telemetry.current_traceparent(request.headers))
        publisher, backlog = state["publisher"], state["backlog"]
        backlog.admit()
        bell = await lifecycle.submit(state["db"], new, hold_back=publisher.away(new.queue))
    backlog.accepted()
    if bell is not None:
        publisher.ring(bell)
    metrics.submitted(new.name, new.queue)
    response.headers["Location"] = f"{PATH}/{new.id}"
    return schemas.TaskCreated(task_id=new.id)


@router.get(f"{ONE}/status", responses=problems.responses(404, 410, 422, 503))
async def read_status(task_id: TaskId, state: Resources, caller: door.Reader) -> schemas.StatusRead:
    """Where the task is in its life."""
    found = await lifecycle.status(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
    return schemas.StatusRead(status=found)


@router.get(
    f"{ONE}/result",
    response_model=schemas.ResultRead,
    responses=_NOT_READY | problems.responses(404, 410, 422, 503),
)
async def read_result(task_id: TaskId, state: Resources, caller: door.Reader) -> Response:
    """How the task ended: its result, or null and why."""
    found = await lifecycle.result(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
    _, ended = found
    if ended is None:
        not_ready = schemas.NotReady().model_dump()
        return JSONResponse(not_ready, 202, {"Retry-After": str(RETRY_AFTER_SECONDS)})
    if ended.status is TaskStatus.SUCCESS:
        # The stored text goes out as it is: nothing is parsed, nothing can change.
        return Response(f'{{"result": {ended.result}}}', media_type="application/json")
    return JSONResponse({"result": None, "error": _shown_error(ended.error)})


@router.get(ONE, responses=problems.responses(404, 410, 422, 503))
async def read_task(task_id: TaskId, state: Resources, caller: door.Reader) -> schemas.TaskRead:
    """Everything known about the task but its arguments and its result."""
    found = await lifecycle.view(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
    return _task_read(found)


@router.post(f"{ONE}/cancel", responses=_CANCELLED | problems.responses(404, 409, 410, 422, 503))
async def cancel(task_id: TaskId, response: Response, state: Resources, caller: door.Writer) -> schemas.StatusRead:
    """End a task: at once if it waits; if it runs, its code is told within two seconds. Asking twice is asking once."""
    cancelled = await lifecycle.cancel(state["db"], task_id, owner=caller.owner)
    if cancelled is None:
        return await _cancelled_before(task_id, state, caller)
    if cancelled.ended is None:
        response.status_code = 202
    else:
        state["publisher"].announce(cancelled.ended)
    return schemas.StatusRead(status=cancelled.status)


async def _cancelled_before(task_id: UUID, state: State, caller: door.Caller) -> schemas.StatusRead:
    """The answer for a task that no cancel could reach. Raises TaskEnded if another end came first."""
    found = await lifecycle.result(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
    status, ended = found
    if ended is None or ended.error is None or ended.error.type != "Cancelled":
        raise errors.TaskEnded
    return schemas.StatusRead(status=status)


async def absent(task_id: UUID, state: State, caller: door.Caller) -> errors.RequestError:
    """Why the caller has no such task: it is past its retention, or never was theirs."""
    pruned = await lifecycle.was_pruned(state["db"], task_id, owner=caller.owner)
    return errors.ResultExpired() if pruned else errors.TaskNotFound()


def _new_task(wanted: schemas.SubmitRequest, state: State, *, owner: str, traceparent: str) -> lifecycle.NewTask:
    """The row to be written, or all that is wrong with it."""
    faults: list[FieldError] = []
    webhook_url = _admitted(wanted.webhook_url, state["rules"], faults)
    try:
        entry = catalog.lookup(wanted.task)
        entry.validate_call(wanted.args, wanted.kwargs)
    except errors.ValidationFailed as invalid:
        faults += invalid.errors
        entry = None
    queues = state["settings"].queues
    queue = wanted.queue or (entry.queue if entry is not None else None) or queues[0]
    if queue not in queues:
        faults.append(FieldError("/queue", "No worker consumes a queue of this name"))
    if wanted.webhook_events is not None and wanted.webhook_url is None:
        faults.append(FieldError("/webhook_events", "Needs a webhook_url"))
    if entry is None or faults:
        raise errors.ValidationFailed(faults)
    moment = wanted.expires if isinstance(wanted.expires, datetime) else None
    return lifecycle.NewTask(
        id=ids.uuid7(),
        name=entry.name,
        queue=queue,
        args=_json(wanted.args),
        kwargs=_json(wanted.kwargs),
        tags=tuple(wanted.tags),
        webhook_url=webhook_url,
        webhook_events=None if wanted.webhook_events is None else tuple(dict.fromkeys(wanted.webhook_events)),
        max_retries=entry.max_retries if wanted.max_retries is None else wanted.max_retries,
        time_limit=entry.time_limit if wanted.time_limit is None else wanted.time_limit,
        delay_seconds=wanted.countdown or 0.0,
        due_at=wanted.eta,
        expires_in_seconds=None if isinstance(wanted.expires, datetime) else wanted.expires,
        expires_at=moment,
        traceparent=traceparent,
        owner=owner,
    )


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _admitted(url: str | None, rules: guard.EgressRules, faults: list[FieldError]) -> str | None:
    if url is None:
        return None
    try:
        return guard.admit_url(url, rules)
    except ValueError as refused:
        faults.append(FieldError("/webhook_url", str(refused)))
        return None


def _shown_error(error: lifecycle.Error | None) -> dict[str, str] | None:
    return None if error is None else {"type": error.type, "message": error.message}


def _task_read(found: lifecycle.TaskView) -> schemas.TaskRead:
    progress = None
    if found.progress is not None:
        progress = schemas.ProgressRead(fraction=found.progress, message=found.progress_message)
    webhook = None
    if found.webhook_url is not None:
        webhook = schemas.WebhookRead(
            url=schemas.shown_url(found.webhook_url),
            status=found.webhook_status,
            attempt=found.webhook_attempt or 0,
            next_at=found.webhook_next_at if found.webhook_status == "pending" else None,
        )
    error = found.error
    return schemas.TaskRead(
        task_id=found.id,
        status=found.status,
        task=found.name,
        queue=found.queue,
        attempt=found.attempt,
        failures=found.failures,
        max_retries=found.max_retries,
        time_limit=found.time_limit,
        tags=list(found.tags),
        cancel_requested=found.cancel_requested,
        rerun_of=found.rerun_of,
        created_at=found.created_at,
        run_at=found.run_at,
        started_at=found.started_at,
        finished_at=found.finished_at,
        expires_at=found.expires_at,
        progress=progress,
        error=None if error is None else schemas.ErrorRead(type=error.type, message=error.message),
        webhook=webhook,
    )

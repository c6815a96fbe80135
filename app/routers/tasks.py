"""Submit, status, result, and all that is known of a task."""

from collections.abc import Iterable
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse

from app import lifecycle, schemas
from app.core import errors, metrics, tracing
from app.core.statuses import TaskStatus
from app.routers import admission, body, door, openapi, problems, waiting
from app.routers.state import Resources, State

PATH = "/api/tasks"
ONE = "/{id}"
RETRY_AFTER_SECONDS = 1

router = APIRouter(prefix=PATH, tags=["tasks"])

Wait = Annotated[
    float | None,
    Query(ge=0, le=waiting.WAIT_LIMIT_SECONDS, description="Seconds to wait for the end of the task, at most."),
]
Prefer = Annotated[str | None, Header(description="`wait=…`: seconds to wait for the end of the task, at most.")]
TaskId = Annotated[UUID, Path(alias="id", description="The `task_id` that the submit answered.")]

_KEYED = {"parameters": [dict(openapi.KEY_PARAMETER)]}
_SUBMIT_BODY = _KEYED | body.declared(schemas.SubmitRequest, required=False)
_BATCH_BODY = _KEYED | body.declared(schemas.BatchRequest, required=True, description="4 MiB at most.")
_ACCEPTED_BATCH: dict[int | str, dict[str, Any]] = {
    202: {"description": "Stored: the tasks will run.", "headers": dict(openapi.SUBMIT_HEADERS)}
}
_CANCELLED: dict[int | str, dict[str, Any]] = {
    202: {"model": schemas.StatusRead, "description": "The task runs; its code will be told."}
}
_APPLIED = {"Preference-Applied": {"description": "`wait=…`, if that was preferred.", "schema": {"type": "string"}}}
_RESULT: dict[int | str, dict[str, Any]] = {
    200: {"headers": _APPLIED},
    202: {
        "model": schemas.NotReady,
        "description": "The task has not ended.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}} | _APPLIED,
    },
}
_VALIDATORS = {
    "ETag": {"description": "Changes with the answer.", "schema": {"type": "string"}},
    "Cache-Control": {"description": "`private, no-cache`", "schema": {"type": "string"}},
}
_STATUS: dict[int | str, dict[str, Any]] = {
    200: {"headers": _VALIDATORS},
    304: {"description": "The status is the one that `If-None-Match` names.", "headers": _VALIDATORS},
}


@router.post(
    "/submit",
    status_code=202,
    response_model=schemas.TaskCreated,
    responses=openapi.ACCEPTED | problems.responses(400, 413, 415, 422, 503),
    openapi_extra=_SUBMIT_BODY,
)
async def submit(request: Request, state: Resources, caller: door.Writer) -> Response:
    """Store a task and answer at once. Whoever has the id can rely on the task being run."""
    with metrics.counting_rejections():
        posted = await body.read(request)
        wanted = schemas.plain_submit(posted.value) or body.parsed(posted, schemas.SubmitRequest)
        key = admission.key_of(request, caller, posted.value)
        accepted = await admission.accept(request, state, caller, [wanted], key=key)
    return created(accepted)


_LOCATION = f"{PATH}/%b".encode()
_CREATED = b'{"task_id":"%b"}'
_CREATED_HEADERS = ((b"content-length", b"%d" % (len(_CREATED) - 2 + 36)), (b"content-type", b"application/json"))


class _Written(Response):
    """An answer whose headers are written already."""

    def __init__(self, body: bytes, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.body = body
        self.status_code = status
        self.raw_headers = list(headers)
        self.background = None


def created(accepted: admission.Accepted) -> Response:
    """The answer to whoever submitted one task, a `schemas.TaskCreated`."""
    [task_id] = accepted.task_ids
    text = str(task_id).encode()
    response = _Written(_CREATED % text, 202, ((b"location", _LOCATION % text), *_CREATED_HEADERS))
    accepted.tell(response)
    return response


@router.post(
    "/batch",
    status_code=202,
    responses=_ACCEPTED_BATCH | problems.responses(400, 413, 415, 422, 503),
    openapi_extra=_BATCH_BODY,
)
async def submit_batch(
    request: Request, response: Response, state: Resources, caller: door.Writer
) -> schemas.BatchCreated:
    """Store up to 1,000 tasks, all or none of them, and answer at once. Their ids come in the order of the tasks.

    Each is as in a submit; what is wrong with the nth of them is named under `/tasks/n`. The body may have 4 MiB.
    """
    with metrics.counting_rejections():
        posted = await body.read(request, body.BATCH_LIMITS)
        wanted = body.parsed(posted, schemas.BatchRequest)
        caller.spend(len(wanted.tasks) - 1)
        key = admission.key_of(request, caller, posted.value)
        accepted = await admission.accept(request, state, caller, wanted.tasks, key=key, place=_in_batch)
    accepted.tell(response)
    return schemas.BatchCreated(task_ids=list(accepted.task_ids))


def _in_batch(index: int, pointer: str) -> str:
    return f"/tasks/{index}{pointer}"


@router.get(
    f"{ONE}/status",
    response_model=schemas.StatusRead,
    responses=_STATUS | problems.responses(404, 410, 422, 503),
)
async def read_status(
    task_id: TaskId,
    state: Resources,
    caller: door.Reader,
    if_none_match: Annotated[str | None, Header(max_length=2000)] = None,
) -> Response:
    """Where the task is in its life. With the `ETag` of an earlier answer in `If-None-Match`, only what is new."""
    found = await state["statuses"].ask((task_id, caller.owner))
    if found is None:
        raise await absent(task_id, state, caller)
    # The status is all that the answer says, so it tells answers apart, byte for byte.
    headers = {"ETag": f'"{found}"', "Cache-Control": "private, no-cache"}
    if if_none_match is not None and _names(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(f'{{"status":"{found}"}}', headers=headers, media_type="application/json")


def _names(if_none_match: str, etag: str) -> bool:
    """Whether the condition is met by this entity tag (RFC 9110, section 13.1.2)."""
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in tags or "*" in tags


@router.get(
    f"{ONE}/result",
    response_model=schemas.ResultRead,
    responses=_RESULT | problems.responses(404, 410, 422, 503),
)
async def read_result(
    task_id: TaskId,
    request: Request,
    state: Resources,
    caller: door.Reader,
    *,
    wait: Wait = None,
    prefer: Prefer = None,
) -> Response:
    """How the task ended: its result, or null and why.

    With `wait` the answer is held back until the task ends, for so many seconds at most. `Prefer: wait=…` (RFC 7240)
    does the same. Where too many wait already, the answer comes at once.
    """
    seconds, applied = waiting.patience(wait, prefer)
    ended = await _end(task_id, state, caller)
    if ended is None and seconds > 0:
        over = await waiting.for_end(request, state["watch"], task_id, seconds, owner=caller.owner)
        # Much may have happened to the key, too.
        if not await caller.holds():
            raise errors.Unauthenticated(shown=True)
        if over:
            ended = await _end(task_id, state, caller)
    answer = _result(ended)
    answer.headers.update(applied)
    return answer


_NOT_READY = schemas.NotReady().model_dump_json().encode()


async def _end(task_id: UUID, state: State, caller: door.Caller) -> lifecycle.Ended | None:
    """How the task ended; None if it has not. Raises why there is no such task."""
    found = await lifecycle.result(state["db"], task_id, owner=caller.owner)
    if found is None:
        raise await absent(task_id, state, caller)
    return found[1]


def _result(ended: lifecycle.Ended | None) -> Response:
    if ended is None:
        return Response(_NOT_READY, 202, {"Retry-After": str(RETRY_AFTER_SECONDS)}, media_type="application/json")
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
        concurrency_key=found.concurrency_key or None,
        held=found.held,
        attempt=found.attempt,
        failures=found.failures,
        max_retries=found.max_retries,
        time_limit=found.time_limit,
        tags=list(found.tags),
        cancel_requested=found.cancel_requested,
        rerun_of=found.rerun_of,
        schedule=found.schedule,
        scheduled_for=found.scheduled_for,
        trace_id=tracing.trace_id_of(found.traceparent),
        created_at=found.created_at,
        run_at=found.run_at,
        started_at=found.started_at,
        finished_at=found.finished_at,
        expires_at=found.expires_at,
        progress=progress,
        error=None if error is None else schemas.ErrorRead(type=error.type, message=error.message),
        webhook=webhook,
    )

"""Acting on many tasks at once, in the background: cancel, or run again, all that pass a filter."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Path, Request, Response

from app import lifecycle, schemas
from app.core import errors, telemetry
from app.core.errors import FieldError
from app.core.statuses import JobKind, TaskStatus
from app.db import Database
from app.routers import admission, body, door, openapi, problems
from app.routers.listing import PATH, filter_of
from app.routers.state import Resources, State

JOBS = "/api/jobs"
FULL_RETRY_AFTER_SECONDS = 5

router = APIRouter(tags=["tasks"])

JobId = Annotated[UUID, Path(alias="id", description="The `job_id` that the start of the job answered.")]

_LOCATION = {"Location": {"description": "Where the job can be read.", "schema": {"type": "string"}}}
_BEGUN: dict[int | str, dict[str, Any]] = {
    202: {"description": "It goes on in the background.", "headers": {**_LOCATION, **openapi.REPLAYED}}
}


def _declared(kind: JobKind) -> dict[str, Any]:
    """What is said of the body: a filter, of statuses that tasks have to which this can be done."""
    declared = body.declared(schemas.BulkFilter, required=True)
    schema = declared["requestBody"]["content"]["application/json"]["schema"]
    schema["title"] = f"{kind.capitalize()}Filter"
    schema["properties"]["status"].pop("default")
    schema["properties"]["status"]["items"] = {"type": "string", "enum": sorted(lifecycle.ELIGIBLE[kind])}
    return {"parameters": [dict(openapi.KEY_PARAMETER)]} | declared


_PROBLEMS = problems.responses(400, 413, 415, 422, 429, 503)


@router.post(f"{PATH}/cancel", status_code=202, responses=_BEGUN | _PROBLEMS, openapi_extra=_declared(JobKind.CANCEL))
async def cancel_tasks(
    request: Request, response: Response, state: Resources, caller: door.Writer
) -> schemas.JobCreated:
    """Cancel every unfinished task that passes a filter, as `POST /api/tasks/{id}/cancel` does one.

    It concerns the tasks that are there now. The body names one part of the filter at least. Each call begins another
    job, but for those under one `Idempotency-Key`.
    """
    return await _begin(JobKind.CANCEL, request, response, state, caller)


@router.post(f"{PATH}/rerun", status_code=202, responses=_BEGUN | _PROBLEMS, openapi_extra=_declared(JobKind.RERUN))
async def rerun_tasks(
    request: Request, response: Response, state: Resources, caller: door.Writer
) -> schemas.JobCreated:
    """Run every task that passes a filter again, as it was: those that failed, unless `status` says otherwise.

    It concerns the tasks that are there now. The body names one part of the filter at least. Each call begins another
    job, but for those under one `Idempotency-Key`.
    """
    return await _begin(JobKind.RERUN, request, response, state, caller)


@router.get(f"{JOBS}/{{id}}", responses=problems.responses(404, 422, 503))
async def read_job(job_id: JobId, state: Resources, caller: door.Reader) -> schemas.JobRead:
    """How far the job has come."""
    return _shown(await lifecycle.job(state["db"], job_id, caller.owner))


@router.post(f"{JOBS}/{{id}}/cancel", responses=problems.responses(404, 422, 503))
async def cancel_job(job_id: JobId, state: Resources, caller: door.Writer) -> schemas.JobRead:
    """Stop the job. What it has done stays done, and one that has ended stays as it is."""
    return _shown(await lifecycle.cancel_job(state["db"], job_id, caller.owner))


_UNLESS_NAMED = {JobKind.CANCEL: lifecycle.ELIGIBLE[JobKind.CANCEL], JobKind.RERUN: frozenset({TaskStatus.FAILURE})}


async def _begin(
    kind: JobKind, request: Request, response: Response, state: State, caller: door.Caller
) -> schemas.JobCreated:
    posted = await body.read(request)
    asked = body.parsed(posted, schemas.BulkFilter)
    key = admission.key_of(request, caller, posted.value)
    if not asked.model_dump(exclude_defaults=True):
        # A body that was forgotten, or nothing but null, must not mean everything.
        raise errors.ValidationFailed([FieldError("", "Name one part of the filter at least")])
    if not frozenset(asked.status) <= lifecycle.ELIGIBLE[kind]:
        fitting = ", ".join(sorted(lifecycle.ELIGIBLE[kind]))
        raise errors.ValidationFailed([FieldError("/status", f"Input should be of {fitting}")])
    wanted = filter_of(asked.model_copy(update={"status": asked.status or sorted(_UNLESS_NAMED[kind])}))
    traceparent = telemetry.current_traceparent(request.headers)
    begin = partial(lifecycle.begin_job, state["db"], caller.owner, kind, wanted, traceparent=traceparent, key=key)
    job_id, replayed = await _begun(begin, state["db"], key)
    if replayed:
        response.headers[admission.REPLAYED_HEADER] = "true"
    response.headers["Location"] = f"{JOBS}/{job_id}"
    return schemas.JobCreated(job_id=job_id)


async def _begun(
    begin: Callable[[], Awaitable[UUID | lifecycle.NotBegun]], db: Database, key: lifecycle.SubmitKey | None
) -> tuple[UUID, bool]:
    """The job, and whether an earlier request has begun it. Raises TooManyAtOnce, and what a reused key raises."""
    while isinstance(begun := await begin(), lifecycle.NotBegun):
        # What was accepted once is answered again, even if there is no room now.
        if key is not None and (first := await lifecycle.remembered(db, key)) is not None:
            [job_id] = admission.answered_before(first, key)
            return job_id, True
        if begun is lifecycle.NotBegun.FULL:
            sentence = f"At most {lifecycle.JOBS_AT_ONCE} jobs of yours can be under way: wait for one to end"
            raise errors.TooManyAtOnce(sentence, retry_after_seconds=FULL_RETRY_AFTER_SECONDS)
    return begun, False


def _shown(job: lifecycle.Job | None) -> schemas.JobRead:
    if job is None:
        raise errors.JobNotFound
    return schemas.JobRead(
        job_id=job.id,
        kind=job.kind,
        status=job.status,
        done=job.acted,
        passed_over=job.passed_over,
        created_at=job.created_at,
        finished_at=job.finished_at,
    )

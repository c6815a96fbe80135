"""Running ended tasks again: each time as a new task, which names the old one."""

import copy
import json
from typing import Any

from fastapi import APIRouter, Request, Response

from app import lifecycle, schemas
from app.core import errors, metrics
from app.core.statuses import TERMINAL
from app.routers import admission, body, door, openapi, problems
from app.routers.body import Body
from app.routers.state import Resources
from app.routers.tasks import ONE, PATH, TaskId, absent, created


def _declared() -> dict[str, Any]:
    """What is said of the body: that of a submit, but what is not given stays as it was."""
    declared = copy.deepcopy(body.declared(schemas.SubmitRequest, required=False))
    schema = declared["requestBody"]["content"]["application/json"]["schema"]
    for field in schema["properties"].values():
        field.pop("default", None)
    schema |= {
        "title": "RerunRequest",
        "description": "What to change. What is not given stays as it was; null, where it may be, is the default.",
        "examples": [{}, {"kwargs": {"x": 1.0}, "max_retries": 0}],
    }
    return declared


router = APIRouter(prefix=PATH, tags=["tasks"])


@router.post(
    f"{ONE}/rerun",
    status_code=202,
    response_model=schemas.TaskCreated,
    responses=openapi.ACCEPTED | problems.responses(400, 404, 409, 410, 413, 415, 422, 503),
    openapi_extra={"parameters": [dict(openapi.KEY_PARAMETER)]} | _declared(),
)
async def rerun(task_id: TaskId, request: Request, state: Resources, caller: door.Writer) -> Response:
    """Submit an ended task again, as it was or with changes. The old one stays as it is; the new one names it.

    It is due now, and never expires, unless the body says otherwise. Each call makes another task, but for those under
    one `Idempotency-Key`.
    """
    with metrics.counting_rejections():
        changes = await body.read(request)
        key = admission.key_of(request, caller, changes.value)
        old = await lifecycle.as_submitted(state["db"], task_id, owner=caller.owner)
        if old is None:
            raise await absent(task_id, state, caller)
        if old.status not in TERMINAL:
            raise errors.TaskUnfinished
        wanted = body.parsed(_changed(old, changes.value), schemas.SubmitRequest)
        accepted = await admission.accept(
            request, state, caller, [wanted], key=key, rerun_of=task_id, traced_before=old.traceparent
        )
    return created(accepted)


def _changed(old: lifecycle.Original, changes: dict[str, Any]) -> Body:
    """The body of a submit that makes the old task again, with changes."""
    fields: dict[str, Any] = {
        "task": old.name,
        "args": json.loads(old.args),
        "kwargs": json.loads(old.kwargs),
        "queue": old.queue,
        "concurrency_key": old.concurrency_key or None,
        "max_retries": old.max_retries,
        "time_limit": old.time_limit,
        "tags": list(old.tags),
        "webhook_url": old.webhook_url,
        "webhook_events": None if old.webhook_events is None else list(old.webhook_events),
    }
    if "webhook_url" in changes and changes["webhook_url"] is None:
        # Nobody is to hear of it any more, whatever of it was to be heard.
        fields["webhook_events"] = None
    fields |= changes
    return Body(json.dumps(fields), fields)

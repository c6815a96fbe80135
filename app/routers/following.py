"""What happens to a task, as it happens: server-sent events (WHATWG HTML, "Server-sent events").

An event says how the task is now, and its id is made of just that. So whoever
comes again with `Last-Event-ID` gets nothing twice, and what is new, whatever
process answers; what came and went while nobody listened is not told.
"""

import json
import time
import zlib
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from app import lifecycle
from app.core import errors
from app.core.statuses import TERMINAL, TaskStatus
from app.lifecycle import Snapshot
from app.routers import door, problems
from app.routers.state import Resources
from app.routers.tasks import ONE, PATH, TaskId, absent
from app.watch import Full, Watch

HEARTBEAT_SECONDS = 15.0
"""After how long a silence something is sent, so that nobody between takes the connection for dead."""
STREAM_SECONDS = 600.0
"""After which a client comes again, perhaps to another process."""
RETRY_MILLISECONDS = 1000
FULL_RETRY_AFTER_SECONDS = 5

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `status`, `progress` and, last of all, `end`. The data of each is JSON: `status`,"
        " `attempt`, `progress` (`fraction` and `message`, or null), and of an end `error_type`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    204: {"description": "The task has ended, and `Last-Event-ID` names its end: there is nothing more to come."},
}

router = APIRouter(tags=["tasks"])


@router.get(
    f"{PATH}{ONE}/events",
    response_class=StreamingResponse,
    responses=_EVENTS | problems.responses(404, 410, 422, 503),
)
async def follow_task(
    task_id: TaskId,
    state: Resources,
    caller: door.Reader,
    last_event_id: Annotated[str | None, Header(max_length=200)] = None,
) -> Response:
    """Follow the task: its status and progress as they change, within about a second, and its end at once.

    The stream ends with the task. It also ends after ten minutes, or when its process does: come again with the
    `id` of the last event as `Last-Event-ID`, as browsers do by themselves.
    """
    found = (await lifecycle.snapshots(state["db"], [task_id], owner=caller.owner)).get(task_id)
    if found is None:
        raise await absent(task_id, state, caller)
    if found.status in TERMINAL and last_event_id == _id(found):
        return Response(status_code=204)
    if found.status not in TERMINAL and state["watch"].full:
        raise errors.ServiceUnavailable(
            "Too many are following tasks; try again later", retry_after_seconds=FULL_RETRY_AFTER_SECONDS
        )
    events = _events(state["watch"], task_id, found, last_event_id)
    # Proxies that collect answers before they pass them on know this header.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _events(watch: Watch, task_id: UUID, found: Snapshot, last_event_id: str | None) -> AsyncIterator[str]:
    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    if _id(found) != last_event_id:
        yield _event(None, found)
    if found.status in TERMINAL:
        return
    until = time.monotonic() + STREAM_SECONDS
    try:
        with watch.follow(task_id, found) as follower:
            told = found
            while time.monotonic() < until:
                changed = await follower.change(HEARTBEAT_SECONDS)
                if follower.seen is not None and follower.seen != told:
                    yield _event(told, follower.seen)
                    told = follower.seen
                elif not changed:
                    yield ":\n\n"
                if follower.over:
                    return
    except Full:
        return


def _id(found: Snapshot) -> str:
    detail = json.dumps([found.progress, found.progress_message])
    return f"{found.attempt}.{found.status}.{zlib.crc32(detail.encode()):08x}"


def _event(before: Snapshot | None, found: Snapshot) -> str:
    """An event as it is sent: its name says what is new, its data all that there is."""
    data: dict[str, Any] = {"status": found.status, "attempt": found.attempt, "progress": None}
    if found.progress is not None:
        data["progress"] = {"fraction": found.progress, "message": found.progress_message}
    kind = "status"
    if found.status in TERMINAL:
        kind = "end"
        data["error_type"] = None if found.status is TaskStatus.SUCCESS else found.error_type
    elif before is not None and (before.status, before.attempt) == (found.status, found.attempt):
        kind = "progress"
    return f"id: {_id(found)}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"

"""What happens to a task, as it happens: server-sent events (WHATWG HTML, "Server-sent events").

An event says how the task is now, or what it has logged, and its id is made of
how the task was when that was told last, and of the number of the last line. So
whoever comes again with `Last-Event-ID` gets nothing twice, and what is new,
whatever process answers; a status that came and went while nobody listened is not
told. Log lines are told while their attempt runs, as far as Redis brings them, and
when it has ended those that are kept of it and were not told before.
"""

import contextlib
import json
import re
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse

from app import lifecycle, schemas
from app.core import errors
from app.core.statuses import TERMINAL, TaskStatus
from app.db import Database
from app.lifecycle import Logged, Snapshot
from app.routers import door, problems
from app.routers.state import Resources
from app.routers.tasks import ONE, PATH, TaskId, absent
from app.watch import Follower, Full, Watch

HEARTBEAT_SECONDS = 15.0
"""After how long a silence something is sent, so that nobody between takes the connection for dead."""
STREAM_SECONDS = 600.0
"""After which a client comes again, perhaps to another process."""
RETRY_MILLISECONDS = 1000
FULL_RETRY_AFTER_SECONDS = 5
PAGE = 10
"""Attempts whose lines are read at once."""

_NOTHING_YET = "new"
_ID = re.compile(r"(new|([0-9]{1,10})\.[A-Z]{1,10}\.[0-9a-f]{8})(?:\.([0-9]{1,10})\.([0-9]{1,18}))?", re.ASCII)

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Events named `status`, `progress`, `log` and, last of all, `end`. The data of each is JSON:"
        " `status`, `attempt`, `progress` (`fraction` and `message`, or null), and of an end `error_type`; of a log"
        " line `attempt`, `line` (its number, 1 for the first of its attempt), `at`, `level`, `logger`, `message`.",
        "content": {"text/event-stream": {}},
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

    What its code logs is told within a second or two, the last 50 lines of an attempt at a time; where more were
    logged, their numbers leave a gap. Without Redis, lines are told when their attempt has ended.

    The stream ends with the task. It also ends after ten minutes, when its key is revoked or expires, or when its
    process does: come again with the `id` of the last event as `Last-Event-ID`, as browsers do by themselves.
    """
    found = (await lifecycle.snapshots(state["db"], [task_id], owner=caller.owner)).get(task_id)
    if found is None:
        raise await absent(task_id, state, caller)
    told = _Told(found, last_event_id)
    if found.status in TERMINAL and told.state == _id(found):
        return Response(status_code=204)
    if found.status not in TERMINAL and state["watch"].full(caller.owner):
        raise errors.ServiceUnavailable(
            "Too many are following tasks; try again later", retry_after_seconds=FULL_RETRY_AFTER_SECONDS
        )
    events = _events(state["db"], state["watch"], caller, task_id, found, told=told)
    # Proxies that collect answers before they pass them on know this header.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, headers=headers, media_type="text/event-stream")


async def _events(
    db: Database, watch: Watch, caller: door.Caller, task_id: UUID, found: Snapshot, *, told: "_Told"
) -> AsyncIterator[str]:
    yield f"retry: {RETRY_MILLISECONDS}\n\n"
    # Without Postgres the stream ends, and whoever comes again goes on behind the last event.
    with contextlib.suppress(Full, errors.DatabaseUnavailable):
        async for event in told.news(db, task_id, found, None):
            yield event
        if found.status in TERMINAL:
            return
        until = time.monotonic() + STREAM_SECONDS
        with watch.follow(task_id, found, owner=caller.owner, log=True) as follower:
            while time.monotonic() < until:
                changed = await _change(follower, caller)
                if changed is None:
                    return
                if follower.seen is not None:
                    async for event in told.news(db, task_id, follower.seen, follower.logged):
                        yield event
                if not changed:
                    yield ":\n\n"
                if follower.over:
                    return


async def _change(follower: Follower, caller: door.Caller) -> bool | None:
    """Wait for a change, until a heartbeat is due. Returns whether there was one; None if it is not for the caller."""
    due_at = time.monotonic() + HEARTBEAT_SECONDS
    while True:
        changed = await follower.change(min(due_at - time.monotonic(), caller.ask_seconds))
        try:
            if not await caller.holds():
                return None
        except errors.DatabaseUnavailable:
            # Nobody knows whether the key still holds. To be silent is all that it is good for until then.
            if changed:
                return None
        if changed or time.monotonic() >= due_at:
            return changed


class _Told:
    """What one client was told.

    Attributes:
        state: how the task was then, as the ids of events say it.
        place: the last line: its attempt, and its number.
    """

    def __init__(self, found: Snapshot, last_event_id: str | None) -> None:
        """Go on behind an event, or begin with the attempt that a picture of the task shows.

        Args:
            found: the picture.
            last_event_id: of the event. What is none of ours, or speaks of attempts that there are not, is ignored.
        """
        came = _ID.fullmatch(last_event_id or "")
        self.state, self.place = _NOTHING_YET, (found.attempt, 0)
        if came is not None:
            place = int(came[3] or came[2] or found.attempt), int(came[4] or 0)
            if place[0] <= found.attempt:
                self.state, self.place = came[1], place
        self._before = found if self.state == _id(found) else None
        self._read = 0

    async def news(self, db: Database, task_id: UUID, found: Snapshot, heard: Logged | None) -> AsyncIterator[str]:
        """The events that are new: lines before what ends their attempt, and behind what begins it.

        Args:
            db: where the lines of attempts that have ended are read.
            task_id: the task.
            found: how it is.
            heard: what was heard of its log.
        """
        if heard is not None and self._before is not None and heard.attempt == self._before.attempt:
            for event in self._lines(heard):
                yield event
        if self.state != _id(found):
            ended = found.attempt if found.status is not TaskStatus.STARTED else found.attempt - 1
            if ended > self._read:
                async for logged in _kept(db, task_id, self.place[0], ended):
                    for event in self._lines(logged):
                        yield event
                self._read = ended
            yield self._state(found)
        if heard is not None and heard.attempt == found.attempt and found.status is TaskStatus.STARTED:
            for event in self._lines(heard):
                yield event

    def _lines(self, logged: Logged) -> Iterator[str]:
        for line in logged.lines:
            if (logged.attempt, line.number) > self.place:
                self.place = logged.attempt, line.number
                shown = schemas.LogLine(at=line.at, level=line.level, logger=line.logger, message=line.message)
                data = {"attempt": logged.attempt, "line": line.number, **shown.model_dump(mode="json")}
                yield self._event("log", data)

    def _state(self, found: Snapshot) -> str:
        """An event of how the task is: its name says what is new, its data all that there is."""
        data: dict[str, Any] = {"status": found.status, "attempt": found.attempt, "progress": None}
        if found.progress is not None:
            data["progress"] = {"fraction": found.progress, "message": found.progress_message}
        kind = "status"
        if found.status in TERMINAL:
            kind = "end"
            data["error_type"] = None if found.status is TaskStatus.SUCCESS else found.error_type
        elif self._before is not None and (self._before.status, self._before.attempt) == (found.status, found.attempt):
            kind = "progress"
        self.state, self._before = _id(found), found
        return self._event(kind, data)

    def _event(self, kind: str, data: dict[str, Any]) -> str:
        attempt, number = self.place
        place = f".{attempt}.{number}" if number else ""
        return f"id: {self.state}{place}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


async def _kept(db: Database, task_id: UUID, first: int, last: int) -> AsyncIterator[Logged]:
    """What is kept of the lines of attempts that have ended, from one number to another."""
    while first <= last:
        page = await lifecycle.logged(db, task_id, first=first, last=last, limit=PAGE)
        for logged in page:
            yield logged
        if len(page) < PAGE:
            return
        first = page[-1].attempt + 1


def _id(found: Snapshot) -> str:
    detail = json.dumps([found.progress, found.progress_message])
    return f"{found.attempt}.{found.status}.{zlib.crc32(detail.encode()):08x}"

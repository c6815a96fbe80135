"""From what a caller asked for to rows and messages: the one way in, for every route that submits.

All that is wrong is found before anything is written. A submit may come with an
`Idempotency-Key`; then it may come again, and is answered as it was the first
time, whatever has changed since.
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from fastapi import Request, Response

from app import intake, lifecycle, schemas
from app.core import errors, metrics, telemetry, tracing
from app.core.errors import FieldError
from app.core.fields import FIELD_ERRORS_LIMIT
from app.gathering import SHARED_BYTES
from app.routers.door import Caller
from app.routers.state import State

KEY_HEADER = "Idempotency-Key"
REPLAYED_HEADER = "Idempotent-Replayed"
DEDUPLICATED_HEADER = "Task-Deduplicated"
TRACE_HEADER = "X-Trace-Id"
KEY_PATTERN = r'^("([!#-\[\]-~]|\\["\\]){1,255}"|[!#-~][!-~]{0,254})$'
"""Visible ASCII, bare or as a string of structured fields (RFC 9651), whose quotes and escapes are not part of it."""

BREATH = 50
"""Tasks of a batch that are checked before others get their turn."""

_REPLAYED, _DEDUPLICATED, _TRACE = (
    name.lower().encode() for name in (REPLAYED_HEADER, DEDUPLICATED_HEADER, TRACE_HEADER)
)
_KEY_NAME = KEY_HEADER.lower().encode()
_KEY = re.compile(KEY_PATTERN, flags=re.ASCII)
_ESCAPED = re.compile(r"\\(.)")

Place = Callable[[int, str], str]
"""Where a field of the nth task stands in the request, by its pointer in a plain submit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """Tasks that are stored, one for each that was wanted.

    Attributes:
        task_ids: in the order of the request.
        replayed: they were made by an earlier request under the same key.
        deduplicated: at least one was there already, unfinished, and `unique_for` says that it will do.
        trace_id: of all that were made; None where one was there already, which has a trace of its own.
    """

    task_ids: tuple[UUID, ...]
    replayed: bool = False
    deduplicated: bool = False
    trace_id: str | None = None

    def tell(self, response: Response) -> None:
        """Say in the headers of an answer what is unusual about it."""
        if self.replayed:
            response.raw_headers.append((_REPLAYED, b"true"))
        if self.deduplicated:
            response.raw_headers.append((_DEDUPLICATED, b"true"))
        if self.trace_id is not None:
            response.raw_headers.append((_TRACE, self.trace_id.encode()))


def key_of(request: Request, caller: Caller, *posted: object) -> lifecycle.SubmitKey | None:
    """What this request is known by, if its caller gave it a key.

    Args:
        request: whose `Idempotency-Key` is read.
        caller: nobody else's keys are the same.
        posted: all that a second request under the same key must repeat, as JSON has it.

    Raises:
        MalformedHeader: if the header is no key, or there twice.
    """
    # Most requests have none. To look for one as text takes longer than this.
    sent = [value.decode("latin-1") for name, value in request.scope["headers"] if name == _KEY_NAME]
    if not sent:
        return None
    if len(sent) > 1 or not _KEY.fullmatch(sent[0]):
        raise errors.MalformedHeader(KEY_HEADER, "Should be once, of 1 to 255 visible ASCII characters, quoted or bare")
    key = _ESCAPED.sub(r"\1", sent[0][1:-1]) if sent[0].startswith('"') else sent[0]
    canonical = json.dumps(posted, sort_keys=True, separators=(",", ":"))
    return lifecycle.SubmitKey(
        owner=caller.owner, route=request.url.path, key=key, fingerprint=hashlib.sha256(canonical.encode()).digest()
    )


def as_submitted(_: int, pointer: str) -> str:
    """The place of a field in a plain submit."""
    return pointer


async def accept(
    request: Request,
    state: State,
    caller: Caller,
    wanted: Sequence[schemas.SubmitRequest],
    *,
    key: lifecycle.SubmitKey | None,
    place: Place = as_submitted,
    rerun_of: UUID | None = None,
    traced_before: str | None = None,
) -> Accepted:
    """Store tasks, all or none, and ring for those that are due. They run `rerun_of` again, if that is given.

    That one's `traceparent` is `traced_before`: a rerun has a trace of its own, which is linked to it.

    Raises:
        ValidationFailed: naming all that is wrong, if anything is.
        IdempotencyKeyReused: if the key stands for another request.
        ServiceUnavailable: if too many tasks wait.
        DatabaseUnavailable: if Postgres is away; the tasks may be there all the same, as the same key will tell.
    """
    try:
        new = await _new_tasks(request, state, caller, wanted, place)
        if rerun_of is not None:
            new = [replace(one, rerun_of=rerun_of) for one in new]
        state["backlog"].admit(len(new))
    except errors.RequestError:
        # What was accepted once is answered again, even if it would be refused now.
        if key is not None and (first := await lifecycle.remembered(state["db"], key)) is not None:
            return _again(first, key)
        raise
    if key is None and len(new) == 1 and new[0].unique_key is None:
        return await _accept_plain(state, new[0], traced_before)
    return await _accept_batch(state, new, key, traced_before)


async def _accept_plain(state: State, new: lifecycle.NewTask, traced_before: str | None) -> Accepted:
    if not tracing.recording():
        await _store(state, new)
    else:
        with tracing.create(new.queue, task=new.name, task_id=new.id, reruns=traced_before) as traceparent:
            if traceparent is not None:
                new = replace(new, traceparent=traceparent)
            await _store(state, new)
    return Accepted(task_ids=(new.id,), trace_id=_trace_id(new))


async def _store(state: State, new: lifecycle.NewTask) -> None:
    publisher, size_bytes = state["publisher"], new.size_bytes
    away = publisher.away(new.queue)
    if size_bytes > SHARED_BYTES:
        bell = await lifecycle.submit(state["db"], new, hold_back=away)
    else:
        bell = await state["submits"].ask((new, away))
    state["backlog"].accepted()
    if bell is not None:
        publisher.ring(bell)
    metrics.submitted(new.name, new.queue, "accepted")
    metrics.accepted_payload(new.name, size_bytes)


async def _accept_batch(
    state: State, new: Sequence[lifecycle.NewTask], key: lifecycle.SubmitKey | None, traced_before: str | None
) -> Accepted:
    publisher = state["publisher"]
    held_back = {one.queue for one in new if publisher.away(one.queue)}
    # One statement, and one span for all that it makes: they are told apart by the spans of their attempts.
    with tracing.create(new[0].queue, count=len(new), reruns=traced_before) as traceparent:
        if traceparent is not None:
            new = [replace(one, traceparent=traceparent) for one in new]
        while (made := await lifecycle.submit_batch(state["db"], new, held_back=held_back, key=key)) is None:
            # The first one is committed: its row kept this one out.
            if key is not None and (first := await lifecycle.remembered(state["db"], key)) is not None:
                _count(new, "replayed")
                return _again(first, key)
    state["backlog"].accepted(len(made.created))
    publisher.ring(*made.bells)
    _count((one for one in new if one.id in made.created), "accepted")
    _count((one for one in new if one.id not in made.created), "deduplicated")
    if len(made.created) < len(new):
        return Accepted(task_ids=made.task_ids, deduplicated=True)
    return Accepted(task_ids=made.task_ids, trace_id=_trace_id(new[0]))


def _trace_id(new: lifecycle.NewTask) -> str | None:
    return None if new.traceparent is None else tracing.trace_id_in(new.traceparent)


def _count(new: Iterable[lifecycle.NewTask], outcome: str) -> None:
    for one in new:
        metrics.submitted(one.name, one.queue, outcome)
        if outcome == "accepted":
            metrics.accepted_payload(one.name, one.size_bytes)


def _again(first: lifecycle.Remembered, key: lifecycle.SubmitKey) -> Accepted:
    return Accepted(task_ids=answered_before(first, key), replayed=True)


def answered_before(first: lifecycle.Remembered, key: lifecycle.SubmitKey) -> tuple[UUID, ...]:
    """The ids that the first request under this key was answered with.

    Raises:
        IdempotencyKeyReused: if it was another request.
    """
    if first.fingerprint != key.fingerprint:
        raise errors.IdempotencyKeyReused
    return first.task_ids


async def _new_tasks(
    request: Request, state: State, caller: Caller, wanted: Sequence[schemas.SubmitRequest], place: Place
) -> list[lifecycle.NewTask]:
    """The rows to be written. Raises ValidationFailed with all that is wrong with any of them."""
    is_traced = any([name == b"traceparent" for name, _ in request.scope["headers"]])  # noqa: C419  # it is quicker
    traceparent = telemetry.current_traceparent(request.headers if is_traced else {})
    new: list[lifecycle.NewTask] = []
    faults: list[FieldError] = []
    for index, one in enumerate(wanted):
        if index and index % BREATH == 0:
            await asyncio.sleep(0)
        try:
            new.append(
                intake.new_task(one, state["settings"], state["rules"], owner=caller.owner, traceparent=traceparent)
            )
        except errors.ValidationFailed as invalid:
            faults += (FieldError(place(index, fault.pointer), fault.detail) for fault in invalid.errors)
            if len(faults) >= FIELD_ERRORS_LIMIT:
                break
    if faults:
        raise errors.ValidationFailed(faults[:FIELD_ERRORS_LIMIT])
    return new

"""How one attempt runs: claim → run → settle → tell.

`DurableTask` is the base class of every task. In a worker it takes only an id,
an attempt number and a name from the message; arguments come from the row. What
happened to the function (an outcome) is kept apart from what it means
(`lifecycle.decide`) and from what is written (`lifecycle.settle`).
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, NoReturn, Protocol
from uuid import UUID, uuid4

from billiard.common import clear_terminate_handler_fired, terminate_handler_fired
from celery import Task
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded
from celery.result import AsyncResult
from opentelemetry.trace import Span

from app import broker, lifecycle
from app.core import backoff, errors, limits, metrics, telemetry, tracing
from app.lifecycle import Cancelled, Claim, Claimed, Error, Failed, Interrupted, Misfit, Outcome, RetryAsked, Succeeded
from app.worker import bridge, memory, signals
from app.worker.desk import Desk
from app.worker.journal import Journal
from app.worker.line import Line
from app.worker.slots import Running
from app.worker.spool import Report

RESULT_LIMIT_BYTES = 1024 * 1024
PROGRESS_INTERVAL_SECONDS = 0.5
PROGRESS_MESSAGE_LIMIT = 500
DYING_SECONDS = 5.0
"""How long a child waits for the keeper to kill it, after the death of its attempt was ordered."""
STOP_HEARD_SECONDS = 2.0
"""How long a child that was told to stop waits to hear that its worker was told as well: a process manager that tells
all processes of a group does not tell the worker's main process first."""
STOP_LOOK_SECONDS = 0.01

log = logging.getLogger(__name__)


class Declared(Protocol):
    """What the catalogue knows about a task that runs here. `catalog.Entry` is one."""

    @property
    def queue(self) -> str | None: ...  # noqa: D102  # a field, described by the class that has it
    @property
    def max_retries(self) -> int: ...  # noqa: D102  # as above
    @property
    def time_limit(self) -> float | None: ...  # noqa: D102  # as above
    @property
    def soft_time_limit(self) -> float | None: ...  # noqa: D102  # as above
    def validate_call(self, args: list[Any], kwargs: dict[str, Any]) -> None: ...  # noqa: D102  # as above
    def bind(self, args: str, kwargs: str) -> dict[str, Any]: ...  # noqa: D102  # as above


class TaskCancelled(BaseException):
    """Raised in a task's own code when its cancel was asked for.

    Not an `Exception`, so that code which survives errors does not survive this. Clean up, and let it pass.
    """


class RetryLater(Retry):  # type: ignore[misc]  # Celery ships no types
    """Raised by `retry()`: the attempt is over, and another is wanted."""

    def __init__(self, cause: BaseException | None, delay_seconds: float, max_retries: int | None) -> None:
        super().__init__(exc=cause if isinstance(cause, Exception) else None, when=delay_seconds)
        self.cause = cause
        self.delay_seconds = delay_seconds
        self.max_retries = max_retries


class DurableTask(Task):  # type: ignore[misc]  # Celery ships no types
    """A task whose row decides. Declared with `catalog.task`."""

    abstract = True
    Strategy = "app.worker.jobs:strategy"
    entry: ClassVar[Declared | None] = None
    full_jitter: ClassVar[bool] = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function: for a message, as an attempt of its row; called directly, as a plain function."""
        if self.request.called_directly or self.request.is_eager:
            return self.run(*args, **kwargs)
        run_attempt(self)
        # Nothing is returned, and nothing raised that is not ours to raise: Celery logs and reports both.
        return None

    def apply_async(
        self, args: Any = None, kwargs: Any = None, task_id: str | None = None, **options: Any
    ) -> AsyncResult:
        """Submit this task durably. Takes the options of `DurableCelery.send_task`."""
        return self.app.send_task(self.name, args, kwargs, task_id=task_id, **options)

    def retry(  # noqa: PLR0917  # Celery's signature
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: BaseException | None = None,
        throw: bool = True,
        eta: datetime | None = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        *,
        automatic: bool = False,
        **options: Any,
    ) -> Any:
        """End this attempt and ask for another; nothing is published, the row gets a `run_at`.

        Celery's `autoretry_for` calls this with the countdown that `retry_backoff` asks for.

        Args:
            args: not supported: a retried task keeps its arguments.
            kwargs: as `args`.
            exc: why; the exception being handled unless given.
            throw: raise at once, or return what to raise.
            eta: when to run again; or `countdown` seconds from now; else `default_retry_delay`.
            countdown: seconds from now.
            max_retries: fewer retries than the task has, for this cause.
            automatic: set for `autoretry_for`, whose countdown is the cap under which the wait is drawn.
            options: not supported.

        Raises:
            TypeError: if it is asked for what is not supported, or for what is no number.
            ValueError: if a number is none.
            OverflowError: if `max_retries` is infinite, or `countdown` an integer of hundreds of digits.
        """
        if args is not None or kwargs is not None or options:
            raise TypeError("retry() keeps the task's arguments and options")
        cause = exc or sys.exc_info()[1]
        if self.request.called_directly:
            raise cause or RuntimeError("retry() was called outside a worker")
        if eta is not None:
            aware = eta if eta.tzinfo is not None else eta.replace(tzinfo=UTC)
            countdown = (aware - datetime.now(UTC)).total_seconds()
        if automatic and self.full_jitter and countdown is not None:
            countdown = backoff.full_jitter(countdown)
        # What is no number is an error of the task's here, and nobody's elsewhere.
        delay = float(self.default_retry_delay if countdown is None else countdown)
        if math.isnan(delay):
            raise ValueError("countdown must be a number of seconds")
        # No task has more, and nobody can write down a number of any length.
        most = None if max_retries is None else min(max(0, int(max_retries)), limits.MAX_RETRIES)
        again = RetryLater(cause, max(0.0, delay), most)
        if throw:
            raise again from cause
        return again


@dataclass(frozen=True, slots=True)
class _Report:
    """How far a task says that it is."""

    fraction: float
    message: str | None


class _Progress:
    """What an attempt says of how far it is, on its way to Postgres: twice a second, and the last of it in the end.

    The task's thread and the bridge's share it without a lock: the task may be interrupted anywhere, and must not
    take a lock along. At worst both find that somebody should write, and the newest is written twice.
    """

    def __init__(self, here: bridge.Bridge, claim: Claim) -> None:
        self._here = here
        self._claim = claim
        self._newest: _Report | None = None
        self._written: _Report | None = None
        self._writing = False
        self._complete = False

    def show(self, report: _Report) -> None:
        """Have this written soon, unless there is something newer by then."""
        self._newest = report
        # The end is not kept waiting: the attempt may be over before the next turn. Once.
        completes = report.fraction >= 1.0 and not self._complete
        if completes or not self._writing:
            self._complete = self._complete or completes
            self._writing = True
            self._here.start(self._write())

    async def _write(self) -> None:
        while True:
            newest = self._newest
            if newest is not None and newest is not self._written:
                self._written = newest
                await self._record(newest)
                await asyncio.sleep(PROGRESS_INTERVAL_SECONDS)
                continue
            self._writing = False
            # Looked at again: what came in between has found that somebody writes.
            if self._newest is newest:
                return
            self._writing = True

    async def _record(self, report: _Report) -> None:
        try:
            await lifecycle.record_progress(self._here.db, self._claim, report.fraction, report.message)
        except (errors.DatabaseUnavailable, errors.StatementRefused) as away:
            log.debug("progress was not recorded: %s", away)


@dataclass(slots=True)
class _Attempt:
    """What this process is running. One at a time: a pool child has one main thread."""

    claimed: Claimed
    started: float
    progress: _Progress
    heard_soft_limit: bool = False


@dataclass(frozen=True, slots=True)
class _Seat:
    """The place of one pool child at the desk."""

    desk: Desk
    slot: int
    line: Line
    worker: str

    def show(self, running: Running) -> None:
        self.desk.slots.show(self.slot, running)

    def clear(self, claim: Claim) -> None:
        self.desk.slots.clear(self.slot)
        if self.desk.slots.ordered_to_die(self.slot, claim):
            # The keeper decided to kill this attempt and may already have sent the signal: take no other task.
            _await_death()


_journal = Journal()
_running: _Attempt | None = None
_desk: Desk | None = None
_seat: _Seat | None = None


def attach(desk: Desk) -> None:
    """Use this desk; called once in a worker's main process, before it forks."""
    global _desk  # noqa: PLW0603  # one pool per process
    _desk = desk


def occupy() -> None:
    """Take a slot for this pool child; called once in each, after the fork. Raises RuntimeError if there is none."""
    global _seat  # noqa: PLW0603  # one per child
    if _desk is not None:
        slot = _desk.slots.occupy()
        line = Line(_desk.door, _desk.spool, slot)
        # A process that a task forks must not keep the keeper from hearing of this one's end.
        os.register_at_fork(after_in_child=line.hang_up)
        _seat = _Seat(_desk, slot, line, worker=f"{socket.gethostname()}/{os.getpid()}")


def run_attempt(task: DurableTask) -> None:
    """Run the attempt that the current message offers, if the row agrees.

    Raises:
        Ignore: if the message was a duplicate or stale, or its task is held for its queue: Celery reports nothing.
        SystemExit: if the worker is stopping; the task has been handed back.
    """
    wanted = _wanted(task)
    here = _seated()
    signals.hold()
    signals.on_interrupt(_interrupted)
    try:
        # Shown before it is claimed: if this process dies in between, the keeper knows what to settle.
        here.show(Running(wanted, started=0.0, limit_seconds=0.0))
        claimed = here.line.claim(lifecycle.Wanted(wanted, task.name, here.worker))
        if isinstance(claimed, lifecycle.Unclaimed):
            if claimed is lifecycle.Unclaimed.STALE:
                metrics.redelivered(_consumed_from(task))
            raise Ignore
        soft_limit = task.entry.soft_time_limit if task.entry is not None else None
        here.show(Running(wanted, time.monotonic(), claimed.time_limit or 0.0, soft_limit or 0.0))
        span = tracing.Attempt(
            task_id=wanted.task_id,
            number=wanted.attempt,
            task=claimed.name,
            queue=claimed.queue,
            traceparent=claimed.traceparent,
        ).begin(waited_seconds=claimed.waited_seconds)
        with (
            tracing.current(span),
            telemetry.bound(task_id=str(wanted.task_id), attempt=wanted.attempt, queue=claimed.queue),
        ):
            _journal.begin(wanted)
            began = time.monotonic()
            outcome = _perform(task, claimed)
            run_seconds, done_at = time.monotonic() - began, time.time_ns()
            signals.hold()
            # Its time limits end here: however long the report waits for room or for Postgres, the task is done.
            here.show(Running(wanted, time.monotonic(), limit_seconds=0.0))
            _report(here, claimed, outcome, _journal.end(), run_seconds, span, done_at)
    finally:
        here.clear(wanted)
        signals.release()
    if isinstance(outcome, Interrupted):
        raise SystemExit(0)


def _seated() -> _Seat:
    """This child's place. Raises Ignore where there is none: such a process is no worker of ours."""
    if _seat is None:
        log.error("a task was offered to a process that is no child of a worker")
        raise Ignore
    return _seat


def _wanted(task: DurableTask) -> Claim:
    """The claim that the message asks for. Raises Ignore if it is not one of ours."""
    attempt = getattr(task.request, "attempt", None)
    with contextlib.suppress(TypeError, ValueError):
        if type(attempt) is int and 0 <= attempt <= broker.MOST_ATTEMPTS:
            return Claim(UUID(task.request.id), attempt + 1, uuid4())
    log.warning("dropped a message for %s that this service did not write", task.name)
    raise Ignore


def _perform(task: DurableTask, claimed: Claimed) -> Outcome:
    """Run the function. Never raises: whatever happens is an outcome."""
    global _running  # noqa: PLW0603  # one at a time
    # Celery computes the backoff from this; crashes and releases must not lengthen it.
    task.request.retries = claimed.budgets.failures
    # A signal that an earlier task has survived is no matter of this one.
    clear_terminate_handler_fired()
    _running = _Attempt(claimed, time.monotonic(), _Progress(bridge.current(), claimed.claim))
    try:
        arguments = _bound(task, claimed)
        with memory.allowance(bridge.current().settings.task_memory_mebibytes):
            with signals.let_through():
                result = task.run(*arguments.args, **arguments.kwargs)
            return _serialised(result)
    except TaskCancelled:
        return Cancelled()
    except MisfitError as misfit:
        return Misfit(Error(type="InvalidArguments", message=str(misfit)))
    except RetryLater as again:
        error = _describe(again.cause) if again.cause else Error(type="Retry", message="The task asked to be retried")
        return RetryAsked(error, again.delay_seconds, again.max_retries)
    except Exception as raised:  # noqa: BLE001  # whatever user code raises is its outcome
        return Failed(_describe(raised))
    except BaseException as raised:  # noqa: BLE001  # sys.exit() in a task must not take the worker along
        return _told_to_stop() if terminate_handler_fired() else Failed(_describe(raised))
    finally:
        _running = None


def _told_to_stop() -> Interrupted:
    """What a signal to end this process means to the attempt: it is handed back if the worker stops.

    If it does not, the task has ended its own process, as libraries do that stop the server they believe to run in.
    Handed back, it would do so for ever. So this process dies like any other that a task has ended: its slot still
    shows the attempt, and the keeper settles it.
    """
    slots = _seated().desk.slots
    until = time.monotonic() + STOP_HEARD_SECONDS
    while not slots.stopping:
        if time.monotonic() > until:
            log.error("this process was told to stop, and not by its worker: it dies, as if the task had ended it")
            os.kill(os.getpid(), signal.SIGKILL)
            _await_death()
        time.sleep(STOP_LOOK_SECONDS)
    return Interrupted()


@dataclass(frozen=True, slots=True)
class _Arguments:
    args: list[Any]
    kwargs: dict[str, Any]


class MisfitError(Exception):
    """The stored arguments don't fit the signature that this worker has."""


def _bound(task: DurableTask, claimed: Claimed) -> _Arguments:
    """The arguments in the types of the signature. They were checked at submit, perhaps by another release."""
    if task.entry is None:
        return _Arguments(json.loads(claimed.args), json.loads(claimed.kwargs))
    try:
        return _Arguments([], task.entry.bind(claimed.args, claimed.kwargs))
    except errors.ValidationFailed as invalid:
        raise MisfitError("; ".join(f"{one.pointer}: {one.detail}" for one in invalid.errors)) from invalid


def _serialised(result: Any) -> Outcome:
    try:
        text = json.dumps(result, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        size = len(text.encode())
    except (TypeError, ValueError, RecursionError) as unfit:
        reason = "holds a lone surrogate" if isinstance(unfit, UnicodeError) else str(unfit)
        return Failed(Error(type="ResultNotSerializable", message=f"The result is not JSON: {reason}"))
    if size > RESULT_LIMIT_BYTES:
        message = f"The result is {size} bytes of JSON, over the limit of {RESULT_LIMIT_BYTES}"
        return Failed(Error(type="ResultTooLarge", message=message))
    return Succeeded(text)


def _describe(raised: BaseException) -> Error:
    if isinstance(raised, MemoryError):
        return Error(type="OutOfMemory", message="The task could not get the memory it asked for")
    if isinstance(raised, SoftTimeLimitExceeded):
        message = "The task ran longer than its soft limit"
        return Error(type="TimeLimitExceeded", message=message, traceback=_trace(raised))
    return Error(type=type(raised).__name__, message=_attempted(lambda: str(raised)) or "", traceback=_trace(raised))


def _trace(raised: BaseException) -> str | None:
    return _attempted(lambda: "".join(traceback.format_exception(raised, limit=-20)))


def _attempted(describe: Callable[[], str]) -> str | None:
    """What an exception says of itself; None if even that raises. It is the task's outcome all the same."""
    try:
        return describe()
    except Exception:  # noqa: BLE001  # user code may do anything in __str__
        return None


def _report(  # noqa: PLR0917  # all that is known of an attempt
    here: _Seat,
    claimed: Claimed,
    outcome: Outcome,
    logged: lifecycle.Log | None,
    run_seconds: float,
    span: Span,
    done_at: int,
) -> None:
    """Have the keeper write what became of the attempt, and end its span."""
    report = Report(
        claim=claimed.claim,
        name=claimed.name,
        queue=claimed.queue,
        budgets=claimed.budgets,
        traceparent=claimed.traceparent,
        limited_with=claimed.limited_with,
        outcome=outcome,
        log=logged,
        run_seconds=run_seconds,
    )
    traced = span.is_recording()
    try:
        status = here.line.report(report, wait=traced)
    except (TypeError, ValueError) as unfit:
        # Nothing has been said yet. Without a word, the task would run again when its lease ends, and again.
        log.exception("the outcome of task %s can't be reported", claimed.claim.task_id)
        outcome = Failed(Error(type="OutcomeNotStorable", message=f"The outcome can't be written down: {unfit}"))
        status = here.line.report(replace(report, outcome=outcome), wait=traced)
    # Of an attempt that was superseded, whoever ended it has told.
    if traced and status is not None:
        transition = lifecycle.decide(claimed.budgets, outcome)
        error_type = transition.error.type if transition.error else None
        tracing.end(span, outcome=transition.outcome, status=status, error_type=error_type, at=done_at)


def _consumed_from(task: DurableTask) -> str:
    """The queue of the current message, which may say anything of itself."""
    queue = (task.request.delivery_info or {}).get("routing_key")
    return queue if queue in bridge.current().settings.queues else metrics.UNKNOWN


def _await_death() -> NoReturn:
    time.sleep(DYING_SECONDS)
    os._exit(1)


def checkpoint() -> None:
    """Stop here if the cancel of the running task was asked for. Outside a worker this does nothing.

    Raises:
        TaskCancelled: if it was.
    """
    attempt = _running
    if attempt is None or _seat is None:
        return
    if _seat.desk.slots.ordered_to_cancel(_seat.slot, attempt.claimed.claim):
        raise TaskCancelled


def _interrupted() -> None:
    """What the keeper's signal means to the task's own code, where it is raised. It may mean nothing any more.

    Raises:
        TaskCancelled: if the cancel of the running attempt was asked for.
        SoftTimeLimitExceeded: if it has passed its soft limit; once, so that it can clean up undisturbed.
    """
    checkpoint()
    attempt = _running
    if attempt is None or attempt.heard_soft_limit or _seat is None:
        return
    if _seat.desk.slots.ordered_by_soft_limit(_seat.slot, attempt.claimed.claim):
        attempt.heard_soft_limit = True
        raise SoftTimeLimitExceeded


def progress(fraction: float, message: str | None = None) -> None:
    """Show how far the running task is.

    Args:
        fraction: from 0 to 1; clipped.
        message: for people; cut to 500 characters.

    Outside a worker this does nothing. At most two are written each second, and of those in between the last one,
    unless the attempt is over by then. Raises as `checkpoint`.
    """
    checkpoint()
    attempt = _running
    if attempt is None:
        return
    clean = message[:PROGRESS_MESSAGE_LIMIT].replace("\x00", "") if message else None
    # Whatever a task says, it can be stored: half a surrogate pair can't.
    clean = clean.encode("utf-8", "replace").decode("utf-8") if clean else None
    attempt.progress.show(_Report(min(1.0, max(0.0, float(fraction))), clean))


def current_failures() -> int:
    """How many runs of the task that runs here have failed; 0 outside a worker."""
    return _running.claimed.budgets.failures if _running is not None else 0

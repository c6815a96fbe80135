"""The state machine as values: which status may follow which, and what an outcome means.

Nothing here does I/O. A worker, the keeper or the relay says what happened to
an attempt (an `Outcome`); `decide()` says what it means (a `Transition`); one
guarded statement in `attempts` makes it so, or finds that somebody else already
ended the attempt.
"""

from dataclasses import dataclass, field
from typing import Literal
from uuid import UUID

from app.core import backoff
from app.core.statuses import TERMINAL, WAITING, AttemptOutcome, TaskStatus

TRANSITIONS: dict[TaskStatus, frozenset[TaskStatus]] = {
    TaskStatus.PENDING: frozenset({TaskStatus.STARTED, TaskStatus.FAILURE, TaskStatus.REVOKED}),
    TaskStatus.STARTED: frozenset(
        {TaskStatus.SUCCESS, TaskStatus.FAILURE, TaskStatus.REVOKED, TaskStatus.RETRY, TaskStatus.PENDING}
    ),
    TaskStatus.RETRY: frozenset({TaskStatus.STARTED, TaskStatus.FAILURE, TaskStatus.REVOKED}),
    TaskStatus.SUCCESS: frozenset(),
    TaskStatus.FAILURE: frozenset(),
    TaskStatus.REVOKED: frozenset(),
}
"""Every legal step. PENDING again: released at shutdown. A waiting task fails when no worker knows it."""

CRASH_BUDGET = 3
"""Deaths of its own process after which a task ends."""
LOSS_BUDGET = 10
"""Lost workers or nodes after which a task ends."""
REFUSAL_BUDGET = 10
"""Workers that did not know the task after which it ends; with their waits that is about four minutes."""
ERROR_TEXT_LIMIT = 16_384
"""Characters of an error's message or traceback that are kept."""

Budget = Literal["failures", "crashes", "losses", "refusals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """Why an attempt did not end well, as it is stored and shown.

    Attributes:
        type: the exception's class name, or one of the words of DESIGN 3.
        message: for people; may be empty.
        traceback: for the task's author; None where no code of the task's raised.
    """

    type: str
    message: str = ""
    traceback: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", _storable(self.type) or "Exception")
        object.__setattr__(self, "message", _storable(self.message))
        if self.traceback is not None:
            object.__setattr__(self, "traceback", _storable(self.traceback))


def _storable(text: str) -> str:
    """`text` as Postgres can keep it: no NUL, no lone surrogate, and not endless."""
    clean = text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= ERROR_TEXT_LIMIT else clean[: ERROR_TEXT_LIMIT - 1] + "…"


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write about one attempt of one task: the fence."""

    task_id: UUID
    attempt: int
    token: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What a task has spent so far, and what its failures may spend."""

    failures: int = 0
    crashes: int = 0
    losses: int = 0
    refusals: int = 0
    max_retries: int = 3


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The function returned; `result` is its value as JSON text."""

    result: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The function raised, and asked for no retry."""

    error: Error


@dataclass(frozen=True, slots=True)
class RetryAsked:
    """The function raised what it retries for, or called `retry()`.

    Attributes:
        delay_seconds: from now until the task is due again.
        max_retries: overrides the task's own, as `Task.retry(max_retries=…)` does.
    """

    error: Error
    delay_seconds: float
    max_retries: int | None = None


@dataclass(frozen=True, slots=True)
class Misfit:
    """The arguments don't fit the function as this worker has it: it is older or newer than the submit."""

    error: Error


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The attempt passed its hard time limit."""

    limit_seconds: float


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The worker stops and hands the task back."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """The process that ran the attempt died by itself: the task's own doing until proven otherwise.

    Attributes:
        out_of_memory: the kernel killed it, because the memory of its container was used up.
    """

    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """The lease ran out, or the whole worker went: a fault of ours."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody asked for the task's end, and the attempt stopped, or was stopped."""


Outcome = Succeeded | Failed | RetryAsked | TimedOut | Interrupted | Crashed | Lost | Cancelled | Misfit


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """What is written about an attempt. Made by `decide()` alone, so illegal combinations don't exist.

    Attributes:
        status: where the task goes.
        run_in_seconds: from now until it is due, for a task that goes on.
        result: JSON text, for SUCCESS.
        error: for all others but a release.
        spends: the budget that this outcome is billed to.
    """

    status: TaskStatus
    run_in_seconds: float = 0.0
    result: str | None = None
    error: Error | None = None
    spends: Budget | None = None
    terminal: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "terminal", self.status in TERMINAL)

    @property
    def outcome(self) -> AttemptOutcome:
        """What became of the attempt, for its history."""
        return _BY_STATUS.get(self.status) or _BY_BUDGET[self.spends or "failures"]


_BY_STATUS = {
    TaskStatus.SUCCESS: AttemptOutcome.SUCCEEDED,
    TaskStatus.PENDING: AttemptOutcome.RELEASED,
    TaskStatus.REVOKED: AttemptOutcome.CANCELLED,
}
_BY_BUDGET: dict[Budget, AttemptOutcome] = {
    "failures": AttemptOutcome.FAILED,
    "crashes": AttemptOutcome.CRASHED,
    "losses": AttemptOutcome.LOST,
    "refusals": AttemptOutcome.REFUSED,
}


def decide(budgets: Budgets, outcome: Outcome) -> Transition:
    """What `outcome` means for a STARTED task that has spent `budgets`. Pure, but for the jitter of waits."""
    match outcome:
        case Succeeded(result):
            return Transition(status=TaskStatus.SUCCESS, result=result)
        case Failed(error):
            return Transition(status=TaskStatus.FAILURE, error=error, spends="failures")
        case RetryAsked(error, delay_seconds, max_retries):
            limit = budgets.max_retries if max_retries is None else min(max_retries, budgets.max_retries)
            spent = budgets.failures >= limit
            return _again_or_end(error, "failures", ends=spent, wait=delay_seconds)
        case TimedOut(limit_seconds):
            error = Error(type="TimeLimitExceeded", message=f"The task ran longer than {limit_seconds:g} s")
            return Transition(status=TaskStatus.FAILURE, error=error, spends="failures")
        case Interrupted():
            return Transition(status=TaskStatus.PENDING)
        case Cancelled():
            error = Error(type="Cancelled", message="The task was cancelled")
            return Transition(status=TaskStatus.REVOKED, error=error)
        case Crashed(out_of_memory):
            crashes = budgets.crashes + 1
            kind, fate = ("OutOfMemory", "was killed for want of memory") if out_of_memory else ("WorkerLost", "died")
            error = Error(type=kind, message=f"The process that ran the task {fate} ({crashes} times)")
            return _again_or_end(error, "crashes", ends=crashes >= CRASH_BUDGET, wait=2.0 ** (crashes - 1))
        case Misfit(error):
            ends = budgets.refusals + 1 >= REFUSAL_BUDGET
            return _again_or_end(error, "refusals", ends=ends, wait=backoff.refusal_wait(budgets.refusals))
        case Lost():
            losses = budgets.losses + 1
            error = Error(type="WorkerLost", message=f"The worker that ran the task was lost ({losses} times)")
            wait = backoff.lost_worker_wait(losses)
            return _again_or_end(error, "losses", ends=losses >= LOSS_BUDGET, wait=wait)


LONGEST_WAIT_SECONDS = 31_536_000.0
"""A year: what asks for more, or for infinity, waits that long."""


def _again_or_end(error: Error, spends: Budget, *, ends: bool, wait: float) -> Transition:
    if ends:
        return Transition(status=TaskStatus.FAILURE, error=error, spends=spends)
    return Transition(
        status=TaskStatus.RETRY, run_in_seconds=min(max(0.0, wait), LONGEST_WAIT_SECONDS), error=error, spends=spends
    )


__all__ = [
    "CRASH_BUDGET",
    "LOSS_BUDGET",
    "REFUSAL_BUDGET",
    "TERMINAL",
    "TRANSITIONS",
    "WAITING",
    "Budget",
    "Budgets",
    "Cancelled",
    "Claim",
    "Crashed",
    "Error",
    "Failed",
    "Interrupted",
    "Lost",
    "Misfit",
    "Outcome",
    "RetryAsked",
    "Succeeded",
    "TimedOut",
    "Transition",
    "decide",
]

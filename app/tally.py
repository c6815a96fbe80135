"""What happens to tasks, in the words of the metrics: pure decisions, and one call for each happening."""

from collections.abc import Iterable, Sequence

from app import lifecycle
from app.core import metrics
from app.core.statuses import TaskStatus

LATE_SECONDS = 10.0
"""How late a first message counts as one that a relay had to bring on its way: as long as the search for lost ones."""


def attempt_outcome(outcome: lifecycle.Outcome, status: TaskStatus) -> str:
    """The word for what became of an attempt, whose task then had this status."""
    if status is TaskStatus.REVOKED:
        return "revoked"
    match outcome:
        case lifecycle.Succeeded():
            return "succeeded"
        case lifecycle.RetryAsked():
            return "retried" if status is TaskStatus.RETRY else "failed"
        case lifecycle.Failed(error):
            return "timed_out" if error.type == "TimeLimitExceeded" else "failed"
        case lifecycle.TimedOut():
            return "timed_out"
        case lifecycle.Interrupted():
            return "released"
        case lifecycle.Crashed() | lifecycle.Lost():
            return "lost"
        case lifecycle.Misfit():
            return "refused"
        case lifecycle.Cancelled():
            return "revoked"


_BY_ERROR = {
    "TimeLimitExceeded": "timed_out",
    "WorkerLost": "lost",
    "OutOfMemory": "lost",
    "Cancelled": "cancelled",
    "Expired": "expired",
}
_BY_STATUS = {TaskStatus.SUCCESS: "succeeded", TaskStatus.FAILURE: "failed", TaskStatus.REVOKED: "cancelled"}


def task_outcome(ended: lifecycle.Ended) -> str:
    """The word for how a task ended."""
    error_type = ended.error.type if ended.error is not None else ""
    # What a task raises may be called anything: only what was revoked was cancelled.
    word = _BY_ERROR.get(error_type)
    if word in {"cancelled", "expired"} and ended.status is not TaskStatus.REVOKED:
        word = None
    return word or _BY_STATUS[ended.status]


def count_attempt(
    name: str, queue: str, outcome: lifecycle.Outcome, settled: lifecycle.Settled, *, run_seconds: float | None
) -> None:
    """Count an attempt that was settled just now by this process.

    Args:
        name: of its task.
        queue: where that waited.
        outcome: what happened.
        settled: what was written about it.
        run_seconds: how long its code ran, if that is known.
    """
    word = attempt_outcome(outcome, settled.status)
    metrics.attempt_ended(name, queue, word, _exception(outcome), run_seconds)


def _exception(outcome: lifecycle.Outcome) -> str | None:
    match outcome:
        case lifecycle.Failed(error) | lifecycle.Misfit(error) | lifecycle.RetryAsked(error):
            return error.type
        case lifecycle.TimedOut():
            return "TimeLimitExceeded"
        case lifecycle.Crashed(out_of_memory):
            return "OutOfMemory" if out_of_memory else "WorkerLost"
        case lifecycle.Lost():
            return "WorkerLost"
        case _:
            return None


def count_ends(ended: Iterable[lifecycle.Ended]) -> None:
    """Count tasks that were ended just now by this process."""
    for one in ended:
        metrics.task_finished(one.name, one.queue, task_outcome(one), one.seconds)


def count_published(bells: Sequence[lifecycle.Bell], *, due_seconds: Sequence[float] = (), lost: bool = False) -> None:
    """Count messages that Redis has taken with one command.

    Args:
        bells: the messages.
        due_seconds: since when they have been due, for those that don't say so themselves.
        lost: Redis had lost them.
    """
    delays = [*due_seconds, *(bell.due_seconds for bell in bells if bell.due_seconds is not None)]
    metrics.published(len(bells), "sent", delays)
    late = len(bells) if lost else sum(delay > LATE_SECONDS for delay in delays)
    if late:
        metrics.recovered("lost_message" if lost else "stuck_outbox", late)

"""How long to wait before the next try, as pure functions."""

import random
from collections.abc import Sequence

LOST_WORKER_CAP_SECONDS = 60.0
PICK_UP_SECONDS = 0.25
"""From when a task is due until a worker has it, as a rule."""
JITTER = 0.2
"""How far a wait is spread, as a part of it."""


def lost_worker_wait(losses: int) -> float:
    """Seconds before a task runs again whose worker was lost for the `losses`-th time.

    The first loss is nobody's pattern, so the task runs again at once; from the
    second on the wait doubles from one second up to a minute.
    """
    if losses <= 1:
        return 0.0
    return float(min(2.0 ** (losses - 2), LOST_WORKER_CAP_SECONDS))


def refusal_wait(refusals: int) -> float:
    """Seconds before a task is offered again that this worker could not run, after so many earlier refusals.

    From one second doubling to half a minute, so that a rolling deploy has time to finish.
    """
    return float(min(2.0**refusals, 30.0))


def full_jitter(cap_seconds: float) -> float:
    """Seconds to wait before a retry: anything up to the cap, less what it takes until a due task is picked up.

    Whole seconds, as Celery draws them, would bring the tasks of one failure back together.
    """
    return random.uniform(0.0, max(0.0, cap_seconds - PICK_UP_SECONDS))  # noqa: S311  # jitter is no secret


def reconnect_wait(failures: int, *, cap_seconds: float = 2.0) -> float:
    """Seconds before a connection is tried again, with full jitter so that a fleet does not march in step."""
    return random.uniform(0.0, min(cap_seconds, 0.1 * 2.0 ** min(failures, 10)))  # noqa: S311  # jitter is no secret


def spread(seconds: float, *, jitter: float = JITTER) -> float:
    """`seconds`, spread by ±`jitter`, so that what failed together does not come back together."""
    return seconds * random.uniform(1.0 - jitter, 1.0 + jitter)  # noqa: S311  # jitter is no secret


def scheduled_wait(schedule: Sequence[float], attempt: int) -> float | None:
    """Seconds from the failed `attempt` (1 is the first) to the next, or None when the schedule is spent.

    `schedule[0]` is the wait before the first attempt, so attempt `n` is followed
    by `schedule[n]`, spread by ±20 % (Standard Webhooks, "Deliverability and
    reliability").
    """
    if attempt >= len(schedule):
        return None
    return spread(schedule[attempt])

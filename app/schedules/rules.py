"""When a schedule is due, and what is fired of what has come due: pure functions of times, and no I/O."""

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import takewhile

from app.core.statuses import CatchUp, Overlap
from app.schedules.timing import Timing
from app.schedules.values import Definition, Due, Schedule

LATE_SECONDS = 60.0
"""What is less late than this was not missed: a relay was replaced, or Postgres failed over."""
CATCH_UP_LIMIT = 100
"""Times at most for which tasks are submitted at once: the newest."""
_FIRST_WINDOW = timedelta(hours=1)


def planned(wanted: Definition, now: datetime, *, over: Schedule | None) -> tuple[Definition, datetime | None]:
    """A schedule that is being written, and the next of its times. Raises as `Timing.following`.

    Whoever says the same again, as every deployment may, moves nothing: an interval goes on from its first
    time, and a time that has come and waits to be fired is fired. What came while it was paused is not.

    Args:
        wanted: what its owner says; the anchor of its timing counts for nothing.
        now: by Postgres's clock.
        over: what it replaces.
    """
    timing = replace(wanted.timing, anchor=_anchor(wanted.timing, now))
    if over is not None and _same_interval(over.definition.timing, timing):
        timing = replace(timing, anchor=over.definition.timing.anchor)
    definition = replace(wanted, timing=timing)
    if definition.paused:
        return definition, None
    if over is not None and not over.definition.paused and over.definition.timing == timing:
        return definition, over.next_run
    return definition, timing.following(now)


def _anchor(timing: Timing, now: datetime) -> datetime:
    if timing.start_at is not None:
        return timing.start_at
    return now + timedelta(seconds=timing.every_seconds or 0.0)


def _same_interval(one: Timing, other: Timing) -> bool:
    return (one.every_seconds, one.start_at) == (other.every_seconds, other.start_at)


def decide(timing: Timing, next_run: datetime, now: datetime, *, catch_up: CatchUp, overlap: Overlap) -> Due:
    """What to fire of the times from `next_run` until now. Raises as `Timing.following`.

    Args:
        timing: of the schedule.
        next_run: the first of its times for which nothing was decided yet; one of its times.
        now: by Postgres's clock.
        catch_up: what to do about those that are later than `LATE_SECONDS`.
        overlap: with `skip`, one task at most can come of it.
    """
    due = _newest(timing, next_run, now)
    late = now - timedelta(seconds=LATE_SECONDS + timing.jitter_seconds)
    fresh = [moment for moment in due if moment >= late]
    if catch_up is CatchUp.ALL:
        times = due
    elif catch_up is CatchUp.ONE:
        times = fresh or due[-1:]
    else:
        times = fresh
    missed = len(times) < len(due) or due[:1] > [next_run]
    if overlap is Overlap.SKIP:
        times = times[-1:]
    return Due(tuple(times), timing.following(max(now, next_run)), missed)


def _newest(timing: Timing, first: datetime, until: datetime) -> list[datetime]:
    """The newest `CATCH_UP_LIMIT` of the times from `first` to `until`, in order.

    Only the last stretch of what may be years is walked, and a longer one only if it holds too few.
    """
    window = _FIRST_WINDOW
    while True:
        begin = max(first, until - window)
        times = timing.times(first if begin == first else timing.following(begin))
        found = list(takewhile(lambda moment: moment <= until, times))
        if begin == first or len(found) >= CATCH_UP_LIMIT:
            return found[-CATCH_UP_LIMIT:]
        window *= 2

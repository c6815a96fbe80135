"""The times of a schedule, as a pure function: which of them comes next."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice

from app.core.cron import Cron, zone


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """The times of a schedule: those that `cron` names on the clocks of `time_zone`, or one each `every_seconds`.

    Attributes:
        anchor: the first time of an interval; all others are whole intervals away from it.
        start_at: no time is before it.
        end_at: no time is after it.
        jitter_seconds: each time is put off by up to so much, drawn anew.
    """

    cron: str | None
    time_zone: str
    every_seconds: float | None
    anchor: datetime
    start_at: datetime | None
    end_at: datetime | None
    jitter_seconds: float

    def following(self, after: datetime) -> datetime | None:
        """The first time after a moment; None if none is left.

        Raises:
            ValueError: if the expression is none, or the zone is not known here.
        """
        found = self._following(after)
        return None if found is None or (self.end_at is not None and found > self.end_at) else found

    def _following(self, after: datetime) -> datetime | None:
        if self.every_seconds is not None:
            every = timedelta(seconds=self.every_seconds)
            return self.anchor + max(0, (after - self.anchor) // every + 1) * every
        if self.start_at is not None:
            after = max(after, self.start_at - timedelta(microseconds=1))
        return Cron.parse(self.cron or "").following(after, zone(self.time_zone))

    def upcoming(self, first: datetime | None, count: int) -> list[datetime]:
        """`first`, which is one of the times, and those that follow, so many in all. Raises as `following`."""
        return list(islice(self.times(first), count))

    def times(self, first: datetime | None) -> Iterator[datetime]:
        """`first`, which is one of the times, and all that follow. Raises as `following`."""
        while first is not None:
            yield first
            first = self.following(first)

"""Cron expressions: which minutes of a wall clock they name, and when these are where clocks are set.

Five fields, as crontab(5) has them: minute, hour, day of the month, month, day
of the week. Each is `*` or a list of numbers, names and ranges, with steps. A
day matches if both fields of days match it, or either where neither begins with
`*`. `@hourly` and its like stand for the usual ones.

Where a clock is set, this follows Debian's cron. An expression whose minute or
hour begins with `*` goes by the clock as it runs: what a change leaves out does
not come, and what it repeats comes twice. All others name times of the day, and
a day has each of them once: one that is left out comes right after the change,
and one that is repeated comes the first time.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Self
from zoneinfo import ZoneInfo

TEXT_LIMIT = 256
"""Characters of an expression."""
YEARS_AHEAD = 41
"""How far the next time is looked for: a 29 February on a given day of the week may be 40 years away."""

_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)
_NICKNAMES: Mapping[str, str] = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_ITEM = re.compile(
    r"(?:\*|(?P<first>[0-9]{1,2}|[a-z]{3})(?:-(?P<last>[0-9]{1,2}|[a-z]{3}))?)(?:/(?P<step>[0-9]{1,3}))?"
)
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_WEEKDAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_SUNDAY = 7


@dataclass(frozen=True, slots=True)
class _Field:
    """One of the five: what it is called, its bounds, and its names, of which the first is `least`."""

    name: str
    least: int
    most: int
    names: Sequence[str] = ()

    def parse(self, text: str) -> frozenset[int]:
        """The numbers that a field names. Raises ValueError with a sentence for the one who wrote it."""
        return frozenset(number for item in text.split(",") for number in self._item(item))

    def _item(self, text: str) -> range:
        found = _ITEM.fullmatch(text)
        if found is None:
            raise ValueError(f"The {self.name} must be *, a number, a range or a list of them, with or without a step")
        first, last, step = found["first"], found["last"], int(found["step"] or 1)
        if step == 0:
            raise ValueError(f"The step of the {self.name} must be 1 or more")
        if first is None:
            return range(self.least, self.most + 1, step)
        begin = self._number(first)
        end = self._number(last) if last else self.most if found["step"] else begin
        if self.most == _SUNDAY and end == 0 < begin:
            end = _SUNDAY
        if end < begin:
            raise ValueError(f"The range of the {self.name} must not end before it begins")
        return range(begin, end + 1, step)

    def _number(self, text: str) -> int:
        if text in self.names:
            return self.least + self.names.index(text)
        if not text.isdecimal() or not self.least <= int(text) <= self.most:
            raise ValueError(f"The {self.name} must be within {self.least} and {self.most}")
        return int(text)


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, _SUNDAY, _WEEKDAYS),
)


@dataclass(frozen=True, slots=True)
class Cron:
    """An expression that was understood.

    Attributes:
        weekdays: 0 to 6, from Sunday on.
        either_day: whether one of the two fields of days is enough.
        running: whether it goes by the clock as it runs, rather than name times of the day.
    """

    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool
    running: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read an expression.

        Raises:
            ValueError: if it is none, or names no day that ever comes. The sentence repeats nothing of it.
        """
        given = text.strip().lower()
        fields = _NICKNAMES.get(given, given).split()
        if len(text) > TEXT_LIMIT or len(fields) != len(_FIELDS):
            raise ValueError(
                "Should be five fields (minute, hour, day of the month, month, day of the week),"
                " or @hourly, @daily, @weekly, @monthly or @yearly"
            )
        minutes, hours, days, months, weekdays = (
            field.parse(part) for field, part in zip(_FIELDS, fields, strict=True)
        )
        found = cls(
            minutes=tuple(sorted(minutes)),
            hours=tuple(sorted(hours)),
            days=days,
            months=months,
            weekdays=frozenset(number % _SUNDAY for number in weekdays),
            either_day=not fields[2].startswith("*") and not fields[4].startswith("*"),
            running=fields[0].startswith("*") or fields[1].startswith("*"),
        )
        if next(found._walls(datetime(2000, 1, 1)), None) is None:  # noqa: DTZ001  # a wall clock without a zone
            raise ValueError("Names no day that ever comes")
        return found

    def following(self, after: datetime, zone: ZoneInfo) -> datetime | None:
        """The first time after a moment, in UTC; None if there is none within `YEARS_AHEAD`.

        Args:
            after: with a time zone.
            zone: whose wall clock is meant.
        """
        local = after.astimezone(zone)
        wall = local.replace(tzinfo=None, fold=0)
        if self.running:
            # What will be repeated stands behind on the wall.
            wall -= max(timedelta(0), _offset(after, zone) - _offset(after + _DAY, zone))
        best: datetime | None = None
        for candidate in self._walls(wall.replace(second=0, microsecond=0)):
            moments, earliest = _moments(candidate, zone, running=self.running)
            for moment in moments:
                if moment > after and (best is None or moment < best):
                    best = moment
            if best is not None and moments and earliest >= best:
                return best
        return best

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """What the wall clock shows at each of the times, from `start` on, in order."""
        day, earliest = start.date(), start.time()
        last_year = min(day.year + YEARS_AHEAD, date.max.year - 1)
        while day.year <= last_year:
            if day.month not in self.months:
                day = (day.replace(day=28) + timedelta(days=4)).replace(day=1)
            else:
                if self._has(day):
                    yield from (datetime.combine(day, one) for one in self._times() if one >= earliest)
                day += _DAY
            earliest = time.min

    def _has(self, day: date) -> bool:
        by_month, by_week = day.day in self.days, day.isoweekday() % _SUNDAY in self.weekdays
        return by_month or by_week if self.either_day else by_month and by_week

    def _times(self) -> Iterator[time]:
        return (time(hour, minute) for hour in self.hours for minute in self.minutes)


def _offset(moment: datetime, zone: ZoneInfo) -> timedelta:
    return moment.astimezone(zone).utcoffset() or timedelta(0)


def _moments(wall: datetime, zone: ZoneInfo, *, running: bool) -> tuple[tuple[datetime, ...], datetime]:
    """When a wall clock shows this, in UTC, in order; and the earliest that it may be."""
    one, other = (wall.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if one == other:
        return (one,), one
    if one < other:
        return ((one, other) if running else (one,)), one
    # Left out: the first reading has the offset from before the change, and so lies behind it.
    return (() if running else (_change(other, one, zone),)), one


def _change(before: datetime, after: datetime, zone: ZoneInfo) -> datetime:
    """The moment, between these two, at which the clock is set."""
    old = _offset(before, zone)
    while after - before > timedelta(seconds=1):
        middle = before + (after - before) // 2
        before, after = (middle, after) if _offset(middle, zone) == old else (before, middle)
    return after.replace(microsecond=0)


def zone(name: str) -> ZoneInfo:
    """A time zone by its IANA name.

    Raises:
        ValueError: if it is not known here. The sentence does not repeat it.
    """
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # whatever a name that is no zone leads to: nowhere, a directory, too far
        raise ValueError("Should be the name of a time zone, such as Europe/Berlin") from None

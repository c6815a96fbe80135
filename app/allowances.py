"""How much of something each caller may have a minute: buckets that fill evenly, in memory.

Every API process counts for itself, so with replicas a caller may have as much of
each. That costs no round trip, and nobody is refused because Redis is away.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

WINDOW_SECONDS = 60
REMEMBERED = 30_000
"""Buckets that are remembered; the one unused for the longest is forgotten, and is full when it comes again."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of the wish to have some.

    Attributes:
        granted: whether they may.
        remaining: how many are left at once.
        full_at: monotonic time at which the bucket is full, if nobody takes any.
        seconds_to_full: from now until then.
        wait_seconds: until as many as were wanted are there; 0 if they were.
    """

    granted: bool
    remaining: int
    full_at: float
    seconds_to_full: float
    wait_seconds: float


def take(allowance: int, full_at: float, now: float, units: int = 1) -> Answer:
    """Take from a bucket that holds `allowance`, and fills in `WINDOW_SECONDS` (GCRA: one number is all its state).

    Args:
        allowance: a minute; more at once are never granted, so a wish for more is cut to it.
        full_at: of the answer before; anything that has passed for a full one.
        now: monotonic time.
        units: how many are wanted.
    """
    each = WINDOW_SECONDS / allowance
    begin = max(full_at, now)
    then = begin + min(units, allowance) * each
    # A billionth of a second, so that no rounding refuses the last one.
    wait = then - now - WINDOW_SECONDS
    granted = wait <= 1e-9  # noqa: PLR2004
    full_at = then if granted else begin
    filling = full_at - now
    remaining = math.floor((WINDOW_SECONDS - filling) / each + 1e-6)
    return Answer(granted, max(0, remaining), full_at, filling, 0.0 if granted else wait)


class Allowances:
    """Who has taken how much."""

    def __init__(self, *, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._full_at: OrderedDict[Hashable, float] = OrderedDict()

    def take(self, who: Hashable, allowance: int, units: int = 1) -> Answer:
        """As `take`, of the bucket of `who`."""
        answer = take(allowance, self._full_at.get(who, 0.0), time.monotonic(), units)
        self._full_at[who] = answer.full_at
        self._full_at.move_to_end(who)
        if len(self._full_at) > self._remembered:
            self._full_at.popitem(last=False)
        return answer

    def __len__(self) -> int:
        return len(self._full_at)

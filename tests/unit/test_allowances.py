import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.allowances import Allowances, take


def test_a_full_bucket_grants_its_allowance_at_once_and_no_more() -> None:
    full_at, granted = 0.0, 0
    for _ in range(100):
        answer = take(60, full_at, now=1000.0)
        full_at, granted = answer.full_at, granted + answer.granted
    assert granted == 60
    assert answer.remaining == 0
    assert answer.wait_seconds == pytest.approx(1.0)


def test_it_fills_evenly() -> None:
    empty = take(60, 0.0, now=1000.0, units=60)
    assert (empty.granted, empty.remaining) == (True, 0)
    assert not take(60, empty.full_at, now=1000.9).granted
    assert take(60, empty.full_at, now=1001.0).granted
    assert take(60, empty.full_at, now=1030.0).remaining == 29
    assert empty.seconds_to_full == pytest.approx(60.0)


def test_one_that_was_not_used_for_a_minute_is_full() -> None:
    empty = take(7, 0.0, now=1000.0, units=7)
    assert take(7, empty.full_at, now=1060.0).remaining == 6
    assert take(7, empty.full_at, now=5000.0).remaining == 6


def test_a_refusal_takes_nothing() -> None:
    spent = take(10, 0.0, now=1000.0, units=6)
    refused = take(10, spent.full_at, now=1000.0, units=5)
    assert (refused.granted, refused.remaining) == (False, 4)
    assert refused.wait_seconds == pytest.approx(6.0)
    assert take(10, refused.full_at, now=1000.0, units=4).granted


def test_more_than_ever_fits_waits_for_a_full_bucket_only() -> None:
    assert take(10, 0.0, now=1000.0, units=1000).granted
    refused = take(10, take(10, 0.0, now=1000.0).full_at, now=1000.0, units=1000)
    assert not refused.granted
    assert refused.wait_seconds == pytest.approx(6.0)


@given(
    allowance=st.integers(1, 100_000_000),
    units=st.lists(st.integers(1, 5000), min_size=1, max_size=50),
    steps=st.lists(st.floats(0, 30), min_size=50, max_size=50),
)
def test_nobody_gets_more_than_two_allowances_in_any_minute(
    allowance: int, units: list[int], steps: list[float]
) -> None:
    now, full_at, granted = 1000.0, 0.0, []
    for wanted, step in zip(units, steps, strict=False):
        now += step
        answer = take(allowance, full_at, now, wanted)
        full_at = answer.full_at
        assert 0 <= answer.remaining <= allowance
        assert answer.granted == (answer.wait_seconds == 0.0)
        if answer.granted:
            granted.append((now, min(wanted, allowance)))
    for begin, _ in granted:
        assert sum(some for at, some in granted if begin <= at < begin + 60) <= 2 * allowance + 1


def test_each_has_their_own_and_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    some = Allowances(remembered=3)
    assert [some.take("a", 2).granted for _ in range(3)] == [True, True, False]
    assert some.take("b", 2).granted
    for who in "cdef":
        some.take(who, 2)
    assert len(some) == 3
    assert some.take("a", 2).granted, "forgotten, so full"

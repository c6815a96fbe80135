"""What is fired of what has come due, as tables."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from app import schedules
from app.core.statuses import CatchUp, Overlap
from app.schedules import Definition, Schedule, Timing

T0 = datetime(2030, 1, 1, tzinfo=UTC)
EACH_SECOND = Timing(
    cron=None, time_zone="UTC", every_seconds=1.0, anchor=T0, start_at=None, end_at=None, jitter_seconds=0.0
)
DAILY = replace(EACH_SECOND, cron="0 3 * * *", time_zone="Europe/Berlin", every_seconds=None)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def seconds_of(times: tuple[datetime, ...]) -> list[float]:
    return [(moment - T0).total_seconds() for moment in times]


@pytest.mark.parametrize(
    ("catch_up", "next_run", "now", "fired", "then"),
    [
        # On time, whatever the policy.
        ("none", 5, 5.0, [5], 6),
        ("one", 5, 5.9, [5], 6),
        ("all", 5, 5.9, [5], 6),
        # Somewhat late is not missed.
        ("none", 5, 8.5, [5, 6, 7, 8], 9),
        ("one", 5, 8.5, [5, 6, 7, 8], 9),
        ("all", 5, 8.5, [5, 6, 7, 8], 9),
        # Later than a minute is.
        ("none", 0, 70.0, list(range(10, 71)), 71),
        ("one", 0, 70.0, list(range(10, 71)), 71),
        ("all", 0, 70.0, list(range(71)), 71),
        ("all", 0, 1000.0, list(range(901, 1001)), 1001),
        ("all", 0, 1e9, list(range(999_999_901, 1_000_000_001)), 1_000_000_001),
    ],
)
def test_what_an_interval_fires(catch_up: str, next_run: int, now: float, fired: list[int], then: int) -> None:
    due = schedules.decide(EACH_SECOND, at(next_run), at(now), catch_up=CatchUp(catch_up), overlap=Overlap.ALLOW)
    assert seconds_of(due.times) == fired
    assert due.next_run == at(then)
    assert due.missed == (len(fired) < then - next_run)


@pytest.mark.parametrize(
    ("catch_up", "days_late", "fired"),
    [
        ("none", 0, 1),
        ("none", 2, 0),
        ("one", 2, 1),
        ("all", 2, 3),
        ("all", 1000, 100),
    ],
)
def test_what_a_cron_schedule_fires(catch_up: str, days_late: int, fired: int) -> None:
    first = DAILY.following(T0)
    assert first is not None
    now = first + timedelta(days=days_late, seconds=90 if days_late else 0)
    due = schedules.decide(DAILY, first, now, catch_up=CatchUp(catch_up), overlap=Overlap.ALLOW)
    assert len(due.times) == fired
    assert due.times == tuple(sorted(set(due.times)))
    assert all(first <= moment <= now for moment in due.times)
    assert due.next_run == DAILY.following(now)


@pytest.mark.parametrize("catch_up", list(CatchUp))
def test_what_must_not_overlap_fires_the_newest_alone(catch_up: CatchUp) -> None:
    due = schedules.decide(EACH_SECOND, at(5), at(8.5), catch_up=catch_up, overlap=Overlap.SKIP)
    assert seconds_of(due.times) == [8]
    assert not due.missed


def test_a_time_that_is_put_off_is_not_late_for_that() -> None:
    put_off = replace(EACH_SECOND, every_seconds=3600.0, jitter_seconds=600.0)
    for late, fired in ((650.0, 1), (670.0, 0)):
        due = schedules.decide(put_off, at(0), at(late), catch_up=CatchUp.NONE, overlap=Overlap.ALLOW)
        assert len(due.times) == fired


def test_the_last_time_is_fired_and_none_follows() -> None:
    ending = replace(EACH_SECOND, end_at=at(7))
    due = schedules.decide(ending, at(6), at(30), catch_up=CatchUp.ALL, overlap=Overlap.ALLOW)
    assert (seconds_of(due.times), due.next_run) == ([6, 7], None)


def test_times_begin_at_the_start() -> None:
    later = T0 + timedelta(days=10, hours=2)  # 03:00 in Berlin
    assert replace(DAILY, start_at=later).following(T0) == later
    assert replace(DAILY, start_at=later + timedelta(seconds=1)).following(T0) == later + timedelta(days=1)
    assert replace(EACH_SECOND, anchor=later).following(T0) == later


def test_the_times_of_an_interval_do_not_drift() -> None:
    odd = replace(EACH_SECOND, every_seconds=1.1)
    last = list(zip(range(100_000), odd.times(odd.following(T0)), strict=False))[-1][1]
    assert last == T0 + 100_000 * timedelta(seconds=1.1)
    assert odd.following(last - timedelta(microseconds=1)) == last


def a_schedule(timing: Timing, next_run: datetime | None, *, paused: bool = False) -> Schedule:
    definition = Definition(
        timing=timing, catch_up=CatchUp.ONE, overlap=Overlap.ALLOW, paused=paused, task="long_task", submit="{}"
    )
    return Schedule(
        owner="", name="n", definition=definition, version=1, next_run=next_run, last_run=None, last_task_id=None,
        fired=0, skipped=0, last_error=None, failing_since=None, created_at=T0, updated_at=T0,
    )  # fmt: skip


MINUTELY = replace(EACH_SECOND, every_seconds=60.0)
NOW = at(150)


@pytest.mark.parametrize(
    ("over", "wanted", "next_run"),
    [
        (None, MINUTELY, at(210)),
        (None, replace(MINUTELY, start_at=at(140)), at(200)),
        (None, replace(MINUTELY, start_at=at(500)), at(500)),
        (None, replace(MINUTELY, start_at=at(0), end_at=at(160)), None),
        # The same again moves nothing, though a time has come and waits.
        (a_schedule(MINUTELY, at(180)), MINUTELY, at(180)),
        (a_schedule(MINUTELY, at(120)), MINUTELY, at(120)),
        (a_schedule(replace(MINUTELY, end_at=at(100)), None), replace(MINUTELY, end_at=at(100)), None),
        # Another end leaves the interval where it is, another interval begins anew.
        (a_schedule(MINUTELY, at(180)), replace(MINUTELY, end_at=at(170)), None),
        (a_schedule(MINUTELY, at(180)), replace(MINUTELY, end_at=at(990)), at(180)),
        (a_schedule(MINUTELY, at(180)), replace(MINUTELY, every_seconds=30.0), at(180)),
        (a_schedule(MINUTELY, at(180)), replace(MINUTELY, every_seconds=45.0), at(195)),
        # What came while it was paused is not fired.
        (a_schedule(MINUTELY, None, paused=True), MINUTELY, at(180)),
        (a_schedule(DAILY, None, paused=True), DAILY, T0 + timedelta(hours=2)),
    ],
)
def test_what_is_written_moves_the_next_time_only_if_it_must(
    over: Schedule | None, wanted: Timing, next_run: datetime | None
) -> None:
    definition = replace(a_schedule(wanted, None).definition, timing=replace(wanted, anchor=at(-999)))
    assert schedules.planned(definition, NOW, over=over)[1] == next_run


def test_a_paused_schedule_has_no_next_time_and_keeps_its_interval() -> None:
    over = a_schedule(MINUTELY, at(180))
    planned, next_run = schedules.planned(replace(over.definition, paused=True), NOW, over=over)
    assert next_run is None
    assert planned.timing.anchor == T0

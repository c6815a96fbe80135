"""Cron expressions as tables: what they name, where clocks are set, and what is refused."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.core.cron import Cron, zone


def following(text: str, after: str, zone_name: str = "UTC", count: int = 1) -> list[str]:
    """The next times as the zone's clocks show them. `after` has an offset, or is in UTC."""
    clock = ZoneInfo(zone_name)
    moment = datetime.fromisoformat(after)
    moment = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    shown = []
    for _ in range(count):
        found = Cron.parse(text).following(moment, clock)
        assert found is not None
        shown.append(found.astimezone(clock).isoformat(timespec="minutes"))
        moment = found
    return shown


@pytest.mark.parametrize(
    ("text", "after", "times"),
    [
        ("* * * * *", "2030-01-01T00:00", ["2030-01-01T00:01", "2030-01-01T00:02"]),
        ("* * * * *", "2030-01-01T00:00:30", ["2030-01-01T00:01"]),
        ("*/20 * * * *", "2030-01-01T00:59:59", ["2030-01-01T01:00", "2030-01-01T01:20", "2030-01-01T01:40"]),
        ("5/25 9-10 * * *", "2030-01-01T00:00", ["2030-01-01T09:05", "2030-01-01T09:30", "2030-01-01T09:55"]),
        ("10-30/10 4 * * *", "2030-01-01T00:00", ["2030-01-01T04:10", "2030-01-01T04:20", "2030-01-01T04:30"]),
        ("0 9 * * MON-FRI", "2030-01-04T09:00", ["2030-01-07T09:00", "2030-01-08T09:00"]),
        ("0 9 * * fri-sun", "2030-01-04T09:00", ["2030-01-05T09:00", "2030-01-06T09:00", "2030-01-11T09:00"]),
        ("0 0 * * 7", "2030-01-01T00:00", ["2030-01-06T00:00"]),
        ("0 0 * * 5-7", "2030-01-04T00:00", ["2030-01-05T00:00", "2030-01-06T00:00", "2030-01-11T00:00"]),
        ("0 0 1 jan,JUL *", "2030-01-01T00:00", ["2030-07-01T00:00", "2031-01-01T00:00"]),
        ("0 0 31 * *", "2030-01-31T00:00", ["2030-03-31T00:00", "2030-05-31T00:00"]),
        ("0 0 29 2 *", "2030-01-01T00:00", ["2032-02-29T00:00", "2036-02-29T00:00"]),
        # Either field of days will do; both, where one begins with a star.
        ("0 0 13 * fri", "2030-09-01T00:00", ["2030-09-06T00:00", "2030-09-13T00:00", "2030-09-20T00:00"]),
        ("0 0 */10 * fri", "2030-09-01T00:00", ["2030-10-11T00:00"]),
        ("0 0 29 2 */7", "2076-01-01T00:00", ["2088-02-29T00:00"]),
        ("@hourly", "2030-01-01T00:00", ["2030-01-01T01:00"]),
        ("@daily", "2030-01-01T00:00", ["2030-01-02T00:00"]),
        ("@midnight", "2030-01-01T00:00", ["2030-01-02T00:00"]),
        ("@weekly", "2030-01-01T00:00", ["2030-01-06T00:00"]),
        ("@monthly", "2030-01-01T00:00", ["2030-02-01T00:00"]),
        ("@Yearly", "2030-01-01T00:00", ["2031-01-01T00:00"]),
        ("@annually", "2030-01-01T00:00", ["2031-01-01T00:00"]),
    ],
)
def test_an_expression_names_these_times(text: str, after: str, times: list[str]) -> None:
    assert following(text, after, count=len(times)) == [f"{one}+00:00" for one in times]


BERLIN, NEW_YORK, LORD_HOWE, CASABLANCA = (
    "Europe/Berlin",
    "America/New_York",
    "Australia/Lord_Howe",
    "Africa/Casablanca",
)


@pytest.mark.parametrize(
    ("text", "zone_name", "after", "times"),
    [
        # Forward, 02:00 to 03:00: what names a time of the day comes right after, once, and the next day as ever.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]),
        ("0,15,30 2 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"]),
        ("0 3 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T03:00+02:00"]),
        ("0 2,3 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-29T03:00+02:00", "2026-03-30T02:00+02:00"]),
        ("59 1 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-29T01:59+01:00", "2026-03-30T01:59+02:00"]),
        ("30 2 * * *", NEW_YORK, "2026-03-07T12:00", ["2026-03-08T03:00-04:00", "2026-03-09T02:30-04:00"]),
        # What goes by the clock as it runs has no such hour.
        ("30 * * * *", BERLIN, "2026-03-29T00:00", ["2026-03-29T01:30+01:00", "2026-03-29T03:30+02:00"]),
        ("*/30 2 * * *", BERLIN, "2026-03-28T12:00", ["2026-03-30T02:00+02:00"]),
        ("0 */2 * * *", BERLIN, "2026-03-28T23:30", ["2026-03-29T04:00+02:00"]),
        # Back, 03:00 to 02:00: a time of the day comes the first time only.
        ("30 2 * * *", BERLIN, "2026-10-24T12:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]),
        ("30 2 * * *", BERLIN, "2026-10-25T00:45", ["2026-10-26T02:30+01:00"]),
        ("30 2 * * *", BERLIN, "2026-10-25T01:15", ["2026-10-26T02:30+01:00"]),
        ("0 3 * * *", BERLIN, "2026-10-24T12:00", ["2026-10-25T03:00+01:00"]),
        ("15 1 * * *", NEW_YORK, "2026-10-31T12:00", ["2026-11-01T01:15-04:00", "2026-11-02T01:15-05:00"]),
        # And what goes by the clock as it runs comes twice.
        (
            "30 * * * *",
            BERLIN,
            "2026-10-24T23:45",
            ["2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00", "2026-10-25T03:30+01:00"],
        ),
        ("5 * * * *", BERLIN, "2026-10-25T00:50", ["2026-10-25T02:05+01:00"]),
        (
            "*/30 2 * * *",
            BERLIN,
            "2026-10-24T12:00",
            ["2026-10-25T02:00+02:00", "2026-10-25T02:30+02:00", "2026-10-25T02:00+01:00", "2026-10-25T02:30+01:00"],
        ),
        # By half an hour, 02:00 to 02:30 and back to 01:30.
        ("15 2 * * *", LORD_HOWE, "2026-10-03T12:00", ["2026-10-04T02:30+11:00", "2026-10-05T02:15+11:00"]),
        ("*/15 * * * *", LORD_HOWE, "2026-10-03T15:20", ["2026-10-04T02:30+11:00", "2026-10-04T02:45+11:00"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-04T12:00", ["2026-04-05T01:45+11:00", "2026-04-06T01:45+10:30"]),
        (
            "45 * * * *",
            LORD_HOWE,
            "2026-04-04T14:00",
            ["2026-04-05T01:45+11:00", "2026-04-05T01:45+10:30", "2026-04-05T02:45+10:30"],
        ),
        # Zones half and three quarters of an hour off, without changes.
        ("0 9 * * *", "Asia/Kolkata", "2026-01-01T00:00", ["2026-01-01T09:00+05:30", "2026-01-02T09:00+05:30"]),
        ("30 * * * *", "Asia/Kathmandu", "2026-01-01T00:00", ["2026-01-01T06:30+05:45", "2026-01-01T07:30+05:45"]),
        # Midnight itself is left out.
        ("0 0 * * *", "Asia/Beirut", "2026-03-28T12:00", ["2026-03-29T01:00+03:00", "2026-03-30T00:00+03:00"]),
        # Where winter is the exception: clocks go back for Ramadan.
        ("30 2 * * *", CASABLANCA, "2026-02-14T12:00", ["2026-02-15T02:30+01:00"]),
        # A whole day is left out.
        ("0 12 30 12 *", "Pacific/Apia", "2011-12-29T00:00", ["2011-12-31T00:00+14:00"]),
    ],
)
def test_where_clocks_are_set(text: str, zone_name: str, after: str, times: list[str]) -> None:
    assert following(text, after, zone_name, count=len(times)) == times


ZONES = (BERLIN, NEW_YORK, LORD_HOWE, CASABLANCA, "Asia/Kolkata", "America/St_Johns", "America/Santiago", "UTC")


@settings(max_examples=60)
@given(
    text=st.sampled_from(("*/7 * * * *", "30 * * * *", "15 */2 * * *", "*/20 1-3 * * *", "*/5 2 * * *")),
    zone_name=st.sampled_from(ZONES),
    minutes=st.integers(0, 1_500_000),
)
def test_what_goes_by_the_clock_as_it_runs_is_every_minute_that_shows_it(
    text: str, zone_name: str, minutes: int
) -> None:
    cron, clock = Cron.parse(text), ZoneInfo(zone_name)
    after = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    found = cron.following(after, clock)
    assert found is not None

    def shows(moment: datetime) -> bool:
        local = moment.astimezone(clock)
        return local.minute in cron.minutes and local.hour in cron.hours

    walked = after + timedelta(minutes=1)
    while not shows(walked):
        walked += timedelta(minutes=1)
    assert found == walked


@settings(max_examples=30)
@given(zone_name=st.sampled_from(ZONES), hour=st.integers(0, 23), minute=st.integers(0, 59))
def test_a_time_of_the_day_comes_once_a_day(zone_name: str, hour: int, minute: int) -> None:
    cron, clock = Cron.parse(f"{minute} {hour} * * *"), ZoneInfo(zone_name)
    moment: datetime | None = datetime(2026, 1, 1, 12, tzinfo=UTC)
    days = []
    for _ in range(366):
        assert moment is not None
        moment = cron.following(moment, clock)
        assert moment is not None
        days.append(moment.astimezone(clock).date())
    assert [later - earlier for earlier, later in pairwise(days)] == [timedelta(days=1)] * 365


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "five fields"),
        ("* * * *", "five fields"),
        ("* * * * * *", "five fields"),
        ("@reboot", "five fields"),
        ("@fortnightly", "five fields"),
        ("* " * 200, "five fields"),
        ("60 * * * *", "minute"),
        ("-1 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("*/ * * * *", "minute"),
        ("1,,2 * * * *", "minute"),
        ("1/2/3 * * * *", "minute"),
        ("1-2-3 * * * *", "minute"),
        ("30-10 * * * *", "minute"),
        ("1.5 * * * *", "minute"),
        ("٣ * * * *", "minute"),
        ("1" * 200 + " * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* mon * * *", "hour"),
        ("* * 0 * *", "day of the month"),
        ("* * 32 * *", "day of the month"),
        ("* * L * *", "day of the month"),
        ("* * ? * *", "day of the month"),
        ("* * * 13 *", "month"),
        ("* * * 0 *", "month"),
        ("* * * sun *", "month"),
        ("* * * * 8", "day of the week"),
        ("* * * * jan", "day of the week"),
        ("* * * * mon#2", "day of the week"),
        ("* * * * fri-mon", "day of the week"),
        ("0 0 30 2 *", "no day"),
        ("0 0 31 4,6,9,11 *", "no day"),
    ],
)
def test_what_is_no_expression_is_refused_with_a_sentence_that_says_where(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as refused:
        Cron.parse(text)
    assert not text or text not in str(refused.value)


@pytest.mark.parametrize(
    "name", ["Europe/Bonn", "", ".", "..", "../UTC", "/etc/passwd", "Europe", "a" * 300, "\x00", "Ü"]
)
def test_what_is_no_zone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name of a time zone") as refused:
        zone(name)
    assert len(name) < 3 or name not in str(refused.value).replace("Europe/Berlin", "")

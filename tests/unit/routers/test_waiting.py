"""How long a request wants to wait, as a table."""

import pytest

from app.routers.waiting import patience


@pytest.mark.parametrize(
    ("wait", "prefer", "seconds", "applied"),
    [
        (None, None, 0.0, None),
        (0.0, None, 0.0, None),
        (2.5, None, 2.5, None),
        (2.5, "wait=20", 2.5, None),
        (None, "wait=20", 20.0, "wait=20"),
        (None, "Wait = 20", 20.0, "wait=20"),
        (None, 'respond-async, wait="7";foo=1', 7.0, "wait=7"),
        (None, "wait=7, wait=9", 7.0, "wait=7"),
        (None, "wait=100", 25.0, "wait=25"),
        (None, "wait=999999999", 25.0, "wait=25"),
        (None, "wait=0", 0.0, "wait=0"),
        (None, "wait", 0.0, None),
        (None, "wait=-5", 0.0, None),
        (None, "wait=1e3", 0.0, None),
        (None, "wait=٣", 0.0, None),
        (None, "wait=" + "9" * 100, 0.0, None),
        (None, "waiting=5", 0.0, None),
        (None, "return=minimal", 0.0, None),
        (None, ",,;=", 0.0, None),
    ],
)
def test_how_long_a_request_waits(wait: float | None, prefer: str | None, seconds: float, applied: str | None) -> None:
    found, headers = patience(wait, prefer)
    assert (found, headers.get("Preference-Applied")) == (seconds, applied)

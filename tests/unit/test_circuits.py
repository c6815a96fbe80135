"""The circuit breaker as a table: what is known, what happens, what may be sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import circuits
from app.circuits import CAP, CLOSED, HOPELESS_SECONDS, OPEN_SECONDS, THRESHOLD, Circuit, Circuits, after, room
from app.delivery import Receiver
from app.utils.webhook import Outcome

A = Receiver("", "https://a.example")
OPEN = Circuit(failures=THRESHOLD, open_until=100.0, open_seconds=OPEN_SECONDS, changed_at=95.0, open_since=95.0)


@pytest.mark.parametrize(
    ("known", "outcome", "now", "then"),
    [
        (CLOSED, "success", 1.0, CLOSED),
        (CLOSED, "timeout", 1.0, Circuit(failures=1, changed_at=1.0)),
        (CLOSED, "dns_unanswered", 1.0, Circuit(failures=1, changed_at=1.0)),
        (Circuit(failures=9, changed_at=1.0), "success", 2.0, CLOSED),
        (Circuit(failures=9, changed_at=1.0), "http_4xx", 2.0, CLOSED),
        (Circuit(failures=9, changed_at=1.0), "http_3xx", 2.0, CLOSED),
        (Circuit(failures=9, changed_at=1.0), "blocked", 2.0, Circuit(failures=9, changed_at=1.0)),
        (Circuit(failures=9, changed_at=1.0), "local_fault", 2.0, Circuit(failures=9, changed_at=1.0)),
        (Circuit(failures=9, changed_at=1.0), "http_5xx", 2.0, Circuit(10, 2.0 + OPEN_SECONDS, OPEN_SECONDS, 2.0, 2.0)),
        # What was under way when it opened changes nothing, unless it is an answer.
        (OPEN, "timeout", 99.0, Circuit(11, 100.0, OPEN_SECONDS, 99.0, 95.0)),
        (OPEN, "success", 99.0, CLOSED),
        # The probe.
        (OPEN, "success", 101.0, CLOSED),
        (OPEN, "connect_error", 101.0, Circuit(11, 101.0 + 2 * OPEN_SECONDS, 2 * OPEN_SECONDS, 101.0, 95.0)),
        (Circuit(19, 0.0, 100.0, 0.0), "http_429", 1.0, Circuit(20, 121.0, 120.0, 1.0)),
        (Circuit(19, 0.0, 120.0, 0.0), "dns_error", 1.0, Circuit(20, 121.0, 120.0, 1.0)),
    ],
)
def test_what_is_known_after_a_request(*, known: Circuit, outcome: str, now: float, then: Circuit) -> None:
    assert after(known, Outcome(outcome), now) == then


@pytest.mark.parametrize(
    ("known", "on_their_way", "now", "left"),
    [
        (CLOSED, 0, 1.0, CAP),
        (CLOSED, 3, 1.0, CAP - 3),
        (CLOSED, CAP, 1.0, 0),
        (CLOSED, CAP + 5, 1.0, 0),
        (Circuit(failures=9), 0, 1.0, CAP),
        (OPEN, 0, 99.9, 0),
        (OPEN, 0, 100.0, 1),
        (OPEN, 1, 100.0, 0),
        (OPEN, 3, 200.0, 0),
    ],
)
def test_how_much_may_be_sent(*, known: Circuit, on_their_way: int, now: float, left: int) -> None:
    assert room(known, on_their_way, now) == left


def test_only_receivers_that_may_not_have_everything_are_named() -> None:
    known = Circuits()
    for number in range(THRESHOLD):
        assert known.rooms(0.0) == ({A: CAP - number} if number else {})
        known.began(A)
    for _ in range(THRESHOLD):
        known.ended(A, Outcome.TIMEOUT, 0.0)
    assert (known.rooms(1.0), known.opened()) == ({A: 0}, 1)
    assert known.rooms(OPEN_SECONDS) == {A: 1}
    known.began(A)
    assert known.rooms(OPEN_SECONDS) == {A: 0}
    known.ended(A, Outcome.SUCCESS, OPEN_SECONDS + 1)
    assert (known.rooms(OPEN_SECONDS + 1), known.opened()) == ({}, 0)


def test_a_request_that_is_given_up_is_no_failure_and_not_on_its_way() -> None:
    known = Circuits()
    known.began(A)
    known.ended(A, None, 0.0)
    assert known.rooms(0.0) == {}


def test_an_origin_that_is_not_heard_of_any_more_is_forgotten() -> None:
    known = Circuits()
    for _ in range(THRESHOLD):
        known.began(A)
        known.ended(A, Outcome.TIMEOUT, 0.0)
    assert known.rooms(circuits.FORGET_SECONDS + 1) == {}


def test_a_receiver_is_hopeless_once_its_probes_have_failed_for_long() -> None:
    known, now = Circuits(), 0.0
    for _ in range(THRESHOLD):
        known.began(A)
        known.ended(A, Outcome.TIMEOUT, now)
    while now < HOPELESS_SECONDS:
        assert known.hopeless(now) == []
        now += circuits.LONGEST_OPEN_SECONDS
        known.began(A)
        known.ended(A, Outcome.TIMEOUT, now)
    assert (known.hopeless(now), known.opened()) == ([A], 1)
    known.began(A)
    known.ended(A, Outcome.HTTP_4XX, now)
    assert (known.hopeless(now), known.opened()) == ([], 0)


def test_what_opens_and_closes_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    known = Circuits()
    for outcome in [Outcome.HTTP_5XX] * (THRESHOLD + 3) + [Outcome.SUCCESS] * 2:
        known.began(A)
        known.ended(A, outcome, 0.0)
    assert [record.getMessage() for record in caplog.records] == [
        "https://a.example fails: after 10 failures in a row it gets probes only",
        "https://a.example answers again, and gets its webhooks",
    ]


def test_an_owner_is_passed_over_once_it_holds_as_much_as_is_free_and_nobody_never_is() -> None:
    known = Circuits()
    for number in range(4):
        known.began(Receiver("ann", f"https://{number}.example"))
        known.began(Receiver("", f"https://{number}.example"))
    known.began(Receiver("bob", "https://b.example"))
    assert [set(known.passed_over(0.0, free=free)) for free in (5, 4, 2, 1)] == [
        set(),
        {"ann"},
        {"ann"},
        {"ann", "bob"},
    ]
    known.ended(Receiver("ann", "https://0.example"), Outcome.TIMEOUT, 0.0)
    assert set(known.passed_over(0.0, free=4)) == set()


def test_an_owner_that_nobody_can_sign_for_is_passed_over_for_a_minute() -> None:
    known = Circuits()
    known.could_not_sign("ann", 100.0)
    seconds = circuits.UNREADABLE_SECONDS
    assert set(known.passed_over(99.9 + seconds, free=500)) == {"ann"}
    assert set(known.passed_over(100.0 + seconds, free=500)) == set()


@given(st.lists(st.tuples(st.sampled_from(list(Outcome)), st.floats(0, 1000))))
def test_whatever_happens_a_circuit_lets_a_probe_through_within_its_longest_time(
    happened: list[tuple[Outcome, float]],
) -> None:
    known, now = CLOSED, 0.0
    for outcome, pause in happened:
        now += pause
        known = after(known, outcome, now)
    assert room(known, 0, now + circuits.LONGEST_OPEN_SECONDS) >= 1

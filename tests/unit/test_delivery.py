import json
from datetime import datetime, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app import delivery
from app.core import config
from app.core.statuses import DeliveryStatus
from app.utils.webhook import Outcome, Receipt

SCHEDULE = config.STANDARD_WEBHOOKS_SCHEDULE
QUICK = (0.0, 1.0, 2.0)
FACTS = (
    '{"type": "task.succeeded", "timestamp": "2026-01-31T12:00:05.999Z", "data": {"task_id": "t", "task": "long_task",'
    ' "status": "SUCCESS", "attempt": 2, "sequence": 1, "created_at": "2026-01-31T12:00:00.123Z",'
    ' "finished_at": "2026-01-31T12:00:05.999Z"}}'
)


def receipt(outcome: str, status_code: int | None = None, retry_after_seconds: float | None = None) -> Receipt:
    return Receipt(outcome=Outcome(outcome), status_code=status_code, retry_after_seconds=retry_after_seconds)


def claimed(**changes: Any) -> delivery.Claimed:
    values: dict[str, Any] = {
        "id": UUID(int=1),
        "task_id": UUID(int=2),
        "url": "https://example.com/",
        "owner": "",
        "receiver": delivery.Receiver("", "https://example.com"),
        "event": "task.succeeded",
        "sequence": 1,
        "attempt": 1,
        "scheduled_attempt": 1,
        "age_seconds": 0.0,
        "token": UUID(int=3),
        "claimed_at": datetime(2026, 1, 31, 12, 0, 9, tzinfo=timezone.utc),  # noqa: UP017
        "traceparent": None,
        "facts": FACTS,
        "outcome": '"result": "done"',
    }
    return delivery.Claimed(**values | changes)


@pytest.mark.parametrize(
    ("attempt", "of", "schedule", "status", "least", "most"),
    [
        (1, receipt("success", 200), SCHEDULE, "delivered", 0, 0),
        (99, receipt("success", 204), SCHEDULE, "delivered", 0, 0),
        (1, receipt("http_5xx", 500), SCHEDULE, "pending", 4, 6),
        (2, receipt("http_5xx", 503), SCHEDULE, "pending", 240, 360),
        (9, receipt("http_4xx", 404), SCHEDULE, "pending", 69120, 103680),
        (10, receipt("http_5xx", 500), SCHEDULE, "exhausted", 0, 0),
        (11, receipt("connect_error"), SCHEDULE, "exhausted", 0, 0),
        (1, receipt("http_3xx", 302), QUICK, "pending", 0.8, 1.2),
        (1, receipt("http_4xx", 400), QUICK, "pending", 0.8, 1.2),
        (1, receipt("connect_error"), QUICK, "pending", 0.8, 1.2),
        (1, receipt("tls_error"), QUICK, "pending", 0.8, 1.2),
        (1, receipt("dns_error"), QUICK, "pending", 0.8, 1.2),
        (1, receipt("http_4xx", 410), SCHEDULE, "exhausted", 0, 0),
        (1, receipt("http_4xx", 410, 5.0), SCHEDULE, "exhausted", 0, 0),
        (1, receipt("blocked"), SCHEDULE, "exhausted", 0, 0),
        (1, receipt("invalid_url"), SCHEDULE, "exhausted", 0, 0),
        # Retry-After is a floor, at most a day, and buys no attempt.
        (1, receipt("http_5xx", 503, 90.0), QUICK, "pending", 90, 90),
        (2, receipt("http_5xx", 503, 90.0), SCHEDULE, "pending", 240, 360),
        (1, receipt("http_5xx", 503, 1e9), QUICK, "pending", 86400, 86400),
        (3, receipt("http_5xx", 503, 90.0), QUICK, "exhausted", 0, 0),
        # A throttled or a slow receiver rests for a minute, unless the wait is longer anyway.
        (1, receipt("http_429", 429), QUICK, "pending", 60, 60),
        (1, receipt("timeout"), QUICK, "pending", 60, 60),
        (1, receipt("http_429", 429, 5.0), QUICK, "pending", 60, 60),
        (1, receipt("http_429", 429, 300.0), QUICK, "pending", 300, 300),
        (2, receipt("http_429", 429), SCHEDULE, "pending", 240, 360),
        (3, receipt("timeout"), QUICK, "exhausted", 0, 0),
        (1, receipt("http_5xx", 500), (0.0,), "exhausted", 0, 0),
    ],
)
def test_an_attempt_is_judged_by_its_receipt(
    *, attempt: int, of: Receipt, schedule: tuple[float, ...], status: str, least: float, most: float
) -> None:
    verdict = delivery.decide(attempt, of, schedule)
    assert verdict.status == status
    assert least <= verdict.wait_seconds <= most


@pytest.mark.parametrize("outcome", ["local_fault", "dns_unanswered"])
@pytest.mark.parametrize("attempt", [1, 2, 10, 99])
def test_a_fault_that_may_be_our_own_network_s_spends_no_attempt(attempt: int, outcome: str) -> None:
    verdict = delivery.decide(attempt, receipt(outcome), SCHEDULE, age_seconds=sum(SCHEDULE) - 1)
    assert (verdict.status, verdict.spends) == ("pending", False)
    assert 48 <= verdict.wait_seconds <= 72


@pytest.mark.parametrize("outcome", ["local_fault", "dns_unanswered"])
@pytest.mark.parametrize(("attempt", "status"), [(1, "pending"), (9, "pending"), (10, "exhausted")])
def test_a_fault_that_never_ends_is_not_tried_for_ever(attempt: int, status: str, outcome: str) -> None:
    verdict = delivery.decide(attempt, receipt(outcome), SCHEDULE, age_seconds=sum(SCHEDULE))
    assert (verdict.status, verdict.spends) == (status, True)


@pytest.mark.parametrize(
    ("schedule", "days"),
    [
        (SCHEDULE, 1 + 1.2 * 272_105 / 86_400),
        ((0.0,), 1.0),
        ((0.0, 864_000.0), 13.0),
    ],
)
def test_patience_outlasts_every_schedule_by_a_day(*, schedule: tuple[float, ...], days: float) -> None:
    assert delivery.patience_seconds(schedule) / 86_400 == pytest.approx(days)


@pytest.mark.parametrize(
    ("attempt", "scheduled_attempt", "days", "spent"),
    [
        (10, 10, 99.0, False),
        (11, 11, 1.0, False),
        (11, 11, 99.0, True),
        (delivery.ATTEMPTS_AT_MOST + 10, 10, 99.0, False),
        (delivery.ATTEMPTS_AT_MOST + 11, 1, 0.0, True),
    ],
)
def test_only_what_was_lost_again_and_again_is_ended_unsent(
    *, attempt: int, scheduled_attempt: int, days: float, spent: bool
) -> None:
    assert delivery.is_spent(attempt, scheduled_attempt, SCHEDULE, age_seconds=days * 86_400) is spent


@settings(deadline=None)
@given(
    st.integers(1, 200),
    # A secret that can't be read is waited for, however long.
    st.sampled_from([one for one in Outcome if one is not Outcome.SECRET_UNREADABLE]),
    st.one_of(st.none(), st.integers(100, 999)),
    st.one_of(st.none(), st.floats(0, 1e9)),
    st.lists(st.floats(0, 31_536_000), min_size=1, max_size=100),
)
def test_every_delivery_ends_and_no_wait_is_absurd(
    attempt: int, outcome: Outcome, status: int | None, asked: float | None, schedule: list[float]
) -> None:
    verdict = delivery.decide(attempt, receipt(outcome, status, asked), schedule, age_seconds=1e12)
    assert verdict.spends
    assert (verdict.status is DeliveryStatus.DELIVERED) == (outcome is Outcome.SUCCESS)
    if attempt >= len(schedule):
        assert verdict.status is not DeliveryStatus.PENDING
    assert 0 <= verdict.wait_seconds <= max(86400, 1.2 * max(schedule))


def test_a_full_body_has_what_came_of_it_and_a_thin_one_has_not() -> None:
    full, thin = (json.loads(delivery.body(claimed(), payload)) for payload in ("full", "thin"))
    assert list(thin["data"]) == ["task_id", "task", "status", "attempt", "sequence", "created_at", "finished_at"]
    assert full["data"].pop("result") == "done"
    assert full == thin


def test_what_has_only_begun_has_no_outcome() -> None:
    assert delivery.body(claimed(outcome=None), "full").decode() == FACTS


def test_no_name_of_a_task_is_taken_for_the_place_of_the_result() -> None:
    facts = FACTS.replace("long_task", json.dumps('x", "created_at": ')[1:-1])
    assert json.loads(delivery.body(claimed(facts=facts), "full"))["data"]["result"] == "done"


@pytest.mark.parametrize(
    "stored",
    [
        "123456789012345678901234567890",
        "1.10",
        "1e400",
        "0.1000000000000000055511151231257827",
        '"\\u0000\\ud800"',
        '"ü"',
        '{"a": 1, "a": 2}',
        "null",
        "[ ]",
        '{"data":\n{"result": "}"}}',
    ],
)
def test_a_result_is_sent_as_the_very_text_that_is_stored(stored: str) -> None:
    assert f'"result": {stored}, "created_at"'.encode() in delivery.body(claimed(outcome=f'"result": {stored}'), "full")


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_result_arrives_as_it_was(result: Any) -> None:
    sent = delivery.body(claimed(outcome=f'"result": {json.dumps(result)}'), "full")
    assert json.loads(sent)["data"]["result"] == result


def test_the_bytes_are_the_same_on_every_attempt() -> None:
    later = {"attempt": 7, "token": UUID(int=9), "claimed_at": datetime(2026, 2, 3, tzinfo=timezone.utc)}  # noqa: UP017
    assert delivery.body(claimed(), "full") == delivery.body(claimed(**later), "full")

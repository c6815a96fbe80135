"""Test events: what they say, and what is said of them."""

import json
from datetime import UTC, datetime
from uuid import UUID

import pytest

from app import delivery, trials
from app.core.statuses import WebhookEvent
from app.utils.webhook import Outcome

MOMENT = datetime(2030, 1, 31, 12, tzinfo=UTC)
SHOWN = "2030-01-31T12:00:00.000Z"


def trial(event: str) -> delivery.Trial:
    return delivery.Trial(
        id=UUID(int=7),
        owner="",
        url="https://example.com/hook",
        event=event,
        traceparent=None,
        created_at=MOMENT,
        claimed_at=MOMENT,
        token=UUID(int=8),
    )


def test_a_test_event_has_the_form_of_every_event_and_speaks_of_no_task() -> None:
    body = json.loads(delivery.trial_body(trial(delivery.TEST), "full"))
    assert (body["type"], body["timestamp"], body["data"]["test"]) == ("webhook.test", SHOWN, True)
    assert "task_id" not in body["data"]


@pytest.mark.parametrize("event", WebhookEvent)
def test_a_test_event_may_resemble_one_of_a_task_in_every_member(event: WebhookEvent) -> None:
    data = json.loads(delivery.trial_body(trial(event), "full"))["data"]
    unfinished = event in {WebhookEvent.STARTED, WebhookEvent.RETRYING}
    usual = {"task_id", "task", "status", "attempt", "sequence", "created_at", "finished_at"}
    came_of = {WebhookEvent.SUCCEEDED: {"result"}, WebhookEvent.STARTED: set[str]()}.get(event, {"error"})
    assert set(data) == usual | came_of | {"test"}
    assert data["finished_at"] == (None if unfinished else SHOWN)
    assert not {"result", "error"} & set(json.loads(delivery.trial_body(trial(event), "thin"))["data"])


@pytest.mark.parametrize("outcome", Outcome)
def test_every_outcome_has_its_advice_in_one_sentence(outcome: Outcome) -> None:
    said = trials.advice(outcome, None)
    assert said[0].isupper()
    assert not said.endswith(".")
    assert ". " not in said


def test_a_status_that_says_more_than_its_class_has_an_advice_of_its_own() -> None:
    assert "410" not in trials.advice(Outcome.HTTP_4XX, 410)
    assert trials.advice(Outcome.HTTP_4XX, 404) != trials.advice(Outcome.HTTP_4XX, 418)
    assert trials.advice(Outcome.HTTP_4XX, 418) == trials.advice(Outcome.HTTP_4XX, 422)

"""What a submitter can learn of a webhook, and do about it."""

from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app import delivery, lifecycle
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.utils.webhook import Outcome, Receipt
from tests.integration.routers.test_tasks import assert_problem, ended, submitted

HOOK = "https://example.com/hook?token=hunter2"
OK = Receipt(outcome=Outcome.SUCCESS, status_code=200, duration_seconds=0.125)
BROKEN = Receipt(outcome=Outcome.HTTP_5XX, status_code=503, duration_seconds=0.25, excerpt="down")
DELIVERED = delivery.Verdict(DeliveryStatus.DELIVERED)
EXHAUSTED = delivery.Verdict(DeliveryStatus.EXHAUSTED)
AGAIN = delivery.Verdict(DeliveryStatus.PENDING)
LATER = delivery.Verdict(DeliveryStatus.PENDING, 3600.0)


async def told(db: Database, **fields: Any) -> UUID:
    """A task that has ended, and whose webhook is due."""
    return await ended(db, lifecycle.Succeeded('"done"'), **{"webhook_url": HOOK, **fields})


async def attempted(db: Database, receipt: Receipt, verdict: delivery.Verdict) -> delivery.Claimed:
    [claimed] = await delivery.claim_due(db, limit=1, lease_seconds=30.0)
    assert await delivery.settle(db, claimed, receipt, verdict)
    return claimed


async def state_of(api: httpx.AsyncClient, task_id: UUID) -> dict[str, Any]:
    answer = await api.get(f"/api/tasks/{task_id}/webhook")
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


async def test_the_state_of_a_webhook_is_told_from_before_its_event_to_its_end(
    api: httpx.AsyncClient, db: Database
) -> None:
    waiting = UUID(await submitted(api, webhook_url=HOOK))
    assert (await state_of(api, waiting))["status"] is None

    task_id = await told(db)
    first = await attempted(db, BROKEN, LATER)
    state = await state_of(api, task_id)
    assert (state["webhook_id"], state["event"], state["sequence"]) == (str(first.id), "task.succeeded", 1)
    assert (state["status"], state["attempt"], state["last_status_code"]) == ("pending", 1, 503)
    assert state["last_error"] == "http_5xx"
    assert state["next_at"].endswith("Z")

    await db.execute("UPDATE webhook_delivery SET next_at = now()")
    await attempted(db, OK, DELIVERED)
    state = await state_of(api, task_id)
    assert (state["status"], state["attempt"], state["next_at"]) == ("delivered", 2, None)
    assert state["delivered_at"].endswith("Z")


async def test_a_token_in_the_url_is_not_shown(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await told(db)
    for path in ("", "/webhook", "/webhook/attempts"):
        answer = await api.get(f"/api/tasks/{task_id}{path}")
        assert answer.status_code == 200
        assert "hunter2" not in answer.text
    assert (await state_of(api, task_id))["url"] == "https://example.com/hook?…"


async def test_every_attempt_is_told_page_by_page(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await told(db)
    for _ in range(4):
        await attempted(db, BROKEN, AGAIN)
    await attempted(db, OK, DELIVERED)

    seen: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {"limit": 2}
    while True:
        page = (await api.get(f"/api/tasks/{task_id}/webhook/attempts", params=parameters)).json()
        seen += page["data"]
        if page["next_cursor"] is None:
            break
        parameters["cursor"] = page["next_cursor"]

    assert [one["number"] for one in seen] == [1, 2, 3, 4, 5]
    assert [one["error"] for one in seen] == ["http_5xx"] * 4 + [None]
    assert seen[0] | {"started_at": "", "webhook_id": ""} == {
        "webhook_id": "",
        "event": "task.succeeded",
        "sequence": 1,
        "number": 1,
        "started_at": "",
        "duration_seconds": 0.25,
        "status_code": 503,
        "error": "http_5xx",
        "excerpt": "down",
    }


@pytest.mark.parametrize("what", ["webhook", "webhook/attempts"])
async def test_a_task_that_is_unknown_removed_or_without_a_webhook_says_so(
    api: httpx.AsyncClient, db: Database, what: str
) -> None:
    problem = assert_problem(await api.get(f"/api/tasks/{uuid4()}/{what}"), 404)
    assert problem["type"] == "/problems/task-not-found"
    without = await submitted(api)
    problem = assert_problem(await api.get(f"/api/tasks/{without}/{what}"), 404)
    assert problem["type"] == "/problems/no-webhook"
    task_id = await told(db, webhook_url=None)
    await lifecycle.prune(db, older_than_seconds=-1.0, limit=10)
    assert_problem(await api.get(f"/api/tasks/{task_id}/{what}"), 410)


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("cursor=x", "/cursor"),
        ("cursor=%00", "/cursor"),
        ("cursor=1.1.1", "/cursor"),
        ("cursor=9999999999.1", "/cursor"),
        ("limit=0", "/limit"),
        ("limit=101", "/limit"),
    ],
)
async def test_a_wrong_question_about_attempts_names_its_part(
    api: httpx.AsyncClient, db: Database, query: str, pointer: str
) -> None:
    task_id = await told(db)
    assert_problem(await api.get(f"/api/tasks/{task_id}/webhook/attempts?{query}"), 422, pointer)
    assert (await api.get(f"/api/tasks/{task_id}/webhook/attempts?cursor=999999999.99999")).json()["data"] == []

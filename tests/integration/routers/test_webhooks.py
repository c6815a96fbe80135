"""What a submitter can learn of a webhook, and do about it."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app import delivery, lifecycle
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.routers import webhooks
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


async def ask_again(api: httpx.AsyncClient, task_id: UUID) -> dict[str, Any]:
    answer = await api.post(f"/api/tasks/{task_id}/webhook/redeliver")
    assert answer.status_code == 202, answer.text
    state: dict[str, Any] = answer.json()
    return state


@pytest.mark.parametrize(("receipt", "verdict"), [(OK, DELIVERED), (BROKEN, EXHAUSTED), (BROKEN, LATER)])
async def test_a_webhook_is_sent_again_under_its_id_from_the_start_of_the_schedule(
    api: httpx.AsyncClient, db: Database, receipt: Receipt, verdict: delivery.Verdict
) -> None:
    task_id = await told(db)
    first = await attempted(db, receipt, verdict)
    for _ in range(2):
        state = await ask_again(api, task_id)
        assert (state["status"], state["attempt"], state["delivered_at"]) == ("pending", 1, None)
    [claimed] = await delivery.claim_due(db, limit=10, lease_seconds=30.0)
    assert (claimed.id, claimed.attempt, claimed.scheduled_attempt) == (first.id, 2, 1)
    assert delivery.body(claimed, "full") == delivery.body(first, "full")
    await delivery.settle(db, claimed, OK, DELIVERED)
    assert [one.number for one in await delivery.attempts(db, task_id, limit=10)] == [1, 2]


async def test_a_webhook_that_is_being_sent_or_has_nothing_to_tell_is_not_sent_again(
    api: httpx.AsyncClient, db: Database
) -> None:
    task_id = await told(db)
    await delivery.claim_due(db, limit=10, lease_seconds=30.0)
    waiting = await submitted(api, webhook_url=HOOK)
    for one in (task_id, waiting):
        problem = assert_problem(await api.post(f"/api/tasks/{one}/webhook/redeliver"), 409)
        assert problem["type"] == "/problems/webhook-not-due"
    assert (await state_of(api, task_id))["status"] == "delivering"
    assert_problem(await api.post(f"/api/tasks/{uuid4()}/webhook/redeliver"), 404)


async def test_a_webhook_is_not_sent_again_without_end(api: httpx.AsyncClient, db: Database) -> None:
    [spent, almost] = [await told(db) for _ in range(2)]
    for task_id, attempts in ((spent, delivery.ATTEMPTS_AT_MOST), (almost, delivery.ATTEMPTS_AT_MOST - 1)):
        await db.execute(
            "UPDATE webhook_delivery SET status = 'exhausted', attempt = $2 WHERE task_id = $1", task_id, attempts
        )
    problem = assert_problem(await api.post(f"/api/tasks/{spent}/webhook/redeliver"), 409)
    assert problem["detail"] == "The webhook was attempted 10,000 times, the most there are"
    assert await all_again(api) == (1, None)
    assert (await state_of(api, spent))["status"] == "exhausted"
    assert (await state_of(api, almost))["status"] == "pending"


async def all_again(api: httpx.AsyncClient, **fields: Any) -> tuple[int, str | None]:
    answer = await api.post("/api/webhooks/redeliver", json={"since": "2020-01-01T00:00:00Z", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["redelivered"], answer.json()["next_cursor"]


async def test_what_receivers_missed_is_sent_again_and_only_that(api: httpx.AsyncClient, db: Database) -> None:
    for receipt, verdict in ((OK, DELIVERED), (BROKEN, EXHAUSTED), (BROKEN, EXHAUSTED), (BROKEN, LATER)):
        await told(db)
        await attempted(db, receipt, verdict)
    await told(db)
    [under_way] = await delivery.claim_due(db, limit=10, lease_seconds=30.0)
    await told(db)

    assert await all_again(api, state="exhausted") == (2, None)
    assert await all_again(api) == (1, None), "the one that waits; the others are due already"
    assert await all_again(api) == (0, None)
    assert await all_again(api, state="delivered") == (1, None)
    assert await delivery.count_due(db) == 5
    assert await db.fetchval("SELECT status FROM webhook_delivery WHERE id = $1", under_way.id) == "delivering"


async def test_only_events_between_the_two_times_are_sent_again(api: httpx.AsyncClient, db: Database) -> None:
    for day in range(1, 6):
        task_id = await told(db)
        await attempted(db, BROKEN, EXHAUSTED)
        moment = f"2026-01-0{day}T00:00:00Z"
        await db.execute(
            "UPDATE webhook_delivery SET created_at = $2::text::timestamptz WHERE task_id = $1", task_id, moment
        )
    sent = await all_again(api, since="2026-01-02T00:00:00Z", until="2026-01-04T00:00:00Z")
    assert sent == (2, None)


async def test_many_are_sent_again_in_batches_however_alike_their_times(
    api: httpx.AsyncClient, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "STEP", 2)
    monkeypatch.setattr(webhooks, "STEPS", 2)
    for _ in range(10):
        await told(db)
        await attempted(db, BROKEN, EXHAUSTED)
    await db.execute("UPDATE webhook_delivery SET created_at = now()")

    counts, cursor = [], None
    while True:
        count, cursor = await all_again(api, cursor=cursor)
        counts.append(count)
        if cursor is None:
            break
    assert counts == [4, 4, 2]
    assert await delivery.count_due(db) == 10


async def test_one_search_for_what_was_missed_is_under_way_at_once(api: httpx.AsyncClient) -> None:
    since = {"since": "2020-01-01T00:00:00Z"}
    answers = await asyncio.gather(*(api.post("/api/webhooks/redeliver", json=since) for _ in range(3)))
    refused = [one for one in answers if one.status_code != 200]
    assert len(refused) == 2
    for one in refused:
        assert assert_problem(one, 429)["type"] == "/problems/too-many-at-once"
        assert one.headers["retry-after"] == "1"
    assert await all_again(api) == (0, None), "a turn ends with its answer"


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({}, "/since"),
        ({"since": "yesterday"}, "/since"),
        ({"since": "2020-01-01T00:00:00Z", "until": 5}, "/until"),
        ({"since": "2020-01-01T00:00:00Z", "state": "delivering"}, "/state"),
        ({"since": "2020-01-01T00:00:00Z", "cursor": "x"}, "/cursor"),
        ({"since": "2020-01-01T00:00:00Z", "surprise": 1}, "/surprise"),
    ],
)
async def test_a_wrong_wish_to_send_again_names_its_field(
    api: httpx.AsyncClient, fields: dict[str, Any], pointer: str
) -> None:
    assert_problem(await api.post("/api/webhooks/redeliver", json=fields), 422, pointer)


async def read_events(api: httpx.AsyncClient, **parameters: Any) -> dict[str, Any]:
    answer = await api.get("/api/events", params=parameters)
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


async def test_events_can_be_read_on_and_on_with_the_very_bodies_of_their_webhooks(
    api: httpx.AsyncClient, db: Database
) -> None:
    assert await read_events(api) == {"data": [], "next_cursor": "0"}
    for number in range(5):
        await ended(db, lifecycle.Succeeded(f'{{"n": {number}, "f": 1.10}}'), webhook_url=HOOK)
    await delivery.number(db, limit=10)
    sent = {one.id: delivery.body(one, "full") for one in await delivery.claim_due(db, limit=10, lease_seconds=30.0)}

    answer = await api.get("/api/events")
    assert all(body in answer.content for body in sent.values())
    read: list[dict[str, Any]] = []
    cursor = "0"
    while len(read) < 5:
        page = await read_events(api, after=cursor, limit=2)
        assert page["data"]
        read, cursor = read + page["data"], page["next_cursor"]
    assert [one["body"]["data"]["result"]["n"] for one in read] == [0, 1, 2, 3, 4]
    assert {UUID(one["webhook_id"]) for one in read} == sent.keys()
    assert await read_events(api, after=cursor) == {"data": [], "next_cursor": cursor}

    await told(db)
    await delivery.number(db, limit=10)
    assert len((await read_events(api, after=cursor))["data"]) == 1


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 19, ""])
async def test_a_wrong_cursor_of_events_is_named(api: httpx.AsyncClient, cursor: str) -> None:
    assert_problem(await api.get("/api/events", params={"after": cursor}), 422, "/after")

"""The catalogue over HTTP: what may be submitted, and each task as a route of its own."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx

from app import catalog
from app.db import Database
from tests.integration.routers.test_tasks import JSON, SECRET, assert_problem, row_of

ECHO = "/api/catalog/sample.echo"


async def test_the_catalogue_says_what_a_submit_needs_to_know(api: httpx.AsyncClient) -> None:
    page = (await api.get("/api/catalog")).json()
    assert page["next_cursor"] is None
    assert [entry["name"] for entry in page["data"]] == [entry.name for entry in catalog.entries()]
    [shown] = [entry for entry in page["data"] if entry["name"] == "sample.flaky"]
    assert shown == (await api.get("/api/catalog/sample.flaky")).json()
    assert shown["parameters"]["properties"]["failures"]["type"] == "integer"
    assert shown | {"parameters": {}} == {
        "name": "sample.flaky",
        "description": "Raise that many times, then succeed.",
        "parameters": {},
        "queue": "default",
        "max_retries": 3,
        "retry": {
            "exceptions": ["SampleError"],
            "backoff_seconds": 1.0,
            "backoff_most_seconds": 600.0,
            "jitter": True,
        },
        "time_limit": None,
        "soft_time_limit": None,
    }


async def test_a_task_that_is_not_there_is_404(api: httpx.AsyncClient) -> None:
    for name in ("nobody", "sample", "%00", SECRET, "sample.echo%2Fx", "x" * 255):
        for answer in (await api.get(f"/api/catalog/{name}"), await api.post(f"/api/catalog/{name}", json={})):
            assert answer.status_code == 404
            assert SECRET not in answer.text
    assert_problem(await api.get("/api/catalog/nobody"), 404)
    assert_problem(await api.get("/api/catalog/" + "x" * 256), 422, "/name")


async def test_the_body_is_the_arguments(api: httpx.AsyncClient, db: Database) -> None:
    answer = await api.post(ECHO, json={"value": {"é": [1, 2.5, None]}})
    assert answer.status_code == 202
    assert set(answer.json()) == {"task_id"}
    task_id = answer.json()["task_id"]
    assert answer.headers["location"] == f"/api/tasks/{task_id}"
    row = await row_of(db, task_id)
    assert (row["name"], row["args"], row["kwargs"]) == ("sample.echo", "[]", '{"value": {"é": [1, 2.5, null]}}')


async def test_a_task_without_arguments_needs_no_body(api: httpx.AsyncClient) -> None:
    assert (await api.post("/api/catalog/long_task")).status_code == 202


async def test_what_else_a_submit_may_say_stands_in_the_query(api: httpx.AsyncClient, db: Database) -> None:
    query = {
        "queue": "reports",
        "countdown": "60",
        "expires": "3600.5",
        "max_retries": "7",
        "time_limit": "12.5",
        "tags": ["nightly", "7"],
        "webhook_events": ["task.started", "task.failed"],
        "unique_for": "1e3",
    }
    headers = {"Webhook-URL": "https://example.com/hook?token=1"}
    answer = await api.post(ECHO, json={"value": 1}, params=query, headers=headers)
    assert answer.status_code == 202, answer.text
    row = await row_of(db, answer.json()["task_id"])
    assert (row["queue"], row["max_retries"], row["time_limit"]) == ("reports", 7, 12.5)
    assert row["run_at"] - row["created_at"] == timedelta(seconds=60)
    assert row["expires_at"] - row["created_at"] == timedelta(seconds=3600.5)
    assert (row["tags"], row["webhook_events"]) == (["nightly", "7"], ["task.started", "task.failed"])
    assert row["webhook_url"] == headers["Webhook-URL"]
    assert await db.fetchval("SELECT task_id FROM unique_task") == row["id"]


async def test_a_moment_may_stand_in_the_query(api: httpx.AsyncClient, db: Database) -> None:
    row_at = await db.fetchval("SELECT date_trunc('second', now()) + interval '5 hours'")
    answer = await api.post(ECHO, json={"value": 1}, params={"eta": row_at.isoformat(), "expires": row_at.isoformat()})
    row = await row_of(db, answer.json()["task_id"])
    assert (row["run_at"], row["expires_at"]) == (row_at, row_at)


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("", {}, "/value"),
    ("", {"value": 1, "other": 2}, "/other"),
    ("countdown=soon", {"value": 1}, "/countdown"),
    ("countdown=", {"value": 1}, "/countdown"),
    ("countdown=-1", {"value": 1}, "/countdown"),
    ("countdown=1e999", {"value": 1}, "/countdown"),
    ("countdown=NaN", {"value": 1}, "/countdown"),
    ("countdown=true", {"value": 1}, "/countdown"),
    ("countdown=1&countdown=1", {"value": 1}, "/countdown"),
    ("countdown=1&eta=2030-01-01T00:00:00Z", {"value": 1}, "/eta"),
    ("max_retries=1.5", {"value": 1}, "/max_retries"),
    ("max_retries=" + "9" * 5000, {"value": 1}, "/max_retries"),
    ("queue=nobody", {"value": 1}, "/queue"),
    ("queue=%00", {"value": 1}, "/queue"),
    ("tags=a&tags=%00", {"value": 1}, "/tags/1"),
    ("tags=", {"value": 1}, "/tags/0"),
    ("webhook_events=task.failed", {"value": 1}, "/webhook_events"),
    ("task=long_task", {"value": 1}, "/task"),
    ("kwargs=%7B%7D", {"value": 1}, "/kwargs"),
    ("webhook_url=https://example.com/", {"value": 1}, "/webhook_url"),
    (f"{SECRET}=1", {"value": 1}, f"/{SECRET}"),
]


async def test_a_wrong_argument_or_option_is_named(api: httpx.AsyncClient, db: Database) -> None:
    for query, arguments, pointer in WRONG:
        assert_problem(await api.post(f"{ECHO}?{query}", json=arguments), 422, pointer)
    assert await db.fetchval("SELECT count(*) FROM task") == 0


async def test_an_argument_of_the_wrong_type_is_named_without_its_value(api: httpx.AsyncClient) -> None:
    wrong: list[tuple[object, str]] = [({"x": SECRET}, "/x"), ({"x": [1]}, "/x"), ([1], "")]
    for arguments, pointer in wrong:
        answer = await api.post("/api/catalog/long_task", json=arguments)
        assert_problem(answer, 422, pointer)
        assert SECRET not in answer.text


async def test_a_webhook_that_leads_nowhere_is_named_by_its_header(api: httpx.AsyncClient) -> None:
    for url in (SECRET, "https://127.0.0.1/", "https://example.com/\xe9\xff" * 200):
        raw = [("content-type", JSON["content-type"]), (b"webhook-url", url.encode("latin-1"))]
        answer = await api.post(ECHO, content=b'{"value": 1}', headers=raw)  # type: ignore[arg-type]  # as bytes, too
        assert_problem(answer, 422, "/Webhook-URL")
        assert SECRET not in answer.text
    twice = [("Webhook-URL", "https://example.com/")] * 2
    assert_problem(await api.post(ECHO, json={"value": 1}, headers=twice), 400, "/Webhook-URL")


async def test_a_submit_by_name_may_come_again(api: httpx.AsyncClient, db: Database) -> None:
    async def post(query: str, value: int, webhook: str) -> httpx.Response:
        headers = {"Idempotency-Key": "k", "Webhook-URL": webhook}
        return await api.post(f"{ECHO}?{query}", json={"value": value}, headers=headers)

    hook = "https://example.com/"
    first = await post("countdown=60&tags=a", 1, hook)
    again = await post("tags=a&countdown=60", 1, hook)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    for other in (("countdown=61&tags=a", 1, hook), ("countdown=60&tags=a", 2, hook), ("", 1, hook + "x")):
        assert_problem(await post(*other), 422)
    assert [row["id"] for row in await db.fetch("SELECT id FROM task")] == [UUID(first.json()["task_id"])]

"""Running a task again: as it was, with changes, and when that can't be."""

import json
from typing import Any
from uuid import UUID, uuid4

import httpx

from app import lifecycle
from app.broker import Broker
from app.core.config import Settings
from app.core.ids import uuid7
from app.db import Database
from tests.integration.routers.test_tasks import assert_problem, ended, row_of, started, submitted
from tests.support.waiting import until

FAILED = lifecycle.Failed(lifecycle.Error(type="SampleError", message="no"))
AS_SUBMITTED = ("name", "queue", "args", "kwargs", "tags", "webhook_url", "webhook_events", "max_retries", "time_limit")


async def failed(api: httpx.AsyncClient, db: Database, **fields: Any) -> UUID:
    task_id = UUID(await submitted(api, **fields))
    held = lifecycle.Claim(task_id, 1, uuid4())
    name = fields.get("task", "long_task")
    assert await lifecycle.claim(db, held, name=name, worker="test", lease_seconds=30)
    assert await lifecycle.settle(db, held, lifecycle.decide(lifecycle.Budgets(), FAILED))
    return task_id


async def rerun(api: httpx.AsyncClient, task_id: UUID, **changes: Any) -> str:
    answer = await api.post(f"/api/tasks/{task_id}/rerun", json=changes)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/tasks/{answer.json()['task_id']}"
    return str(answer.json()["task_id"])


async def test_a_rerun_is_a_new_task_that_names_the_old_one(
    api: httpx.AsyncClient, db: Database, api_settings: Settings
) -> None:
    old = await failed(
        api,
        db,
        task="sample.echo",
        args=[{"é": [1, 2.5, None, "😀"]}],
        queue="reports",
        concurrency_key="customer-7",
        max_retries=7,
        time_limit=12.5,
        tags=["nightly", "é"],
        webhook_url="https://example.com/hook?token=1",
        webhook_events=["task.failed"],
        expires=3600,
    )
    before = await row_of(db, str(old))
    new = await rerun(api, old)
    was, made = await row_of(db, str(old)), await row_of(db, new)
    assert was == before
    assert {name: made[name] for name in AS_SUBMITTED} == {name: was[name] for name in AS_SUBMITTED}
    assert (made["rerun_of"], made["status"], made["attempt"], made["failures"]) == (old, "PENDING", 0, 0)
    assert made["expires_at"] is None
    assert (await api.get(f"/api/tasks/{new}")).json()["rerun_of"] == str(old)
    assert (await api.get(f"/api/tasks/{new}")).json()["concurrency_key"] == "customer-7"

    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")

    async def depth() -> int:
        return await broker.depth("reports")

    await until(depth, what="the message")
    await broker.close()


async def test_a_rerun_takes_changes(api: httpx.AsyncClient, db: Database) -> None:
    old = await failed(api, db, kwargs={"x": 3}, tags=["a"], webhook_url="https://example.com/hook", time_limit=9)
    changes = {"kwargs": {"x": 1}, "queue": "reports", "max_retries": 0, "tags": ["b"], "countdown": 60}
    made = await row_of(db, await rerun(api, old, **changes))
    assert (json.loads(made["kwargs"]), made["queue"], made["max_retries"], made["tags"]) == (
        {"x": 1},
        "reports",
        0,
        ["b"],
    )
    assert (made["webhook_url"], made["time_limit"]) == ("https://example.com/hook", 9)
    assert made["published_at"] is None


async def test_null_makes_it_the_default(api: httpx.AsyncClient, db: Database) -> None:
    old = await failed(
        api, db, queue="reports", webhook_url="https://example.com/hook", webhook_events=["task.failed"], time_limit=9
    )
    made = await row_of(db, await rerun(api, old, webhook_url=None, queue=None, time_limit=None))
    assert (made["webhook_url"], made["webhook_events"], made["queue"], made["time_limit"]) == (
        None,
        None,
        "default",
        None,
    )


async def test_each_call_makes_another(api: httpx.AsyncClient, db: Database) -> None:
    old = await ended(db, lifecycle.Succeeded("1"))
    first = await rerun(api, old)
    assert (await api.post(f"/api/tasks/{old}/rerun")).status_code == 202
    assert await db.fetchval("SELECT count(*) FROM task WHERE rerun_of = $1", old) == 2
    assert_problem(await api.post(f"/api/tasks/{first}/rerun"), 409)


async def test_a_rerun_under_a_key_may_come_again(api: httpx.AsyncClient, db: Database) -> None:
    old = await ended(db, lifecycle.Succeeded("1"))
    path, key = f"/api/tasks/{old}/rerun", {"Idempotency-Key": "again-1"}
    first, second = [await api.post(path, headers=key) for _ in range(2)]
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() == second.json()
    assert second.headers["idempotent-replayed"] == "true"
    assert [row["rerun_of"] for row in await db.fetch("SELECT rerun_of FROM task WHERE id <> $1", old)] == [old]
    assert_problem(await api.post(path, headers=key, json={"max_retries": 1}), 422)


async def test_what_has_not_ended_can_not_be_run_again(api: httpx.AsyncClient, db: Database) -> None:
    for unfinished in (UUID(await submitted(api)), await started(db)):
        problem = assert_problem(await api.post(f"/api/tasks/{unfinished}/rerun"), 409)
        assert problem["type"] == "/problems/task-unfinished"
    assert await db.fetchval("SELECT count(*) FROM task") == 2


async def test_an_unknown_task_and_somebody_elses_are_404(api: httpx.AsyncClient, db: Database) -> None:
    theirs = await ended(db, lifecycle.Succeeded("1"), owner="somebody else")
    for unknown in (uuid7(), theirs):
        assert_problem(await api.post(f"/api/tasks/{unknown}/rerun"), 404)
    assert_problem(await api.post("/api/tasks/me/rerun"), 422, "/id")


async def test_a_task_that_was_pruned_is_410(api: httpx.AsyncClient, db: Database) -> None:
    old = await ended(db, lifecycle.Succeeded("1"))
    await lifecycle.prune(db, older_than_seconds=-1, limit=10)
    assert_problem(await api.post(f"/api/tasks/{old}/rerun"), 410)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"kwargs": {"x": "five"}}, "/kwargs/x"),
    ({"args": [1, 2]}, "/args/1"),
    ({"queue": "nobody"}, "/queue"),
    ({"webhook_url": "http://169.254.169.254/"}, "/webhook_url"),
    ({"webhook_url": "https://example.com/hook?…"}, "/webhook_url"),
    ({"max_retries": 101}, "/max_retries"),
    ({"rerun_of": "x"}, "/rerun_of"),
    ({"task": "nobody"}, "/task"),
    ({"tags": None}, "/tags"),
    ({"eta": "2030-01-01T00:00:00Z", "countdown": 1}, "/eta"),
]


async def test_changes_are_checked_as_a_submit_is(api: httpx.AsyncClient, db: Database) -> None:
    old = await ended(db, lifecycle.Succeeded("1"))
    for changes, pointer in WRONG:
        assert_problem(await api.post(f"/api/tasks/{old}/rerun", json=changes), 422, pointer)
    hostile = {b"[]": 422, b"{": 400, b'{"kwargs": {"x": NaN}}': 400, b'{"tags": ["\\u0000"]}': 422}
    for sent, status in hostile.items():
        answer = await api.post(f"/api/tasks/{old}/rerun", content=sent, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
    assert await db.fetchval("SELECT count(*) FROM task") == 1


async def test_arguments_that_fit_no_longer_are_named(api: httpx.AsyncClient, db: Database) -> None:
    """The task was submitted to another release, whose signature was another."""
    old = await ended(db, lifecycle.Succeeded("1"), kwargs='{"seconds": 5}')
    assert_problem(await api.post(f"/api/tasks/{old}/rerun"), 422, "/kwargs/seconds")
    assert (await row_of(db, await rerun(api, old, kwargs={"x": 1})))["rerun_of"] == old

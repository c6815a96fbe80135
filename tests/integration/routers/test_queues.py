"""The queues over HTTP."""

import json
from typing import Any
from uuid import UUID

import httpx
import pytest
from pydantic import SecretStr

from app import lifecycle
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Succeeded
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import assert_problem, closed_port, ended, submitted
from tests.support.database import started

UNLIMITED = {"concurrency_limit": None, "rate_limit": None, "key_concurrency_limit": None, "key_rate_limit": None}
LIMITED = {
    "concurrency_limit": 3,
    "rate_limit": {"count": 20, "seconds": 1.0},
    "key_concurrency_limit": 1,
    "key_rate_limit": {"count": 100, "seconds": 60.0},
}


async def read(api: httpx.AsyncClient, queue: str = "default") -> dict[str, Any]:
    answer = await api.get(f"/api/queues/{queue}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_the_queues_are_shown_as_they_are(api: httpx.AsyncClient, db: Database) -> None:
    answer = await api.get("/api/queues")
    assert answer.status_code == 200
    assert [one["name"] for one in answer.json()["data"]] == ["default", "reports"]
    assert answer.json()["next_cursor"] is None
    assert answer.json()["data"][0] == {
        "name": "default",
        "paused": False,
        **UNLIMITED,
        "depth": 0,
        "waiting": 0,
        "held": 0,
        "running": 0,
        "oldest_seconds": None,
        "ended_per_second": 0.0,
    }

    await ended(db, Succeeded("1"))
    first = UUID(await submitted(api))
    await submitted(api)
    await submitted(api, countdown=60)
    await started(db, first, name="long_task")
    await db.execute("UPDATE task SET run_at = now() - interval '30 s' WHERE status = 'PENDING' AND position > 0")
    found = await read(api)
    assert (found["waiting"], found["held"], found["running"]) == (2, 0, 1)
    assert 30 <= found["oldest_seconds"] < 60
    assert found["ended_per_second"] == pytest.approx(1 / 60, abs=0.001)
    assert (await read(api, "reports"))["waiting"] == 0


async def test_a_queue_is_paused_and_resumed(api: httpx.AsyncClient, db: Database) -> None:
    for _ in range(2):
        answer = await api.post("/api/queues/default/pause")
        assert (answer.status_code, answer.json()["paused"]) == (200, True)
    task_id = await submitted(api)
    await submitted(api, queue="reports")

    task = (await api.get(f"/api/tasks/{task_id}")).json()
    assert (task["status"], task["held"]) == ("PENDING", "paused")
    found = await read(api)
    assert (found["waiting"], found["held"], found["running"], found["depth"]) == (0, 1, 0, 0)
    assert found["oldest_seconds"] >= 0
    assert not (await read(api, "reports"))["paused"]

    for _ in range(2):
        answer = await api.post("/api/queues/default/resume")
        assert (answer.status_code, answer.json()["paused"]) == (200, False)
    assert [bell.task_id for bell in await lifecycle.let_go(db, "default", limit=5)] == [UUID(task_id)]
    assert (await api.get(f"/api/tasks/{task_id}")).json()["held"] is None


async def test_limits_are_set_as_a_whole(api: httpx.AsyncClient) -> None:
    await api.post("/api/queues/default/pause")
    answer = await api.put("/api/queues/default/limits", json=LIMITED)
    assert answer.status_code == 200
    found = await read(api)
    assert found == answer.json()
    assert found | LIMITED == found
    assert found["paused"], "limits leave the pause alone"

    only = {"rate_limit": {"count": 5}}
    assert (await api.put("/api/queues/default/limits", json=only)).status_code == 200
    found = await read(api)
    assert found | UNLIMITED | {"rate_limit": {"count": 5, "seconds": 1.0}} == found
    assert (await api.put("/api/queues/default/limits", json={})).status_code == 200
    assert await read(api) | UNLIMITED == await read(api)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"concurrency_limit": 0}, "/concurrency_limit"),
        ({"concurrency_limit": 10**30}, "/concurrency_limit"),
        ({"concurrency_limit": True}, "/concurrency_limit"),
        ({"concurrency_limit": "3"}, "/concurrency_limit"),
        ({"key_concurrency_limit": -1}, "/key_concurrency_limit"),
        ({"rate_limit": {"count": 0, "seconds": 1}}, "/rate_limit/count"),
        ({"rate_limit": {"count": 1, "seconds": 0}}, "/rate_limit/seconds"),
        ({"rate_limit": {"count": 1, "seconds": 1e300}}, "/rate_limit/seconds"),
        ({"rate_limit": {"seconds": 1}}, "/rate_limit/count"),
        ({"rate_limit": 20}, "/rate_limit"),
        ({"key_rate_limit": {"count": 1, "per": 1}}, "/key_rate_limit/per"),
        ({"paused": True}, "/paused"),
        ([], ""),
    ],
)
async def test_wrong_limits_are_refused_by_name_and_change_nothing(
    api: httpx.AsyncClient, body: Any, pointer: str
) -> None:
    await api.put("/api/queues/default/limits", json=LIMITED)
    answer = await api.put("/api/queues/default/limits", json=body)
    assert_problem(answer, 422, pointer)
    assert await read(api) | LIMITED == await read(api)


@pytest.mark.parametrize("name", ["other", "defaul", "default%00", "%2e%2e", "x" * 5000])
async def test_an_unknown_queue_is_404(api: httpx.AsyncClient, name: str) -> None:
    answers = [
        await api.get(f"/api/queues/{name}"),
        await api.post(f"/api/queues/{name}/pause"),
        await api.post(f"/api/queues/{name}/resume"),
        await api.put(f"/api/queues/{name}/limits", json={}),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert assert_problem(answers[0], 404)["type"] == "/problems/queue-not-found"


@pytest.mark.parametrize("key", ["", "x" * 256, 5, ["a"], "a\x00b", "\ud800"])
async def test_a_wrong_concurrency_key_is_refused_by_name(api: httpx.AsyncClient, key: Any) -> None:
    content = json.dumps({"concurrency_key": key})
    answer = await api.post("/api/tasks/submit", content=content, headers={"content-type": "application/json"})
    assert_problem(answer, 422, "/concurrency_key")


async def test_a_concurrency_key_is_kept(api: httpx.AsyncClient) -> None:
    key = "c" * 255
    await api.put("/api/queues/default/limits", json={"key_concurrency_limit": 1})
    task_id = await submitted(api, concurrency_key=key)
    assert (await api.get(f"/api/tasks/{task_id}")).json()["concurrency_key"] == key
    assert (await api.get(f"/api/tasks/{await submitted(api)}")).json()["concurrency_key"] is None


async def test_without_redis_only_the_depth_is_not_known(serve: Serve, api_settings: Settings) -> None:
    with closed_port() as port:
        url = SecretStr(f"redis://127.0.0.1:{port}/0")
        async with serve(api_settings.model_copy(update={"redis_url": url})) as api:
            assert (await api.post("/api/queues/default/pause")).status_code == 200
            await submitted(api)
            found = await read(api)
    assert (found["depth"], found["held"], found["paused"]) == (None, 1, True)


async def test_limits_are_not_taken_away_by_a_body_that_was_forgotten(api: httpx.AsyncClient) -> None:
    await api.put("/api/queues/default/limits", json={"concurrency_limit": 3})
    assert_problem(await api.put("/api/queues/default/limits"), 422, "")
    assert (await read(api))["concurrency_limit"] == 3
    assert (await api.put("/api/queues/default/limits", json={})).status_code == 200
    assert (await read(api))["concurrency_limit"] is None

"""Why a task is where it is: the facts, as a real Postgres and a real Redis have them."""

from typing import Any
from uuid import UUID

import httpx

from app import lifecycle
from app.broker import Broker
from app.core.config import Settings
from app.core.ids import uuid7
from app.db import Database
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import assert_problem, ended, started, submitted
from tests.support.waiting import until


async def explained(api: httpx.AsyncClient, task_id: object) -> dict[str, Any]:
    answer = await api.get(f"/api/tasks/{task_id}/explain")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def announced(db: Database, name: str = "host/1", *queues: str) -> None:
    await lifecycle.announce(db, name, queues=queues or ("default",), slots=4, busy=3)


async def test_a_task_that_no_worker_will_take(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await submitted(api, queue="reports")
    await announced(db, "host/1", "default")
    found = await explained(api, task_id)
    assert (found["status"], found["reason"], found["facts"]["consumers"]) == ("PENDING", "no_consumer", 0)
    assert "no worker consumes queue `reports`" in found["explanation"]
    await announced(db, "host/2", "default", "reports")
    assert (await explained(api, task_id))["facts"]["consumers"] == 1
    await db.execute("UPDATE worker SET seen_at = now() - interval '31 s' WHERE name = 'host/2'")
    assert (await explained(api, task_id))["reason"] == "no_consumer"
    await announced(db, "host/2", "default", "reports")
    await lifecycle.leave(db, "host/2")
    assert (await explained(api, task_id))["reason"] == "no_consumer"


async def test_its_place_in_line(api: httpx.AsyncClient, api_settings: Settings, db: Database) -> None:
    await announced(db)
    ids = [await submitted(api) for _ in range(3)]
    await submitted(api, queue="reports")
    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")

    async def depth() -> bool:
        return await broker.depth("default") == 3

    await until(depth, what="the messages")
    await broker.close()
    found = [await explained(api, task_id) for task_id in ids]
    assert [one["reason"] for one in found] == ["in_line"] * 3
    assert [one["facts"]["ahead"] for one in found] == [0, 1, 2]
    assert {one["facts"]["queue_depth"] for one in found} == {3}
    assert "3 of 4 slots busy" in found[0]["explanation"]


async def test_those_without_a_message_come_after_those_with_one(db: Database) -> None:
    ids = [uuid7() for _ in range(5)]
    for number, task_id in enumerate(ids):
        new = lifecycle.NewTask(id=task_id, name="long_task", queue="default")
        await lifecycle.submit(db, new, hold_back=number >= 2)
    known = [await lifecycle.facts(db, task_id, "") for task_id in ids]
    assert [(one.published, one.ahead) for one in known if one is not None] == [
        (True, 0),
        (True, 1),
        (False, 2),
        (False, 3),
        (False, 4),
    ]


async def test_a_task_that_is_held_and_how_many_before_it(api: httpx.AsyncClient, db: Database) -> None:
    await announced(db)
    await submitted(api)
    await api.post("/api/queues/default/pause")
    ids = [await submitted(api) for _ in range(3)]
    found = [await explained(api, task_id) for task_id in ids]
    assert [(one["reason"], one["facts"]["ahead"]) for one in found] == [("held", 0), ("held", 1), ("held", 2)]
    assert found[1]["explanation"] == (
        "It is held: queue `default` is paused, or is being worked off since it was; 1 task is held before it."
    )
    await lifecycle.resume_queue(db, "default")
    await lifecycle.let_go(db, "default", limit=1)
    found = [await explained(api, task_id) for task_id in ids]
    assert [(one["reason"], one["facts"]["ahead"]) for one in found] == [("in_line", 1), ("held", 0), ("held", 1)]


async def test_a_task_that_is_not_due(api: httpx.AsyncClient) -> None:
    found = await explained(api, await submitted(api, countdown=40, expires=90))
    assert found["reason"] == "not_due"
    assert found["explanation"].startswith("It waits: it is due in 40 s. It expires in 90 s")
    assert 38 < found["facts"]["due_in"] <= 40
    assert (found["facts"]["ahead"], found["facts"]["queue_depth"]) == (None, None)


async def test_a_task_that_runs(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await started(db)
    held = lifecycle.Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    await lifecycle.record_progress(db, held, 0.4, "page 4 of 10")
    found = await explained(api, task_id)
    assert (found["reason"], found["facts"]["worker"]) == ("running", "test")
    assert found["facts"]["progress"] == {"fraction": 0.4, "message": "page 4 of 10"}
    assert 25 < found["facts"]["lease_left"] <= 30
    assert "40% done (page 4 of 10)" in found["explanation"]
    await api.post(f"/api/tasks/{task_id}/cancel")
    assert (await explained(api, task_id))["reason"] == "cancel_requested"
    await db.execute("UPDATE task SET lease_until = now() + interval '12 s' WHERE id = $1", task_id)
    found = await explained(api, task_id)
    assert found["reason"] == "worker_silent"
    assert "its lease ends in 12 s" in found["explanation"]


async def test_a_task_that_has_ended(api: httpx.AsyncClient, db: Database) -> None:
    error = lifecycle.Error(type="SampleError", message="no such month")
    found = await explained(api, await ended(db, lifecycle.Failed(error)))
    assert found["reason"] == "ended"
    assert found["explanation"] == "It ended as FAILURE 0 s ago, after 1 attempt: SampleError: no such month."
    facts = found["facts"]
    assert 0 <= facts.pop("ended_ago") < 10
    assert set(facts.values()) == {None}


async def test_a_queue_that_nobody_looks_after(api: httpx.AsyncClient, db: Database) -> None:
    task_id = uuid7()
    await lifecycle.submit(db, lifecycle.NewTask(id=task_id, name="long_task", queue="gone"))
    assert (await explained(api, task_id))["reason"] == "queue_unknown"


async def test_without_redis_it_says_so(serve: Serve, api_settings: Settings, db: Database) -> None:
    away = api_settings.model_copy(update={"redis_url": type(api_settings.redis_url)("redis://127.0.0.1:1/0")})
    await announced(db)
    async with serve(away) as api:
        found = await explained(api, await submitted(api))
        assert (found["reason"], found["facts"]["queue_depth"]) == ("redis_away", None)
        running = await started(db)
        assert (await explained(api, running))["reason"] == "running"


async def test_an_unknown_task_and_somebody_elses_are_404(api: httpx.AsyncClient, db: Database) -> None:
    theirs = await ended(db, lifecycle.Succeeded("1"), owner="somebody else")
    for unknown in (uuid7(), theirs):
        assert_problem(await api.get(f"/api/tasks/{unknown}/explain"), 404)


async def test_workers_that_went_without_a_word_are_forgotten(db: Database) -> None:
    await announced(db, "host/1")
    await db.execute("UPDATE worker SET seen_at = now() - interval '25 h'")
    await announced(db, "host/2")
    assert [row["name"] for row in await db.fetch("SELECT name FROM worker")] == ["host/2"]

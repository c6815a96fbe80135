"""The history of a task: one entry for each attempt, whoever ended it."""

import json
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from app import lifecycle
from app.core.ids import uuid7
from app.core.statuses import AttemptOutcome
from app.db import Database
from app.lifecycle import Budgets, Claim
from tests.integration.routers.test_tasks import assert_problem, ended, started, submitted

ERROR = lifecycle.Error(type="SampleError", message="no", traceback="Traceback: here")
LOG = lifecycle.Log(json.dumps([{"after": 1.5, "level": "INFO", "logger": "my", "message": "page 4"}]), dropped=3)
OUTCOMES: list[tuple[lifecycle.Outcome, str, str | None]] = [
    (lifecycle.RetryAsked(ERROR, 0.0), "failed", "SampleError"),
    (lifecycle.Interrupted(), "released", None),
    (lifecycle.Crashed(out_of_memory=True), "crashed", "OutOfMemory"),
    (lifecycle.Lost(), "lost", "WorkerLost"),
    (lifecycle.Misfit(lifecycle.Error(type="InvalidArguments")), "refused", "InvalidArguments"),
]


async def claim(db: Database, task_id: UUID, number: int) -> Claim:
    await db.execute("UPDATE task SET run_at = now() WHERE id = $1", task_id)
    held = Claim(task_id, number, uuid4())
    assert await lifecycle.claim(db, held, name="long_task", worker=f"host/{number}", lease_seconds=30)
    return held


async def settle(db: Database, held: Claim, outcome: lifecycle.Outcome, log: lifecycle.Log | None = None) -> None:
    assert await lifecycle.settle(db, held, lifecycle.decide(Budgets(), outcome), log) is not None


async def history(api: httpx.AsyncClient, task_id: object, **asked: object) -> list[dict[str, Any]]:
    answer = await api.get(f"/api/tasks/{task_id}/attempts", params={name: str(value) for name, value in asked.items()})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def rows(db: Database) -> int:
    count: int = await db.fetchval("SELECT count(*) FROM task_attempt")
    return count


async def test_each_attempt_tells_how_it_ended(api: httpx.AsyncClient, db: Database) -> None:
    task_id = UUID(await submitted(api))
    assert await history(api, task_id) == []
    for number, (outcome, _, _) in enumerate(OUTCOMES, 1):
        await settle(db, await claim(db, task_id, number), outcome)
    running = await claim(db, task_id, 6)
    found = await history(api, task_id)
    assert [(one["number"], one["worker"], one["outcome"]) for one in found] == [
        *((number, f"host/{number}", word) for number, (_, word, _) in enumerate(OUTCOMES, 1)),
        (6, "host/6", None),
    ]
    assert [one["error"] and one["error"]["type"] for one in found] == [*(kind for _, _, kind in OUTCOMES), None]
    assert found[0]["error"] == {"type": "SampleError", "message": "no", "traceback": "Traceback: here"}
    assert [one["ended_at"] is None for one in found] == [False] * 5 + [True]
    assert all(one["started_at"] <= (one["ended_at"] or "9") for one in found)
    await settle(db, running, lifecycle.Succeeded("1"))
    last = (await history(api, task_id))[-1]
    assert (last["number"], last["outcome"], last["error"], last["log"]) == (6, "succeeded", None, [])
    assert last["ended_at"] == (await api.get(f"/api/tasks/{task_id}")).json()["finished_at"]


async def test_a_success_without_a_log_writes_no_row(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await ended(db, lifecycle.Succeeded("1"))
    assert await rows(db) == 0
    [only] = await history(api, task_id)
    assert (only["number"], only["outcome"], only["worker"]) == (1, "succeeded", "test")


async def test_the_log_of_an_attempt_is_kept_with_it(api: httpx.AsyncClient, db: Database) -> None:
    task_id = UUID(await submitted(api))
    await settle(db, await claim(db, task_id, 1), lifecycle.RetryAsked(ERROR, 0.0), LOG)
    await settle(db, await claim(db, task_id, 2), lifecycle.Succeeded("1"), LOG)
    found = await history(api, task_id)
    assert [one["outcome"] for one in found] == ["failed", "succeeded"]
    for one in found:
        [line] = one["log"]
        began = datetime.fromisoformat(one["started_at"])
        assert datetime.fromisoformat(line.pop("at")) == began + timedelta(seconds=1.5)
        assert line == {"level": "INFO", "logger": "my", "message": "page 4"}
        assert one["log_dropped"] == 3


@pytest.mark.parametrize("write", [lifecycle.settle_for, lifecycle.reap])
async def test_whoever_ends_an_attempt_for_another_keeps_it_too(
    api: httpx.AsyncClient, db: Database, write: Any
) -> None:
    task_id = await started(db)
    held = Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    await db.execute("UPDATE task SET lease_until = now() - interval '1 s' WHERE id = $1", task_id)
    assert await write(db, held, lifecycle.decide(Budgets(), lifecycle.Lost()))
    assert [one["outcome"] for one in await history(api, task_id)] == ["lost"]


async def test_what_an_attempt_did_is_told_though_its_task_was_cancelled(api: httpx.AsyncClient, db: Database) -> None:
    task_id = UUID(await submitted(api))
    held = await claim(db, task_id, 1)
    await lifecycle.cancel(db, task_id)
    await settle(db, held, lifecycle.RetryAsked(ERROR, 0.0))
    [only] = await history(api, task_id)
    assert (only["outcome"], only["error"]["type"]) == ("failed", "SampleError")
    assert (await api.get(f"/api/tasks/{task_id}/result")).json()["error"]["type"] == "Cancelled"


async def test_a_settle_that_was_superseded_or_repeated_adds_nothing(api: httpx.AsyncClient, db: Database) -> None:
    task_id = UUID(await submitted(api))
    held = await claim(db, task_id, 1)
    transition = lifecycle.decide(Budgets(), lifecycle.Failed(ERROR))
    assert await lifecycle.settle(db, Claim(task_id, 1, uuid4()), transition, LOG) is None
    assert await rows(db) == 0
    for _ in range(2):
        assert await lifecycle.settle(db, held, transition, LOG)
    assert await rows(db) == 1


async def test_an_attempt_that_an_earlier_release_has_ended_is_told_from_its_task(
    api: httpx.AsyncClient, db: Database
) -> None:
    task_id = await ended(db, lifecycle.Failed(ERROR))
    await db.execute("DELETE FROM task_attempt")
    [only] = await history(api, task_id)
    assert (only["number"], only["outcome"], only["error"]["traceback"]) == (1, None, "Traceback: here")


async def test_the_progress_of_an_attempt_that_is_over_is_not_that_of_the_next(
    api: httpx.AsyncClient, db: Database
) -> None:
    task_id = UUID(await submitted(api))
    held = await claim(db, task_id, 1)
    await lifecycle.record_progress(db, held, 0.9, "nearly")
    await settle(db, held, lifecycle.RetryAsked(ERROR, 0.0))
    assert (await api.get(f"/api/tasks/{task_id}")).json()["progress"] is None


async def test_the_history_comes_in_pages(api: httpx.AsyncClient, db: Database) -> None:
    task_id = UUID(await submitted(api))
    for number in range(1, 4):
        await settle(db, await claim(db, task_id, number), lifecycle.Interrupted())
    path = f"/api/tasks/{task_id}/attempts"
    first = (await api.get(path, params={"limit": 2})).json()
    assert ([one["number"] for one in first["data"]], first["next_cursor"]) == ([1, 2], "2")
    second = (await api.get(path, params={"limit": 2, "cursor": "2"})).json()
    assert ([one["number"] for one in second["data"]], second["next_cursor"]) == ([3], None)
    assert_problem(await api.get(path, params={"cursor": "x"}), 422, "/cursor")
    assert_problem(await api.get(path, params={"cursor": "9" * 10}), 422, "/cursor")
    assert await history(api, task_id, cursor="9" * 9) == []


async def test_it_goes_with_its_task_and_is_its_owners(api: httpx.AsyncClient, db: Database) -> None:
    theirs = await ended(db, lifecycle.Failed(ERROR), owner="somebody else")
    for unknown in (uuid7(), theirs):
        assert_problem(await api.get(f"/api/tasks/{unknown}/attempts"), 404)
    await lifecycle.prune(db, older_than_seconds=-1, limit=10)
    assert await rows(db) == 0


def test_every_outcome_has_a_word() -> None:
    ends: list[lifecycle.Outcome] = [
        lifecycle.Succeeded("1"),
        lifecycle.Failed(ERROR),
        lifecycle.TimedOut(1.0),
        lifecycle.Cancelled(),
    ]
    words = [lifecycle.decide(Budgets(), outcome).outcome for outcome in ends]
    assert words == ["succeeded", "failed", "failed", "cancelled"]
    assert {*words, *(word for _, word, _ in OUTCOMES)} == set(AttemptOutcome)

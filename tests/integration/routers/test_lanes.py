"""The short ways to a submit, a status and a result: nobody can tell them from the usual ones."""

from typing import Any
from uuid import uuid4

import httpx
import pytest
from starlette.routing import Match, NoMatchFound

from app import lifecycle
from app.db import Database
from app.main import create_app
from app.routers import admission, lanes
from tests.integration.routers.test_tasks import assert_problem
from tests.support import database

BOOM = lifecycle.Error(type="ValueError", message="boom")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that took a lane."""
    found: list[str] = []
    answer = lanes.Lane.answer

    async def noted(self: lanes.Lane, scope: Any, receive: Any, send: Any) -> Any:
        assert "router" not in scope, "it stands ahead of all routes"
        found.append(scope["path"])
        return await answer(self, scope, receive, send)

    monkeypatch.setattr(lanes.Lane, "answer", noted)
    return found


def seen(answer: httpx.Response) -> tuple[int, dict[str, str], Any]:
    headers = {name: value for name, value in answer.headers.items() if name not in {"date", "location", "x-trace-id"}}
    return answer.status_code, headers, answer.json() if answer.content else None


async def test_both_ways_give_the_same_answers(api: httpx.AsyncClient, taken: list[str]) -> None:
    bodies: list[Any] = [{}, {"task": "sample.echo", "args": [1]}, {"task": "nobody"}, {"args": 7}, [1], "text"]
    for body in bodies:
        short = await api.post("/api/tasks/submit", json=body)
        usual = await api.post("/api/tasks/submit?usual", json=body)
        one, other = seen(short), seen(usual)
        if short.status_code == 202:
            assert one[2].keys() == other[2].keys() == {"task_id"}
            assert short.headers["location"] == f"/api/tasks/{one[2]['task_id']}"
            one, other = one[:2], other[:2]  # type: ignore[assignment]  # the ids differ
        assert one == other
    assert taken == ["/api/tasks/submit"] * len(bodies)
    taken.clear()
    known = (await api.post("/api/tasks/submit")).json()["task_id"]
    for task_id in (known, str(uuid4())):
        for headers in ({}, {"If-None-Match": '"PENDING"'}, {"If-None-Match": '"SUCCESS"'}):
            short = await api.get(f"/api/tasks/{task_id}/status", headers=headers)
            usual = await api.get(f"/api/tasks/{task_id.upper()}/status", headers=headers)
            assert seen(short) == seen(usual)
        assert seen(await api.get(f"/api/tasks/{task_id}/result")) == seen(
            await api.get(f"/api/tasks/{task_id.upper()}/result")
        )
    assert len([path for path in taken if path.endswith("/status")]) == 6
    assert len([path for path in taken if path.endswith("/result")]) == 2
    assert known.upper() not in "".join(taken)


async def test_what_is_not_plain_goes_the_usual_way(api: httpx.AsyncClient, taken: list[str]) -> None:
    assert_problem(await api.get("/api/tasks/nobody/status"), 422, "/id")
    assert_problem(await api.get("/api/tasks/submit"), 405)
    assert (await api.put("/api/tasks/submit")).status_code == 405
    some = str(uuid4())
    long = {"If-None-Match": '"' + "x" * 2001 + '"'}
    assert_problem(await api.get(f"/api/tasks/{some}/status", headers=long), 422, "/if-none-match")
    assert (await api.delete(f"/api/tasks/{some}/status")).status_code == 405
    assert (await api.get(f"/api/tasks/{some}/status/")).status_code == 404
    assert_problem(await api.get("/api/tasks/nobody/result"), 422, "/id")
    assert_problem(await api.get(f"/api/tasks/{some}/result?wait=soon"), 422, "/wait")
    assert (await api.get(f"/api/tasks/{some}/result", headers={"Prefer": "wait=0"})).status_code == 404
    assert taken == []


def test_a_lane_is_called_as_its_route_is(api_settings: Any) -> None:
    """Metrics and traces name a request by the route that matched."""
    api = create_app(api_settings)
    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/api/tasks/{uuid4()}/status",
        "query_string": b"",
        "headers": [],
    }
    found = next(route for route in api.router.routes if route.matches(dict(scope))[0] is Match.FULL)
    assert isinstance(found, lanes.Lane)
    assert found.path == "/api/tasks/{id}/status"
    assert found.matches(dict(scope))[1]["route"].path == "/api/tasks/{id}/status"


def test_a_route_is_found_by_its_name_behind_the_lanes(api_settings: Any) -> None:
    api = create_app(api_settings)
    assert api.url_path_for("read_status", id="7") == "/api/tasks/7/status"
    with pytest.raises(NoMatchFound):
        api.url_path_for("nobody")


class Unforeseen(Exception):
    """Nobody has a handler for it."""


async def test_what_nobody_foresaw_is_answered_as_anywhere(
    api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any, **__: Any) -> None:
        raise Unforeseen

    monkeypatch.setattr(admission, "accept", fails)
    for path in ("/api/tasks/submit", "/api/tasks/submit?usual"):
        with pytest.raises(Unforeseen):  # The server logs it, behind the answer.
            await api.post(path, json={})


@pytest.mark.parametrize("outcome", [lifecycle.Succeeded('{"a": [1.50]}'), lifecycle.Failed(BOOM)])
async def test_an_end_is_the_same_either_way(
    api: httpx.AsyncClient, db: Database, taken: list[str], outcome: lifecycle.Outcome
) -> None:
    claimed = await database.started(db, await database.submitted(db))
    task_id = claimed.claim.task_id
    await lifecycle.settle(db, claimed.claim, lifecycle.decide(claimed.budgets, outcome))
    short = await api.get(f"/api/tasks/{task_id}/result")
    usual = await api.get(f"/api/tasks/{task_id}/result", headers={"Prefer": "respond-async"})
    assert short.content == usual.content
    assert seen(short) == seen(usual)
    assert short.status_code == 200
    assert taken == [f"/api/tasks/{task_id}/result"]


async def test_keys_and_traces_are_read_in_a_lane(api: httpx.AsyncClient, taken: list[str]) -> None:
    headers = {"Idempotency-Key": "once", "traceparent": f"00-{7:032x}-{8:016x}-00"}
    first = await api.post("/api/tasks/submit", json={}, headers=headers)
    assert first.headers["x-trace-id"] == f"{7:032x}"
    again = await api.post("/api/tasks/submit?usual", json={}, headers=headers)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert_problem(
        await api.post("/api/tasks/submit", json={}, headers={b"Idempotency-Key": "é".encode()}),
        400,
        "/Idempotency-Key",
    )
    assert taken == ["/api/tasks/submit"] * 2


async def test_an_answer_says_how_long_it_is_and_what(api: httpx.AsyncClient) -> None:
    answer = await api.post("/api/tasks/submit", json={})
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.content)

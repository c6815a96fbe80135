"""Schedules over HTTP: what is written is read, what is wrong is named, and owners are apart."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from app import lifecycle, schedules
from app.core import ids
from app.db import Database
from tests.integration.routers.test_tasks import assert_problem

PATH = "/api/schedules"
HOURLY = {"every": 3600, "submit": {"task": "sample.echo", "args": [1]}}


async def put(api: httpx.AsyncClient, name: str = "nightly", **changes: Any) -> dict[str, Any]:
    answer = await api.put(f"{PATH}/{name}", json={**HOURLY, **changes})
    assert answer.status_code in {200, 201}, answer.text
    found: dict[str, Any] = answer.json()
    return found


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def test_a_schedule_is_made_read_replaced_and_removed(api: httpx.AsyncClient) -> None:
    wanted = {
        "cron": "30 2 * * mon-fri",
        "time_zone": "Europe/Berlin",
        "jitter": 5,
        "start": "2030-01-01T00:00:00Z",
        "end": "2040-01-01T00:00:00+01:00",
        "catch_up": "all",
        "overlap": "skip",
        "paused": False,
        "submit": {
            "task": "sample.echo",
            "args": [{"é": [1, 2.5, None, "😀"]}],
            "queue": "reports",
            "expires": 60,
            "webhook_url": "https://example.com/hook?token=hunter2",
        },
    }
    made = await api.put(f"{PATH}/nightly", json=wanted)
    assert made.status_code == 201
    assert made.headers["location"] == f"{PATH}/nightly"
    shown = made.json()
    assert shown["task"] == "sample.echo"
    assert {name: shown[name] for name in wanted if name not in {"end", "submit"}} == {
        name: value for name, value in wanted.items() if name not in {"end", "submit"}
    }
    assert moment(shown["end"]) == datetime(2039, 12, 31, 23, tzinfo=UTC)
    assert shown["submit"] == wanted["submit"] | {"webhook_url": "https://example.com/hook?…"}  # type: ignore[operator]
    assert shown["next_runs"][:2] == ["2030-01-01T01:30:00Z", "2030-01-02T01:30:00Z"]
    assert len(shown["next_runs"]) == 5
    assert shown["next_run"] == shown["next_runs"][0]
    assert (await api.get(f"{PATH}/nightly")).json() == shown

    replaced = await api.put(f"{PATH}/nightly", json=wanted | {"cron": "@hourly"})
    assert replaced.status_code == 200
    assert "location" not in replaced.headers
    assert replaced.json()["next_runs"][:2] == ["2030-01-01T00:00:00Z", "2030-01-01T01:00:00Z"]
    assert replaced.json()["created_at"] == shown["created_at"]

    removed = await api.delete(f"{PATH}/nightly")
    assert (removed.status_code, removed.content) == (204, b"")
    assert_problem(await api.get(f"{PATH}/nightly"), 404)
    assert_problem(await api.delete(f"{PATH}/nightly"), 404)


async def test_what_says_the_same_again_moves_nothing(api: httpx.AsyncClient) -> None:
    first = await put(api)
    again = await put(api, submit={"task": "sample.echo", "args": [2]})
    assert again["next_runs"] == first["next_runs"]
    assert again["submit"]["args"] == [2]
    assert (await put(api, every=1800))["next_run"] != first["next_run"]


async def test_what_was_read_and_is_sent_back_keeps_the_whole_url(api: httpx.AsyncClient, db: Database) -> None:
    async def stored() -> str | None:
        found = await schedules.get(db, "", "nightly")
        assert found is not None
        url: str | None = json.loads(found.definition.submit).get("webhook_url")
        return url

    def sent_back(read: dict[str, Any], **submit: Any) -> dict[str, Any]:
        return {"every": read["every"], "submit": {**read["submit"], **submit}}

    url = "https://example.com/hook?token=hunter2&x=%E2%80%A6"
    made = await put(api, submit={"task": "sample.echo", "args": [1], "webhook_url": url})
    read = (await api.get(f"{PATH}/nightly")).json()
    assert read["submit"]["webhook_url"] == "https://example.com/hook?…"
    again = await api.put(f"{PATH}/nightly", json=sent_back(read, args=[2]))
    assert (again.status_code, again.json()["submit"]) == (200, {**made["submit"], "args": [2]})
    assert await stored() == url

    # It is of this URL only, and of this schedule only.
    for other in ("https://example.com/other?…", "https://example.com/hook?token=hunter2…?…"):
        answer = await api.put(f"{PATH}/nightly", json=sent_back(read, webhook_url=other))
        assert_problem(answer, 422, "/submit/webhook_url")
        assert "hunter2" not in answer.text
    assert_problem(await api.put(f"{PATH}/new", json=sent_back(read)), 422, "/submit/webhook_url")
    assert await stored() == url
    for meant in ("https://example.com/hook", "https://example.com/hook?token=2", None):
        await put(api, submit={"task": "sample.echo", "args": [1], "webhook_url": meant})
        assert await stored() == meant
    assert_problem(await api.put(f"{PATH}/nightly", json=sent_back(read)), 422, "/submit/webhook_url")


async def test_a_paused_schedule_has_no_next_time(api: httpx.AsyncClient) -> None:
    first = await put(api)
    paused = await put(api, paused=True)
    assert (paused["next_run"], paused["next_runs"]) == (None, [])
    assert (await put(api))["next_run"] == first["next_run"]


async def test_what_was_fired_says_by_which_schedule_and_for_when(api: httpx.AsyncClient, db: Database) -> None:
    made = await put(api)
    found = await schedules.get(db, "", "nightly")
    assert found is not None
    assert found.next_run is not None
    task = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default")
    decided = schedules.Due((found.next_run,), found.next_run + timedelta(hours=1), missed=False)
    assert await schedules.fire(db, found, decided, [task]) is not None
    view = (await api.get(f"/api/tasks/{task.id}")).json()
    assert (view["schedule"], view["scheduled_for"]) == ("nightly", made["next_run"])
    after = (await api.get(f"{PATH}/nightly")).json()
    assert (after["last_run"], after["last_task_id"], after["fired"]) == (made["next_run"], str(task.id), 1)
    assert moment(after["next_run"]) - moment(made["next_run"]) == timedelta(hours=1)


async def test_schedules_are_listed_by_name_and_page(api: httpx.AsyncClient) -> None:
    names = ["a", "a.b", "b", "c-1", "c_1"]
    for name in reversed(names):
        await put(api, name)
    listed = []
    cursor: dict[str, Any] = {}
    while True:
        page = (await api.get(PATH, params={"limit": 2, **cursor})).json()
        listed += [row["name"] for row in page["data"]]
        assert all("submit" not in row for row in page["data"])
        if page["next_cursor"] is None:
            break
        cursor = {"cursor": page["next_cursor"]}
    assert sorted(listed) == names
    assert len(listed) == len(names)


async def test_another_owner_s_schedules_are_not_there(api: httpx.AsyncClient, db: Database) -> None:
    await put(api, "mine")
    await db.execute("UPDATE schedule SET owner = 'bob'")
    assert_problem(await api.get(f"{PATH}/mine"), 404)
    assert_problem(await api.delete(f"{PATH}/mine"), 404)
    assert (await api.get(PATH)).json()["data"] == []
    assert (await api.put(f"{PATH}/mine", json=HOURLY)).status_code == 201


@pytest.mark.parametrize(
    ("body", "pointers"),
    [
        ({}, ["/submit"]),
        ({"submit": {}}, ["/cron"]),
        ({"cron": "@daily", "every": 60, "submit": {}}, ["/every"]),
        ({"cron": "0 0 30 2 *", "submit": {}}, ["/cron"]),
        ({"cron": "hunter2", "submit": {}}, ["/cron"]),
        ({"cron": "* " * 300, "submit": {}}, ["/cron"]),
        ({"cron": 5, "submit": {}}, ["/cron"]),
        ({"cron": "@daily", "time_zone": "Hunter2/Zone", "submit": {}}, ["/time_zone"]),
        ({"cron": "@daily", "time_zone": "../../../etc/passwd", "submit": {}}, ["/time_zone"]),
        ({"every": 0.5, "submit": {}}, ["/every"]),
        ({"every": 1e300, "submit": {}}, ["/every"]),
        ({"every": "60", "submit": {}}, ["/every"]),
        ({"every": True, "submit": {}}, ["/every"]),
        ({"every": 60, "jitter": -1, "submit": {}}, ["/jitter"]),
        ({"every": 60, "jitter": 1e9, "submit": {}}, ["/jitter"]),
        ({"every": 60, "catch_up": "hunter2", "submit": {}}, ["/catch_up"]),
        ({"every": 60, "overlap": True, "submit": {}}, ["/overlap"]),
        ({"every": 60, "paused": 1, "submit": {}}, ["/paused"]),
        ({"every": 60, "start": "tomorrow", "submit": {}}, ["/start"]),
        ({"every": 60, "start": "0001-01-01T00:00:00Z", "submit": {}}, ["/start"]),
        ({"every": 60, "end": "9999-12-31T23:59:59Z", "submit": {}}, ["/end"]),
        ({"every": 60, "start": "2030-01-02T00:00:00Z", "end": "2030-01-01T00:00:00Z", "submit": {}}, ["/end"]),
        ({"every": 60, "submit": {"countdown": 5}}, ["/submit"]),
        ({"every": 60, "submit": {"unique_for": 60}}, ["/submit"]),
        ({"every": 60, "submit": {"expires": "2026-12-01T00:00:00Z"}}, ["/submit"]),
        ({"every": 60, "submit": None}, ["/submit"]),
        ({"every": 60, "submit": {"task": "no.such"}}, ["/submit/task"]),
        ({"every": 60, "submit": {"kwargs": {"x": "hunter2"}}}, ["/submit/kwargs/x"]),
        ({"every": 60, "submit": {"webhook_url": "http://127.0.0.1/hunter2"}}, ["/submit/webhook_url"]),
        ({"submit": {"task": "no.such", "queue": "gone"}}, ["/cron", "/submit/task", "/submit/queue"]),
        ({"every": 60, "submit": {"hunter": 2}}, ["/submit/hunter"]),
        ({"every": 60, "name": "n", "submit": {}}, ["/name"]),
    ],
)
async def test_a_bad_schedule_is_refused_with_the_fields_at_fault_and_no_values(
    api: httpx.AsyncClient, db: Database, body: dict[str, Any], pointers: list[str]
) -> None:
    answer = await api.put(f"{PATH}/n", json=body)
    assert_problem(answer, 422, *pointers)
    assert "unter2" not in answer.text
    assert await db.fetchval("SELECT count(*) FROM schedule") == 0


@pytest.mark.parametrize(
    "body",
    [
        '{"every": 1e999, "submit": {}}',
        '{"every": NaN, "submit": {}}',
        '{"every": 60, "every": 60, "submit": {}}',
        '{"every": ' + "9" * 5000 + ', "submit": {}}',
        "[" * 5000,
    ],
)
async def test_what_is_no_json_is_refused(api: httpx.AsyncClient, body: str) -> None:
    answer = await api.put(f"{PATH}/n", content=body, headers={"content-type": "application/json"})
    assert_problem(answer, 400, *[fault["pointer"] for fault in answer.json().get("errors", [])])


@pytest.mark.parametrize("name", ["%00", "a%20b", "-a", "a" * 129, "%F0%9F%98%80", "a%2Fb", "a\\b"])
async def test_a_name_that_is_none_is_refused(api: httpx.AsyncClient, name: str) -> None:
    for answer in (
        await api.put(f"{PATH}/{name}", json=HOURLY),
        await api.get(f"{PATH}/{name}"),
        await api.delete(f"{PATH}/{name}"),
    ):
        assert answer.status_code in {404, 405, 422}, answer.text


@pytest.mark.parametrize("query", [{"cursor": "a b"}, {"cursor": "\x00"}, {"cursor": ""}, {"limit": 0}, {"limit": 101}])
async def test_a_bad_page_is_refused(api: httpx.AsyncClient, query: dict[str, Any]) -> None:
    assert_problem(await api.get(PATH, params=query), 422, f"/{next(iter(query))}")


async def test_too_many_schedules_are_refused(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.schedules.table.SCHEDULES_LIMIT", 2)
    for name in "ab":
        await put(api, name)
    assert_problem(await api.put(f"{PATH}/c", json=HOURLY), 409)
    assert (await api.put(f"{PATH}/a", json=HOURLY)).status_code == 200

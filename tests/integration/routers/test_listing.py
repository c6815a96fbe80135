"""Finding tasks: every filter against what a plain look at the rows says, pages, counts, and hostile questions."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest

from app import lifecycle
from app.core.config import Settings
from app.core.statuses import TaskStatus
from app.db import PLANNER, Database
from app.lifecycle import listing
from tests.integration.routers.test_tasks import assert_problem

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
FILL = """
INSERT INTO task (id, name, queue, args, kwargs, tags, owner, status, attempt, token, lease_until, result, error_type,
                  error_message, created_at, started_at, finished_at)
SELECT md5($5 || n::text)::uuid, 'task.' || n % 7, 'queue-' || n % 3, '[]', '{}',
       CASE WHEN n % 4 = 0 THEN ARRAY['nightly', 'customer-' || n % 50] ELSE '{}' END, $1, status,
       CASE WHEN status = 'PENDING' THEN 0 ELSE 1 END, gen_random_uuid(),
       CASE WHEN status = 'STARTED' THEN moment + interval '1 day' END,
       CASE WHEN status = 'SUCCESS' THEN '1'::json END,
       CASE WHEN status IN ('FAILURE', 'RETRY') THEN 'Error' || n % 2 WHEN status = 'REVOKED' THEN 'Cancelled'
            WHEN n % 5 = 0 THEN 'Error1' END,
       repeat('x', 600), moment, CASE WHEN status <> 'PENDING' THEN moment END,
       CASE WHEN status IN ('SUCCESS', 'FAILURE', 'REVOKED') THEN moment + make_interval(mins => n * 37 % 60) END
  FROM generate_series(1, $2::int) AS n,
       LATERAL (SELECT $3::timestamptz + make_interval(secs => n / 3) AS moment,
                       (ARRAY['SUCCESS', 'SUCCESS', 'FAILURE', 'REVOKED', 'PENDING', 'RETRY', 'STARTED', $4])[1 + n % 8]
                         AS status) AS kind
"""


async def fill(db: Database, tasks: int, owner: str = "", *, often: str = "SUCCESS") -> None:
    await db.execute(FILL, owner, tasks, NOON, often, owner)


async def collected(api: httpx.AsyncClient, **asked: Any) -> list[dict[str, Any]]:
    """All pages, one after another."""
    found: list[dict[str, Any]] = []
    while True:
        answer = await api.get("/api/tasks", params=asked)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        assert len(page["data"]) <= asked.get("limit", 50)
        found += page["data"]
        if page["next_cursor"] is None:
            assert "link" not in answer.headers
            return found
        asked["cursor"] = page["next_cursor"]


def at(seconds: float) -> str:
    return (NOON + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


FILTERS: list[tuple[dict[str, Any], str]] = [
    ({}, "true"),
    ({"status": "FAILURE"}, "status = 'FAILURE'"),
    ({"status": ["PENDING", "REVOKED"]}, "status IN ('PENDING', 'REVOKED')"),
    ({"task": "task.3"}, "name = 'task.3'"),
    ({"queue": "queue-2"}, "queue = 'queue-2'"),
    ({"tag": "customer-8"}, "'customer-8' = ANY (tags)"),
    ({"error_type": "Error1"}, "error_type = 'Error1' AND status <> 'SUCCESS'"),
    ({"created_after": at(30)}, f"created_at >= '{at(30)}'"),
    ({"created_after": at(10), "created_before": at(30)}, f"created_at >= '{at(10)}' AND created_at < '{at(30)}'"),
    ({"finished_after": at(1800)}, f"finished_at >= '{at(1800)}'"),
    ({"finished_before": at(900)}, f"finished_at < '{at(900)}'"),
    (
        {"finished_after": at(900), "finished_before": at(1800), "status": "SUCCESS"},
        f"finished_at >= '{at(900)}' AND finished_at < '{at(1800)}' AND status = 'SUCCESS'",
    ),
    (
        {"status": ["FAILURE", "RETRY"], "task": "task.1", "queue": "queue-1", "created_before": at(50)},
        f"status IN ('FAILURE', 'RETRY') AND name = 'task.1' AND queue = 'queue-1' AND created_at < '{at(50)}'",
    ),
    (
        {"error_type": "Error0", "status": "FAILURE", "finished_after": at(600)},
        f"error_type = 'Error0' AND status = 'FAILURE' AND finished_at >= '{at(600)}'",
    ),
    ({"task": "nobody"}, "false"),
]
"""What is asked, and the same as SQL."""


async def test_a_filter_finds_what_it_says_newest_first(api: httpx.AsyncClient, db: Database) -> None:
    await fill(db, 300)
    await fill(db, 40, "somebody else")
    for asked, condition in FILTERS:
        by_end = "finished_after" in asked or "finished_before" in asked
        moment = "finished_at" if by_end and "error_type" not in asked else "created_at"
        expected = await db.fetch(
            f"SELECT id::text FROM task WHERE owner = '' AND {condition} ORDER BY {moment} DESC, id DESC"
        )
        found = await collected(api, limit=7, **asked)
        assert [task["task_id"] for task in found] == [row["id"] for row in expected], asked


async def test_an_owner_finds_nobody_elses(db: Database) -> None:
    await fill(db, 60)
    await fill(db, 30, "team-a")
    for wanted in (
        lifecycle.Filter(),
        lifecycle.Filter(error_type="Error1"),
        lifecycle.Filter(finished_after=NOON),
    ):
        mine = {one.id for one in (await lifecycle.page(db, "team-a", wanted, limit=100)).tasks}
        theirs = {one.id for one in (await lifecycle.page(db, "", wanted, limit=100)).tasks}
        assert mine
        assert theirs
        assert mine.isdisjoint(theirs)
    assert sum(one.tasks for one in (await lifecycle.counts(db, "team-a")).values()) == 30
    assert (await lifecycle.page(db, "nobody", lifecycle.Filter(), limit=100)).tasks == []


async def test_a_task_in_a_list_shows_what_it_is(api: httpx.AsyncClient, db: Database) -> None:
    await fill(db, 8)
    task = (await collected(api, status="FAILURE"))[0]
    assert set(task) == {
        *("task_id", "status", "task", "queue", "attempt", "failures", "max_retries", "tags", "cancel_requested"),
        *("rerun_of", "created_at", "run_at", "started_at", "finished_at", "error"),
    }
    assert (task["status"], task["task"], task["queue"], task["attempt"]) == ("FAILURE", "task.2", "queue-2", 1)
    assert task["error"] == {"type": "Error0", "message": "x" * 500}
    assert [one["error"] for one in await collected(api, status="SUCCESS")] == [None, None, None]


async def test_the_link_leads_to_the_next_page(api: httpx.AsyncClient, db: Database) -> None:
    await fill(db, 30)
    first = await api.get("/api/tasks", params={"limit": 4, "status": ["SUCCESS", "FAILURE"]})
    target, relation = first.headers["link"].split("; ")
    assert relation == 'rel="next"'
    assert urlsplit(target.strip("<>")).path == "/api/tasks"
    second = (await api.get(target.strip("<>"))).json()
    both = [task["task_id"] for task in first.json()["data"] + second["data"]]
    [whole] = [(await api.get("/api/tasks", params={"limit": 8, "status": ["SUCCESS", "FAILURE"]})).json()]
    assert both == [task["task_id"] for task in whole["data"]]


async def test_what_is_submitted_meanwhile_moves_no_page(api: httpx.AsyncClient, db: Database) -> None:
    await fill(db, 20)
    first = (await api.get("/api/tasks", params={"limit": 10})).json()
    await api.post("/api/tasks/submit")
    second = (await api.get("/api/tasks", params={"limit": 10, "cursor": first["next_cursor"]})).json()
    ids = [task["task_id"] for task in first["data"] + second["data"]]
    assert len(set(ids)) == 20
    assert second["next_cursor"] is None


async def test_a_walk_that_finds_nothing_says_where_to_go_on(
    api: httpx.AsyncClient, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "WALK", 50)
    await fill(db, 200)
    rare = await db.fetchrow(
        "UPDATE task SET name = 'rare' WHERE id = (SELECT id FROM task ORDER BY created_at, id LIMIT 1)"
        " RETURNING id::text"
    )
    assert rare is not None
    first = (await api.get("/api/tasks", params={"task": "rare"})).json()
    assert first["data"] == []
    assert first["next_cursor"] is not None
    assert [task["task_id"] for task in await collected(api, task="rare")] == [rare["id"]]
    # The last row that a page looks at may be meant itself, and the page is not the last for that.
    assert len(await collected(api)) == 200
    assert len(await collected(api, limit=50)) == 200


async def test_a_page_reads_no_more_than_it_shows(
    api_settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the planner believes of the table: it is planned once, before anybody has counted its rows."""
    asked: list[tuple[str, tuple[object, ...]]] = []
    fetch = Database.fetch

    async def noted(self: Database, sql: str, *args: object) -> list[asyncpg.Record]:
        asked.append((sql, args))
        return await fetch(self, sql, *args)

    monkeypatch.setattr(Database, "fetch", noted)
    for wanted in (
        lifecycle.Filter(),
        lifecycle.Filter(statuses=frozenset({TaskStatus.SUCCESS, TaskStatus.FAILURE})),
        lifecycle.Filter(finished_after=NOON),
        lifecycle.Filter(error_type="Error1"),
    ):
        await lifecycle.page(db, "", wanted, limit=10)
    for analyzed in (False, True):
        await fill(db, 3000, "" if analyzed else "before", often="FAILURE")
        if analyzed:
            await db.execute("ANALYZE task")
        connection = await asyncpg.connect(api_settings.postgres_dsn, server_settings=PLANNER)
        for sql, args in asked:
            await connection.execute(f"PREPARE page AS {sql}")
            given = ", ".join(_literal(arg) for arg in ("" if analyzed else "before", *args[1:]))
            [plan] = await connection.fetchrow(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE page({given})") or []
            await connection.execute("DEALLOCATE page")
            steps = list(_steps(json.loads(plan)[0]["Plan"]))
            assert not {step["Node Type"] for step in steps} & {"Sort", "Incremental Sort", "Seq Scan"}, plan
            assert max(step["Actual Rows"] for step in steps) <= 11, plan
        await connection.close()


def _steps(plan: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return [plan, *(step for part in plan.get("Plans", []) for step in _steps(part))]


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(str(one) for one in value) + "}'"
    return f"'{value}'"


async def test_tasks_are_counted_by_status_up_to_a_bound(
    api: httpx.AsyncClient, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(db, 80)
    counts = (await api.get("/api/tasks/counts")).json()["data"]
    assert counts == {
        status: {"count": count, "at_least": False}
        for status, count in {
            "PENDING": 10,
            "STARTED": 10,
            "RETRY": 10,
            "SUCCESS": 30,
            "FAILURE": 10,
            "REVOKED": 10,
        }.items()
    }
    monkeypatch.setattr(listing, "COUNT_LIMIT", 25)
    counts = (await api.get("/api/tasks/counts")).json()["data"]
    assert counts["SUCCESS"] == {"count": 25, "at_least": True}
    assert counts["FAILURE"] == {"count": 10, "at_least": False}


BAD: list[tuple[dict[str, str], str]] = [
    ({"status": "DONE"}, "/status"),
    ({"state": "SUCCESS"}, "/state"),
    ({"limit": "0"}, "/limit"),
    ({"limit": "101"}, "/limit"),
    ({"limit": "many"}, "/limit"),
    ({"task": ""}, "/task"),
    ({"task": "x" * 256}, "/task"),
    ({"tag": "a\x00b"}, "/tag"),
    ({"error_type": "\x00"}, "/error_type"),
    ({"created_after": "yesterday"}, "/created_after"),
    ({"created_before": "2026-01-01T00:00:00"}, "/created_before"),
    ({"finished_after": "0001-01-01T00:00:00+14:00"}, "/finished_after"),
    ({"finished_before": "9999-12-31T23:59:59-01:00"}, "/finished_before"),
    ({"cursor": ""}, "/cursor"),
    ({"cursor": "c1." + "g" * 32}, "/cursor"),
    ({"cursor": "c1." + "0" * 32 + "\n"}, "/cursor"),
    ({"cursor": "f1." + "0" * 32}, "/cursor"),
    ({"cursor": "c1." + "0" * 32, "finished_after": "2026-01-01T00:00:00Z"}, "/cursor"),
    ({"cursor": "c" + "9" * 18 + "." + "0" * 32}, "/cursor"),
]
"""What can't be asked, and which part of it is at fault."""


async def test_a_bad_question_is_told_which_of_its_parts_is_wrong(api: httpx.AsyncClient) -> None:
    for asked, pointer in BAD:
        assert_problem(await api.get("/api/tasks", params=asked), 422, pointer)


async def test_questions_about_the_ends_of_time_are_answered(api: httpx.AsyncClient) -> None:
    for asked in (
        {"created_after": "0001-01-01T00:00:00Z"},
        {"finished_before": "0001-01-01T00:00:00Z"},
        {"cursor": "c" + "9" * 17 + "." + "f" * 32},
        {"cursor": "c0." + "0" * 32},
    ):
        answer = await api.get("/api/tasks", params=asked)
        assert (answer.status_code, answer.json()) == (200, {"data": [], "next_cursor": None}), asked


async def test_an_id_that_a_caller_chose_is_in_its_place(api: httpx.AsyncClient, db: Database) -> None:
    """Python may submit under any id: the list goes by the time of the submit all the same."""
    ids = [UUID(int=2**128 - 1), uuid4(), UUID(int=0)]
    for task_id in ids:
        await lifecycle.submit(db, lifecycle.NewTask(id=task_id, name="sample.echo", queue="default"))
    assert [task["task_id"] for task in await collected(api, limit=1)] == [str(task_id) for task_id in ids[::-1]]


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00Z", "2999-01-31T12:00:00Z", "9999-12-31T23:59:59Z"])
async def test_a_time_that_is_looked_for_may_be_any(api: httpx.AsyncClient, moment: str) -> None:
    for name in ("created_after", "created_before", "finished_after", "finished_before"):
        assert (await api.get("/api/tasks", params={name: moment})).status_code == 200
        answer = await api.post("/api/tasks/cancel", json={name: moment})
        assert answer.status_code == 202, answer.text

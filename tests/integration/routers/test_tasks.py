"""Submit, status, result: what is promised, and what bad input gets."""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from pydantic import SecretStr

from app import lifecycle
from app.broker import Broker
from app.core.config import Settings
from app.core.ids import uuid7
from app.core.statuses import TaskStatus
from app.db import Database
from tests.integration.routers.conftest import Serve
from tests.support.scraping import sampled
from tests.support.waiting import until

SUBMIT = "/api/tasks/submit"
JSON = {"content-type": "application/json"}
SECRET = "zq-hunter2-zq"


async def row_of(db: Database, task_id: str) -> dict[str, Any]:
    row = await db.fetchrow("SELECT * FROM task WHERE id = $1", UUID(task_id))
    assert row is not None
    return dict(row)


async def submitted(api: httpx.AsyncClient, **fields: Any) -> str:
    answer = await api.post(SUBMIT, json=fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


async def ended(db: Database, outcome: lifecycle.Outcome, **fields: Any) -> UUID:
    task_id = await started(db, **fields)
    held = lifecycle.Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    assert await lifecycle.settle(db, held, lifecycle.decide(lifecycle.Budgets(), outcome)) is not None
    return task_id


async def started(db: Database, **fields: Any) -> UUID:
    task_id = uuid7()
    await lifecycle.submit(db, lifecycle.NewTask(id=task_id, name="long_task", queue="default", **fields))
    held = lifecycle.Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    assert await lifecycle.claim(db, held, name="long_task", worker="test", lease_seconds=30)
    return task_id


def assert_problem(answer: httpx.Response, status: int, *pointers: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "detail"} <= set(problem) <= {"type", "title", "status", "detail", "errors"}
    assert problem["status"] == status
    assert re.fullmatch(r"/problems/[a-z-]+", problem["type"])
    assert isinstance(problem["detail"], str)
    assert [fault["pointer"] for fault in problem.get("errors", [])] == list(pointers)
    assert len(answer.content) < 4000
    return problem


@pytest.mark.parametrize("given", [{"json": {"webhook_url": "https://example.com/hook"}}, {"json": {}}, {}])
async def test_the_three_bodies_of_the_mission_are_accepted(
    api: httpx.AsyncClient, db: Database, given: dict[str, Any]
) -> None:
    answer = await api.post(SUBMIT, **given)
    assert answer.status_code == 202
    assert set(answer.json()) == {"task_id"}
    task_id = answer.json()["task_id"]
    assert str(UUID(task_id)) == task_id
    assert UUID(task_id).version == 7
    assert answer.headers["location"] == f"/api/tasks/{task_id}"
    row = await row_of(db, task_id)
    assert (row["name"], row["args"], row["kwargs"], row["queue"]) == ("long_task", "[]", "{}", "default")
    assert row["webhook_url"] == given.get("json", {}).get("webhook_url")


async def test_every_field_reaches_the_row(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await submitted(
        api,
        task="sample.echo",
        args=[{"é": [1, 2.5, None, "😀"]}],
        queue="reports",
        countdown=60,
        expires=3600,
        max_retries=7,
        time_limit=12.5,
        tags=["nightly", "é"],
        webhook_url="https://example.com/hook",
        webhook_events=["task.started", "task.failed", "task.started"],
    )
    row = await row_of(db, task_id)
    assert row["webhook_events"] == ["task.started", "task.failed"]
    assert row["args"] == '[{"é": [1, 2.5, null, "😀"]}]'
    assert (row["name"], row["queue"], row["max_retries"], row["time_limit"]) == ("sample.echo", "reports", 7, 12.5)
    assert row["run_at"] - row["created_at"] == timedelta(seconds=60)
    assert row["expires_at"] - row["created_at"] == timedelta(seconds=3600)
    assert row["tags"] == ["nightly", "é"]
    assert row["published_at"] is None
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", row["traceparent"])


async def test_moments_are_stored_as_they_were_meant(api: httpx.AsyncClient, db: Database) -> None:
    soon = (datetime.now(UTC) + timedelta(hours=5)).replace(microsecond=0)
    row = await row_of(db, await submitted(api, eta=soon.isoformat(), expires=(soon + timedelta(1)).isoformat()))
    assert (row["run_at"], row["expires_at"]) == (soon, soon + timedelta(1))


async def test_a_task_keeps_its_own_budget_unless_told_otherwise(api: httpx.AsyncClient, db: Database) -> None:
    assert (await row_of(db, await submitted(api)))["max_retries"] == 3
    assert (await row_of(db, await submitted(api, max_retries=0)))["max_retries"] == 0


async def test_the_callers_trace_goes_on(api: httpx.AsyncClient, db: Database) -> None:
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = await api.post(SUBMIT, headers={"traceparent": sent})
    assert (await row_of(db, answer.json()["task_id"]))["traceparent"] == sent


async def test_the_bell_is_rung_after_the_commit(api: httpx.AsyncClient, api_settings: Settings) -> None:
    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")
    await submitted(api, queue="reports")

    async def depth() -> Any:
        return await broker.depth("reports")

    assert await until(depth, what="the message") == 1
    assert await broker.depth("default") == 0
    await broker.close()


async def test_no_bell_is_rung_while_a_submit_waits_for_its_commit(
    api: httpx.AsyncClient, api_settings: Settings
) -> None:
    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")
    other = await asyncpg.connect(api_settings.postgres_dsn)
    onlooker = await asyncpg.connect(api_settings.postgres_dsn)

    async def waits() -> Any:
        return await onlooker.fetchval(
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'task'::regclass"
        )

    async def depth() -> Any:
        return await broker.depth("reports")

    try:
        async with other.transaction():
            await other.execute("LOCK TABLE task IN SHARE MODE")
            submitting = asyncio.create_task(submitted(api, queue="reports"))
            await until(waits, what="a submit that waits")
            # What was rung before would be there by now: a look at Redis takes as long as a push.
            assert [await depth() for _ in range(50)] == [0] * 50
        await submitting
        assert await until(depth, what="the message") == 1
    finally:
        await onlooker.close()
        await other.close()
        await broker.close()


async def test_an_accepted_task_is_counted(api: httpx.AsyncClient) -> None:
    labels = {"task": "sample.echo", "queue": "reports", "outcome": "accepted"}
    before = sampled("taskqueue_tasks_submitted_total", **labels) or 0
    await submitted(api, task="sample.echo", args=[1], queue="reports")
    assert sampled("taskqueue_tasks_submitted_total", **labels) == before + 1


async def test_a_refused_one_is_counted_by_its_kind(api: httpx.AsyncClient) -> None:
    labels = {"reason": "unknown_task"}
    before = sampled("taskqueue_submit_rejected_total", **labels) or 0
    await api.post(SUBMIT, json={"task": "nobody"})
    assert sampled("taskqueue_submit_rejected_total", **labels) == before + 1


async def test_a_task_goes_from_pending_to_success(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await submitted(api, countdown=1000)
    pending = await api.get(f"/api/tasks/{task_id}/status")
    assert (pending.status_code, pending.content) == (200, b'{"status":"PENDING"}')
    running = await started(db)
    assert (await api.get(f"/api/tasks/{running}/status")).json() == {"status": "STARTED"}
    for waiting in (task_id, running):
        not_yet = await api.get(f"/api/tasks/{waiting}/result")
        assert (not_yet.status_code, not_yet.json()) == (202, {"detail": "Result not available yet"})
        assert not_yet.headers["retry-after"] == "1"
    done = await ended(db, lifecycle.Succeeded('"fine"'))
    assert (await api.get(f"/api/tasks/{done}/status")).json() == {"status": "SUCCESS"}
    assert (await api.get(f"/api/tasks/{done}/result")).json() == {"result": "fine"}


@pytest.mark.parametrize(
    "result", ["null", "1.10", "123456789012345678901234567890", '{"a":  [1, "é"]}', '{"__type__":"x","__value__":1}']
)
async def test_a_result_goes_out_as_it_was_stored(api: httpx.AsyncClient, db: Database, result: str) -> None:
    answer = await api.get(f"/api/tasks/{await ended(db, lifecycle.Succeeded(result))}/result")
    assert answer.status_code == 200
    assert answer.text == f'{{"result": {result}}}'
    assert answer.headers["content-type"] == "application/json"


async def test_a_failure_says_why(api: httpx.AsyncClient, db: Database) -> None:
    error = lifecycle.Error(type="OSError", message="no such page", traceback="Traceback: secret")
    answer = await api.get(f"/api/tasks/{await ended(db, lifecycle.Failed(error))}/result")
    assert answer.status_code == 200
    assert answer.json() == {"result": None, "error": {"type": "OSError", "message": "no such page"}}


async def test_a_cancelled_task_says_so(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await submitted(api)
    await lifecycle.cancel(db, UUID(task_id))
    assert (await api.get(f"/api/tasks/{task_id}/status")).json() == {"status": "REVOKED"}
    error = (await api.get(f"/api/tasks/{task_id}/result")).json()["error"]
    assert error["type"] == "Cancelled"


async def test_everything_is_known_of_a_task(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await started(db, webhook_url="https://example.com/hook", tags=("a",))
    held = lifecycle.Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    await lifecycle.record_progress(db, held, 0.5, "half")
    known = (await api.get(f"/api/tasks/{task_id}")).json()
    assert known["task_id"] == str(task_id)
    assert (known["status"], known["task"], known["queue"]) == ("STARTED", "long_task", "default")
    assert (known["attempt"], known["failures"], known["max_retries"], known["tags"]) == (1, 0, 3, ["a"])
    assert known["progress"] == {"fraction": 0.5, "message": "half"}
    assert known["webhook"] == {
        "url": "https://example.com/hook", "status": None, "attempt": 0, "next_at": None
    }  # fmt: skip
    assert (known["error"], known["finished_at"]) == (None, None)
    for moment in ("created_at", "run_at", "started_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", known[moment])


async def test_the_end_of_a_task_is_known_with_its_webhook(api: httpx.AsyncClient, db: Database) -> None:
    error = lifecycle.Error(type="OSError", message="no such page", traceback="Traceback: secret")
    task_id = await ended(db, lifecycle.Failed(error), webhook_url="https://example.com/hook")
    answer = await api.get(f"/api/tasks/{task_id}")
    known = answer.json()
    assert (known["status"], known["failures"]) == (TaskStatus.FAILURE, 1)
    assert known["error"] == {"type": "OSError", "message": "no such page"}
    assert known["webhook"]["status"] == "pending"
    assert known["webhook"]["next_at"].endswith("Z")
    assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["", "/status", "/result"])
async def test_an_unknown_task_is_404(api: httpx.AsyncClient, path: str) -> None:
    problem = assert_problem(await api.get(f"/api/tasks/{uuid4()}{path}"), 404)
    assert problem["type"] == "/problems/task-not-found"


@pytest.mark.parametrize("path", ["", "/status", "/result"])
async def test_a_task_past_its_retention_is_410(api: httpx.AsyncClient, db: Database, path: str) -> None:
    task_id = await submitted(api, countdown=60)
    assert await lifecycle.cancel(db, UUID(task_id)) is not None
    assert await lifecycle.prune(db, older_than_seconds=-1, limit=10) == 1

    problem = assert_problem(await api.get(f"/api/tasks/{task_id}{path}"), 410)
    assert problem["type"] == "/problems/result-expired"


async def test_beyond_the_cap_submits_are_asked_to_come_back(
    api_settings: Settings, db: Database, serve: Serve
) -> None:
    async with serve(api_settings.model_copy(update={"max_backlog": 3})) as api:

        async def accepted() -> str:
            # A submit in the middle of a count may be counted twice, until the next count.
            answer = await api.post(SUBMIT, json={"countdown": 60})
            return str(answer.json()["task_id"]) if answer.status_code == 202 else ""

        tasks = [await until(accepted, what="a submit under the cap") for _ in range(3)]
        refused = await api.post(SUBMIT, json={})
        assert_problem(refused, 503)
        assert refused.headers["retry-after"] == "5"
        assert await db.fetchval("SELECT count(*) FROM task") == 3

        await lifecycle.cancel(db, UUID(tasks[0]))
        await until(accepted, what="room for one more")
        assert_problem(await api.post(SUBMIT, json={}), 503)


@pytest.mark.parametrize("path", ["", "/status", "/result"])
@pytest.mark.parametrize("task_id", ["42", SECRET, "%00", "%ff", "x" * 5000, "🦊", "0" * 31, "*"])
async def test_an_id_that_is_no_uuid_is_422(api: httpx.AsyncClient, task_id: str, path: str) -> None:
    answer = await api.get(f"/api/tasks/{task_id}{path}")
    assert_problem(answer, 422, "/id")
    assert SECRET not in answer.text


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"task": "nobody"}, "/task"),
        ({"task": 1}, "/task"),
        ({"surprise": SECRET}, "/surprise"),
        ({"s" * 5000: 1}, "/" + "s" * 64),
        ({"args": ["5"]}, "/args/0"),
        ({"args": [1, 2]}, "/args/1"),
        ({"args": [-1]}, "/args/0"),
        ({"kwargs": {"x": SECRET}}, "/kwargs/x"),
        ({"kwargs": {"x": True}}, "/kwargs/x"),
        ({"kwargs": {"x": 1e300}}, "/kwargs/x"),
        ({"kwargs": {"y": 1}}, "/kwargs/y"),
        ({"args": [1], "kwargs": {"x": 1}}, "/kwargs/x"),
        ({"task": "http_request"}, "/kwargs/url"),
        ({"task": "http_request", "kwargs": {"url": "http://x.test", "headers": {"a": 1}}}, "/kwargs/headers/a"),
        ({"queue": "nobody"}, "/queue"),
        ({"countdown": -1}, "/countdown"),
        ({"countdown": "5"}, "/countdown"),
        ({"countdown": 1, "eta": "2030-01-01T00:00:00Z"}, "/eta"),
        ({"eta": "9999-12-31T23:59:59-14:00"}, "/eta"),
        ({"eta": SECRET}, "/eta"),
        ({"expires": 0}, "/expires"),
        ({"max_retries": 101}, "/max_retries"),
        ({"max_retries": 10**400}, "/max_retries"),
        ({"time_limit": 0}, "/time_limit"),
        ({"tags": ["x" * 65]}, "/tags/0"),
        ({"tags": "x"}, "/tags"),
        *(
            ({"webhook_url": url}, "/webhook_url")
            for url in (
                SECRET, "ftp://example.com/x", "https://", "javascript:alert(1)", "//example.com", 1,
                "https://user:pw@example.com/", "http://127.0.0.1/", "https://[::1]/", "https://169.254.169.254/",
                "https://example.com:22/", "https://exa mple.com/", "x" * 3000,
            )
        ),
    ],
)  # fmt: skip
async def test_a_wrong_field_is_named(api: httpx.AsyncClient, db: Database, body: dict[str, Any], pointer: str) -> None:
    answer = await api.post(SUBMIT, json=body)
    problem = assert_problem(answer, 422, pointer)
    assert problem["type"] == "/problems/validation-failed"
    assert SECRET not in answer.text
    assert await db.fetchval("SELECT count(*) FROM task") == 0


async def test_every_wrong_field_is_named_at_once(api: httpx.AsyncClient) -> None:
    answer = await api.post(SUBMIT, json={"webhook_url": "x", "queue": "nobody", "kwargs": {"x": "1"}})
    assert_problem(answer, 422, "/webhook_url", "/kwargs/x", "/queue")


@pytest.mark.parametrize(
    ("raw", "status", "pointers"),
    [
        (b"{", 400, []),
        (b'{"task": "long_task",}', 400, []),
        (b'\xef\xbb\xbf{"task": "long_task"}', 400, []),
        (b'{"task": "\xff"}', 400, []),
        ('{"task": "long_task"}'.encode("utf-16"), 400, []),
        (b'{"kwargs": {"x": NaN}}', 400, ["/kwargs/x"]),
        (b'{"kwargs": {"x": -Infinity}}', 400, ["/kwargs/x"]),
        (b'{"kwargs": {"x": 1e999}}', 400, ["/kwargs/x"]),
        (b'{"kwargs": {"x": ' + b"9" * 5000 + b"}}", 400, ["/kwargs/x"]),
        (b'{"task": "a", "task": "b"}', 400, ["/task"]),
        (b'{"args": ' + b"[" * 1000 + b"]" * 1000 + b"}", 400, []),
        (b'{"args": ' + b"[" * 500_000, 400, []),
        (json.dumps({"args": [0] * 20_000}).encode(), 400, []),
        (rb'{"webhook_url": "https://example.com/\u0000"}', 422, ["/webhook_url"]),
        (rb'{"kwargs": {"x": "\ud800"}}', 422, ["/kwargs/x"]),
        (rb'{"\ud800": 1}', 422, ["/?"]),
        (b"[]", 422, [""]),
        (b"null", 422, [""]),
        (b'"' + SECRET.encode() + b'"', 422, [""]),
        (b'{"a": "' + b"x" * 1024 * 1024 + b'"}', 413, []),
    ],
)
async def test_a_hostile_body_is_a_problem(
    api: httpx.AsyncClient, raw: bytes, status: int, pointers: list[str]
) -> None:
    answer = await api.post(SUBMIT, content=raw, headers=JSON)
    assert_problem(answer, status, *pointers)
    assert SECRET not in answer.text


async def test_a_streamed_body_is_bounded_too(api: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b" " * 65536

    assert_problem(await api.post(SUBMIT, content=endless(), headers=JSON), 413)


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_another_content_type_is_415(api: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert_problem(await api.post(SUBMIT, content=b"{}", headers=headers), 415)


async def test_the_largest_integers_and_deep_values_pass_and_are_kept(api: httpx.AsyncClient, db: Database) -> None:
    digits, deep = "9" * 4300, "[" * 29 + "]" * 29
    raw = f'{{"task": "sample.echo", "args": [[{digits}, {deep}]]}}'
    answer = await api.post(SUBMIT, content=raw, headers=JSON)
    assert answer.status_code == 202
    assert (await row_of(db, answer.json()["task_id"]))["args"] == f"[[{digits}, {deep}]]"


async def test_a_path_that_is_not_there_is_a_problem(api: httpx.AsyncClient) -> None:
    for path in (f"/{SECRET}", "/api/tasks/", "/api/tasks/submit/", "/api/tasks/a/b/c"):
        answer = await api.get(path)
        assert_problem(answer, 404)
        assert SECRET not in answer.text


@pytest.mark.parametrize(("method", "allowed"), [("PUT", "POST"), ("OPTIONS", "POST"), ("DELETE", "POST")])
async def test_another_method_is_405_and_says_what_is_allowed(
    api: httpx.AsyncClient, method: str, allowed: str
) -> None:
    answer = await api.request(method, SUBMIT)
    assert_problem(answer, 405)
    assert allowed in answer.headers["allow"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", SUBMIT, "POST"),
        ("GET", "/api/tasks/batch", "POST"),
        ("DELETE", "/api/catalog/long_task", "GET, POST"),
        ("POST", "/api/catalog", "GET"),
        ("PUT", f"/api/tasks/{UUID(int=7)}/cancel", "POST"),
        ("POST", f"/api/tasks/{UUID(int=7)}", "GET"),
        ("POST", "/healthz", "GET"),
    ],
)
async def test_a_path_says_all_that_it_allows_and_is_no_id(
    api: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await api.request(method, path)
    assert_problem(answer, 405)
    assert answer.headers["allow"] == allowed


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else gets meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


async def test_without_postgres_every_request_is_503(api_settings: Settings, serve: Serve) -> None:
    with closed_port() as port:
        url = SecretStr(f"postgresql://nobody@127.0.0.1:{port}/none")
        async with serve(api_settings.model_copy(update={"database_url": url})) as api:
            for answer in (
                await api.post(SUBMIT),
                *[await api.get(f"/api/tasks/{uuid4()}{path}") for path in ("", "/status", "/result")],
            ):
                assert_problem(answer, 503)
                assert answer.headers["retry-after"] == "1"
                assert "nobody" not in answer.text


async def test_without_redis_submits_succeed(api_settings: Settings, serve: Serve, db: Database) -> None:
    with closed_port() as port:
        url = SecretStr(f"redis://127.0.0.1:{port}/0")
        async with serve(api_settings.model_copy(update={"redis_url": url})) as api:
            task_id = UUID(await submitted(api))
            # What could not be pushed is handed to the relay.
            stamp = "SELECT published_at IS NULL AND position IS NOT NULL FROM task WHERE id = $1"
            await until(lambda: db.fetchval(stamp, task_id), what="the handing over")


async def test_events_for_nobody_and_unknown_ones_are_refused(api: httpx.AsyncClient) -> None:
    for fields, pointer in (
        ({"webhook_events": ["task.failed"]}, "/webhook_events"),
        ({"webhook_events": ["task.paused"], "webhook_url": "https://example.com/"}, "/webhook_events/0"),
    ):
        assert_problem(await api.post(SUBMIT, json=fields), 422, pointer)


async def test_a_private_webhook_is_admitted_in_development(api_settings: Settings, serve: Serve) -> None:
    async with serve(api_settings.model_copy(update={"webhook_allow_private": True})) as api:
        assert await submitted(api, webhook_url="http://127.0.0.1:9000/hook")


async def test_a_fault_of_ours_is_a_500_without_its_reason(api: httpx.AsyncClient, db: Database) -> None:
    await db.execute("DROP TABLE webhook_delivery, task_attempt CASCADE")
    await db.execute("ALTER TABLE task ALTER COLUMN id TYPE text USING id::text")
    quiet = httpx.ASGITransport(app=api._transport.app, raise_app_exceptions=False)  # type: ignore[attr-defined]
    async with httpx.AsyncClient(transport=quiet, base_url="http://api.test") as client:
        answer = await client.get(f"/api/tasks/{uuid4()}/status")
    assert_problem(answer, 500)
    assert "status" not in answer.json()["detail"]
    assert "column" not in answer.text


async def test_openapi_declares_every_problem_and_the_body(api: httpx.AsyncClient) -> None:
    schema = (await api.get("/openapi.json")).json()
    submit = schema["paths"][SUBMIT]["post"]
    assert submit["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/SubmitRequest"
    }
    fields = schema["components"]["schemas"]["SubmitRequest"]["properties"]
    assert {"task", "args", "kwargs", "webhook_url", "eta", "expires", "tags"} <= set(fields)
    assert "WebhookEvent" in str(fields["webhook_events"])
    assert "$defs" not in str(schema), "a reference that leads nowhere"
    assert set(submit["responses"]) == {"202", "400", "401", "403", "413", "415", "422", "429", "503"}
    assert "Location" in submit["responses"]["202"]["headers"]
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            problems = {status for status in operation["responses"] if status >= "400"}
            if path.startswith("/api/"):
                assert "503" in problems
                assert "422" in problems or not (operation.get("parameters") or operation.get("requestBody"))
                for status in problems:
                    assert set(operation["responses"][status]["content"]) == {"application/problem+json"}
    assert (await api.get("/docs")).status_code == 200
    assert "HTTPValidationError" not in schema["components"]["schemas"]

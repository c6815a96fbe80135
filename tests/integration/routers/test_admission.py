"""Submits that come again, that may be the only one of their kind, and that are many at once."""

import asyncio
import json
from collections import Counter
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
from pydantic import SecretStr

from app import lifecycle
from app.broker import Broker
from app.core import errors, ids, limits
from app.core.config import Settings
from app.db import Database
from app.routers import body
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import JSON, SECRET, SUBMIT, assert_problem
from tests.support.database import opened
from tests.support.scraping import sampled
from tests.support.waiting import until

BATCH = "/api/tasks/batch"
LATER: dict[str, Any] = {"countdown": 1000.0}


async def keyed(api: httpx.AsyncClient, key: str, path: str = SUBMIT, **fields: Any) -> httpx.Response:
    return await api.post(path, json=fields, headers={"Idempotency-Key": key})


async def count(db: Database) -> int:
    return int(await db.fetchval("SELECT count(*) FROM task"))


def tasks_of(answers: list[httpx.Response]) -> set[str]:
    assert {answer.status_code for answer in answers} == {202}
    return {answer.json()["task_id"] for answer in answers}


async def test_of_a_hundred_submits_at_once_under_one_key_one_makes_a_task(
    api: httpx.AsyncClient, db: Database, api_settings: Settings
) -> None:
    answers = await asyncio.gather(*(keyed(api, "order-4711", kwargs={"x": 1.0}) for _ in range(100)))

    [task_id] = tasks_of(answers)
    assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {None: 1, "true": 99}
    assert {answer.headers["location"] for answer in answers} == {f"/api/tasks/{task_id}"}
    assert await count(db) == 1
    assert await db.fetchval("SELECT count(*) FROM idempotency_key") == 1
    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")
    assert await until(lambda: broker.depth("default"), what="the message") == 1
    await broker.close()


async def test_a_key_with_another_request_is_a_problem_of_its_own(api: httpx.AsyncClient, db: Database) -> None:
    first = await keyed(api, "k", kwargs={"x": 1.0})
    problem = assert_problem(await keyed(api, "k", kwargs={"x": 2.0}), 422)
    assert problem["type"] == "/problems/idempotency-key-reused"
    assert_problem(await keyed(api, "k", kwargs={"x": SECRET}), 422)
    again = await keyed(api, "k", kwargs={"x": 1.0})
    assert tasks_of([first, again]) == {first.json()["task_id"]}
    assert await count(db) == 1


async def test_a_request_is_the_same_however_its_json_is_written(api: httpx.AsyncClient) -> None:
    written = [
        '{"tags": ["é"], "kwargs": {"x": 10.0}}',
        '{"kwargs":{"x":1e1},"tags":["\\u00e9"]}',
    ]
    headers = JSON | {"Idempotency-Key": "k"}
    answers = [await api.post(SUBMIT, content=text, headers=headers) for text in written]
    assert len(tasks_of(answers)) == 1


async def test_no_body_and_an_empty_one_are_the_same_request(api: httpx.AsyncClient) -> None:
    assert len(tasks_of([await api.post(SUBMIT, headers={"Idempotency-Key": "k"}), await keyed(api, "k")])) == 1


async def test_a_key_is_of_one_route(api: httpx.AsyncClient, db: Database) -> None:
    await keyed(api, "k")
    assert (await keyed(api, "k", BATCH, tasks=[{}])).status_code == 202
    for name in ("sample.echo", "sample.sleep"):
        arguments = {"value": 1} if name == "sample.echo" else {"seconds": 1}
        assert (await keyed(api, "k", f"/api/catalog/{name}", **arguments)).status_code == 202
    assert await count(db) == 4


async def test_a_key_is_of_one_owner(db: Database) -> None:
    for owner in ("", "acme"):
        key = lifecycle.SubmitKey(owner=owner, route="/r", key="k", fingerprint=b"f")
        assert await lifecycle.submit_batch(db, [_new()], key=key) is not None
        assert await lifecycle.submit_batch(db, [_new()], key=key) is None


def _new(**fields: Any) -> lifecycle.NewTask:
    return lifecycle.NewTask(**{"id": ids.uuid7(), "name": "sample.echo", "queue": "default", **fields})


async def test_a_key_may_be_quoted_or_bare(api: httpx.AsyncClient) -> None:
    assert len(tasks_of([await keyed(api, key) for key in ('a"b\\c', '"a\\"b\\\\c"')])) == 1
    assert len(tasks_of([await keyed(api, key) for key in ("x" * 255, f'"{"x" * 255}"')])) == 1


NO_KEYS = ("", " ", "a b", '"', '""', '"a', 'a" ', '"a"b', '"a\\n"', "x" * 256, f'"{"x" * 256}"', "é", "a\tb")


async def test_what_is_no_key_is_refused_by_the_name_of_its_header(api: httpx.AsyncClient, db: Database) -> None:
    for key in NO_KEYS:
        answer = await api.post(SUBMIT, headers=[(b"idempotency-key", key.encode("latin-1"))])
        problem = assert_problem(answer, 400, "/Idempotency-Key")
        assert problem["type"] == "/problems/malformed-header"
    assert await count(db) == 0


async def test_two_keys_are_none(api: httpx.AsyncClient) -> None:
    answer = await api.post(SUBMIT, headers=[("Idempotency-Key", "a"), ("Idempotency-Key", "a")])
    assert_problem(answer, 400, "/Idempotency-Key")


async def test_a_key_is_forgotten_after_a_day(api: httpx.AsyncClient, db: Database) -> None:
    first = await keyed(api, "k")
    aged = "UPDATE idempotency_key SET created_at = now() - make_interval(secs => $1)"
    await db.execute(aged, limits.KEY_SECONDS - 60.0)
    assert len(tasks_of([first, await keyed(api, "k")])) == 1
    await db.execute(aged, limits.KEY_SECONDS + 1.0)
    later = await keyed(api, "k", kwargs={"x": 2.0})
    assert "idempotent-replayed" not in later.headers
    assert len(tasks_of([first, later])) == 2


async def test_forgotten_keys_are_removed_in_batches(db: Database) -> None:
    for name in "abc":
        key = lifecycle.SubmitKey(owner="", route="/r", key=name, fingerprint=b"f")
        assert await lifecycle.submit_batch(db, [_new()], key=key)
    await db.execute("UPDATE idempotency_key SET created_at = now() - interval '25 hours' WHERE key <> 'c'")
    removed = [await lifecycle.forget_keys(db, older_than_seconds=limits.KEY_SECONDS, limit=1) for _ in range(3)]
    assert removed == [1, 1, 0]
    assert [row["key"] for row in await db.fetch("SELECT key FROM idempotency_key")] == ["c"]


async def test_what_was_accepted_is_answered_again_even_if_it_would_be_refused_now(
    api_settings: Settings, serve: Serve
) -> None:
    async with serve(api_settings) as api:
        first = await keyed(api, "k", queue="reports", **LATER)
    full_and_without_that_queue = {"max_backlog": 0, "queues": ("default",)}
    async with serve(api_settings.model_copy(update=full_and_without_that_queue)) as api:
        again = await keyed(api, "k", queue="reports", **LATER)
        assert len(tasks_of([first, again])) == 1
        assert_problem(await keyed(api, "k", **LATER), 422)
        assert_problem(await keyed(api, "another", **LATER), 503)


async def test_a_submit_without_a_key_leaves_no_trace_of_one(api: httpx.AsyncClient, db: Database) -> None:
    await api.post(SUBMIT)
    assert await db.fetchval("SELECT count(*) FROM idempotency_key") == 0


async def test_a_key_and_its_tasks_come_together_or_not_at_all(db: Database) -> None:
    key = lifecycle.SubmitKey(owner="", route="/r", key="k", fingerprint=b"f")
    bad = _new(max_retries=101)
    with pytest.raises(errors.StatementRefused):
        await lifecycle.submit_batch(db, [_new(), bad], key=key)
    assert await lifecycle.remembered(db, key) is None
    assert await count(db) == 0


async def test_of_a_hundred_unique_submits_at_once_one_makes_a_task(api: httpx.AsyncClient, db: Database) -> None:
    fields = {"kwargs": {"x": 1.0}, "unique_for": 60.0}
    answers = await asyncio.gather(*(api.post(SUBMIT, json=fields) for _ in range(100)))
    assert len(tasks_of(list(answers))) == 1
    assert Counter(answer.headers.get("task-deduplicated") for answer in answers) == {None: 1, "true": 99}
    assert await count(db) == 1


async def test_unique_is_by_task_and_arguments_however_they_are_given(api: httpx.AsyncClient) -> None:
    async def task_of(**fields: Any) -> str:
        answer = await api.post(SUBMIT, json={"unique_for": 60.0, **fields})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    first = await task_of(args=[1.0])
    assert await task_of(kwargs={"x": 1.0}, queue="reports", tags=["other"]) == first
    assert await task_of(kwargs={"x": 2.0}) != first
    assert await task_of() != first
    assert await task_of(task="sample.sleep", args=[1.0]) != first


async def test_a_plain_submit_is_never_deduplicated(api: httpx.AsyncClient) -> None:
    answers = [await api.post(SUBMIT, json=fields) for fields in ({"unique_for": 60.0}, {}, {})]
    assert len(tasks_of(answers)) == 3


async def test_unique_ends_with_the_task(api: httpx.AsyncClient, db: Database) -> None:
    fields: dict[str, Any] = {"unique_for": 60.0, **LATER}
    first = await api.post(SUBMIT, json=fields)
    assert await lifecycle.cancel(db, UUID(first.json()["task_id"]))
    second, third = [await api.post(SUBMIT, json=fields) for _ in range(2)]
    assert len(tasks_of([first, second, third])) == 2
    assert "task-deduplicated" not in second.headers
    assert third.headers["task-deduplicated"] == "true"


async def test_what_made_a_task_unique_goes_with_it(api: httpx.AsyncClient, db: Database) -> None:
    for x in (1.0, 2.0):
        await api.post(SUBMIT, json={"kwargs": {"x": x}, "unique_for": 60.0, **LATER})
    kept, gone = [row["id"] for row in await db.fetch("SELECT id FROM task ORDER BY id")]
    assert await lifecycle.cancel(db, gone)
    assert await lifecycle.prune(db, older_than_seconds=-1, limit=10) == 1
    assert [row["task_id"] for row in await db.fetch("SELECT task_id FROM unique_task")] == [kept]


async def test_unique_ends_with_its_time(api: httpx.AsyncClient, db: Database) -> None:
    first = await api.post(SUBMIT, json={"unique_for": 60.0, **LATER})
    await db.execute("UPDATE task SET created_at = now() - interval '61 seconds'")
    second, third = [await api.post(SUBMIT, json={"unique_for": 60.0, **LATER}) for _ in range(2)]
    assert len(tasks_of([first, second, third])) == 2
    assert second.json() == third.json()
    still_young = await api.post(SUBMIT, json={"unique_for": 3600.0, **LATER})
    assert still_young.json() == second.json()


async def test_a_key_remembers_the_task_that_was_there_already(api: httpx.AsyncClient, db: Database) -> None:
    first = await api.post(SUBMIT, json={"unique_for": 60.0, **LATER})
    given = [await keyed(api, "k", unique_for=60.0, **LATER) for _ in range(2)]
    assert len(tasks_of([first, *given])) == 1
    assert await lifecycle.cancel(db, UUID(first.json()["task_id"]))
    assert (await keyed(api, "k", unique_for=60.0, **LATER)).json() == first.json()


async def test_keys_and_unique_tasks_that_race_agree(api: httpx.AsyncClient, db: Database) -> None:
    fields: dict[str, Any] = {"unique_for": 60.0, **LATER}
    answers = await asyncio.gather(*(keyed(api, f"k{number % 5}", **fields) for number in range(50)))
    [task_id] = tasks_of(list(answers))
    remembered = await db.fetch("SELECT task_ids FROM idempotency_key")
    assert [row["task_ids"] for row in remembered] == [[UUID(task_id)]] * 5
    assert await count(db) == 1


async def test_a_batch_is_answered_in_its_order_and_stands_in_line_so(
    api: httpx.AsyncClient, db: Database, api_settings: Settings
) -> None:
    tasks = [{"task": "sample.echo", "args": [n], "queue": ("default", "reports")[n % 2]} for n in range(1000)]
    answer = await api.post(BATCH, json={"tasks": tasks})
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == {"task_ids"}
    wanted = [UUID(task_id) for task_id in answer.json()["task_ids"]]
    rows = await db.fetch("SELECT id, args, published_at, created_at FROM task ORDER BY position")
    assert [row["id"] for row in rows] == wanted
    assert [json.loads(row["args"]) for row in rows] == [[n] for n in range(1000)]
    assert len({row["created_at"] for row in rows}) == 1
    assert all(row["published_at"] for row in rows)

    broker = Broker(api_settings.redis_url.get_secret_value(), client_name="test")

    async def all_there() -> bool:
        return [await broker.depth(queue) for queue in ("default", "reports")] == [500, 500]

    await until(all_there, what="a thousand messages")
    next_in_line = await broker.tail("default")
    assert next_in_line is not None
    assert [message.task_id for message in next_in_line] == wanted[0:20:2]
    await broker.close()


async def test_every_field_of_a_task_in_a_batch_reaches_its_row(api: httpx.AsyncClient, db: Database) -> None:
    fields = {
        "task": "sample.echo",
        "args": [{"é": [1, 2.5, None, "😀", 10**30]}],
        "queue": "reports",
        "countdown": 60,
        "expires": 3600,
        "max_retries": 7,
        "time_limit": 12.5,
        "tags": ["nightly", 'a"b,{}\\'],
        "webhook_url": "https://example.com/hook",
        "webhook_events": ["task.started", "task.failed"],
    }
    alone = (await api.post(SUBMIT, json=fields)).json()["task_id"]
    [in_batch] = (await api.post(BATCH, json={"tasks": [fields]}, headers={"Idempotency-Key": "k"})).json()["task_ids"]
    rows = [dict(await db.fetchrow("SELECT * FROM task WHERE id = $1", UUID(one)) or {}) for one in (alone, in_batch)]
    for row in rows:
        row["waits"], row["lasts"] = row["run_at"] - row["created_at"], row["expires_at"] - row["created_at"]
        for own in ("id", "created_at", "run_at", "expires_at", "traceparent"):
            assert row.pop(own)
    assert rows[0] == rows[1]


async def test_what_is_wrong_with_a_task_of_a_batch_is_named_by_its_index(api: httpx.AsyncClient, db: Database) -> None:
    tasks: list[dict[str, Any]] = [{} for _ in range(1000)]
    tasks[17] = {"kwargs": {"x": SECRET}}
    tasks[999] = {"queue": "nobody", "webhook_url": "x"}
    answer = await api.post(BATCH, json={"tasks": tasks})
    assert_problem(answer, 422, "/tasks/17/kwargs/x", "/tasks/999/webhook_url", "/tasks/999/queue")
    assert SECRET not in answer.text
    assert await count(db) == 0

    tasks[500] = {"surprise": 1, "countdown": "5"}
    answer = await api.post(BATCH, json={"tasks": tasks})
    assert_problem(answer, 422, "/tasks/500/countdown", "/tasks/500/surprise")

    assert len((await api.post(BATCH, json={"tasks": [{"queue": "x"}] * 1000})).json()["errors"]) == 20


async def test_a_batch_that_postgres_refuses_in_the_middle_writes_nothing(db: Database) -> None:
    new = [_new(max_retries=101 if number == 500 else 3) for number in range(1000)]
    with pytest.raises(errors.StatementRefused):
        await lifecycle.submit_batch(db, new)
    assert await count(db) == 0


NO_BATCHES: list[tuple[dict[str, Any], str]] = [
    ({}, "/tasks"),
    ({"tasks": []}, "/tasks"),
    ({"tasks": [{}] * 1001}, "/tasks"),
    ({"tasks": {}}, "/tasks"),
    ({"tasks": [1]}, "/tasks/0"),
    ({"tasks": [None]}, "/tasks/0"),
    ({"tasks": [{}], "more": 1}, "/more"),
]


async def test_what_is_no_batch_is_refused(api: httpx.AsyncClient, db: Database) -> None:
    for given, pointer in NO_BATCHES:
        assert_problem(await api.post(BATCH, json=given), 422, pointer)
    assert await count(db) == 0


async def test_a_batch_may_be_larger_than_a_submit_and_is_bounded_too(api: httpx.AsyncClient) -> None:
    def of(size: int) -> bytes:
        return b'{"tasks": [{"task": "sample.echo", "args": ["' + b"x" * size + b'"]}]}'

    assert (await api.post(BATCH, content=of(2 * body.LIMITS.size_bytes), headers=JSON)).status_code == 202
    assert_problem(await api.post(SUBMIT, content=of(body.LIMITS.size_bytes), headers=JSON), 413)
    assert_problem(await api.post(BATCH, content=of(body.BATCH_LIMITS.size_bytes), headers=JSON), 413)
    deepest = b"[" * 29 + b"]" * 29
    for depth, status in ((deepest, 202), (b"[" + deepest + b"]", 400)):
        raw = b'{"tasks": [{"task": "sample.echo", "args": [[' + depth + b"]]}]}"
        assert (await api.post(BATCH, content=raw, headers=JSON)).status_code == status
    many = json.dumps({"tasks": [{"task": "sample.echo", "args": [[0] * body.BATCH_LIMITS.items]}]})
    assert_problem(await api.post(BATCH, content=many, headers=JSON), 400)


async def test_a_batch_counts_as_many_against_the_cap(api_settings: Settings, db: Database, serve: Serve) -> None:
    async with serve(api_settings.model_copy(update={"max_backlog": 10})) as api:
        refused = await api.post(BATCH, json={"tasks": [LATER] * 11})
        assert_problem(refused, 503)
        assert refused.headers["retry-after"] == "5"
        assert await count(db) == 0
        assert (await api.post(BATCH, json={"tasks": [LATER] * 10})).status_code == 202
        assert_problem(await api.post(SUBMIT, json=LATER), 503)


async def test_a_batch_may_come_again(api: httpx.AsyncClient, db: Database) -> None:
    tasks = [{"kwargs": {"x": float(n)}} for n in range(1, 4)]
    answers = await asyncio.gather(*(keyed(api, "k", BATCH, tasks=tasks) for _ in range(20)))
    assert len({tuple(answer.json()["task_ids"]) for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 19
    assert await count(db) == 3


async def test_unique_tasks_of_a_batch_are_the_same_task(api: httpx.AsyncClient, db: Database) -> None:
    there = (await api.post(SUBMIT, json={"kwargs": {"x": 2.0}, "unique_for": 60.0})).json()["task_id"]
    tasks = [{"kwargs": {"x": x}, "unique_for": 60.0} for x in (1.0, 2.0, 1.0, 3.0)]
    answer = await api.post(BATCH, json={"tasks": tasks})
    one, two, one_again, three = answer.json()["task_ids"]
    assert (two, one_again) == (there, one)
    assert len({one, two, three}) == 3
    assert answer.headers["task-deduplicated"] == "true"
    assert await count(db) == 3


async def test_unique_batches_that_cross_each_other_do_not_wait_for_each_other(
    api_settings: Settings, db: Database
) -> None:
    digests = [bytes([number]) * 32 for number in range(1, 6)]

    async def submit(order: list[bytes]) -> lifecycle.Submitted | None:
        new = [_new(unique_key=digest, unique_for_seconds=60.0) for digest in order]
        async with opened(api_settings) as own:
            return await lifecycle.submit_batch(own, new)

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    rival = await asyncpg.connect(api_settings.postgres_dsn)
    async with asyncio.timeout(20), asyncio.TaskGroup() as batches:
        transaction = rival.transaction()
        await transaction.start()
        await rival.execute("INSERT INTO unique_task (digest, task_id) VALUES ($1, $2)", digests[2], ids.uuid7())
        made = []
        for order in (digests, digests[::-1]):
            made.append(batches.create_task(submit(order)))
            await until(lambda: _equals(db, waiting, len(made)), what="a batch that waits")
        await transaction.rollback()
    await rival.close()
    first, second = [one.result() for one in made]
    assert first is not None
    assert second is not None
    assert first.task_ids == second.task_ids[::-1]
    assert await count(db) == 5


async def _equals(db: Database, sql: str, wanted: int) -> bool:
    return bool(await db.fetchval(sql) == wanted)


async def test_each_task_of_a_batch_is_counted_by_what_came_of_it(api: httpx.AsyncClient) -> None:
    def counted(outcome: str) -> float:
        labels = {"task": "sample.sleep", "queue": "reports", "outcome": outcome}
        return sampled("taskqueue_tasks_submitted_total", **labels) or 0.0

    before = [counted(outcome) for outcome in ("accepted", "deduplicated", "replayed")]
    task = {"task": "sample.sleep", "args": [1.0], "queue": "reports", "unique_for": 60.0}
    for _ in range(2):
        await keyed(api, "k", BATCH, tasks=[task, task, {**task, "args": [2.0]}])
    after = [counted(outcome) for outcome in ("accepted", "deduplicated", "replayed")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 3]


async def test_with_a_broken_postgres_nothing_is_said_to_be_stored(api_settings: Settings, serve: Serve) -> None:
    away = api_settings.model_copy(update={"database_url": SecretStr("postgresql://a@127.0.0.1:1/b")})
    async with serve(away) as api:
        for answer in (await keyed(api, "k"), await api.post(BATCH, json={"tasks": [{}]})):
            assert_problem(answer, 503)

"""Every route against every identity, made of the routes that there are: a new one is tested without being named.

What is asked on behalf of others must neither tell nor change anything of a task of Ada's.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import Request
from fastapi.routing import APIRoute, iter_route_contexts

from app import delivery, keys, lifecycle
from app.core import errors
from app.core.config import Settings
from app.core.scopes import Scope
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.lifecycle import Budgets, Succeeded, decide
from app.main import create_app
from app.routers import door, lanes
from app.utils.webhook import Outcome, Receipt
from tests.conftest import settings_for
from tests.integration.routers.conftest import Serve, serving
from tests.integration.routers.test_tasks import assert_problem
from tests.support.database import started, submitted
from tests.support.identities import SECRET, guarded, key_of, shown, spent
from tests.support.scraping import sampled
from tests.support.waiting import until

MARK = "ada-4711"
"""Stands in all that is Ada's."""
HOOK = f"https://example.com/{MARK}"
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
"""What probes ask, which have no key."""
BODIES: dict[str, Any] = {"/api/webhooks/redeliver": {"since": "2020-01-01T00:00:00Z"}}
"""What a route needs to do something; others do something with an empty object."""


@dataclass(frozen=True)
class Route:
    """One method of one path, and the scope that it needs."""

    method: str
    path: str
    scope: Scope | None

    def url(self, task_id: UUID) -> str:
        return re.sub(r"\{\w+\}", "anything", self.path.replace("{id}", str(task_id)))


def routes(**changes: object) -> Iterator[Route]:
    """Every route of the API, those outside its OpenAPI included."""
    settings = settings_for(
        "postgresql://h/d", "redis://h/0",
        TASKQUEUE_AUTH_MODE="api-key", TASKQUEUE_SECRET_KEY=SECRET.get_secret_value(), **changes,
    )  # fmt: skip
    for found in iter_route_contexts(create_app(settings).routes):
        route = found.original_route
        if found.path is None or isinstance(route, lanes.Lane):
            continue  # what refuses the methods that a path has not, and the short ways to what has its own route
        needed = []
        if isinstance(route, APIRoute):
            calls = [one.call for one in route.dependant.dependencies]
            needed = [call.scope for call in calls if isinstance(call, door.Needs)]
        assert len(needed) <= 1, f"{found.path} needs one scope"
        for method in sorted(found.methods or {"?"}):
            yield Route(method, str(found.path), needed[0] if needed else None)


ROUTES = list(routes())
GUARDED = [route for route in ROUTES if (route.method, route.path) not in OPEN]


@pytest.fixture
def door_settings(settings: Settings) -> Settings:
    return guarded(settings, queues=("default", "reports"))


@pytest.fixture
async def api(door_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(door_settings) as client:
        yield client


async def ended(db: Database, owner: str, mark: str = MARK) -> UUID:
    """A task that has ended and told of it in vain, with a mark all over it."""
    receipt = Receipt(outcome=Outcome.HTTP_5XX, status_code=503, duration_seconds=0.1, excerpt=mark)
    task_id = await submitted(
        db,
        owner=owner,
        webhook_url=f"https://example.com/{mark}",
        tags=(mark,),
        kwargs=json.dumps({"value": mark}),
        traceparent=None,
    )
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded(f'"{mark}"')))
    [claimed] = await delivery.claim_due(db, limit=1, lease_seconds=30.0)
    assert await delivery.settle(db, claimed, receipt, delivery.Verdict(DeliveryStatus.EXHAUSTED))
    await delivery.number(db, limit=10)
    return task_id


@dataclass(frozen=True)
class Ada:
    """What is Ada's, and what of it must not be seen."""

    waiting: UUID
    held: UUID
    ended: UUID
    pruned: UUID
    words: frozenset[str]

    @property
    def tasks(self) -> tuple[UUID, ...]:
        return self.waiting, self.held, self.ended, self.pruned


@pytest.fixture
async def ada(db: Database) -> Ada:
    """With a task of nobody in particular beside hers."""
    pruned = await ended(db, "ada")
    await lifecycle.prune(db, older_than_seconds=-1.0, limit=10)
    done = await ended(db, "ada")
    await submitted(db)
    await ended(db, "", mark="nobody")
    waiting = await submitted(db, owner="ada", webhook_url=HOOK, tags=(MARK,), kwargs=f'{{"value": "{MARK}"}}')
    await lifecycle.pause_queue(db, "reports")
    held = await submitted(db, owner="ada", queue="reports", concurrency_key=MARK)
    hooks = [str(row["id"]) for row in await db.fetch("SELECT id FROM webhook_delivery WHERE owner = 'ada'")]
    words = {MARK, *hooks, str(waiting), str(held), str(done), str(pruned)}
    return Ada(waiting, held, done, pruned, frozenset(words | {word.replace("-", "") for word in words - {MARK}}))


async def everything(db: Database, *, but: str | None = None) -> list[str]:
    """Every row of every table that has owners, or belongs to tasks, but for those of one owner."""
    tables = await db.fetch(
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'owner' AND table_schema = 'public'"
        " AND table_name <> 'api_key' ORDER BY 1"
    )
    of_tasks = await db.fetch(
        "SELECT table_name FROM information_schema.columns WHERE column_name = 'task_id' AND table_schema = 'public'"
        " AND table_name <> ALL ($1::text[]) ORDER BY 1",
        [table["table_name"] for table in tables],
    )
    found = []
    for table in of_tasks:
        name = table["table_name"]
        rows = await db.fetch(
            f"SELECT t::text AS line FROM {name} t LEFT JOIN task ON task.id = t.task_id"
            " WHERE task.owner IS DISTINCT FROM $1 ORDER BY 1",
            but,
        )
        found += [f"{name}: {row['line']}" for row in rows]
    for table in tables:
        name = table["table_name"]
        rows = await db.fetch(f"SELECT t::text AS line FROM {name} t WHERE owner IS DISTINCT FROM $1 ORDER BY 1", but)
        found += [f"{name}: {row['line']}" for row in rows]
    return found


async def call(api: httpx.AsyncClient, route: Route, task_id: UUID, headers: Any) -> httpx.Response:
    body = {} if route.method in {"GET", "DELETE", "HEAD"} else {"json": BODIES.get(route.path, {})}
    return await api.request(route.method, route.url(task_id), headers=headers, **body)


def leaks(answer: httpx.Response, ada: Ada, asked: UUID) -> list[str]:
    """What of Ada's stands in an answer; the id that was asked for is no news."""
    told = answer.text + str(answer.headers.multi_items())
    known = {str(asked), str(asked).replace("-", "")}
    return sorted(word for word in ada.words - known if word in told)


def test_every_route_names_the_scope_that_it_needs() -> None:
    assert len(GUARDED) >= 10
    assert [route for route in GUARDED if route.scope is None] == [], "see app/routers/door.py"


def test_the_scopes_of_the_routes_are_these() -> None:
    """What a key that may only read can do is a promise: a route that changes something is not `tasks:read`."""
    changing = [route for route in GUARDED if route.method != "GET"]
    assert [route for route in changing if route.scope is Scope.TASKS_READ] == []


def test_the_openapi_says_what_each_route_needs() -> None:
    settings = settings_for(
        "postgresql://h/d", "redis://h/0", TASKQUEUE_AUTH_MODE="api-key", TASKQUEUE_SECRET_KEY="k" * 32
    )
    described = create_app(settings).openapi()
    assert described["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    for route in ROUTES:
        operation = described["paths"].get(route.path, {}).get(route.method.lower())
        if operation is None:
            continue
        if route.scope is None:
            assert "security" not in operation
            continue
        assert operation["security"] == [{"ApiKey": [str(route.scope)]}], route
        assert {"401", "403", "429"} <= operation["responses"].keys(), route
        assert "WWW-Authenticate" in operation["responses"]["401"]["headers"]
        assert {"Retry-After", "RateLimit"} <= operation["responses"]["429"]["headers"].keys()


async def test_who_shows_no_key_that_opens_something_gets_the_same_401_everywhere(
    api: httpx.AsyncClient, db: Database, ada: Ada, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "FAILURES_A_MINUTE", 100_000)
    identities = {
        "none": {},
        "garbage": shown("tq_live_garbage"),
        "expired": shown(await key_of(db, "ada", expires_in_seconds=-1.0)),
        "revoked": shown(await key_of(db, "ada", revoked=True)),
        "unknown": shown(keys.made()),
        "basic": {"Authorization": "Basic " + (await key_of(db, "ada"))},
    }
    before = await everything(db)
    answers = defaultdict(set)
    for who, headers in identities.items():
        for route in GUARDED:
            for task_id in ada.tasks:
                answer = await call(api, route, task_id, headers)
                assert leaks(answer, ada, task_id) == [], (who, route)
                assert_problem(answer, 401)
                answers[who].add((answer.text, answer.headers["www-authenticate"]))
    [(text, challenge)] = answers.pop("none")
    assert (challenge, "tq_live_" in text) == ('Bearer realm="taskqueue"', True)
    [(text, challenge)] = set().union(*answers.values())
    assert (challenge, "tq_live_" in text) == ('Bearer realm="taskqueue", error="invalid_token"', False)
    assert set(answers) == set(identities) - {"none"}
    assert await everything(db) == before


@pytest.mark.parametrize("who", ["bob", "bob, an admin", "nobody in particular"])
async def test_another_owner_neither_sees_nor_changes_anything(
    api: httpx.AsyncClient, db: Database, ada: Ada, who: str
) -> None:
    scopes = (Scope.ADMIN,) if "admin" in who else ()
    owner = "" if who.startswith("nobody") else "bob"
    headers = shown(await key_of(db, owner, *scopes))
    before = await everything(db, but=owner)
    for route in GUARDED:
        if route.scope is Scope.ADMIN and "admin" not in who:
            continue
        unknown = uuid4()
        expected = await call(api, route, unknown, headers)
        for task_id in ada.tasks:
            answer = await call(api, route, task_id, headers)
            assert leaks(answer, ada, task_id) == [], route
            if "{id}" in route.path:
                assert answer.status_code == expected.status_code == 404, route
                assert answer.text.replace(str(task_id), "") == expected.text.replace(str(unknown), ""), route
    assert await everything(db, but=owner) == before


async def test_a_key_that_may_only_read_changes_nothing(api: httpx.AsyncClient, db: Database, ada: Ada) -> None:
    headers = shown(await key_of(db, "ada", Scope.TASKS_READ))
    before = await everything(db)
    for route in GUARDED:
        answer = await call(api, route, ada.ended, headers)
        if route.scope is Scope.TASKS_READ:
            assert answer.status_code not in {401, 403}, route
        else:
            problem = assert_problem(answer, 403)
            assert str(route.scope) in problem["detail"], route
            assert f'scope="{route.scope}"' in answer.headers["www-authenticate"]
            assert leaks(answer, ada, ada.ended) == []
    assert await everything(db) == before


async def test_each_scope_opens_its_own_routes_and_admin_all(api: httpx.AsyncClient, db: Database, ada: Ada) -> None:
    for scope in Scope:
        headers = shown(await key_of(db, "ada", scope))
        for route in GUARDED:
            answer = await call(api, route, ada.ended, headers)
            opened = scope in (route.scope, Scope.ADMIN)
            assert (answer.status_code == 403) is not opened, (scope, route, answer.text)


async def test_ada_does_with_her_own_what_she_likes(api: httpx.AsyncClient, db: Database, ada: Ada) -> None:
    headers = shown(await key_of(db, "ada"))
    other = shown(await key_of(db, "ada"))  # Two keys of one owner: how one is replaced by the next.
    submit = await api.post("/api/tasks/submit", json={"tags": [MARK]}, headers=headers)
    assert submit.status_code == 202
    assert (await api.get(f"{submit.headers['location']}/status", headers=other)).json() == {"status": "PENDING"}
    assert await db.fetchval("SELECT owner FROM task WHERE id = $1", UUID(submit.json()["task_id"])) == "ada"
    result = await api.get(f"/api/tasks/{ada.ended}/result", headers=other)
    assert result.json() == {"result": MARK}
    assert_problem(await api.get(f"/api/tasks/{ada.pruned}/status", headers=headers), 410)
    events = (await api.get("/api/events", headers=headers)).json()
    assert [one["body"]["data"]["task_id"] for one in events["data"]] == [str(ada.ended)]
    again = await api.post("/api/webhooks/redeliver", json=BODIES["/api/webhooks/redeliver"], headers=headers)
    assert again.json() == {"redelivered": 1, "next_cursor": None}
    assert (await api.post(f"/api/tasks/{ada.ended}/webhook/redeliver", headers=headers)).status_code == 202
    assert (await api.post(f"/api/tasks/{ada.waiting}/cancel", headers=headers)).json() == {"status": "REVOKED"}


async def test_a_key_of_nobody_in_particular_goes_on_with_what_was_submitted_without(
    api: httpx.AsyncClient, db: Database
) -> None:
    before = await submitted(db)  # With no door, or by `.delay()`.
    headers = shown(await key_of(db, ""))
    assert (await api.get(f"/api/tasks/{before}/status", headers=headers)).json() == {"status": "PENDING"}


async def test_a_submit_that_is_not_let_in_is_counted_as_refused(api: httpx.AsyncClient, db: Database) -> None:
    def refused(reason: str) -> float:
        return sampled("taskqueue_submit_rejected_total", reason=reason) or 0.0

    before = [refused(reason) for reason in ("unauthenticated", "forbidden")]
    reader = shown(await key_of(db, "ada", Scope.TASKS_READ))
    for headers in ({}, reader):
        assert (await api.post("/api/tasks/submit", headers=headers)).status_code in {401, 403}
        await api.get(f"/api/tasks/{uuid4()}", headers=headers)  # which submits nothing
    after = [refused(reason) for reason in ("unauthenticated", "forbidden")]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1]


async def test_the_scheme_is_known_however_it_is_written(api: httpx.AsyncClient, db: Database) -> None:
    key = await key_of(db, "ada")
    for header in ("bearer {}", "BEARER {}", "Bearer   {} "):
        assert (await api.get("/api/events", headers={"Authorization": header.format(key)})).status_code == 200


HOSTILE = [
    b"", b"Bearer", b"Bearer ", b"Bearer \xff\xfe", b"Bearer tq_live_" + b"A" * 60_000, b"Bearer a b", b"tq_live_x",
    b"Bearer " + b"\xc3\xa9" * 35, b"Digest username=x", b"Bearer {key} {key}", b"Bearer {key},Bearer {key}",
    b"{key}", b"Bearer\t{key}", b"Bearer {key}=", b'Bearer "{key}"',
]  # fmt: skip


async def test_a_hostile_header_is_a_401(api: httpx.AsyncClient, db: Database) -> None:
    key = (await key_of(db, "ada")).encode()
    for header in HOSTILE:
        answer = await api.get("/api/events", headers=[(b"authorization", header.replace(b"{key}", key))])
        assert_problem(answer, 401)


async def test_probes_need_no_key_and_nothing_else_is_there_without(api: httpx.AsyncClient) -> None:
    assert (await api.get("/healthz")).status_code == 200
    assert (await api.get("/readyz")).status_code == 200
    for path in ("/docs", "/redoc", "/metrics", "/docs/oauth2-redirect"):
        assert (await api.get(path)).status_code == 404
    assert_problem(await api.get("/openapi.json"), 401)


async def test_the_description_of_the_api_is_for_who_has_a_key_unless_it_is_public(
    api: httpx.AsyncClient, db: Database, door_settings: Settings, serve: Serve
) -> None:
    described = await api.get("/openapi.json", headers=shown(await key_of(db, "ada", Scope.TASKS_READ)))
    assert described.json()["info"]["title"] == "Task Queue Worker API"
    async with serve(door_settings.model_copy(update={"public_docs": True})) as public:
        assert (await public.get("/openapi.json")).status_code == 200
        assert (await public.get("/docs")).status_code == 200


async def test_with_no_door_everything_is_open(db: Database, api_settings: Settings, serve: Serve) -> None:
    async with serve(api_settings) as public:
        task_id = await submitted(db)
        answer = await public.get(f"/api/tasks/{task_id}/status", headers=shown("garbage"))
        assert answer.json() == {"status": "PENDING"}
        assert "ratelimit" not in answer.headers
        assert (await public.get("/docs")).status_code == 200


# Budgets


async def test_every_answer_says_what_is_left_of_the_budget_it_spent(
    api: httpx.AsyncClient, db: Database, ada: Ada
) -> None:
    headers = shown(await key_of(db, "ada"))
    # One that FastAPI makes, one that the route makes, and two problems.
    for path, status in (
        (f"/api/tasks/{ada.waiting}/status", 200),
        (f"/api/tasks/{ada.ended}/result", 200),
        (f"/api/tasks/{uuid4()}/status", 404),
        ("/api/tasks/x/status", 422),
    ):
        answer = await api.get(path, headers=headers)
        assert answer.status_code == status
        assert answer.headers["ratelimit-policy"] == '"poll";q=60000;w=60'
        budget, remaining, until = spent(answer)
        assert (budget, until) == ("poll", 1)
        assert 59_990 <= remaining < 60_000
    assert spent(await api.post("/api/tasks/submit", headers=headers))[0] == "submit"
    assert spent(await api.post(f"/api/tasks/{ada.ended}/webhook/redeliver", headers=headers))[0] == "webhooks"


async def test_each_key_has_a_budget_of_its_own_for_each_kind_of_request(
    db: Database, door_settings: Settings, serve: Serve, ada: Ada
) -> None:
    few = door_settings.model_copy(update={"rate_limit_poll": 3, "rate_limit_submit": 2, "rate_limit_webhooks": 0})
    async with serve(few) as api:
        headers = shown(await key_of(db, "ada"))
        answers = [await api.get(f"/api/tasks/{ada.waiting}/status", headers=headers) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert [spent(answer)[1] for answer in answers] == [2, 1, 0, 0]
        refused = answers[-1]
        assert assert_problem(refused, 429)["type"] == "/problems/quota-exceeded"
        assert 1 <= int(refused.headers["retry-after"]) == spent(refused)[2] <= 20

        assert (await api.post("/api/tasks/submit", headers=headers)).status_code == 202
        other = shown(await key_of(db, "ada"))
        assert (await api.get(f"/api/tasks/{ada.waiting}/status", headers=other)).status_code == 200
        unlimited = await api.post("/api/webhooks/redeliver", json={"since": "2020-01-01T00:00:00Z"}, headers=other)
        assert unlimited.status_code == 200
        assert "ratelimit" not in unlimited.headers


async def test_a_submit_beyond_its_budget_stores_nothing(db: Database, door_settings: Settings, serve: Serve) -> None:
    async with serve(door_settings.model_copy(update={"rate_limit_submit": 1})) as api:
        headers = shown(await key_of(db, "ada"))
        answers = [(await api.post("/api/tasks/submit", headers=headers)).status_code for _ in range(3)]
    assert answers == [202, 429, 429]
    assert await db.fetchval("SELECT count(*) FROM task") == 1


async def test_a_request_that_is_worth_many_takes_as_many(db: Database, door_settings: Settings) -> None:
    guard = door.Door.of(door_settings.model_copy(update={"rate_limit_submit": 10}), db)
    assert guard is not None
    header = (b"authorization", b"Bearer " + (await key_of(db, "ada")).encode())
    request = Request({"type": "http", "headers": [header], "state": {}})
    caller = await guard.admit(request, Scope.TASKS_WRITE, "submit")
    caller.spend(6)
    with pytest.raises(errors.QuotaExceeded):
        caller.spend(4)
    caller.spend(3)
    door.Caller("").spend(1_000_000)  # Where nobody asks who calls, nobody counts.


async def test_a_batch_takes_as_many_as_it_has_tasks(db: Database, door_settings: Settings, serve: Serve) -> None:
    async with serve(door_settings.model_copy(update={"rate_limit_submit": 10})) as api:

        async def batch(tasks: int) -> httpx.Response:
            return await api.post("/api/tasks/batch", json={"tasks": [{}] * tasks}, headers=headers)

        headers = shown(await key_of(db, "ada"))
        assert (spent(await batch(1))[1], spent(await batch(5))[1]) == (9, 4)
        refused = await batch(5)
        assert_problem(refused, 429)
        assert 6 <= int(refused.headers["retry-after"]) <= 18, "two more, one of which was taken in vain"
        assert await db.fetchval("SELECT count(*) FROM task") == 6

        headers = shown(await key_of(db, "bob"))
        assert (await batch(50)).status_code == 202, "more than ever fits needs a full budget"
        assert_problem(await batch(1), 429)


# Whoever tries keys


async def test_who_tries_keys_is_slowed_down_and_nobody_is_locked_out(api: httpx.AsyncClient, db: Database) -> None:
    true = await key_of(db, "ada")
    answers = [await api.get("/api/events", headers=shown(keys.made())) for _ in range(door.FAILURES_A_MINUTE + 20)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 15
    assert {answer.status_code for answer in answers} == {401, 429}
    assert int(refused[-1].headers["retry-after"]) >= 1
    # Not one that was seen before, and not one that never was.
    assert (await api.get("/api/events", headers=shown(true))).status_code == 200
    assert (await api.get("/api/events", headers=shown(await key_of(db, "bob")))).status_code == 200
    assert (await api.get("/api/events")).status_code == 401, "who shows none tries none"


def test_a_network_of_ipv6_is_one_address() -> None:
    def address(host: str) -> str:
        return door._address(Request({"type": "http", "client": (host, 1), "headers": []}))

    assert address("2001:db8::1") == address("2001:db8::ffff:1") != address("2001:db8:0:1::1")
    assert address("192.0.2.1") != address("192.0.2.2")
    assert address("a name") == "a name"


# Keys stay where they are


async def test_no_key_is_in_a_log_or_an_answer(
    api: httpx.AsyncClient, db: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tried = [await key_of(db, "ada"), await key_of(db, "ada", revoked=True), keys.made(), keys.made()[:-1] + "-"]
    told = ""
    for key in tried:
        for path in ("/api/events", "/api/events?after=x", "/nothing"):
            answer = await api.get(path, headers=shown(key))
            told += answer.text + str(answer.headers)
        answer = await api.post("/api/tasks/submit", headers=shown(key), content=b"{")
        told += answer.text + str(answer.headers)
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    told += "".join(record.getMessage() + str(record.exc_info) for record in ours)
    assert [key for key in tried if key in told or key[19:60] in told] == []


async def test_an_api_without_any_key_says_how_to_make_one(
    door_settings: Settings, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(door_settings):
        await until(lambda: "taskqueue keys create" in caplog.text, what="the line")

"""Acting on many tasks: in steps, by any relay, each task once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from app import lifecycle
from app.broker import Broker
from app.core import limits
from app.core.config import Settings
from app.core.statuses import JobKind, TaskStatus
from app.db import Database
from app.lifecycle import Filter, jobs, listing
from app.relay import Relay
from app.utils.webhook import Sender
from tests.integration.routers.conftest import serving
from tests.integration.routers.test_tasks import assert_problem
from tests.support.database import events, opened, row, started, submitted

ERROR = lifecycle.Error(type="SampleError", message="no")
FAILURE = frozenset({TaskStatus.FAILURE})


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def relay(settings: Settings, db: Database) -> AsyncIterator[Relay]:
    broker = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with Sender.from_settings(settings) as sender:
        yield Relay(settings, db, broker, sender)
    await broker.close()


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(settings.model_copy(update={"metrics_port": 0})) as client:
        yield client


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "STEP", 4)


async def failed(db: Database, **fields: Any) -> UUID:
    task_id = await submitted(db, **fields)
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, lifecycle.decide(lifecycle.Budgets(), lifecycle.Failed(ERROR)))
    return task_id


async def begun(api: httpx.AsyncClient, what: str, **wanted: Any) -> str:
    answer = await api.post(f"/api/tasks/{what}", json=wanted)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/api/jobs/{answer.json()['job_id']}"
    return str(answer.json()["job_id"])


async def read(api: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    answer = await api.get(f"/api/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def worked_off(api: httpx.AsyncClient, relay: Relay, job_id: str) -> dict[str, Any]:
    for _ in range(50):
        await relay.work_on_jobs()
        if (job := await read(api, job_id))["status"] != "running":
            return job
    raise AssertionError("the job does not end")


@pytest.mark.usefixtures("short_steps")
async def test_all_that_pass_a_filter_are_cancelled(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    meant = [await submitted(db, tags=("old",), webhook_url="https://example.com/hook") for _ in range(9)]
    running = await submitted(db, tags=("old",))
    await started(db, running)
    retried = await submitted(db, tags=("old",))
    claimed = await started(db, retried)
    await lifecycle.settle(
        db, claimed.claim, lifecycle.decide(lifecycle.Budgets(), lifecycle.RetryAsked(ERROR, delay_seconds=60))
    )
    others = [await submitted(db, tags=("new",)), await failed(db, tags=("old",))]
    theirs = await submitted(db, tags=("old",), owner="somebody else")
    before = [await row(db, task_id) for task_id in (*others, theirs)]
    job_id = await begun(api, "cancel", tag="old")
    assert await read(api, job_id) | {"created_at": ""} == {
        "job_id": job_id,
        "kind": "cancel",
        "status": "running",
        "done": 0,
        "passed_over": 0,
        "created_at": "",
        "finished_at": None,
    }
    job = await worked_off(api, relay, job_id)
    assert (job["status"], job["done"], job["passed_over"]) == ("done", 11, 0)
    assert job["finished_at"] is not None
    for task_id in (*meant, retried):
        ended = await row(db, task_id)
        assert (ended["status"], ended["error_type"]) == ("REVOKED", "Cancelled")
    assert [await events(db, task_id) for task_id in meant] == [["task.revoked"]] * 9
    assert (await row(db, running))["cancel_requested"] is True
    assert [await row(db, task_id) for task_id in (*others, theirs)] == before


@pytest.mark.usefixtures("short_steps")
async def test_what_is_held_is_cancelled_too_and_leaves_its_line(
    api: httpx.AsyncClient, relay: Relay, db: Database
) -> None:
    await lifecycle.pause_queue(db, "default")
    held = [await submitted(db, tags=("old",)) for _ in range(6)]
    stays = await submitted(db, tags=("new",))
    assert await db.fetchval("SELECT count(*) FROM held_task") == 7
    job = await worked_off(api, relay, await begun(api, "cancel", tag="old"))
    assert (job["status"], job["done"]) == ("done", 6)
    assert {(await row(db, task_id))["status"] for task_id in held} == {"REVOKED"}
    assert [one["task_id"] for one in await db.fetch("SELECT task_id FROM held_task")] == [stays]


@pytest.mark.usefixtures("short_steps")
async def test_what_is_run_again_in_a_paused_queue_is_held(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    await failed(db, tags=("old",))
    await lifecycle.pause_queue(db, "default")
    await worked_off(api, relay, await begun(api, "rerun", tag="old"))
    await relay.look_at_limits()
    await relay.publish_due("default")
    [made] = await db.fetch("SELECT id FROM task WHERE rerun_of IS NOT NULL")
    assert (await api.get(f"/api/tasks/{made['id']}")).json()["held"] == "paused"


@pytest.mark.usefixtures("short_steps")
async def test_all_that_pass_a_filter_are_run_again_once(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    fields = {
        "args": '["é"]',
        "kwargs": "{}",
        "tags": ("old", "é"),
        "webhook_url": "https://example.com/hook",
        "webhook_events": ("task.failed",),
        "max_retries": 7,
        "time_limit": 9.5,
        "queue": "default",
        "concurrency_key": "customer-7",
    }
    meant = [await failed(db, **fields) for _ in range(10)]
    await submitted(db, tags=("old",))
    job = await worked_off(api, relay, await begun(api, "rerun", tag="old"))
    assert (job["status"], job["done"]) == ("done", 10)
    made = await db.fetch("SELECT * FROM task WHERE rerun_of IS NOT NULL ORDER BY position")
    assert {one["rerun_of"] for one in made} == set(meant)
    assert len(made) == 10
    copied = ("name", "queue", "concurrency_key", "args", "kwargs", "tags", "webhook_url", "webhook_events",
              "max_retries", "time_limit")  # fmt: skip
    old = await row(db, meant[0])
    for one in made:
        assert {name: one[name] for name in copied} == {name: old[name] for name in copied}
        assert (one["status"], one["attempt"], one["failures"], one["error_type"]) == ("PENDING", 0, 0, None)
    # They wait as what was held back does, and the relay feeds them.
    assert await relay.publish_due("default") == 10


async def test_a_rerun_means_what_failed_unless_it_says_otherwise(
    api: httpx.AsyncClient, relay: Relay, db: Database
) -> None:
    bad = await failed(db)
    good = await submitted(db)
    claimed = await started(db, good)
    await lifecycle.settle(db, claimed.claim, lifecycle.decide(lifecycle.Budgets(), lifecycle.Succeeded("1")))
    await worked_off(api, relay, await begun(api, "rerun", task="sample.echo"))
    assert await db.fetchval("SELECT array_agg(rerun_of) FROM task WHERE rerun_of IS NOT NULL") == [bad]
    await worked_off(api, relay, await begun(api, "rerun", status=["SUCCESS"]))
    assert await db.fetchval("SELECT count(*) FROM task WHERE rerun_of = $1", good) == 1


@pytest.mark.usefixtures("short_steps")
async def test_two_relays_do_nothing_twice_and_one_that_was_killed_leaves_nothing_behind(
    api: httpx.AsyncClient, relay: Relay, db: Database
) -> None:
    for _ in range(15):
        await failed(db)
    job_id = await begun(api, "rerun", error_type="SampleError")
    dead = await lifecycle.take_step(db)
    assert dead is not None
    # It holds the step until its lease ends; then it is somebody else's.
    assert await relay.work_on_jobs() == 0
    await db.execute("UPDATE job SET lease_until = now() - interval '1 s'")
    assert await relay.work_on_jobs() == 4
    # It was not dead after all.
    assert (await lifecycle.step(db, dead)).acted == 0
    while (await read(api, job_id))["status"] == "running":
        await asyncio.gather(*(relay.work_on_jobs() for _ in range(3)))
    assert (await read(api, job_id))["done"] == 15
    reruns = await db.fetch("SELECT count(*) AS made FROM task WHERE rerun_of IS NOT NULL GROUP BY rerun_of")
    assert [one["made"] for one in reruns] == [1] * 15


@pytest.mark.usefixtures("short_steps")
async def test_a_job_that_is_stopped_goes_no_further(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    for _ in range(10):
        await submitted(db)
    job_id = await begun(api, "cancel", task="sample.echo")
    assert await relay.work_on_jobs() == 4
    late = await lifecycle.take_step(db)
    assert late is not None
    for _ in range(2):
        stopped = await api.post(f"/api/jobs/{job_id}/cancel")
        assert (stopped.status_code, stopped.json()["status"], stopped.json()["done"]) == (200, "cancelled", 4)
    assert (await lifecycle.step(db, late)).acted == 0
    assert await relay.work_on_jobs() == 0
    assert await db.fetchval("SELECT count(*) FROM task WHERE status = 'PENDING'") == 6


async def test_what_has_moved_on_is_passed_over(
    api: httpx.AsyncClient, relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await submitted(db) for _ in range(3)]
    job_id = await begun(api, "cancel", status=["PENDING"])
    page = listing.page

    async def meanwhile(*args: Any, **kwargs: Any) -> lifecycle.Page:
        found: lifecycle.Page = await page(*args, **kwargs)
        await started(db, ids[1])
        return found

    monkeypatch.setattr(listing, "page", meanwhile)
    job = await worked_off(api, relay, job_id)
    assert (job["done"], job["passed_over"]) == (2, 1)
    assert (await row(db, ids[1]))["cancel_requested"] is False


async def test_it_concerns_what_was_there_when_it_began(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    await submitted(db)
    job_id = await begun(api, "cancel", task="sample.echo")
    later = await submitted(db)
    assert (await worked_off(api, relay, job_id))["done"] == 1
    assert (await row(db, later))["status"] == "PENDING"


@pytest.mark.usefixtures("short_steps")
async def test_jobs_take_turns(api: httpx.AsyncClient, relay: Relay, db: Database) -> None:
    for _ in range(12):
        await submitted(db, tags=("a",))
    await submitted(db, tags=("b",))
    long = await begun(api, "cancel", tag="a")
    short = await begun(api, "cancel", tag="b")
    for _ in range(2):
        await relay.work_on_jobs()
    assert [(await read(api, job_id))["status"] for job_id in (long, short)] == ["running", "done"]


async def test_owners_take_turns_however_many_jobs_one_has(relay: Relay, db: Database) -> None:
    async def begin(owner: str) -> UUID:
        job_id = await lifecycle.begin_job(db, owner, JobKind.CANCEL, Filter(name="nobody"), traceparent="")
        assert isinstance(job_id, UUID)
        return job_id

    async def whose_turn() -> str:
        before = await db.fetch("SELECT owner FROM job WHERE status = 'running'")
        await relay.work_on_jobs()
        after = await db.fetch("SELECT owner FROM job WHERE status = 'running'")
        [owner] = (Counter(one["owner"] for one in before) - Counter(one["owner"] for one in after)).elements()
        return str(owner)

    # Each of them ends with its only step, so nothing that runs says whose turn it was.
    for _ in range(lifecycle.JOBS_AT_ONCE):
        await begin("bob")
    assert await whose_turn() == "bob"
    await begin("ada")
    await begin("ada")
    turns = []
    for _ in range(6):
        turns.append(await whose_turn())
        if turns[-1] == "bob":
            await begin("bob")
    assert turns == ["ada", "bob", "ada", "bob", "bob", "bob"]


async def test_an_owner_has_a_few_jobs_at_most_whoever_asks_at_once(
    api: httpx.AsyncClient, relay: Relay, db: Database
) -> None:
    async def begin(number: int) -> httpx.Response:
        headers = {"Idempotency-Key": f"k{number // 2}"} if number % 3 else {}
        return await api.post("/api/tasks/cancel", json={"task": "nobody"}, headers=headers)

    first = await keyed(api, "k", task="nobody")
    answers = [first, *await asyncio.gather(*(begin(number) for number in range(60)))]
    accepted = [one for one in answers if one.status_code == 202]
    assert {one.status_code for one in answers} == {202, 429}
    assert len({one.json()["job_id"] for one in accepted}) == lifecycle.JOBS_AT_ONCE
    assert await db.fetchval("SELECT count(*) FROM job") == lifecycle.JOBS_AT_ONCE
    refused = next(one for one in answers if one.status_code == 429)
    assert assert_problem(refused, 429)["type"] == "/problems/too-many-at-once"
    assert refused.headers["retry-after"] == "5"
    # Nothing is remembered of a request that was refused, and what was accepted is answered again.
    beginnings = "SELECT count(*) FROM idempotency_key k WHERE NOT EXISTS (SELECT FROM job WHERE id = ANY (k.task_ids))"
    assert await db.fetchval(beginnings) == 0
    again = await keyed(api, "k", task="nobody")
    assert (again.json(), again.headers["idempotent-replayed"]) == (first.json(), "true")
    assert await lifecycle.begin_job(db, "ada", JobKind.CANCEL, Filter(name="x"), traceparent="")

    # The one that ends makes room, whoever ends it.
    await relay.work_on_jobs()
    stopped, refused = await begun(api, "cancel", task="nobody"), await begin(0)
    assert refused.status_code == 429
    assert (await api.post(f"/api/jobs/{stopped}/cancel")).json()["status"] == "cancelled"
    assert (await begin(0)).status_code == 202


async def test_a_job_makes_no_tasks_while_too_many_wait(
    api: httpx.AsyncClient, relay: Relay, db: Database, settings: Settings
) -> None:
    await failed(db)
    for _ in range(3):
        await submitted(db)
    relay.settings = settings.model_copy(update={"max_backlog": 3})
    job_id = await begun(api, "rerun", status=["FAILURE"])
    assert await relay.work_on_jobs() == 0
    assert (await read(api, job_id))["status"] == "running"
    relay.settings = settings
    await db.execute("UPDATE job SET lease_until = now() - interval '1 s'")
    assert (await worked_off(api, relay, job_id))["done"] == 1


async def test_a_filter_survives_its_way_through_the_row(db: Database) -> None:
    now = await lifecycle.clock(db)
    wanted = Filter(
        statuses=FAILURE, name="t", queue="q", tag="é", error_type="E", created_after=now, finished_before=now
    )
    await lifecycle.begin_job(db, "me", JobKind.RERUN, wanted, traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-00")
    taken = await lifecycle.take_step(db)
    assert taken is not None
    created = await db.fetchval("SELECT created_at FROM job")
    assert taken.wanted.created_before == created
    assert taken.wanted == Filter(
        statuses=FAILURE,
        name="t",
        queue="q",
        tag="é",
        error_type="E",
        created_after=now,
        created_before=created,
        finished_before=now,
    )


async def test_ended_jobs_are_forgotten(api: httpx.AsyncClient, relay: Relay, settings: Settings) -> None:
    done = await begun(api, "cancel", task="nobody")
    await worked_off(api, relay, done)
    running = await begun(api, "cancel", task="nobody")
    relay.settings = settings.model_copy(update={"retention_days": 1e-9})
    await relay.prune()
    assert_problem(await api.get(f"/api/jobs/{done}"), 404)
    assert (await read(api, running))["status"] == "running"


async def keyed(api: httpx.AsyncClient, key: str, what: str = "cancel", **wanted: Any) -> httpx.Response:
    return await api.post(f"/api/tasks/{what}", json=wanted, headers={"Idempotency-Key": key})


@pytest.mark.parametrize("what", ["cancel", "rerun"])
async def test_of_a_hundred_at_once_under_one_key_one_begins_a_job(
    api: httpx.AsyncClient, relay: Relay, db: Database, what: str
) -> None:
    await failed(db)
    answers = await asyncio.gather(*(keyed(api, "k", what, task="sample.echo") for _ in range(100)))
    assert {answer.status_code for answer in answers} == {202}
    assert Counter(answer.headers.get("idempotent-replayed") for answer in answers) == {None: 1, "true": 99}
    [job_id] = {answer.json()["job_id"] for answer in answers}
    assert {answer.headers["location"] for answer in answers} == {f"/api/jobs/{job_id}"}
    assert await db.fetchval("SELECT array_agg(id) FROM job") == [UUID(job_id)]
    await worked_off(api, relay, job_id)
    again = await keyed(api, "k", what, task="sample.echo")
    assert (again.json()["job_id"], again.headers["idempotent-replayed"]) == (job_id, "true"), "after its end, too"
    assert await db.fetchval("SELECT count(*) FROM task WHERE rerun_of IS NOT NULL") == (what == "rerun")


async def test_a_key_with_another_filter_is_refused_and_begins_nothing(api: httpx.AsyncClient, db: Database) -> None:
    assert (await keyed(api, "k", tag="a")).status_code == 202
    problem = assert_problem(await keyed(api, "k", tag="b"), 422)
    assert problem["type"] == "/problems/idempotency-key-reused"
    assert await db.fetchval("SELECT count(*) FROM job") == 1
    # Of another route it is another key, and so is that of another owner.
    assert "idempotent-replayed" not in (await keyed(api, "k", "rerun", tag="b")).headers
    await db.execute("UPDATE idempotency_key SET owner = 'ada'")
    assert "idempotent-replayed" not in (await keyed(api, "k", tag="b")).headers
    assert await db.fetchval("SELECT count(*) FROM job") == 3


async def test_a_key_of_a_job_is_forgotten_after_a_day(api: httpx.AsyncClient, db: Database) -> None:
    first = await keyed(api, "k", tag="a")
    await db.execute(
        "UPDATE idempotency_key SET created_at = now() - make_interval(secs => $1)", limits.KEY_SECONDS + 1.0
    )
    later = await keyed(api, "k", tag="b")
    assert (later.status_code, "idempotent-replayed" in later.headers) == (202, False)
    assert later.json() != first.json()


async def test_what_is_no_key_begins_nothing(api: httpx.AsyncClient, db: Database) -> None:
    assert_problem(await keyed(api, "a b", tag="a"), 400, "/Idempotency-Key")
    # What is wrong with the filter is said before the key is kept.
    assert_problem(await keyed(api, "k", tag=5), 422, "/tag")
    assert (await keyed(api, "k", tag="a")).status_code == 202
    assert await db.fetchval("SELECT count(*) FROM job") == 1


async def test_the_openapi_says_that_a_job_may_have_a_key(api: httpx.AsyncClient) -> None:
    paths: dict[str, Any] = (await api.get("/openapi.json")).json()["paths"]
    for what in ("cancel", "rerun"):
        operation = paths[f"/api/tasks/{what}"]["post"]
        assert [one["name"] for one in operation["parameters"]] == ["Idempotency-Key"]
        assert {"Location", "Idempotent-Replayed"} <= operation["responses"]["202"]["headers"].keys()


async def test_somebody_elses_job_is_404(api: httpx.AsyncClient, db: Database) -> None:
    theirs = await lifecycle.begin_job(db, "me", JobKind.CANCEL, Filter(name="x"), traceparent="")
    assert isinstance(theirs, UUID)
    for path in (f"/api/jobs/{theirs}", f"/api/jobs/{UUID(int=1)}"):
        assert assert_problem(await api.get(path), 404)["type"] == "/problems/job-not-found"
        assert_problem(await api.post(f"{path}/cancel"), 404)
    assert_problem(await api.get("/api/jobs/me"), 422, "/id")
    assert await db.fetchval("SELECT status FROM job") == "running"


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("cancel", {}, ""),
    ("cancel", {"task": None, "queue": None}, ""),
    ("cancel", {"task": "long_task", "status": []}, "/status"),
    ("cancel", {"status": ["SUCCESS"]}, "/status"),
    ("rerun", {"status": ["FAILURE", "PENDING"]}, "/status"),
    ("rerun", {"status": "FAILURE"}, "/status"),
    ("rerun", {"status": ["FAILURE"] * 7}, "/status"),
    ("cancel", {"tag": 5}, "/tag"),
    ("cancel", {"tag": "a\x00"}, "/tag"),
    ("cancel", {"limit": 5}, "/limit"),
    ("rerun", {"created_after": 5}, "/created_after"),
    ("rerun", {"finished_before": "2026-13-01T00:00:00Z"}, "/finished_before"),
]


async def test_a_filter_that_is_wrong_begins_nothing(api: httpx.AsyncClient, db: Database) -> None:
    for path, body, pointer in WRONG:
        assert_problem(await api.post(f"/api/tasks/{path}", json=body), 422, pointer)
    assert await db.fetchval("SELECT count(*) FROM job") == 0

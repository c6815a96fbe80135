"""A real API process whose clients wait for tasks, follow them, leave, and are let go."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from uuid import UUID, uuid4

import httpx
import pytest
import redis.asyncio

from app import lifecycle, loglines
from app.core.stopping import stop
from app.db import Database
from app.dev import ports
from app.routers import following
from tests.conftest import settings_for
from tests.integration.worker.conftest import environment
from tests.support import servers
from tests.support.database import opened, started, submitted
from tests.support.servers import Servers
from tests.support.service import Service, service
from tests.support.stream import Stream
from tests.support.waiting import until


@pytest.fixture(scope="module")
def module_api(
    session_servers: Servers,
    migrated_template: str,
    session_redis_databases: Iterator[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Service]:
    """An API without a worker: what happens to a task is what the test does."""
    [port] = ports.free_ports(1)
    with servers.database(session_servers.postgres, template=migrated_template) as postgres:
        settings = environment(postgres, next(session_redis_databases), port)
        with service(settings, tmp_path_factory.mktemp("api")) as one:
            one.start_all("api")
            yield one


@pytest.fixture
def running(module_api: Service) -> Iterator[Service]:
    """The API; what it logged is shown if the test fails."""
    yield module_api
    print(module_api.logs())  # noqa: T201  # pytest shows it with a failure only


@pytest.fixture
async def db(running: Service) -> AsyncIterator[Database]:
    async with opened(settings_for(running.environment["DATABASE_URL"], running.environment["REDIS_URL"])) as database:
        yield database


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.http.base_url, timeout=30) as one:
        yield one


@pytest.fixture
async def wire(running: Service) -> AsyncIterator["redis.asyncio.Redis"]:
    async with redis.asyncio.Redis.from_url(running.environment["REDIS_URL"]) as one:
        yield one


async def begun(db: Database) -> lifecycle.Claimed:
    return await started(db, await submitted(db))


async def end(db: Database, claimed: lifecycle.Claimed) -> None:
    """Have a task end, and nobody tell Redis of it."""
    transition = lifecycle.decide(claimed.budgets, lifecycle.Succeeded("1"))
    assert await lifecycle.settle(db, claimed.claim, transition) is not None


async def listens(wire: "redis.asyncio.Redis", *tasks: UUID, not_to: Sequence[UUID] = ()) -> None:
    """Return once the API listens for the ends of these tasks, and not for those of others."""
    wanted, unwanted = ({f"celery-task-meta-{task_id}".encode() for task_id in some} for some in (tasks, not_to))

    async def does() -> bool:
        # Channels are one name space for all databases of a Redis: those of other tests are there, too.
        heard = set(await wire.pubsub_channels("celery-task-meta-*"))
        return wanted <= heard and not unwanted & heard

    await until(does, 10, "the subscriptions")


async def test_a_task_is_followed_to_its_end_and_no_event_comes_twice(client: httpx.AsyncClient, db: Database) -> None:
    claimed = await begun(db)
    task_id = claimed.claim.task_id
    stream = Stream(client, task_id)
    await stream.got(1)
    await lifecycle.record_progress(db, claimed.claim, 0.4, "page 4 of 10")
    await stream.got(2)
    await end(db, claimed)
    events = await stream.ended()
    progress = {"fraction": 0.4, "message": "page 4 of 10"}
    assert [(kind, data) for kind, _, data in events] == [
        ("status", {"status": "STARTED", "attempt": 1, "progress": None}),
        ("progress", {"status": "STARTED", "attempt": 1, "progress": progress}),
        ("end", {"status": "SUCCESS", "attempt": 1, "progress": progress, "error_type": None}),
    ]
    assert (stream.status, stream.content_type) == (200, "text/event-stream; charset=utf-8")
    ids = [event_id for _, event_id, _ in events]
    assert len(set(ids)) == 3

    again = Stream(client, task_id, ids[1])
    assert await again.ended() == events[2:], "what is new is told"
    over = Stream(client, task_id, ids[2])
    assert (await over.ended(), over.status) == ([], 204)


async def test_who_comes_again_goes_on_behind_the_last_event(
    client: httpx.AsyncClient, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    claimed = await begun(db)
    stream = Stream(client, claimed.claim.task_id)
    [(_, event_id, _)] = await stream.got(1)
    await stream.leave()
    await listens(wire, not_to=[claimed.claim.task_id])
    again = Stream(client, claimed.claim.task_id, event_id)
    await listens(wire, claimed.claim.task_id)
    await lifecycle.record_progress(db, claimed.claim, 0.5, "half")
    assert [kind for kind, _, _ in await again.got(1)] == ["progress"]
    await again.leave()


def log_of(*numbers: int) -> lifecycle.Log:
    lines = [{"after": n / 10, "level": "INFO", "logger": "somebody", "message": f"line {n}"} for n in numbers]
    return lifecycle.Log(json.dumps(lines), dropped=numbers[0] - 1)


def lines(attempt: int, *numbers: int) -> list[tuple[int, int, str]]:
    return [(attempt, number, f"line {number}") for number in numbers]


async def attempted(db: Database, claimed: lifecycle.Claimed, outcome: lifecycle.Outcome, log: lifecycle.Log) -> None:
    assert await lifecycle.settle(db, claimed.claim, lifecycle.decide(claimed.budgets, outcome), log) is not None


async def test_log_lines_are_told_once_whether_they_were_heard_or_are_kept(
    client: httpx.AsyncClient, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    claimed = await begun(db)
    task_id, channel = claimed.claim.task_id, f"taskqueue-log-{claimed.claim.task_id}"
    stream = Stream(client, task_id)
    await listens(wire, task_id)
    await until(lambda: wire.publish(channel, loglines.encode(claimed.claim, log_of(1, 2))), 10, "a listener")
    await until(lambda: len(stream.logged()) == 2, 10, "what was heard")
    for again in (log_of(2), log_of(1, 2), log_of(2, 3)):
        await wire.publish(channel, loglines.encode(claimed.claim, again))
    await until(lambda: len(stream.logged()) == 3, 10, "what is new")
    await attempted(db, claimed, lifecycle.Succeeded("1"), log_of(3, 4, 5))
    events = await stream.ended()
    assert stream.logged() == lines(1, 1, 2, 3, 4, 5)
    assert [kind for kind, _, _ in events] == ["status", *["log"] * 5, "end"]
    assert len({event_id for _, event_id, _ in events}) == len(events)
    assert set(events[1][2]) == {"attempt", "line", "at", "level", "logger", "message"}
    [kept] = (await client.get(f"/api/tasks/{task_id}/attempts")).json()["data"]
    assert [data["at"] for kind, _, data in events if kind == "log"][2:] == [line["at"] for line in kept["log"]]
    for place in range(1, len(events)):
        later = Stream(client, task_id, events[place - 1][1])
        told = [event for event in events[place:] if event[0] == "end" or event[2]["line"] > 2]
        assert [event[2] for event in await later.ended()] == [event[2] for event in told], "those that are kept"


async def test_nothing_that_is_published_harms_a_stream_or_is_taken_for_a_line(
    client: httpx.AsyncClient, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    claimed = await begun(db)
    claim, channel = claimed.claim, f"taskqueue-log-{claimed.claim.task_id}"
    stream = Stream(client, claim.task_id)
    await until(lambda: wire.publish(channel, b""), 10, "a listener")
    body = loglines.encode(claim, log_of(1))[32:]
    forged = [
        *(b"", b"\xff" * 40, b"null", b"[" * 30_000, b"x" * 200_000, body, bytes(32) + body),
        loglines.encode(lifecycle.Claim(claim.task_id, claim.attempt, uuid4()), log_of(1)),
        loglines.encode(lifecycle.Claim(claim.task_id, 2, claim.token), log_of(1)),
        loglines.encode(claim, lifecycle.Log('[{"after": NaN}]')),
        loglines.encode(claim, lifecycle.Log("[" * 20_000)),
    ]
    for one in forged:
        await wire.publish(channel, one)
        await wire.publish(f"celery-task-meta-{claim.task_id}", one)
    await wire.publish(channel, loglines.encode(claim, log_of(7)))
    await until(stream.logged, 10, "the line that is one")
    await end(db, claimed)
    assert [kind for kind, _, _ in await stream.ended()] == ["status", "log", "end"]
    assert stream.logged() == lines(1, 7)


async def test_who_comes_again_later_is_told_the_lines_of_all_attempts_since(
    client: httpx.AsyncClient, db: Database
) -> None:
    task_id = await submitted(db, max_retries=30)
    waiting = Stream(client, task_id)
    [(_, before, _)] = await waiting.got(1)
    await waiting.leave()
    failed = lifecycle.RetryAsked(lifecycle.Error(type="OSError", message=""), 0.0, None)
    for _ in range(following.PAGE + 3):
        await attempted(db, await started(db, task_id), failed, log_of(1, 2))
    await attempted(db, await started(db, task_id), lifecycle.Succeeded("1"), log_of(8, 9))
    last = following.PAGE + 4
    everything = [line for attempt in range(1, last) for line in lines(attempt, 1, 2)] + lines(last, 8, 9)

    anew = Stream(client, task_id)
    assert [kind for kind, _, _ in await anew.ended()] == ["log", "log", "end"]
    assert anew.logged() == everything[-2:], "of the attempt that it is at"
    since = Stream(client, task_id, before)
    told = await since.ended()
    assert since.logged() == everything
    place = 5
    again = Stream(client, task_id, told[place][1])
    assert await again.ended() == told[place + 1 :]
    old = Stream(client, task_id, "2.RETRY.00000000")
    await old.ended()
    assert old.logged() == everything[2:], "an id of a release that told no lines"


@pytest.mark.parametrize(
    "hostile",
    [
        "new",
        "new.0.0",
        "new.99999999999.1",
        "9999999999.STARTED.00000000",
        "1.STARTED.00000000.9999999999.1",
        "1.STARTED.00000000.1.99999999999999999999",
        "1.STARTED.0000000",
        "1.STARTED.00000000.-1.1",
        "1.STARTED.00000000.1",
        "' OR 1=1 --",
        "x" * 200,
    ],
)
async def test_an_id_that_is_none_is_no_id(client: httpx.AsyncClient, db: Database, hostile: str) -> None:
    claimed = await begun(db)
    await attempted(db, claimed, lifecycle.Succeeded("1"), log_of(1))
    stream = Stream(client, claimed.claim.task_id, hostile)
    assert [kind for kind, _, _ in await stream.ended()] == ["log", "end"]


async def test_a_line_that_is_not_kept_is_told_all_the_same(
    client: httpx.AsyncClient, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    """Its process was killed, for example."""
    claimed = await begun(db)
    stream = Stream(client, claimed.claim.task_id)
    channel = f"taskqueue-log-{claimed.claim.task_id}"
    await until(lambda: wire.publish(channel, loglines.encode(claimed.claim, log_of(1))), 10, "a listener")
    await until(stream.logged, 10, "the line")
    await end(db, claimed)
    await stream.ended()
    assert stream.logged() == lines(1, 1)


async def test_what_is_not_there_can_t_be_followed(client: httpx.AsyncClient) -> None:
    answer = await client.get(f"/api/tasks/{uuid4()}/events")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")
    assert (await client.get("/api/tasks/hunter2/events")).status_code == 422


async def test_who_leaves_gives_the_place_back(
    client: httpx.AsyncClient, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    waited, followed = [(await begun(db)).claim.task_id for _ in range(2)]
    stream = Stream(client, followed)
    await stream.got(1)
    waiting = asyncio.create_task(client.get(f"/api/tasks/{waited}/result", params={"wait": 20}))
    await listens(wire, waited, followed)
    await stop(waiting)
    await listens(wire, followed, not_to=[waited])
    await stream.leave()
    await listens(wire, not_to=[waited, followed])


async def test_who_waits_is_answered_at_once_when_the_api_stops(
    running: Service, db: Database, wire: "redis.asyncio.Redis"
) -> None:
    [port] = ports.free_ports(1)
    stopping = running.start("api", PORT=str(port))
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        await until(lambda: _ready(client), 30, "the start of another API")
        tasks = [(await begun(db)).claim.task_id for _ in range(3)]
        stream = Stream(client, tasks[0])
        await stream.got(1)
        waiting = [asyncio.create_task(client.get(f"/api/tasks/{one}/result", params={"wait": 25})) for one in tasks]
        await listens(wire, *tasks)
        began = time.monotonic()
        stopping.signal(signal.SIGTERM)
        answers = await asyncio.gather(*waiting)
        assert [one.status_code for one in answers] == [202] * 3
        assert [kind for kind, _, _ in await stream.ended()] == ["status"]
        assert time.monotonic() - began < 15, "without hearing of it they would wait for 25 s"
    await until(lambda: not stopping.running(), 10, "the end of the API")


async def _ready(client: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await client.get("/readyz")).status_code == 200
    return False

"""A real API process whose clients wait for tasks, follow them, leave, and are let go."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import redis.asyncio

from app import lifecycle
from app.core.stopping import stop
from app.db import Database
from app.dev import ports
from tests.conftest import settings_for
from tests.integration.worker.conftest import environment
from tests.support import servers
from tests.support.database import opened, started, submitted
from tests.support.servers import Servers
from tests.support.service import Service, service
from tests.support.waiting import until

Event = tuple[str, str, dict[str, Any]]
"""Its name, its id and its data."""


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


class Stream:
    """What comes of a stream of events."""

    def __init__(self, client: httpx.AsyncClient, task_id: UUID, last_event_id: str | None = None) -> None:
        self.events: list[Event] = []
        self.status = 0
        self.content_type = ""
        headers = {"last-event-id": last_event_id} if last_event_id else {}
        self._reading = asyncio.create_task(self._read(client, f"/api/tasks/{task_id}/events", headers))

    async def _read(self, client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
        async with client.stream("GET", path, headers=headers) as answer:
            self.status, self.content_type = answer.status_code, answer.headers.get("content-type", "")
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "data" in fields:
                    self.events.append((fields["event"], fields["id"], json.loads(fields["data"])))
                    fields = {}

    async def got(self, count: int) -> list[Event]:
        await until(lambda: len(self.events) >= count, 10, f"{count} events")
        return self.events

    async def ended(self) -> list[Event]:
        async with asyncio.timeout(10):
            await self._reading
        return self.events

    async def leave(self) -> None:
        await stop(self._reading)


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

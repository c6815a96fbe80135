"""Waiting for a result, and asking for what is new."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import Request
from pydantic import SecretStr

from app import keys, lifecycle, publisher
from app.broker import Broker
from app.core import errors
from app.core.config import Settings
from app.core.scopes import Scope
from app.core.stopping import stop
from app.db import Database
from app.routers import door, following
from app.watch import Full, Watch
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import assert_problem, started
from tests.support.identities import guarded, key_of, shown
from tests.support.network import closed_port
from tests.support.waiting import until

NEVER = 3600.0
SOON = 5.0
"""Seconds, of a busy machine; what fails here waits for ever."""
ANYBODY = door.Caller("")


@pytest.fixture
async def broker(redis_url: str) -> AsyncIterator[Broker]:
    wire = Broker(redis_url, client_name="test")
    yield wire
    await wire.close()


@pytest.fixture
async def deaf(
    monkeypatch: pytest.MonkeyPatch, api_settings: Settings, serve: Serve
) -> AsyncIterator[httpx.AsyncClient]:
    """An API that never looks by itself: who waits is woken through Redis or not at all."""
    monkeypatch.setattr("app.watch.LOOK_SECONDS", NEVER)
    async with serve(api_settings) as client:
        yield client


async def settle(db: Database, task_id: UUID, outcome: lifecycle.Outcome) -> lifecycle.Ended:
    held = lifecycle.Claim(task_id, 1, UUID(int=task_id.int ^ 1))
    settled = await lifecycle.settle(db, held, lifecycle.decide(lifecycle.Budgets(max_retries=0), outcome))
    assert settled is not None
    assert settled.ended is not None
    return settled.ended


def asking(
    api: httpx.AsyncClient, task_id: UUID, wait: float = 25, *, prefer: str | None = None
) -> "asyncio.Task[httpx.Response]":
    path = f"/api/tasks/{task_id}/result"
    if prefer is not None:
        return asyncio.create_task(api.get(path, headers={"prefer": prefer}))
    return asyncio.create_task(api.get(path, params={"wait": wait}))


async def waited_for(broker: Broker, *tasks: UUID, by_nobody: bool = False) -> None:
    """Return once an API listens for the ends of these tasks; with `by_nobody`, once none does."""
    asked = {f"celery-task-meta-{task_id}".encode() for task_id in tasks}

    async def listens() -> bool:
        # Channels are one name space for all databases of a Redis: those of other tests are there, too.
        heard = asked.intersection(await broker._redis.pubsub_channels("celery-task-meta-*"))
        return heard == (set() if by_nobody else asked)

    await until(listens, SOON, "a subscription, or its end")


@pytest.mark.parametrize("prefer", [None, "respond-async, wait=20"])
async def test_who_waits_gets_the_result_when_the_task_ends(
    deaf: httpx.AsyncClient, db: Database, broker: Broker, prefer: str | None
) -> None:
    task_id = await started(db)
    answers = [asking(deaf, task_id, prefer=prefer) for _ in range(3)]
    await waited_for(broker, task_id)
    ended = await settle(db, task_id, lifecycle.Succeeded('{"pages": 3}'))
    assert not any(one.done() for one in answers)
    await publisher.announce_end(broker, ended)
    async with asyncio.timeout(SOON):
        for answer in await asyncio.gather(*answers):
            assert (answer.status_code, answer.json()) == (200, {"result": {"pages": 3}})
            assert answer.headers.get("preference-applied") == ("wait=20" if prefer else None)
    await waited_for(broker, task_id, by_nobody=True)


async def test_an_end_that_nobody_told_of_is_found_a_second_later(
    api: httpx.AsyncClient, db: Database, broker: Broker
) -> None:
    task_id = await started(db)
    answer = asking(api, task_id)
    await waited_for(broker, task_id)
    await settle(db, task_id, lifecycle.Failed(lifecycle.Error(type="E", message="m")))
    async with asyncio.timeout(SOON):
        assert (await answer).json() == {"result": None, "error": {"type": "E", "message": "m"}}


async def test_without_redis_who_waits_hears_of_the_end_all_the_same(
    api_settings: Settings, serve: Serve, db: Database
) -> None:
    url = SecretStr(f"redis://127.0.0.1:{closed_port()}/0")
    async with serve(api_settings.model_copy(update={"redis_url": url})) as client:
        task_id = await started(db)
        answer = asking(client, task_id)
        await asyncio.sleep(0)
        await settle(db, task_id, lifecycle.Succeeded("1"))
        async with asyncio.timeout(SOON):
            assert (await answer).json() == {"result": 1}


async def test_a_task_that_does_not_end_in_time_is_not_available_yet(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await started(db)
    began = time.monotonic()
    answer = await asking(api, task_id, wait=0.3)
    assert time.monotonic() - began >= 0.3
    assert (answer.status_code, answer.json()) == (202, {"detail": "Result not available yet"})
    assert answer.headers["retry-after"] == "1"


async def test_a_cancel_over_http_wakes_who_waits(deaf: httpx.AsyncClient, broker: Broker) -> None:
    created = await deaf.post("/api/tasks/submit", json={"countdown": 600})
    task_id = UUID(created.json()["task_id"])
    answer = asking(deaf, task_id)
    await waited_for(broker, task_id)
    await deaf.post(f"/api/tasks/{task_id}/cancel")
    async with asyncio.timeout(SOON):
        assert (await answer).json()["error"]["type"] == "Cancelled"


async def test_what_is_not_there_is_not_waited_for(api: httpx.AsyncClient) -> None:
    async with asyncio.timeout(SOON):
        assert_problem(await asking(api, uuid4()), 404)


@pytest.mark.parametrize("wait", ["26", "-1", "nan", "inf", "soon", "", "1e9"])
async def test_a_bad_wait_is_refused(api: httpx.AsyncClient, wait: str) -> None:
    answer = await api.get(f"/api/tasks/{uuid4()}/result", params={"wait": wait})
    assert_problem(answer, 422, "/wait")


async def test_where_too_many_wait_the_answer_comes_at_once(
    api_settings: Settings, serve: Serve, db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.watch.PLACES", 2)
    async with serve(api_settings) as client:
        first, second, third = [await started(db) for _ in range(3)]
        waiting = [asking(client, task_id) for task_id in (first, second)]
        await waited_for(broker, first, second)
        async with asyncio.timeout(SOON):
            answer = await asking(client, third)
        assert (answer.status_code, answer.headers["retry-after"]) == (202, "1")
        assert_problem(await client.get(f"/api/tasks/{third}/events"), 503)
        for task_id in (first, second):
            await publisher.announce_end(broker, await settle(db, task_id, lifecycle.Succeeded("1")))
        await asyncio.gather(*waiting)
        answer = await asking(client, third, wait=0.1)
        assert answer.status_code == 202


@pytest.fixture
async def watch(db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    monkeypatch.setattr("app.watch.LOOK_SECONDS", NEVER)
    one = Watch(db, broker, places=3)
    running = asyncio.create_task(one.run())
    yield one
    running.cancel()
    await asyncio.wait([running])


async def test_an_end_before_the_subscription_is_not_missed(watch: Watch, db: Database) -> None:
    task_id = await started(db)
    await settle(db, task_id, lifecycle.Succeeded("1"))
    with watch.follow(task_id) as first:
        async with asyncio.timeout(SOON):
            await first.end(NEVER)
        assert first.over
        # And there is a subscription already.
        with watch.follow(task_id) as second:
            async with asyncio.timeout(SOON):
                await second.end(NEVER)
            assert second.over


async def test_a_task_that_is_removed_is_not_waited_for_any_longer(watch: Watch) -> None:
    with watch.follow(uuid4()) as follower:
        async with asyncio.timeout(SOON):
            await follower.end(NEVER)
        assert (follower.over, follower.seen) == (True, None)


async def test_a_subscription_that_broke_is_made_again(
    watch: Watch, db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.watch.HEAR_AGAIN_SECONDS", 0.05)
    task_id = await started(db)
    with watch.follow(task_id) as follower:
        await waited_for(broker, task_id)
        await until(lambda: follower.seen, SOON, "the look that comes with the subscription")
        # Nobody tells of it, and nobody looks, until a subscription is there again.
        await settle(db, task_id, lifecycle.Succeeded("1"))
        [listening] = [one for one in await broker._redis.client_list(_type="pubsub") if _is_ours(one, broker)]
        await broker._redis.client_kill_filter(_id=listening["id"])
        async with asyncio.timeout(SOON):
            await follower.end(NEVER)
        assert follower.over


async def test_of_a_lost_connection_one_is_made_again_not_two(
    watch: Watch, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.watch.HEAR_AGAIN_SECONDS", 0.0)
    for _ in range(20):
        # Whoever leaves changes the subscriptions, at the time when the loss of the connection is noticed.
        task_id = uuid4()
        with watch.follow(task_id):
            await waited_for(broker, task_id)
            [listening] = [one for one in await broker._redis.client_list(_type="pubsub") if _is_ours(one, broker)]
            await broker._redis.client_kill_filter(_id=listening["id"])
        await waited_for(broker, task_id, by_nobody=True)


def _is_ours(client: dict[str, str], broker: Broker) -> bool:
    """Whether a client of Redis is connected to this test's database."""
    return client["db"] == str(broker._redis.connection_pool.connection_kwargs["db"])


async def test_places_are_given_back(watch: Watch) -> None:
    for _ in range(3):
        with watch.follow(uuid4()), watch.follow(uuid4()), watch.follow(uuid4()):
            assert watch.full()
            with pytest.raises(Full), watch.follow(uuid4()):
                pass
        assert not watch.full()


async def test_an_owner_has_no_more_places_than_it_leaves_free(db: Database, broker: Broker) -> None:
    shared = Watch(db, broker, places=8, shared=True)
    with contextlib.ExitStack() as taken:

        def take(owner: str) -> int:
            """How many more places this owner gets."""
            for count in range(9):
                if shared.full(owner):
                    with pytest.raises(Full):
                        taken.enter_context(shared.follow(uuid4(), owner=owner))
                    return count
                taken.enter_context(shared.follow(uuid4(), owner=owner))
            raise AssertionError("more than there are")

        # Who says nothing of themselves, but has a key, is an owner like any other.
        assert [take(owner) for owner in ("", "ada", "bob", "carol")] == [4, 2, 1, 1]
        assert shared.full("dave")
    assert not any(shared._taken.values())
    assert not shared.full("ada")


async def test_an_owner_that_takes_all_the_places_it_gets_leaves_some(
    api_settings: Settings, serve: Serve, db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.watch.PLACES", 4)
    ada, bob = [shown(await key_of(db, owner)) for owner in ("ada", "bob")]
    theirs, too, his = [await started(db, owner=owner) for owner in ("ada", "ada", "bob")]
    async with serve(guarded(api_settings)) as client:

        async def wait(task_id: UUID, headers: Mapping[str, str], seconds: float) -> httpx.Response:
            return await client.get(f"/api/tasks/{task_id}/result", params={"wait": seconds}, headers=headers)

        waiting = [asyncio.create_task(wait(task_id, ada, 25)) for task_id in (theirs, too)]
        await waited_for(broker, theirs, too)
        # The third is not held back, and a stream of theirs is refused.
        async with asyncio.timeout(2 * SOON):
            assert (await wait(theirs, ada, 25)).status_code == 202
        assert_problem(await client.get(f"/api/tasks/{theirs}/events", headers=ada), 503)
        other = asyncio.create_task(wait(his, bob, 25))
        await waited_for(broker, his)
        for task_id in (theirs, too, his):
            await publisher.announce_end(broker, await settle(db, task_id, lifecycle.Succeeded("1")))
        async with asyncio.timeout(2 * SOON):
            assert [one.json() for one in await asyncio.gather(*waiting, other)] == [{"result": 1}] * 3


async def test_who_waits_is_let_go_when_the_process_ends(watch: Watch, db: Database, broker: Broker) -> None:
    task_id = await started(db)
    with watch.follow(task_id) as follower:
        ending = asyncio.create_task(follower.end(NEVER))
        await waited_for(broker, task_id)
        watch.close()
        async with asyncio.timeout(SOON):
            await ending
        with pytest.raises(Full), watch.follow(uuid4()):
            pass


async def test_a_stream_that_is_silent_is_kept_alive_and_ends_in_time(
    watch: Watch, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routers.following.HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr("app.routers.following.STREAM_SECONDS", 0.2)
    task_id = await started(db)
    found = (await lifecycle.snapshots(db, [task_id]))[task_id]
    async with asyncio.timeout(SOON):
        sent = [
            chunk
            async for chunk in following._events(db, watch, ANYBODY, task_id, found, told=following._Told(found, None))
        ]
    assert sent[0] == "retry: 1000\n\n"
    assert sent[1].startswith("id: 1.STARTED.")
    assert len(sent) > 3
    assert set(sent[2:]) == {":\n\n"}
    with watch.follow(uuid4()), watch.follow(uuid4()), watch.follow(uuid4()):
        late = [
            chunk
            async for chunk in following._events(db, watch, ANYBODY, task_id, found, told=following._Told(found, None))
        ]
    assert late == sent[:2], "where nobody else may wait, a stream ends at once and is asked for again"


@pytest.fixture
async def guarded_api(api_settings: Settings, serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    async with serve(guarded(api_settings)) as client:
        yield client


async def followed(
    watch: Watch, db: Database, caller: door.Caller, task_id: UUID
) -> tuple[list[str], "asyncio.Task[None]"]:
    """What somebody who follows a task is told, as it comes, once they wait for more."""
    sent: list[str] = []
    found = (await lifecycle.snapshots(db, [task_id]))[task_id]

    async def read() -> None:
        async for chunk in following._events(db, watch, caller, task_id, found, told=following._Told(found, None)):
            sent.append(chunk)  # noqa: PERF401  # it is looked at as it comes

    reading = asyncio.create_task(read())
    await until(lambda: task_id in watch._followers, SOON, "somebody who waits")
    return sent, reading


async def admitted(api_settings: Settings, db: Database, key: str) -> door.Caller:
    """Who shows this key, as a door of its own lets them in."""
    entrance = door.Door.of(guarded(api_settings), db)
    assert entrance is not None
    request = Request({"type": "http", "headers": [(b"authorization", f"Bearer {key}".encode())], "state": {}})
    return await entrance.admit(request, Scope.TASKS_READ, "poll")


async def revoke(db: Database, key: str) -> None:
    key_id = keys.id_of(key)
    assert key_id is not None
    assert await keys.revoke(db, key_id) is not None


async def test_a_silent_stream_ends_soon_after_its_key_was_revoked(
    watch: Watch, db: Database, api_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routers.following.HEARTBEAT_SECONDS", NEVER)
    key, other = [await key_of(db, "ada") for _ in range(2)]
    task_id = await started(db)
    sent, reading = await followed(watch, db, await admitted(api_settings, db, key), task_id)
    others, staying = await followed(watch, db, await admitted(api_settings, db, other), task_id)
    await revoke(db, key)
    async with asyncio.timeout(4 * keys.STALE_SECONDS):
        await reading
    assert len(sent) == len(others) == 2, "nothing more was told"
    assert not staying.done()
    await stop(staying)


async def test_nothing_is_told_to_a_key_that_has_expired_or_that_nobody_can_ask_about(
    watch: Watch, db: Database, api_settings: Settings
) -> None:
    task_id = await started(db)
    opens: bool | None = True

    async def holds() -> bool:
        if opens is None:
            raise errors.DatabaseUnavailable("gone")
        return opens

    caller = door.Caller("ada", holds=holds, ask_seconds=0.01)
    answers: list[bool | None] = [False, None]
    for answer in answers:
        opens = True
        sent, reading = await followed(watch, db, caller, task_id)
        [follower] = watch._followers[task_id]
        opens = answer
        await asyncio.sleep(0)
        follower.see(replace((await lifecycle.snapshots(db, [task_id]))[task_id], progress=0.5))
        async with asyncio.timeout(SOON):
            await reading
        assert len(sent) == 2
    expiring = await admitted(api_settings, db, await key_of(db, "ada", expires_in_seconds=0.5))
    sent, reading = await followed(watch, db, expiring, task_id)
    async with asyncio.timeout(2 * SOON):
        await reading


async def test_a_stream_outlives_postgres_as_long_as_there_is_nothing_to_tell(
    watch: Watch, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.routers.following.HEARTBEAT_SECONDS", 0.05)
    asked = 0

    async def holds() -> bool:
        nonlocal asked
        asked += 1
        if asked < 20:
            raise errors.DatabaseUnavailable("gone")
        return True

    caller = door.Caller("ada", holds=holds, ask_seconds=0.01)
    sent, reading = await followed(watch, db, caller, await started(db))
    await until(lambda: asked > 25, SOON, "questions")
    assert not reading.done()
    assert ":\n\n" in sent
    await stop(reading)


async def test_who_waits_with_a_key_that_is_revoked_meanwhile_gets_no_result(
    guarded_api: httpx.AsyncClient, db: Database, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.keys.ring.FRESH_SECONDS", 0.0)
    monkeypatch.setattr("app.keys.ring.STALE_SECONDS", 0.0)
    key, other = [await key_of(db, "") for _ in range(2)]
    ends, goes_on = [await started(db) for _ in range(2)]

    def waiting(task_id: UUID, key: str, wait: float) -> "asyncio.Task[httpx.Response]":
        path = f"/api/tasks/{task_id}/result"
        return asyncio.create_task(guarded_api.get(path, params={"wait": wait}, headers=shown(key)))

    answers = [waiting(ends, key, 25), waiting(goes_on, key, 2), waiting(ends, other, 25)]
    await waited_for(broker, ends, goes_on)
    await revoke(db, key)
    await publisher.announce_end(broker, await settle(db, ends, lifecycle.Succeeded('"secret"')))
    async with asyncio.timeout(2 * SOON):
        first, second, third = await asyncio.gather(*answers)
    for refused in (first, second):
        assert assert_problem(refused, 401)["type"] == "/problems/unauthenticated"
    assert third.json() == {"result": "secret"}


async def test_a_status_that_is_known_is_not_sent_again(api: httpx.AsyncClient, db: Database) -> None:
    task_id = await started(db)
    path = f"/api/tasks/{task_id}/status"
    first = await api.get(path)
    assert (first.status_code, first.json()) == (200, {"status": "STARTED"})
    assert (first.headers["etag"], first.headers["cache-control"]) == ('"STARTED"', "private, no-cache")
    for known in ('"STARTED"', 'W/"STARTED"', '"PENDING", "STARTED"', "*"):
        again = await api.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", '"STARTED"')
    for other in ('"PENDING"', "STARTED", "", '"START'):
        assert (await api.get(path, headers={"if-none-match": other})).status_code == 200
    await settle(db, task_id, lifecycle.Succeeded("1"))
    assert (await api.get(path, headers={"if-none-match": '"STARTED"'})).json() == {"status": "SUCCESS"}
    assert_problem(await api.get(f"/api/tasks/{uuid4()}/status", headers={"if-none-match": "*"}), 404)


async def test_openapi_declares_how_to_wait_and_follow(api: httpx.AsyncClient) -> None:
    paths: dict[str, Any] = (await api.get("/openapi.json")).json()["paths"]
    result = paths["/api/tasks/{id}/result"]["get"]
    assert {one["name"] for one in result["parameters"]} >= {"id", "wait", "prefer"}
    assert {"200", "202", "404", "410", "422", "503"} <= set(result["responses"])
    assert {"Retry-After", "Preference-Applied"} <= set(result["responses"]["202"]["headers"])
    status = paths["/api/tasks/{id}/status"]["get"]
    assert {"200", "304", "404", "410", "422", "503"} <= set(status["responses"])
    events = paths["/api/tasks/{id}/events"]["get"]
    assert {"200", "204", "404", "410", "422", "503"} <= set(events["responses"])
    assert set(events["responses"]["200"]["content"]) == {"text/event-stream"}

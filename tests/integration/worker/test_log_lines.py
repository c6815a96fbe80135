"""What a real worker tells those who follow a task of what its code logs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import redis.asyncio

from app.core.stopping import stop
from app.worker.journal import LINES, TELL_SECONDS
from tests.support.service import Service
from tests.support.stream import Stream
from tests.support.waiting import until


@pytest.fixture
async def client(running: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=running.http.base_url, timeout=30) as one:
        yield one


@contextlib.asynccontextmanager
async def watching(running: Service) -> AsyncIterator[list[tuple[str, str]]]:
    """The commands that Redis is sent about channels of log lines: each one's name, and its channel."""
    seen: list[tuple[str, str]] = []

    async def watch(monitor: "redis.asyncio.client.Monitor") -> None:
        async for one in monitor.listen():
            words = one["command"].split()
            seen.extend((words[0].upper(), word) for word in words if word.startswith("taskqueue-log-"))

    async with (
        redis.asyncio.Redis.from_url(running.environment["REDIS_URL"]) as wire,
        wire.monitor() as monitor,
    ):
        task = asyncio.create_task(watch(monitor))
        try:
            yield seen
        finally:
            await stop(task)


def kept(running: Service, task_id: UUID) -> list[dict[str, Any]]:
    """The lines of all attempts, as `GET …/attempts` shows them, in the form of a `log` event."""
    found: list[dict[str, Any]] = running.http.get(f"/api/tasks/{task_id}/attempts").json()["data"]
    return [
        {"attempt": one["number"], "line": number, **line}
        for one in found
        for number, line in enumerate(one["log"], one["log_dropped"] + 1)
    ]


async def test_lines_are_told_while_the_task_runs_and_nobody_gets_one_twice(
    running: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    mark = tmp_path / "go on"
    task_id = running.submit("odd.talks", str(mark), 3)
    running.reaches(task_id, "STARTED")
    first = Stream(client, task_id)
    await until(lambda: len(first.logged()) == 3, 10, "the lines of a task that runs")
    assert running.status(task_id) == "STARTED"
    assert [kind for kind, _, _ in first.events] == ["status", "log", "log", "log"]
    await first.leave()

    # One that comes again, after the second of them; one that comes anew, to the same process.
    again, late = Stream(client, task_id, first.events[2][1]), Stream(client, task_id)
    await until(lambda: len(again.logged()) == 1 and len(late.logged()) == 3, 10, "what each of them does not know")
    assert running.status(task_id) == "STARTED"
    mark.touch()
    lines = [(1, number, f"line {number - 1}") for number in (1, 2, 3)]
    lines += [(1, number, f"late line {number - 4}") for number in (4, 5, 6)]
    assert [kind for kind, _, _ in await again.ended()] == [*["log"] * 4, "end"]
    assert again.logged() == lines[2:]
    assert [kind for kind, _, _ in await late.ended()] == ["status", *["log"] * 6, "end"]
    assert late.logged() == lines
    assert [data for kind, _, data in late.events if kind == "log"] == kept(running, task_id)
    over = Stream(client, task_id, late.events[-1][1])
    assert (await over.ended(), over.status) == ([], 204)


async def test_each_attempt_has_numbers_of_its_own(running: Service, client: httpx.AsyncClient, tmp_path: Path) -> None:
    mark = tmp_path / "go on"
    task_id = running.submit("odd.talks", str(mark), 1, True)
    stream = Stream(client, task_id)
    await until(lambda: len(stream.logged()) == 1, 10, "the first line")
    mark.touch()
    await stream.ended()
    told = [(kind, data["attempt"], data.get("line")) for kind, _, data in stream.events]
    # Which statuses are seen between is a matter of moments.
    assert [one for one in told if one[0] == "log"] == [("log", 1, 1), ("log", 1, 2), ("log", 2, 1), ("log", 2, 2)]
    assert told[-1] == ("end", 2, None)
    statuses = [kind for kind, attempt, _ in told[told.index(("log", 1, 2)) :] if attempt == 2]
    assert statuses[-3:] == ["log", "log", "end"]


async def test_a_flood_of_lines_is_told_by_its_last_ones(running: Service, client: httpx.AsyncClient) -> None:
    seconds = 2.0
    task_id = running.submit("odd.floods", seconds)
    stream = Stream(client, task_id)
    await stream.ended()
    numbers = [number for _, number, _ in stream.logged()]
    logged = running.result(task_id)["result"]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == logged
    assert all(text.startswith(f"line {number} ") for _, number, text in stream.logged())
    assert LINES < len(numbers) <= LINES * (seconds / TELL_SECONDS + 2) < logged, "also while it runs, and not all"
    shown = [data for kind, _, data in stream.events if kind == "log"]
    assert shown[-len(kept(running, task_id)) :] == kept(running, task_id)


async def test_who_logs_nothing_or_is_not_followed_tells_nothing(
    running: Service, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    mark = tmp_path / "go on"
    async with watching(running) as seen:
        silent, quick = running.submit("sample.echo", 1), running.submit("odd.log", "lines")
        running.ends(silent)
        running.ends(quick)
        alone = running.submit("odd.talks", str(mark), 3)
        channels = {one: f"taskqueue-log-{one}" for one in (silent, alone)}
        await until(lambda: len([one for one in seen if one[1] == channels[alone]]) > 1, 10, "two questions")
        assert {name for name, channel in seen if channel == channels[alone]} == {"PUBSUB"}
        # And now somebody is there.
        stream = Stream(client, alone)
        await until(lambda: ("PUBLISH", channels[alone]) in seen, 10, "what is told")
        await until(lambda: len(stream.logged()) == 3, 10, "the lines")
        mark.touch()
        await stream.ended()
    assert not [one for one in seen if one[1] == channels[silent]]

"""How long it takes from a submit to the result, one task after another.

Whoever polls asks again as soon as it is answered; the tutorial's clients can
do nothing else. Ours may wait for the answer, or be told by a webhook.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from app.dev import ports
from benchmarks.suite.figures import OURS, Comparison, Measure, Target, percentile
from benchmarks.suite.load import request
from benchmarks.suite.stage import Stage
from benchmarks.suite.submits import TUTORIAL

LONG_POLL, WEBHOOK = "ours, waited for", "ours, by webhook"
TUTORIAL_WORKER = "-m celery -A benchmarks.suite.tutorial worker -c 2 --loglevel WARNING"
WARM_UP = 10
PATIENCE_SECONDS = 60.0

Way = Callable[[], Awaitable[None]]
"""Submits one task, and returns once its result is known."""


async def measure(stage: Stage) -> list[Measure]:
    """Milliseconds from submit to result, of tasks that do nothing."""
    ours, tutorial = await asyncio.gather(stage.api(), stage.serve("tutorial", "benchmarks.suite.tutorial:api"))
    await stage.cleared("ours", "task")
    await stage.cleared("tutorial", "tutorial_task")
    await stage.worker()
    await stage.relay()
    await stage.process(TUTORIAL_WORKER.split(), "tutorial")
    found: dict[str, dict[str, list[float]]] = {"p50": {}, "p99": {}}
    async with contextlib.AsyncExitStack() as stack:
        told = await stack.enter_async_context(receiver())
        client = await stack.enter_async_context(connected(ours.port))
        theirs = await stack.enter_async_context(connected(tutorial.port))
        ways: dict[str, Way] = {
            OURS: lambda: polled(client, "sample.echo"),
            LONG_POLL: lambda: waited(client),
            WEBHOOK: lambda: by_webhook(client, told),
            TUTORIAL: lambda: polled(theirs, "tutorial.echo"),
        }
        for name, way in ways.items():
            stage.say(f"{name}: warms up")
            async with asyncio.timeout(PATIENCE_SECONDS):
                await _took(way, WARM_UP)
        for _, names in stage.plan.turns(list(ways)):
            for name in names:
                took = await _took(ways[name], 40 if stage.plan.quick else 150)
                for what, part in (("p50", 0.5), ("p99", 0.99)):
                    found[what].setdefault(name, []).append(percentile(took, part) * 1e3)
    own = [Comparison(side=name, kind="own") for name in (LONG_POLL, WEBHOOK)]
    target = {"p50": Target(at_most=0.65), "p99": None}
    return [
        Measure(
            name=f"submit to result, {what}",
            unit="ms",
            figures=found[what],
            comparisons=[Comparison(side=TUTORIAL, kind="peer", target=target[what]), *own],
        )
        for what in ("p50", "p99")
    ]


async def _took(way: Way, tasks: int) -> list[float]:
    took = []
    for _ in range(tasks):
        began = time.perf_counter()
        await way()
        took.append(time.perf_counter() - began)
    return took


Ask = Callable[..., Awaitable[tuple[int, Any]]]
"""Sends one request; returns the HTTP status and the body, parsed."""


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Ask]:
    """One connection that stays."""
    reader, writer = await asyncio.open_connection(ports.ADDRESS, port)

    async def ask(method: str, path: str, body: object = None) -> tuple[int, Any]:
        writer.write(request(method, path, body).encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
        return int(head.split(b" ", 2)[1]), json.loads(await reader.readexactly(length))

    try:
        yield ask
    finally:
        writer.close()


async def polled(ask: Ask, task: str) -> None:
    """Ask for the result again and again."""
    _, made = await ask("POST", "/api/tasks/submit", {"task": task, "args": [1]})
    while True:
        status, found = await ask("GET", f"/api/tasks/{made['task_id']}/result")
        if status == 200 and found["result"] is not None:  # noqa: PLR2004  # HTTP's own number
            return


async def waited(ask: Ask) -> None:
    """Ask for the result once, and be answered when it is there."""
    _, made = await ask("POST", "/api/tasks/submit", {"task": "sample.echo", "args": [1]})
    status, _ = await ask("GET", f"/api/tasks/{made['task_id']}/result?wait=25")
    if status != 200:  # noqa: PLR2004  # HTTP's own number
        raise RuntimeError("the task did not end in time")


class Told:
    """What a receiver of webhooks heard, and where it is."""

    def __init__(self) -> None:
        self.url = ""
        self._heard: asyncio.Queue[str] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer each webhook of one connection, and note its task."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0])
                self._heard.put_nowait(json.loads(await reader.readexactly(length))["data"]["task_id"])
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        writer.close()

    async def of(self, task_id: str) -> None:
        """Return once it heard of this task."""
        while await self._heard.get() != task_id:
            pass


@contextlib.asynccontextmanager
async def receiver() -> AsyncIterator[Told]:
    """A receiver of webhooks, for as long as the block runs."""
    told = Told()
    server = await asyncio.start_server(told.serve, ports.ADDRESS, 0)
    told.url = f"http://{ports.ADDRESS}:{server.sockets[0].getsockname()[1]}/hook"
    try:
        yield told
    finally:
        server.close()


async def by_webhook(ask: Ask, told: Told) -> None:
    """Hear of the result."""
    wanted = {"task": "sample.echo", "args": [1], "webhook_url": told.url}
    _, made = await ask("POST", "/api/tasks/submit", wanted)
    await told.of(made["task_id"])

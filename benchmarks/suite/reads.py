"""How fast a task's status is read: ours from its row, the tutorial's from Celery's result backend."""

import asyncio

import httpx

from app.dev import ports
from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.load import request
from benchmarks.suite.stage import Process, Stage
from benchmarks.suite.submits import EMPTY, TUTORIAL

CONNECTIONS = 16
TASKS = 1000

_COMPARISONS = [
    Comparison(side=TUTORIAL, kind="peer"),
    Comparison(side=EMPTY, kind="limit", target=Target(at_least=0.55)),
]


async def measure(stage: Stage) -> list[Measure]:
    """Status reads over 16 connections, of a thousand tasks that wait."""
    ours, tutorial, empty = await asyncio.gather(
        stage.api(),
        stage.serve("tutorial", "benchmarks.suite.tutorial:api"),
        stage.serve("ours", "benchmarks.suite.empty:app"),
    )
    await stage.cleared("ours", "task")
    servers = {OURS: ours, TUTORIAL: tutorial, EMPTY: empty}
    asked = [request("GET", f"/api/tasks/{task_id}/status") for task_id in await _submitted(ours)]
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for server in servers.values():
        await stage.load(server.port, asked, connections=CONNECTIONS, seconds=0.3)  # warms up
    for _, sides in stage.plan.turns(list(servers)):
        for name in sides:
            before = servers[name].cpu_seconds()
            found = await stage.load(servers[name].port, asked, connections=CONNECTIONS, seconds=stage.plan.seconds)
            rates.setdefault(name, []).append(found["rate"])
            cpu.setdefault(name, []).append((servers[name].cpu_seconds() - before) / found["sent"] * 1e6)
    plain = [Comparison(side=one.side, kind=one.kind) for one in _COMPARISONS]
    return [
        Measure(name="status reads, 16 connections", unit="1/s", figures=rates, comparisons=_COMPARISONS),
        Measure(name="status read CPU, 16 connections", unit="µs", figures=cpu, comparisons=plain),
    ]


async def _submitted(api: Process) -> list[str]:
    async with httpx.AsyncClient(base_url=f"http://{ports.ADDRESS}:{api.port}", timeout=60) as client:
        wanted = [{"task": "sample.echo", "args": [1]}] * TASKS
        answer = await client.post("/api/tasks/batch", json={"tasks": wanted})
        answer.raise_for_status()
        task_ids: list[str] = answer.json()["task_ids"]
        return task_ids

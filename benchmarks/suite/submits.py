"""How fast tasks are taken: requests a second, and how long the slowest of a hundred waits."""

import asyncio

from app.dev import ports
from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.load import request
from benchmarks.suite.stage import Process, Stage

CONNECTIONS = (1, 16, 64)
METRICS = "ours, counting"
EMPTY = "empty route"
TUTORIAL = "tutorial"
BODY = {"task": "sample.echo", "args": [1], "webhook_url": "https://receiver.example/hook"}

_NO_TARGETS = [Comparison(side=TUTORIAL, kind="peer"), Comparison(side=EMPTY, kind="limit")]
_RATES = {
    16: [
        Comparison(side=TUTORIAL, kind="peer", target=Target(at_least=13)),
        Comparison(side=EMPTY, kind="limit", target=Target(at_least=0.60)),
    ],
    64: [
        Comparison(side=TUTORIAL, kind="peer", target=Target(at_least=18)),
        Comparison(side=EMPTY, kind="limit", target=Target(at_least=0.85)),
        Comparison(side=METRICS, kind="own"),
    ],
}
_LATEST = {16: [Comparison(side=TUTORIAL, kind="peer"), Comparison(side=EMPTY, kind="limit", target=Target(at_most=3))]}


async def measure(stage: Stage) -> list[Measure]:
    """Submits over 1, 16 and 64 connections, to ours, the tutorial's and a route that does nothing."""
    servers = await started(stage)
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for name, server in servers.items():
        await _loaded(stage, name, server, connections=16, seconds=0.5)  # warms up
    for _, sides in stage.plan.turns(list(servers)):
        for connections in CONNECTIONS:
            for name in sides:
                if name == METRICS and connections != CONNECTIONS[-1]:
                    continue
                figures = await _loaded(stage, name, servers[name], connections, stage.plan.seconds)
                for what, figure in figures.items():
                    found.setdefault((what, connections), {}).setdefault(name, []).append(figure)
    return [
        Measure(
            name=f"{what}, {count} connection{'s' if count > 1 else ''}",
            unit=unit,
            figures=found[what, count],
            comparisons=held.get(count, _NO_TARGETS),
        )
        for what, unit, held in (("submits", "1/s", _RATES), ("submit p99", "ms", _LATEST), ("submit CPU", "µs", {}))
        for count in CONNECTIONS
    ]


async def started(stage: Stage) -> dict[str, Process]:
    """The servers of all sides."""
    servers = await asyncio.gather(
        stage.api(),
        stage.serve("tutorial", "benchmarks.suite.tutorial:api"),
        stage.serve("ours", "benchmarks.suite.empty:app"),
        stage.api({"TASKQUEUE_METRICS_PORT": str(ports.free_ports(1)[0])}),
    )
    return dict(zip((OURS, TUTORIAL, EMPTY, METRICS), servers, strict=True))


async def _loaded(stage: Stage, name: str, server: Process, connections: int, seconds: float) -> dict[str, float]:
    """What a load finds; the CPU time is that of the server's processes. What was submitted before is forgotten."""
    if name != EMPTY:
        await stage.cleared(*(("tutorial", "tutorial_task") if name == TUTORIAL else ("ours", "task")))
    before = server.cpu_seconds()
    found = await stage.load(
        server.port,
        [request("POST", "/api/tasks/submit", BODY)],
        connections=connections,
        seconds=seconds,
        expect=202,
    )
    cpu_seconds = server.cpu_seconds() - before
    return {"submits": found["rate"], "submit p99": found["p99"], "submit CPU": cpu_seconds / found["sent"] * 1e6}

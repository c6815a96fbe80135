"""How much memory each of our processes takes once it has worked.

PSS: what a process shares with others counts in parts, so that the sum is what
the machine gives. Nothing else of Python but this runs meanwhile, so little is
shared with processes that would not be there.
"""

import asyncio
from pathlib import Path

import psutil

from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.load import request
from benchmarks.suite.noops import submitted
from benchmarks.suite.stage import Process, Stage
from benchmarks.suite.submits import BODY

TASKS = 1000
PATIENCE_SECONDS = 60.0
_LEFT = "SELECT count(*) FROM task WHERE finished_at IS NULL"


async def measure(stage: Stage) -> list[Measure]:
    """MiB of the API, the relay, and a pool child of the worker; and of the worker as a whole."""
    await stage.cleared("ours", "task")
    api = await stage.api()
    worker, relay = await stage.worker(), await stage.relay()
    await stage.load(
        api.port, [request("POST", "/api/tasks/submit", BODY | {"webhook_url": None})], connections=16, seconds=1.0,
        expect=202,
    )  # fmt: skip
    await submitted(api.port, TASKS)
    async with stage.connection("ours") as database, asyncio.timeout(PATIENCE_SECONDS):
        while await database.fetchval(_LEFT):  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.05)
    found: dict[str, list[float]] = {"API": [], "relay": [], "worker child": [], "worker, all its processes": []}
    for _ in range(stage.plan.rounds):
        await asyncio.sleep(0.2)
        found["API"].append(max(mebibytes(one) for one in api.family()))
        found["relay"].append(max(mebibytes(one) for one in relay.family()))
        found["worker child"].append(max(mebibytes(one) for one in pool_children(worker)))
        found["worker, all its processes"].append(sum(mebibytes(one) for one in worker.family()))
    targets = {"API": Target(at_most=90), "relay": Target(at_most=80), "worker child": Target(at_most=70)}
    return [
        Measure(
            name=f"memory (PSS): {name}",
            unit="MiB",
            figures={OURS: figures},
            comparisons=[Comparison(side=None, kind="own", target=targets.get(name))] if name in targets else [],
        )
        for name, figures in found.items()
    ]


def mebibytes(process: psutil.Process) -> float:
    """The proportional set size of a process."""
    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(text.partition("\nPss:")[2].split()[0]) / 1024


def pool_children(worker: Process) -> list[psutil.Process]:
    """The children that run tasks: those of the worker's own program, not the keeper's."""
    main, *others = worker.family()
    return [one for one in others if one.cmdline() == main.cmdline() or "keeper" not in " ".join(one.cmdline())]

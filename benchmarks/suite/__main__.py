"""Our figures beside the peers' and the limits', on one Postgres and one Redis, in turns.

    python -m benchmarks.suite [--quick] [--only NAME]... [--json FILE] [--record]

It starts everything itself: a Postgres that keeps its promises (fsync on), a
Redis that keeps an append-only file, and every side on them. Our API asks for
no keys; nothing is traced, and metrics are off but where it says so. What
counts is the median of the ratios of the rounds, in which the sides take turns.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import asyncpg
import redis.asyncio

from benchmarks.suite import figures, footprint, latency, noops, page, posts, reads, submits, waiting_rows
from benchmarks.suite.stage import PEERS, Plan, Stage, stage

MEASURES: Mapping[str, Callable[[Stage], Awaitable[list[figures.Measure]]]] = {
    "memory": footprint.measure,
    "submit": submits.measure,
    "status": reads.measure,
    "noop": noops.measure,
    "latency": latency.measure,
    "webhooks": posts.measure,
    "backlog": waiting_rows.measure,
}
"""By the name that `--only` takes, in the order of the table."""

JSON = Path(__file__).parents[2] / "docs" / "performance.json"
PAGE = JSON.with_suffix(".md")

SLOW = {"backlog"}
"""What a quick run leaves out."""
FULL = Plan(quick=False, rounds=5, seconds=2.0)
QUICK = Plan(quick=True, rounds=3, seconds=0.5)
PACKAGES = ("fastapi", "uvicorn", "uvloop", "celery", "sqlmodel", "httpx", "asyncpg")
PEER_PACKAGES = ("procrastinate", "arq", "taskiq", "taskiq-redis", "dramatiq")


async def machine(one: Stage) -> dict[str, Any]:
    """What ran it: nothing that names this machine."""
    connection = await asyncpg.connect(one.postgres_url)
    async with redis.asyncio.Redis.from_url(one.redis_url) as broker:
        redis_version = (await broker.info("server"))["redis_version"]
    facts = {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "postgres": str(await connection.fetchval("SHOW server_version")).split()[0],
        "fsync": await connection.fetchval("SHOW fsync"),
        "redis": redis_version,
        "load before": [round(value, 1) for value in os.getloadavg()],
        "versions": {name: metadata.version(name) for name in PACKAGES} | peers(),
    }
    await connection.close()
    return facts


def peers() -> dict[str, str]:
    """The versions of the peers that are there."""
    packages = [str(path) for path in PEERS.parents[1].glob("lib/python*/site-packages")]
    found = {one.name: one.version for one in metadata.distributions(path=packages)} if packages else {}
    return {name: found[name] for name in PEER_PACKAGES if name in found}


async def run(plan: Plan, names: list[str]) -> figures.Report:
    """Measure what these names stand for, one after another."""
    with tempfile.TemporaryDirectory(prefix="taskqueue-benchmark-") as home:
        async with stage(Path(home), plan) as one:
            options = {"quick": plan.quick, "rounds": plan.rounds, "seconds": plan.seconds, "measures": names}
            report = figures.Report(machine=await machine(one), options=options)
            for name in names:
                began = time.monotonic()
                try:
                    async with one.one_measure():
                        report.measures += await MEASURES[name](one)
                except (OSError, RuntimeError) as failed:  # the others are still to be measured
                    one.skipped[name] = str(failed) or type(failed).__name__
                sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
            report.skipped |= one.skipped
            return report


def record(report: figures.Report) -> None:
    """Write the figures and the page of a run."""
    JSON.write_text(written(report))
    PAGE.write_text(page.page(report, MEASURES))


def written(report: figures.Report) -> str:
    """A run as JSON, one side's figures a line."""
    text = json.dumps(report.plain(), indent=1, ensure_ascii=False)
    return re.sub(r"\[([^][{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def main() -> int:
    """Measure, print, write, and say with the exit code whether all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--only", action="append", choices=MEASURES, metavar="NAME", help=", ".join(MEASURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument(
        "--record", action="store_true", help="write docs/performance.json and .md, unless --only is given"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # what was started is to end, too
    plan = QUICK if options.quick else FULL
    report = asyncio.run(run(plan, options.only or [name for name in MEASURES if plan is FULL or name not in SLOW]))
    print(figures.table(report.measures), flush=True)
    for name, reason in report.skipped.items():
        print(f"left out: {name}: {reason}")
    if options.json:
        options.json.write_text(json.dumps(report.plain(), indent=1) + "\n")
    if options.record and not options.only:
        record(report)
    verdicts = [line.verdict for measure in report.measures for line in figures.lines(measure)]
    return 1 if "over" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())

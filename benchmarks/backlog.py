"""What a million waiting rows cost: each statement on a short and on a long backlog, in turns.

    python -m benchmarks.backlog [--explain] [--json FILE]

It starts a durable Postgres of its own, fills two databases, and calls the
product's functions on one and the other, call by call, so that the machine's
drift meets both alike. `blocks` are the pages of tables and indexes that a call
touched: unlike times, they are the same on every machine. The second table is
measured after a burst of work that no vacuum has cleaned up.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from app import delivery, lifecycle, migrations
from app.core.config import Settings
from app.db import PLANNER, Database
from app.dev.embedded import EmbeddedPostgres
from app.dev.running import running
from benchmarks import rows
from benchmarks.calls import Side, measured, opened

TARGET = 1.2
RUNNING = 2_000
UNDELIVERED = 10_000
"""Webhooks whose receiver is away: each waits for its next attempt. As many are due, to one that gets nothing."""


async def counted(sides: Sequence[Side]) -> None:
    """What is only asked now and then, and may look at every waiting row."""
    for _ in range(5):
        for side in sides:
            await side.measure("queue_counts, 3 queues", lambda db=side.db: _queue_counts(db))  # type: ignore[misc]
            await side.measure(
                "count_waiting",
                lambda db=side.db: lifecycle.count_waiting(db, limit=5_000_001),  # type: ignore[misc]
            )
            await side.measure("count_due", lambda db=side.db: delivery.count_due(db))  # type: ignore[misc]


async def _queue_counts(db: Database) -> None:
    await lifecycle.queue_counts(db, [rows.LINE, rows.OTHER, rows.HELD])


async def worked_off(side: Side, tasks: int) -> None:
    """A burst of work: so many tasks fed, claimed, renewed and ended, with all the dead rows that it leaves."""
    fed = 0
    while fed < tasks:
        fed += len(await lifecycle.take_due(side.db, rows.HELD, limit=500)) or tasks
    connection = await asyncpg.connect(side.url)
    for queue in (rows.LINE, rows.HELD):
        for _ in range(0, tasks, 1000):
            taken = await connection.fetch(_BURST_CLAIM, queue)
            await connection.execute(_BURST_SETTLE, [row["id"] for row in taken])
    await connection.close()


_BURST_CLAIM = """
UPDATE task SET status = 'STARTED', attempt = attempt + 1, token = gen_random_uuid(), worker = 'worker-1',
                started_at = now(), lease_until = now() + interval '30 seconds'
 WHERE id IN (SELECT id FROM task WHERE queue = $1 AND status IN ('PENDING', 'RETRY') AND published_at IS NOT NULL
               ORDER BY queue, position LIMIT 1000)
RETURNING id
"""
_BURST_SETTLE = """
UPDATE task SET status = 'SUCCESS', result = '1', lease_until = NULL, published_at = NULL, position = NULL,
                finished_at = now()
 WHERE id = ANY($1::uuid[])
"""


def table(small: Side, large: Side, names: tuple[str, str]) -> list[dict[str, Any]]:
    """One line per call: medians in microseconds, their ratio, and pages touched."""
    lines = []
    for what, seconds in large.seconds.items():
        few, many = (statistics.median(side.seconds[what]) * 1e6 for side in (small, large))
        lines.append(
            {
                "operation": what,
                "calls": len(seconds),
                names[0]: round(few),
                names[1]: round(many),
                "ratio": round(many / few, 2),
                "blocks": [statistics.median(side.blocks.get(what, [0])) for side in (small, large)],
            }
        )
    return lines


def show(title: str, lines: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> None:
    """Print a table."""
    print(f"\n{title}")
    print(f"{'operation':<26}{'calls':>7}{names[0] + ' µs':>14}{names[1] + ' µs':>14}{'ratio':>8}{'blocks':>18}")
    for line in lines:
        few, many = line["blocks"]
        over = f"  over {TARGET}" if line["ratio"] > TARGET else ""
        print(
            f"{line['operation']:<26}{line['calls']:>7}{line[names[0]]:>14}{line[names[1]]:>14}{line['ratio']:>8.2f}"
            f"{f'{few:g} → {many:g}':>18}{over}",
            flush=True,
        )


async def explained(side: Side) -> None:
    """Print the plan of every statement that was measured, run on the long backlog and rolled back.

    It is the plan that the product's connections keep: the one for whatever arguments come.
    """
    connection = await asyncpg.connect(side.url, server_settings=PLANNER)
    for what, (sql, args) in side.statements.items():
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(f"PREPARE explained AS {sql}")
        given = f"({', '.join(_literal(arg) for arg in args)})" if args else ""
        plan = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, SUMMARY OFF) EXECUTE explained{given}")
        await transaction.rollback()
        await connection.execute("DEALLOCATE explained")
        print(f"\n{what}\n" + "\n".join(f"    {row[0]}" for row in plan))
    await connection.close()


def _literal(value: object) -> str:
    """A value of ours as Postgres reads it, of whatever type."""
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(str(one) for one in value) + "}'"
    return "'" + str(value).replace("'", "''") + "'"


async def filled(server: str, name: str, waiting: int, ended: int) -> str:
    """The URL of a migrated database with so many rows; one that is there already is used as it is."""
    url = urlunsplit(urlsplit(server)._replace(path=f"/{name}"))
    connection = await asyncpg.connect(server)
    exists = await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name)
    if not exists:
        await connection.execute(f"CREATE DATABASE {name}")
        settings = Settings.model_validate(
            {"DATABASE_URL": url, "REDIS_URL": "redis://127.0.0.1:1/0", "TASKQUEUE_AUTH_MODE": "none"}
        )
        await asyncio.to_thread(migrations.migrate, settings)
    await connection.close()
    if not exists:
        began = time.monotonic()
        connection = await asyncpg.connect(url)
        await rows.fill(connection, waiting=waiting, ended=ended, running=RUNNING, undelivered=UNDELIVERED)
        await connection.execute("VACUUM ANALYZE")
        await connection.close()
        print(f"filled {name} in {time.monotonic() - began:.0f} s", flush=True)
    return url


async def run(server: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and return everything."""
    names = (f"{given.small:,}", f"{given.large:,}")
    urls = [await filled(server, f"waiting_{waiting}", waiting, given.ended) for waiting in (given.small, given.large)]
    report: dict[str, Any] = {"rounds": given.rounds, "operations": given.operations, "ended": given.ended}
    async with opened(urls[0]) as small, opened(urls[1]) as large:
        await measured([small, large], rounds=given.rounds, operations=given.operations)
        await counted([small, large])
        report["fresh"] = table(small, large, names)
        show(
            f"{names[0]} and {names[1]} rows that wait in each of three queues and for tomorrow, {given.ended:,} ended",
            report["fresh"],
            names,
        )
        if given.explain:
            await explained(large)
    if given.churn:
        async with opened(urls[0]) as small, opened(urls[1]) as large:
            # The worst of moments: just before autovacuum comes.
            await large.db.execute("ALTER TABLE task SET (autovacuum_enabled = false)")
            await large.db.execute("ALTER TABLE webhook_delivery SET (autovacuum_enabled = false)")
            await worked_off(large, given.churn)
            await measured([small, large], rounds=given.rounds, operations=given.operations)
            await counted([small, large])
            report["churned"] = table(small, large, names)
            show(
                f"the same, once {given.churn:,} tasks of two queues were worked off without a vacuum",
                report["churned"],
                names,
            )
            report["updates"] = dict(await large.db.fetchrow(_UPDATES) or {})
            print(
                "updates of task: {n_tup_upd:,}, heap-only {n_tup_hot_upd:,}; dead {n_dead_tup:,}".format(
                    **report["updates"]
                )
            )
    return report


_UPDATES = "SELECT n_tup_upd, n_tup_hot_upd, n_dead_tup FROM pg_stat_user_tables WHERE relname = 'task'"


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1_000, help="rows that wait in each queue of the one database")
    parser.add_argument("--large", type=int, default=1_000_000, help="and of the other")
    parser.add_argument("--ended", type=int, default=100_000, help="ended rows in each")
    parser.add_argument("--churn", type=int, default=200_000, help="tasks that the burst works off; 0: no burst")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--operations", type=int, default=200, help="tasks per round")
    parser.add_argument("--explain", action="store_true", help="print each plan on the long backlog")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--directory", type=Path, help="keep the databases there, and use those that are there")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        home = given.directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="taskqueue-benchmark-")))
        server = stack.enter_context(running(EmbeddedPostgres(home / "postgres")))
        report = asyncio.run(run(server.url, given))
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

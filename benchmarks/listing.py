"""What finding tasks costs among ten thousand and among a million: every filter, in turns.

    python -m benchmarks.listing [--explain] [--json FILE]

It starts a durable Postgres of its own, fills two databases with tasks of two
owners, of every status, name, queue and kind of error, and asks one and the
other, call by call, so that the machine's drift meets both alike. The last
pages are those of filters that nothing passes: the most that a page can cost.
`blocks` are the pages of tables and indexes that a call touches: unlike times,
they are the same on every machine.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg

from app import lifecycle, migrations
from app.core.config import Settings
from app.core.statuses import TaskStatus
from app.db import PLANNER, Database
from app.dev.embedded import EmbeddedPostgres
from app.dev.running import running
from app.lifecycle import Filter
from benchmarks.calls import Recorder, blocks_touched

TARGET = 1.2
LIMIT = 50
CHUNK = 100_000
OWNER, OTHER = "team-a", "team-b"

# Of ten tasks seven succeeded, one failed, one was revoked; the tenth waits, runs or is to be retried. They were
# submitted one each 100 ms, and took up to an hour.
_FILL = """
INSERT INTO task (id, name, queue, args, kwargs, tags, owner, status, attempt, token, worker, lease_until, result,
                  error_type, error_message, failures, run_at, created_at, started_at, finished_at, position,
                  published_at)
SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || '7' || substr(md5(n::text), 1, 3)
        || '8' || substr(md5((n + 1)::text), 1, 15))::uuid,
       'task.' || n % 20, 'queue-' || n % 5, '[]', '{"value": "something to say"}',
       CASE WHEN n % 4 = 0 THEN ARRAY['nightly', 'customer-' || n % 1000] ELSE '{}' END,
       CASE WHEN n % 5 = 0 THEN 'team-b' ELSE 'team-a' END, kind.status,
       CASE WHEN kind.status = 'PENDING' THEN 0 ELSE 1 END, gen_random_uuid(), 'worker-1',
       CASE WHEN kind.status = 'STARTED' THEN moment + interval '1 day' END,
       CASE WHEN kind.status = 'SUCCESS' THEN '"something to say"'::json END,
       CASE WHEN kind.status IN ('FAILURE', 'RETRY') THEN 'Error' || n % 7 WHEN kind.status = 'REVOKED' THEN 'Cancelled'
       END,
       CASE WHEN kind.status IN ('FAILURE', 'RETRY', 'REVOKED') THEN 'something went wrong' END,
       CASE WHEN kind.status IN ('FAILURE', 'RETRY') THEN 1 ELSE 0 END, moment, moment,
       CASE WHEN kind.status <> 'PENDING' THEN moment END,
       CASE WHEN kind.status IN ('SUCCESS', 'FAILURE', 'REVOKED') THEN moment + make_interval(secs => n * 37 % 3600)
       END,
       CASE WHEN kind.status = 'PENDING' THEN nextval('task_position') END,
       CASE WHEN kind.status = 'PENDING' THEN moment END
  FROM generate_series($1::int, $2::int) AS n,
       LATERAL (SELECT now() - make_interval(secs => ($3::int - n) / 10.0) AS moment) AS at,
       LATERAL (SELECT (ARRAY['SUCCESS', 'SUCCESS', 'SUCCESS', 'SUCCESS', 'SUCCESS', 'SUCCESS', 'SUCCESS', 'FAILURE',
                              'REVOKED', (ARRAY['PENDING', 'PENDING', 'RETRY', 'STARTED'])[1 + n / 11 % 4]])
                       [1 + (n / 20) % 10] AS status) AS kind
 ORDER BY n
"""


async def filled(server: str, name: str, tasks: int) -> str:
    """The URL of a migrated database with so many tasks; one that is there already is used as it is."""
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
        connection = await asyncpg.connect(url)
        for first in range(1, tasks + 1, CHUNK):
            await connection.execute(_FILL, first, min(tasks, first + CHUNK - 1), tasks)
        await connection.execute("VACUUM ANALYZE")
        await connection.close()
        print(f"filled {name}", flush=True)
    return url


Call = Callable[[Database], Awaitable[object]]


async def calls(db: Database) -> dict[str, Call]:
    """What is asked of each side, by name."""
    now = await lifecycle.clock(db)
    lately, before = now - timedelta(minutes=10), now - timedelta(minutes=5)
    failed, ends = frozenset({TaskStatus.FAILURE}), frozenset({TaskStatus.FAILURE, TaskStatus.REVOKED})
    filters = {
        "everything": Filter(),
        "status=FAILURE": Filter(statuses=failed),
        "status=FAILURE,REVOKED": Filter(statuses=ends),
        "status=PENDING": Filter(statuses=frozenset({TaskStatus.PENDING})),
        "task": Filter(name="task.7"),
        "queue": Filter(queue="queue-3"),
        "tag, of one in 4": Filter(tag="nightly"),
        "tag, of one in 1,000": Filter(tag="customer-8"),
        "error_type": Filter(error_type="Error3"),
        "created_after": Filter(created_after=lately),
        "created_before": Filter(created_before=before),
        "finished_after": Filter(finished_after=lately),
        "finished_before": Filter(finished_before=before),
        "status, task": Filter(statuses=failed, name="task.7"),
        "status, created_before": Filter(statuses=failed, created_before=before),
        "status, finished_after": Filter(statuses=failed, finished_after=lately),
        "task, queue": Filter(name="task.8", queue="queue-3"),
        "error_type, finished_after": Filter(error_type="Error3", finished_after=lately),
        "task that nobody has": Filter(name="nobody"),
        "tag that nobody has": Filter(tag="nobody"),
        "status, task that nobody has": Filter(statuses=failed, name="nobody"),
        "status, tag that nobody has": Filter(statuses=failed, tag="nobody"),
        "error_type that nobody has": Filter(error_type="Nobody"),
    }

    def asking(wanted: Filter) -> Call:
        return lambda side: lifecycle.page(side, OWNER, wanted, limit=LIMIT)

    second = (await lifecycle.page(db, OWNER, Filter(), limit=LIMIT)).end
    found = {what: asking(wanted) for what, wanted in filters.items()}
    found["everything, page 2"] = lambda side: lifecycle.page(side, OWNER, Filter(), after=second, limit=LIMIT)
    return found | {"counts": lambda side: lifecycle.counts(side, OWNER)}


async def _blocks(side: Recorder, call: Call) -> int:
    before = await blocks_touched(side)
    await call(side)
    return await blocks_touched(side) - before


def percentile(seconds: list[float]) -> float:
    """The 95th, in microseconds."""
    return statistics.quantiles(seconds, n=20)[-1] * 1e6


async def explained(url: str, statements: dict[str, tuple[str, tuple[object, ...]]]) -> None:
    """Print the plan of each statement, as the product's connections keep it."""
    connection = await asyncpg.connect(url, server_settings=PLANNER)
    for what, (sql, args) in statements.items():
        await connection.execute(f"PREPARE explained AS {sql}")
        given = ", ".join(_literal(arg) for arg in args)
        plan = await connection.fetch(f"EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, SUMMARY OFF) EXECUTE explained({given})")
        await connection.execute("DEALLOCATE explained")
        print(f"\n{what}\n" + "\n".join(f"    {row[0]}" for row in plan))
    await connection.close()


def _literal(value: object) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return "'{" + ",".join(str(one) for one in value) + "}'"
    return "'" + str(value).replace("'", "''") + "'"


async def run(server: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, print and return everything."""
    sizes = (given.small, given.large)
    urls = [await filled(server, f"listed_{size}", size) for size in sizes]
    sides = [Recorder(url, max_connections=1, application_name="benchmark", patience_seconds=600.0) for url in urls]
    asked = [await calls(side) for side in sides]
    seconds: dict[str, tuple[list[float], list[float]]] = {what: ([], []) for what in asked[0]}
    statements: dict[str, tuple[str, tuple[object, ...]]] = {}
    for what in asked[0]:
        for nth in range(given.calls + given.calls // 10):
            for number in (0, 1) if nth % 2 else (1, 0):
                began = time.perf_counter()
                await asked[number][what](sides[number])
                if nth >= given.calls // 10:
                    seconds[what][number].append(time.perf_counter() - began)
        statements[what] = sides[1].newest
    blocks = {
        what: [await _blocks(side, calls[what]) for side, calls in zip(sides, asked, strict=True)] for what in seconds
    }
    print(f"{'page of 50, p95':<30}{f'{sizes[0]:,} µs':>14}{f'{sizes[1]:,} µs':>14}{'ratio':>8}{'blocks':>16}")
    lines = []
    for what, (small, large) in seconds.items():
        few, many = percentile(small), percentile(large)
        figures = {
            "small_us": round(few),
            "large_us": round(many),
            "ratio": round(many / few, 2),
            "blocks": blocks[what],
        }
        lines.append({"filter": what, **figures})
        touched = " → ".join(str(count) for count in blocks[what])
        over = "  over" if many / few > TARGET else ""
        print(f"{what:<30}{few:>14.0f}{many:>14.0f}{many / few:>8.2f}{touched:>16}{over}")
    if given.explain:
        await explained(urls[1], statements)
    for side in sides:
        await side.close()
    return lines


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=10_000, help="tasks in the one database")
    parser.add_argument("--large", type=int, default=1_000_000, help="and in the other")
    parser.add_argument("--calls", type=int, default=200, help="of each kind")
    parser.add_argument("--explain", action="store_true", help="print each plan on the larger one")
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

"""procrastinate: asyncio, and jobs that are as durable as ours, in Postgres. It keeps no results."""

import asyncio
import os
import sys

import procrastinate

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["DATABASE_URL"]))


@app.task(name="noop")
async def noop(value: int) -> int:
    """Return the argument."""
    return value


async def fill(count: int) -> None:
    """Defer so many at once; make the tables if there are none."""
    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        if count:
            await noop.batch_defer_async(*[{"value": 1}] * count)


if __name__ == "__main__":
    asyncio.run(fill(int(sys.argv[1])))

"""Stock Celery: nothing is configured but where Redis is, and whether results are kept there.

    python -m benchmarks.suite.stock COUNT

It fills its queue when it is run, and is what `celery worker` loads.
"""

import os
import sys

import redis
from celery import Celery

KEEPS_RESULTS = os.environ.get("STOCK_RESULTS") == "true"

app = Celery("stock", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"] if KEEPS_RESULTS else None)


@app.task(name="noop", ignore_result=not KEEPS_RESULTS)  # type: ignore[untyped-decorator]  # Celery ships no types
def noop(value: int) -> int:
    """Return the argument."""
    return value


def fill(count: int) -> None:
    """Send so many; no worker begins before all are there."""
    for _ in range(count):
        noop.apply_async((1,), queue="staged")
    with redis.Redis.from_url(os.environ["REDIS_URL"]) as client:
        client.rename("staged", "celery")


if __name__ == "__main__":
    fill(int(sys.argv[1]))

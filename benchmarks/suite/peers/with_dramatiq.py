"""dramatiq: processes with threads, a list in Redis, results in Redis."""

import os
import sys

import dramatiq
import redis
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends.redis import RedisBackend

URL = os.environ["REDIS_URL"]
NAMESPACE = "staged" if __name__ == "__main__" else "dramatiq"
RESULTS = "dramatiq-results"

broker = RedisBroker(url=URL, namespace=NAMESPACE)
broker.add_middleware(Results(backend=RedisBackend(url=URL, namespace=RESULTS)))
dramatiq.set_broker(broker)


@dramatiq.actor(store_results=True)
def noop(value: int) -> int:
    """Return the argument."""
    return value


def fill(count: int) -> None:
    """Enqueue so many."""
    for _ in range(count):
        noop.send(1)
    with redis.Redis.from_url(URL) as client:
        client.rename(f"{NAMESPACE}:default.msgs", "dramatiq:default.msgs")
        client.rename(f"{NAMESPACE}:default", "dramatiq:default")


if __name__ == "__main__":
    fill(int(sys.argv[1]))

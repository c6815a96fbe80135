"""The pool when the connection to Redis comes back: a child that died in between is replaced."""

import subprocess
import sys

# In a process of its own, since it forks. The child is no longer watched and still in the pool: what a broken
# connection leaves that comes between a child's last breath and its end.
_RECONNECT = """
import os, signal, sys, time
from types import SimpleNamespace
from celery import Celery
from celery.concurrency.prefork import TaskPool
from kombu.asynchronous import Hub, set_event_loop
from app.celery_app import WatchAnewStep

hub = Hub()
set_event_loop(hub)
pool = TaskPool(1, app=Celery(set_as_current=False), threads=False)
pool.start()
pool._pool.register_with_event_loop(hub)
child = pool._pool._pool[0]
os.kill(child.pid, signal.SIGKILL)
pool._pool._untrack_child_process(child, hub)
consumer = SimpleNamespace(pool=pool)
if "anew" in sys.argv:
    WatchAnewStep(consumer).start(consumer)
pool._pool.register_with_event_loop(hub)
loop = hub.create_loop()
deadline = time.monotonic() + 20
while pool._pool._pool[0] is child and time.monotonic() < deadline:
    next(loop)
sys.stdout.write("replaced" if pool._pool._pool[0] is not child else "still there")
sys.stdout.flush()
os.kill(pool._pool._pool[0].pid, signal.SIGKILL)
os._exit(0)
"""


def reconnected(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _RECONNECT, *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_child_that_died_as_the_connection_broke_is_replaced() -> None:
    done = reconnected("anew")
    assert done.stdout == "replaced", done.stderr


def test_celery_alone_would_end_the_worker() -> None:
    """When this fails, the step is needed no more."""
    assert "file descriptor is None" in reconnected().stderr

"""How code that can't await talks to Postgres and Redis: one daemon thread with one event loop per process.

A pool child, and any Python program that calls `.delay()`, gets its bridge at
first use, so always after a fork: connections and threads do not survive one.
A loop per task would break asyncpg's connections; this one lives as long as the
process, and what runs on it goes on when a signal interrupts the main thread.
"""

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from app.broker import Broker
from app.core import config
from app.core.config import Settings
from app.db import Database
from app.publisher import Publisher

THREAD_NAME = "bridge"

T = TypeVar("T")


class Bridge:
    """The resources of one process, and the thread that uses them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=THREAD_NAME, daemon=True)
        self._thread.start()
        self.db, self.broker, self.publisher = self.run(self._open())

    async def _open(self) -> tuple[Database, Broker, Publisher]:
        database = Database(self.settings.postgres_dsn, max_connections=1, application_name=f"taskqueue-{os.getpid()}")
        broker = Broker(
            self.settings.redis_url.get_secret_value(), client_name=f"taskqueue-{os.getpid()}", max_connections=2
        )
        return database, broker, Publisher(database, broker)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait in this thread for `work`, which runs on the bridge's loop.

        Raises:
            RuntimeError: if called on the loop's own thread, which would wait for itself for ever.
        """
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("called from the bridge's own thread: await the coroutine instead")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, object]) -> None:
        """Let `work` run on the bridge's loop, without waiting for it. It must handle its own errors."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Finish what was started (for a second at most), then close the connections and the thread."""
        self.run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():
            self._loop.close()

    async def _finish(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=1.0)
        await self.broker.close()
        await self.db.close()


_bridge: Bridge | None = None
_guard = threading.Lock()
_inherited: list[Bridge | None] = []


def current(load: Callable[[], Settings] = config.load) -> Bridge:
    """This process's bridge, opened at first use. Raises SettingsError if the settings are wrong."""
    global _bridge  # noqa: PLW0603  # one per process is the point
    with _guard:
        if _bridge is None:
            _bridge = Bridge(load())
        return _bridge


def close() -> None:
    """Close this process's bridge, if it has one."""
    global _bridge  # as above
    with _guard:
        closing, _bridge = _bridge, None
    if closing is not None:
        closing.close()


def _forget() -> None:
    """A child inherits neither the thread nor a right to the sockets: it opens its own."""
    global _bridge, _guard  # noqa: PLW0603  # as above
    # Kept for ever: its finalisers would take the parent's sockets out of the epoll instance that both share.
    _inherited.append(_bridge)
    _bridge = None
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_forget)

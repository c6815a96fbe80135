"""Ending asyncio tasks for certain.

A cancel that arrives together with what its task was waiting for may be
swallowed: `asyncio.wait_for` before Python 3.12 does so, and drivers have their
own versions of it. A loop that misses its one cancel goes on for ever.
"""

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

AGAIN_SECONDS = 3.0
"""How long a task may take to clean up before it is cancelled again."""


async def stop(*tasks: asyncio.Task[Any]) -> None:
    """Cancel these tasks, as often as it takes, and wait until all of them have ended."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN_SECONDS)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that it is not reported as never retrieved


@contextlib.contextmanager
def hearing(callback: Callable[[], None]) -> Iterator[None]:
    """Within the block, have `callback` called on this loop when the process is told to end, before its server is.

    A server ends the application only once every request is answered, so what makes a request wait would
    never hear of it. Where no server handles SIGTERM, nothing is changed.
    """
    loop = asyncio.get_running_loop()
    server = signal.getsignal(signal.SIGTERM)
    if not callable(server):
        yield
        return

    def ending(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        server(number, frame)

    signal.signal(signal.SIGTERM, ending)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, server)

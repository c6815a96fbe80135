"""Ending asyncio tasks for certain.

A cancel that arrives together with what its task was waiting for may be
swallowed: `asyncio.wait_for` before Python 3.12 does so, and drivers have their
own versions of it. A loop that misses its one cancel goes on for ever.
"""

import asyncio
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

"""How a request waits for a task: until it ends, its time is over, its caller is gone, or this process ends."""

import asyncio
import math
import re
from collections.abc import Mapping
from uuid import UUID

from fastapi import Request

from app.core.stopping import stop
from app.watch import Full, Watch

WAIT_LIMIT_SECONDS = 25.0
"""Less than proxies wait for an answer."""

_WAIT = re.compile(r'\s*wait\s*=\s*"?([0-9]{1,9})"?\s*(;.*)?', re.IGNORECASE | re.ASCII)


def patience(wait: float | None, prefer: str | None) -> tuple[float, Mapping[str, str]]:
    """How many seconds a request wants to wait, and the headers that say so.

    A preference is met as far as it can be, and one that is not understood is none (RFC 7240).

    Args:
        wait: the parameter of the query, which comes first.
        prefer: the header.
    """
    if wait is not None:
        return wait, {}
    preferred = (_WAIT.fullmatch(one) for one in (prefer or "").split(","))
    seconds = next((float(found[1]) for found in preferred if found), None)
    if seconds is None:
        return 0.0, {}
    seconds = min(seconds, WAIT_LIMIT_SECONDS)
    return seconds, {"Preference-Applied": f"wait={math.floor(seconds)}"}


async def for_end(request: Request, watch: Watch, task_id: UUID, seconds: float, *, owner: str) -> bool:
    """Hold a request back until its task ends, for so long at most.

    Where too many wait already, in all or for this owner, it is not held back at all.

    Returns:
        Whether there is something new to read. Many waits may be over at once, and most of them in vain.
    """
    try:
        with watch.follow(task_id, owner=owner) as follower:
            waiting = asyncio.create_task(follower.end(seconds))
            leaving = asyncio.create_task(_gone(request))
            try:
                await asyncio.wait((waiting, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                await stop(waiting, leaving)
            return follower.over
    except Full:
        return False


async def _gone(request: Request) -> None:
    """Return once nobody waits for the answer any more."""
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Doing something again and again, through outages, and more rarely the longer it takes."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable

from app.core import errors

log = logging.getLogger(__name__)


async def every(
    seconds: float,
    sweep: Callable[[], Awaitable[object]],
    what: str,
    *,
    share_of_time: float = 1.0,
    rest_at_most: float = math.inf,
    at_once: asyncio.Event | None = None,
) -> None:
    """Repeat a sweep, more rarely if it takes more than its share of the time.

    An outage is logged once, and again when it ends.

    Args:
        seconds: from the beginning of one to that of the next.
        sweep: what is repeated.
        what: its name in the log.
        share_of_time: how much of the time it may take.
        rest_at_most: how many seconds it rests at most, for the sake of that, after one that took long.
        at_once: ends a rest when it is set, unless the sweep has failed. Whoever sweeps clears it before it looks.
    """
    out = False
    while True:
        began, failed = time.monotonic(), True
        try:
            await sweep()
            failed = False
            if out:
                log.info("%s goes on", what)
            out = False
        except (errors.DatabaseUnavailable, errors.BrokerUnavailable) as away:
            if not out:
                log.warning("%s waits: %s", what, away)
            out = True
        except Exception:
            log.exception("%s failed", what)
        took = time.monotonic() - began
        # What an outage took says nothing of what the next time will take.
        rest = 0.0 if out else min(rest_at_most, took / share_of_time - took)
        rest = max(seconds - took, rest, 0.0)
        if at_once is None or failed:
            await asyncio.sleep(rest)
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await at_once.wait()

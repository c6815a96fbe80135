"""Doing something again and again, through outages, and more rarely the longer it takes."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from app.core import errors

log = logging.getLogger(__name__)


async def every(
    seconds: float, sweep: Callable[[], Awaitable[object]], what: str, *, share_of_time: float = 1.0
) -> None:
    """Repeat a sweep, more rarely if it takes more than its share of the time.

    An outage is logged once, and again when it ends.
    """
    out = False
    while True:
        began = time.monotonic()
        try:
            await sweep()
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
        await asyncio.sleep(max(seconds, took if out else took / share_of_time) - took)

"""The cap on what may wait: beyond it, submits are asked to come back later.

Counting a long backlog is work for Postgres, so nobody counts one that is far
from the cap: the size of two indexes says that it is. Nearer to it each API
process keeps an estimate, a count now and then and what it has accepted since.
The count stops at the cap, and the longer it took, the longer until the next.
"""

import asyncio
import contextlib
import time

from app import lifecycle
from app.core import errors
from app.db import Database

RECOUNT_SECONDS = 1.0
SHARE_OF_TIME = 0.02
"""How much of the time may be spent on counting."""
RETRY_AFTER_SECONDS = 5


class Backlog:
    """How many tasks wait, as far as one API process knows."""

    def __init__(self, database: Database, *, cap: int) -> None:
        self._db = database
        self._cap = cap
        self._counted = 0
        self._accepted_since = 0

    def admit(self, tasks: int = 1) -> None:
        """Make sure that so many more tasks may wait.

        Raises:
            ServiceUnavailable: if they may not; with Retry-After.
        """
        if self._counted + self._accepted_since + tasks > self._cap:
            raise errors.ServiceUnavailable(
                "Too many tasks are waiting; try again later", retry_after_seconds=RETRY_AFTER_SECONDS
            )

    def accepted(self, tasks: int = 1) -> None:
        """Count tasks that were just submitted here."""
        self._accepted_since += tasks

    async def run(self) -> None:
        """Recount until cancelled."""
        while True:
            began = time.monotonic()
            with contextlib.suppress(errors.DatabaseUnavailable):
                await self.recount()
            took = time.monotonic() - began
            await asyncio.sleep(max(RECOUNT_SECONDS, took / SHARE_OF_TIME))

    async def recount(self) -> None:
        """Count what waits, or learn that it is less than half the cap, which is then taken to wait.

        What is accepted meanwhile may be counted twice, until the next time.
        """
        before = self._accepted_since
        most = await lifecycle.most_waiting(self._db)
        near = most > self._cap // 2
        self._counted = await lifecycle.count_waiting(self._db, limit=self._cap + 1) if near else most
        self._accepted_since -= before

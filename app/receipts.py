"""What became of a relay's webhooks, written down: receipts that come together share one statement.

A relay has a hundred POSTs on their way, so while one receipt is being committed
several others come. They go with the next statement (`app.gathering`): one that comes
alone waits for nobody, and under load a commit serves as many as came during the one
before. A delivery keeps its place in the relay until its own receipt is durable.
"""

import asyncio
from collections.abc import Sequence

from app import db, delivery
from app.core import metrics
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.delivery import Settling
from app.gathering import Gathering

SETTLE_SECONDS = 60.0
"""How long a receipt is kept while Postgres is away. It counts after the lease, too, if no other relay was faster."""
LANES = 2
"""Statements under way: one would carry more receipts, but a row that somebody has locked would hold all of them up."""


class _Receipts:
    def __init__(self, database: Database) -> None:
        self._db = database

    async def alone(self, one: Settling, /) -> bool:
        return await delivery.settle(self._db, *one)

    async def together(self, some: Sequence[Settling], /) -> Sequence[bool]:
        return await delivery.settle_batch(self._db, some)


class Receipts:
    """The receipts of one relay."""

    def __init__(self, database: Database) -> None:
        self._gathering = Gathering(_Receipts(database), lanes=LANES)

    async def settle(self, one: Settling, *, age_seconds: float) -> None:
        """Write a receipt, for as long as `SETTLE_SECONDS` if Postgres is away, and count what it ended.

        If Postgres stays away for longer, the receiver hears of it again, under the same id.

        Args:
            one: the attempt, and what it means.
            age_seconds: since the schedule of its delivery began.

        Raises:
            StatementRefused: as `Database.fetch`; of the others that came with it, none is concerned.
        """
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                settled = await db.insist(lambda: self._gathering.ask(one), what="a webhook's receipt")
        except TimeoutError:
            return
        if settled and one.verdict.status is DeliveryStatus.DELIVERED:
            metrics.webhooks_ended("delivered", 1, age_seconds)
        elif settled and one.verdict.status is DeliveryStatus.EXHAUSTED:
            metrics.webhooks_ended("exhausted", 1, None)

"""Rings the bell after a commit, without making anybody wait for Redis.

The API hands over one `Bell` per submit and answers. What piles up while a push
is under way goes with the next one: bursts become batches by themselves, and a
lone submit waits for nobody. What can't be pushed has its stamp taken back, so
that the relay feeds it in order; until Redis answers again, and while a queue
is full, `away()` tells submits to leave new rows to the relay from the start.

A Python program that submits may end the next moment, so it waits for its push,
and looks at its queue before (`look`, `push`) instead of watching (`run`).

Where a queue is limited, whoever ends a task makes room for the next (`let_go`).
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice

from app import db, lifecycle, tally
from app.broker import Broker, encode_meta
from app.core import errors, metrics, tracing
from app.core.stopping import stop

DEPTH_CAP = 50_000
"""Messages in one queue beyond which rows wait in Postgres: Redis's memory is bounded, the backlog is not."""
ROOM = 0.9
"""How much of the cap a full queue must fall under before it is pushed to again."""
BATCH = 1000
"""Messages of one command at most: those of the largest batch that is submitted at once, or of a burst."""
ENDS_AT_ONCE = 100
"""Ends of tasks, which may have results of a MiB, that are put into Redis with one round trip."""
RECHECK_SECONDS = 0.5

log = logging.getLogger(__name__)


class Publisher:
    """The publishing side of one process that submits."""

    def __init__(self, database: db.Database, broker: Broker) -> None:
        self._db = database
        self._broker = broker
        self._bells: deque[tuple[lifecycle.Bell, float]] = deque()
        self._rung = asyncio.Event()
        self._down = False
        self._full: set[str] = set()
        self._looked: dict[str, float] = {}
        self._announcing: set[asyncio.Task[bool]] = set()

    def ring(self, *bells: lifecycle.Bell) -> None:
        """Push these messages soon, those of one queue with one command. Never waits, never fails."""
        now = time.monotonic()
        self._bells.extend((bell, now) for bell in bells)
        self._rung.set()

    def announce(self, ended: lifecycle.Ended) -> None:
        """Tell Celery's waiters of a task's end soon. Never waits, never fails."""
        task = asyncio.create_task(announce_end(self._broker, ended))
        self._announcing.add(task)
        task.add_done_callback(self._announcing.discard)

    def away(self, queue: str) -> bool:
        """Whether new rows of this queue should be left to the relay: Redis is down, or the queue is full."""
        return self._down or queue in self._full

    async def look(self, queue: str) -> None:
        """Learn whether this queue is `away`, unless that was learnt within `RECHECK_SECONDS`. Never fails."""
        now = time.monotonic()
        if now - self._looked.get(queue, -math.inf) < RECHECK_SECONDS:
            return
        self._looked[queue] = now
        try:
            self._saw(queue, await self._broker.depth(queue))
            self._down = False
        except errors.BrokerUnavailable:
            self._down = True

    async def depths(self, queues: Sequence[str]) -> dict[str, int]:
        """How many messages each of these holds; nothing of any if Redis is away. Never fails, hardly waits."""
        try:
            # Known to be away is away: nobody who looks at the queues waits for that again.
            return {} if self._down else {queue: await self._broker.depth(queue) for queue in queues}
        except errors.BrokerUnavailable:
            return {}

    async def push(self, bell: lifecycle.Bell) -> None:
        """Push this message now. Never fails: what can't be pushed is left to the relay."""
        await self._push(bell.queue, [bell])

    async def run(self) -> None:
        """Push and watch until cancelled, then push what is left."""
        watch = asyncio.create_task(self._watch())
        try:
            while True:
                await self._rung.wait()
                self._rung.clear()
                await self.flush()
        finally:
            await stop(watch)
            await self.flush()
            await asyncio.gather(*self._announcing, return_exceptions=True)

    async def flush(self) -> None:
        """Push everything that was rung so far."""
        while self._bells:
            # They leave the line once they are pushed: if this is cancelled in between, the last flush repeats it.
            now = time.monotonic()
            batch = list(islice(self._bells, BATCH))
            for queue in dict.fromkeys(bell.queue for bell, _ in batch):
                some = [(bell, rung) for bell, rung in batch if bell.queue == queue]
                # They were due when they were rung, which is as they were committed.
                await self._push(queue, [bell for bell, _ in some], [now - rung for _, rung in some])
            for _ in batch:
                self._bells.popleft()

    async def _push(self, queue: str, bells: Sequence[lifecycle.Bell], due_seconds: Sequence[float] = ()) -> None:
        if not self._down:
            try:
                with tracing.send(queue, bells):
                    depth = await self._broker.publish(queue, sorted(bells, key=lambda bell: bell.position))
            except errors.BrokerUnavailable as away:
                self._down = True
                metrics.published(len(bells), "error", [])
                log.warning("submits go on without Redis; the relay will publish them: %s", away)
            else:
                tally.count_published(bells, due_seconds=due_seconds)
                self._saw(queue, depth)
                return
        # If Postgres is away as well, the rows keep their stamp and the search for lost messages finds them.
        with contextlib.suppress(errors.DatabaseUnavailable):
            await lifecycle.unpublish(self._db, bells)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(RECHECK_SECONDS)
            try:
                if self._down:
                    await self._broker.ping()
                    self._down = False
                    log.info("Redis answers again")
                for queue in tuple(self._full):
                    self._saw(queue, await self._broker.depth(queue))
            except errors.BrokerUnavailable:
                self._down = True

    def _saw(self, queue: str, depth: int) -> None:
        if depth >= DEPTH_CAP:
            self._full.add(queue)
        elif depth < DEPTH_CAP * ROOM:
            self._full.discard(queue)


def meta_of(ended: lifecycle.Ended) -> bytes:
    """What Celery's Redis backend stores about a task's end."""
    error = ended.error
    return encode_meta(
        ended.task_id,
        str(ended.status),
        result=ended.result,
        error_type=error.type if error else "",
        error_message=error.message if error else "",
    )


def tell_of_attempt(settled: lifecycle.Settled, transition: lifecycle.Transition) -> dict[str, object]:
    """End the span of an attempt that could not end it itself.

    Returns:
        What a log line about it is to name.
    """
    attempt = settled.attempt
    if attempt is None:
        return {}
    error = transition.error
    tracing.end(
        attempt.begin(began=settled.began),
        outcome=transition.outcome,
        status=settled.status,
        error_type=error.type if error else None,
    )
    return attempt.fields()


async def let_go(database: db.Database, broker: Broker, queue: str, key: str) -> None:
    """Push what may start now that a task of this queue and key has ended. Never fails: a relay looks again."""
    with contextlib.suppress(errors.DatabaseUnavailable):
        bells = await lifecycle.let_go(database, queue, key=key, limit=BATCH)
        if bells:
            try:
                with tracing.send(queue, bells):
                    await broker.publish(queue, bells)
            except errors.BrokerUnavailable:
                metrics.published(len(bells), "error", [])
                await lifecycle.unpublish(database, bells)
            else:
                tally.count_published(bells)


async def announce_end(broker: Broker, ended: lifecycle.Ended) -> bool:
    """Tell of a task's end, which this process has just written: count it, and put a copy where `AsyncResult` looks.

    Relays are told at once if it has a webhook. All of it is best effort: the row answers if this fails, and relays
    look anyway.

    Returns:
        Whether Redis took it.
    """
    return await announce_ends(broker, [ended])


async def announce_ends(broker: Broker, ended: Sequence[lifecycle.Ended]) -> bool:
    """As `announce_end`, for several."""
    tally.count_ends(ended)
    if any(one.is_told for one in ended):
        broker.tell_of_webhooks()
    try:
        for first in range(0, len(ended), ENDS_AT_ONCE):
            await broker.put_results({one.task_id: meta_of(one) for one in ended[first : first + ENDS_AT_ONCE]})
    except errors.BrokerUnavailable as away:
        log.warning("the end of %s is in the row only: %s", _named(ended), away)
        return False
    return True


def _named(ended: Sequence[lifecycle.Ended]) -> str:
    first = f"task {ended[0].task_id}"
    return first if len(ended) == 1 else f"{first} and {len(ended) - 1} others"

"""Who waits for a task hears of it: of its end at once, of what it does before within a second.

Whoever settles a task tells Redis (`Broker.put_results`). Each API process has
one subscription there, to just the tasks that somebody waits for in it. What is
heard is only a reason to look: one statement reads all rows that there is a
reason to look at, and the same statement reads every row that is waited for once
a second. So nobody's wait is a statement of its own, and with Redis away waits
end a second later.

Who follows a task may hear its log lines as well, those of an attempt that runs.
That is a favour of Redis's: what was not heard is read when the attempt has ended.

Places are few. Where callers say who they are, an owner has no more of them than it
leaves free, so nobody can take all of them from the others.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from uuid import UUID

from app import lifecycle, loglines
from app.broker import Broker
from app.core import errors
from app.core.statuses import TERMINAL
from app.core.stopping import stop
from app.db import Database
from app.lifecycle import Logged, Snapshot

PLACES = 2000
"""How many may wait in one process at once."""
LOOK_SECONDS = 1.0
"""How often everything that is waited for is looked at."""
LOOK_BATCH = 1000
HEAR_AGAIN_SECONDS = 1.0
SAME_OUTAGE_SECONDS = 30.0
"""What is lost again so soon was not found, and is not worth another line in the log."""

log = logging.getLogger(__name__)


class Full(Exception):
    """As many wait as may, in all or of one owner, or the process is about to end."""


class Follower:
    """One that waits for a task.

    Attributes:
        seen: how the task was when it was looked at last; None if it has not been, or is not there any more.
        logged: the newest lines that were heard of an attempt; None if there are none.
        told: the message that brought them.
        over: there is nothing to wait for any more: the task has ended or is gone, or this process ends.
    """

    def __init__(self, seen: Snapshot | None) -> None:
        self.seen = seen
        self.logged: Logged | None = None
        self.over = False
        self.told = b""
        self._news = asyncio.Event()

    def see(self, found: Snapshot | None) -> None:
        """Take note of how the task is."""
        self.over = self.over or found is None or found.status in TERMINAL
        if self.over or found != self.seen:
            self._news.set()
        self.seen = found

    def hear(self, told: bytes, logged: Logged) -> None:
        """Take note of what the task has logged. Only the newest is kept, however long nobody reads it."""
        self.told, self.logged = told, logged
        self._news.set()

    def dismiss(self) -> None:
        """End the wait, whatever the task does."""
        self.over = True
        self._news.set()

    async def change(self, seconds: float) -> bool:
        """Wait for a change, or the end of the wait, for so long at most. Returns whether there was one."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        changed = self._news.is_set()
        self._news.clear()
        return changed or self.over

    async def end(self, seconds: float) -> None:
        """Wait until there is nothing to wait for, for so long at most."""
        deadline = time.monotonic() + seconds
        while not self.over and (left := deadline - time.monotonic()) > 0:
            await self.change(left)


class Watch:
    """Those who wait in one process.

    Args:
        database: where the tasks are.
        broker: through which their ends are heard.
        places: how many may wait at once.
        shared: callers say who they are, and none is to have all places.
    """

    def __init__(self, database: Database, broker: Broker, *, places: int | None = None, shared: bool = False) -> None:
        self._db = database
        self._broker = broker
        self._places = PLACES if places is None else places
        self._shared = shared
        self._taken: Counter[str] = Counter()
        self._closed = False
        self._followers: dict[UUID, set[Follower]] = {}
        self._readers: dict[UUID, set[Follower]] = {}
        self._changed = asyncio.Event()
        self._suspects: set[UUID] = set()
        self._suspicion = asyncio.Event()

    def full(self, owner: str = "") -> bool:
        """Whether nobody else may wait for this owner now."""
        free = self._places - self._taken.total()
        return self._closed or free <= 0 or (self._shared and self._taken[owner] >= free)

    @contextlib.contextmanager
    def follow(
        self, task_id: UUID, seen: Snapshot | None = None, *, owner: str = "", log: bool = False
    ) -> Iterator[Follower]:
        """Wait for a task within the block.

        Args:
            task_id: the task, which had not ended when it was last looked at.
            seen: how it was then, if that is of interest.
            owner: for whom.
            log: hear what it logs, too; needs `seen`.

        Raises:
            Full: if nobody else may wait now, or nobody else for this owner.
        """
        if self.full(owner):
            raise Full
        follower = Follower(seen)
        self._taken[owner] += 1
        if task_id in self._followers:
            # What happened since it was looked at was told before this one listened.
            self._suspect(task_id)
        if log:
            for other in self._readers.get(task_id, ()):
                if other.logged is not None:
                    follower.hear(other.told, other.logged)
        joined = [self._followers, self._readers] if log else [self._followers]
        try:
            for those in joined:
                self._join(those, task_id, follower)
            yield follower
        finally:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]
            for those in joined:
                self._leave(those, task_id, follower)

    def _join(self, those: dict[UUID, set[Follower]], task_id: UUID, follower: Follower) -> None:
        if task_id not in those:
            those[task_id] = set()
            self._changed.set()
        those[task_id].add(follower)

    def _leave(self, those: dict[UUID, set[Follower]], task_id: UUID, follower: Follower) -> None:
        those[task_id].discard(follower)
        if not those[task_id]:
            del those[task_id]
            self._changed.set()

    def close(self) -> None:
        """Let everybody go, and nobody else in: this process is about to end."""
        self._closed = True
        for followers in self._followers.values():
            for follower in followers:
                follower.dismiss()

    async def run(self) -> None:
        """Listen and look until cancelled."""
        hearing = asyncio.create_task(self._hear())
        try:
            await self._keep_looking()
        finally:
            await stop(hearing)

    async def _hear(self) -> None:
        lost_at = -math.inf
        await self._changed.wait()  # Where nobody ever waits, no connection is made.
        while True:
            try:
                await self._broker.hear(
                    self._followers.keys(),
                    self._readers.keys(),
                    self._changed,
                    ended=self._suspect,
                    logged=self._pass_on,
                )
            except errors.BrokerUnavailable as away:
                if time.monotonic() - lost_at > SAME_OUTAGE_SECONDS:
                    log.warning("waits end up to a second later without Redis: %s", away)
                lost_at = time.monotonic()
            except Exception:
                log.exception("listening to Redis failed; it starts again")
            await asyncio.sleep(HEAR_AGAIN_SECONDS)

    def _suspect(self, task_id: UUID) -> None:
        self._suspects.add(task_id)
        self._suspicion.set()

    def _pass_on(self, task_id: UUID, told: bytes) -> None:
        """Let those who follow a task know what it has logged, unless it was said before or is not to be believed."""
        # Many may follow one task, and have seen the same of it.
        read: dict[Snapshot, Logged | None] = {}
        for reader in self._readers.get(task_id, ()):
            if reader.seen is None or reader.told == told:
                continue
            if reader.seen not in read:
                read[reader.seen] = loglines.decode(told, reader.seen)
            logged = read[reader.seen]
            if logged is not None:
                reader.hear(told, logged)

    async def _keep_looking(self) -> None:
        all_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, all_at - time.monotonic())):
                    await self._suspicion.wait()
            self._suspicion.clear()
            everything = time.monotonic() >= all_at
            suspects, self._suspects = self._suspects, set()
            try:
                await self._look(list(self._followers) if everything else [*suspects & self._followers.keys()])
            except errors.DatabaseUnavailable as away:
                log.debug("nobody hears of a task: %s", away)
                everything = True
            if everything:
                all_at = time.monotonic() + LOOK_SECONDS

    async def _look(self, task_ids: list[UUID]) -> None:
        for begin in range(0, len(task_ids), LOOK_BATCH):
            # Whoever comes while this is read may know more than it says.
            waiting = {one: tuple(self._followers.get(one, ())) for one in task_ids[begin : begin + LOOK_BATCH]}
            found = await lifecycle.snapshots(self._db, list(waiting))
            for task_id, followers in waiting.items():
                for follower in followers:
                    follower.see(found.get(task_id))

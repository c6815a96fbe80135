"""Claims and settles for all children of a pool, those that come together in one statement.

It lives in the keeper. A child asks for a claim over its line and waits; what
became of the attempt it puts into the spool, and goes on. So the children talk
to Postgres and Redis through two or three connections of the keeper's, and a
commit is paid for once by all that ended while the one before it was on its way.

Nothing is weaker for that: a task's end is durable before anybody hears of it,
and a report in the spool is written, whoever dies, or belongs to an attempt
that was superseded.
"""

import asyncio
import contextlib
import logging
import math
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from app import db, lifecycle, publisher, tally
from app.broker import Broker
from app.core import errors, metrics, tracing
from app.core.stopping import stop
from app.db import Database
from app.lifecycle import Claim, Done, Ended, Error, Failed, Settled, Succeeded, Unclaimed, Wanted
from app.worker import line
from app.worker.spool import Place, Report, Spool

CONNECTIONS = 2
CONNECTIONS_ALONE = 2
"""For what comes alone. All but claims take turns at one of them: the other is there for claims, however many rows
somebody has locked."""
BATCH = 100
"""Claims or reports of one statement at most."""
SETTLES_APART_SECONDS = 0.004
"""From one statement that settles to the next: of a row among ten, Postgres has a fifth of the work that it has of one
alone. The child that has reported is at its next task meanwhile."""
SHARED_BYTES = 16 * 1024
"""A report that shares a statement, at most: a large one keeps no other waiting."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Lane(Generic[T]):
    """One after the other: what comes while some are being worked on is worked on together.

    Args:
        work: on some.
        size: of one, in bytes.
        apart_seconds: from the beginning of one work to that of the next, while they come several at a time.
    """

    def __init__(
        self,
        work: Callable[[list[T]], Awaitable[None]],
        *,
        size: Callable[[T], int] = lambda _: 0,
        apart_seconds: float = 0.0,
    ) -> None:
        self._work = work
        self._size = size
        self._apart = apart_seconds
        self._begun = -math.inf
        self._last = 0
        self._waiting: deque[T] = deque()
        self._rung = asyncio.Event()
        self._works = False

    def __bool__(self) -> bool:
        """Whether there is something to do."""
        return self._works or bool(self._waiting)

    def put(self, one: T) -> None:
        """Have this worked on."""
        self._waiting.append(one)
        self._rung.set()

    def drop(self, unwanted: Callable[[T], bool]) -> list[T]:
        """Forget those of them that nobody works on yet; returns them."""
        dropped = [one for one in self._waiting if unwanted(one)]
        self._waiting = deque(one for one in self._waiting if not unwanted(one))
        return dropped

    async def run(self) -> None:
        """Work for ever."""
        while True:
            await self._rung.wait()
            self._rung.clear()
            while self._waiting:
                self._works = True
                await self._rest()
                if some := self._next():
                    await self._work(some)
                self._works = False

    async def _rest(self) -> None:
        """Let some more come, unless the last one came alone: one task after another is not kept waiting."""
        now = asyncio.get_running_loop().time()
        if self._last > 1 and (left := self._begun + self._apart - now) > 0:
            await asyncio.sleep(left)
            now += left
        self._begun = now

    def _next(self) -> list[T]:
        some: list[T] = []
        left = SHARED_BYTES
        while self._waiting and len(some) < BATCH:
            left -= self._size(self._waiting[0])
            if left < 0 and some:
                break
            some.append(self._waiting.popleft())
        self._last = len(some)
        return some


@dataclass(slots=True, eq=False)
class _Asked:
    """A claim that a child waits for."""

    wanted: Wanted
    slot: int
    by: "_Caller"


@dataclass(slots=True, eq=False)
class _Reported:
    """A report that is being written."""

    report: Report
    place: Place
    size: int
    waits: "_Caller | None" = None


class _Caller(asyncio.Protocol):
    """The keeper's end of a child's line."""

    def __init__(self, recorder: "Recorder") -> None:
        self._recorder = recorder
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._transport = None
        self._recorder.left(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (found := line.taken_from(self._buffer)) is not None:
            self._recorder.told(*found, self)

    def say(self, kind: bytes, said: bytes) -> None:
        """Answer, if somebody is there."""
        if self._transport is not None:
            self._transport.write(line.frame(kind, said))


@dataclass(slots=True)
class Recorder:
    """Writes for the children of one pool.

    Attributes:
        db: for what comes together, which waits for nobody: a connection for claims, and one for settles.
        alone: for what may have to wait, `CONNECTIONS_ALONE` of them.
        broker: where ends are told.
        spool: where children report.
        door: where their lines come from.
        lease_seconds: of a claim.
    """

    db: Database
    alone: Database
    broker: Broker
    spool: Spool
    door: socket.socket
    lease_seconds: float
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _claiming: set[_Asked] = field(default_factory=set)
    _reported: dict[Place, _Reported] = field(default_factory=dict)
    _claims: Lane[_Asked] = field(init=False)
    _settles: Lane[_Reported] = field(init=False)
    _ends: Lane[Ended] = field(init=False)
    _started: set[asyncio.Task[Any]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _rooms: dict[tuple[str, str], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._claims = Lane(self._claim)
        self._settles = Lane(self._settle, size=lambda one: one.size, apart_seconds=SETTLES_APART_SECONDS)
        self._ends = Lane(self._announce, size=lambda ended: len(ended.result or ""))

    async def run(self) -> None:
        """Answer and write until cancelled. Raises what a lane could not cope with: then another keeper is needed."""
        loop = asyncio.get_running_loop()
        self.door.setblocking(False)
        loop.add_reader(self.door, self._open)
        lanes = [asyncio.create_task(lane.run()) for lane in (self._claims, self._settles, self._ends)]
        try:
            self.look()
            ended, _ = await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
            for lane in ended:
                lane.result()  # raises
        finally:
            loop.remove_reader(self.door)
            await stop(*lanes, *self._started)

    async def close(self) -> None:
        """Close every connection."""
        await self.broker.close()
        await self.alone.close()
        await self.db.close()

    @contextlib.asynccontextmanager
    async def in_turn(self) -> AsyncIterator[Database]:
        """`alone`, for anything but a claim: one after the other, so that claims find a connection."""
        async with self._turn:
            yield self.alone

    def look(self) -> None:
        """Take what is in the spool and was not heard of: a keeper that has died may have."""
        for place in self.spool.places():
            self._take(place, None)

    def unsettled(self) -> list[Claim]:
        """The attempts that are over and not yet written."""
        return [one.report.claim for one in self._reported.values()]

    def is_done(self) -> bool:
        """Whether nothing that was reported is left to write or to tell."""
        return not (self._reported or self._ends or self.spool.places())

    async def finish(self, slot: int, claim: Claim) -> None:
        """Wait until nothing is left to do of what a dead child in this slot has asked for or reported of `claim`."""
        self.look()
        for place in self.spool.places():
            if place.slot == slot and place not in self._reported:
                log.error("a report of a dead process can't be read, and is dropped")
                self.spool.free(place)
        while claim in self.unsettled() or any(one.wanted.claim == claim for one in self._claiming):
            self._changed.clear()
            await self._changed.wait()

    def told(self, kind: bytes, said: bytes, by: _Caller) -> None:
        """Hear what a child has to say."""
        if kind == line.CLAIM:
            wanted, slot = line.decode_wanted(said)
            asked = _Asked(wanted, slot, by)
            self._claiming.add(asked)
            self._claims.put(asked)
        elif kind == line.SPOOLED:
            slot, cell, waits = line.WHERE.unpack(said)
            self._take(Place(slot, cell), by if waits else None)

    def left(self, caller: _Caller) -> None:
        """Forget what somebody has asked for who is gone."""
        self._claiming.difference_update(self._claims.drop(lambda asked: asked.by is caller))
        self._changed.set()

    def _open(self) -> None:
        try:
            _, descriptors, _, _ = socket.recv_fds(self.door, 16, 1)
        except BlockingIOError:
            return
        for descriptor in descriptors:
            end = socket.socket(fileno=descriptor)
            self._start(asyncio.get_running_loop().connect_accepted_socket(lambda: _Caller(self), end))

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._started.add(task)
        task.add_done_callback(self._started.discard)

    async def _claim(self, asked: Sequence[_Asked]) -> None:
        wanted = [one.wanted for one in asked]
        try:
            found = await lifecycle.claim_plain(self.db, wanted, lease_seconds=self.lease_seconds)
        except Exception as failed:  # noqa: BLE001  # each of them is tried alone
            log.debug("claims are tried one by one: %s", failed)
            found = [None] * len(asked)
        for one, claimed in zip(asked, found, strict=True):
            if claimed is not None:
                self._answer(one, claimed)
            else:
                # It may have to wait: for others of its queue, for who has locked its row, or for Postgres.
                self._start(self._claim_alone(one))

    async def _claim_alone(self, asked: _Asked) -> None:
        found: lifecycle.Claimed | Unclaimed = Unclaimed.STALE
        try:
            found = await db.insist(
                lambda: lifecycle.claim_with_care(self.alone, asked.wanted, lease_seconds=self.lease_seconds),
                what="a claim",
            )
        except Exception:
            # If there is a task, it waits, and the search for lost messages brings it back.
            log.exception("task %s can't be claimed", asked.wanted.claim.task_id)
        self._answer(asked, found)

    def _answer(self, asked: _Asked, found: lifecycle.Claimed | Unclaimed) -> None:
        if not isinstance(found, Unclaimed):
            metrics.attempt_started(found.name, found.queue, found.waited_seconds)
        asked.by.say(line.CLAIMED, line.encode_found(found))
        self._claiming.discard(asked)
        self._changed.set()

    def _take(self, place: Place, waits: _Caller | None) -> None:
        """Have a report written, unless that is under way."""
        known = self._reported.get(place)
        if known is not None:
            known.waits = waits or known.waits
            return
        raw = self.spool.get(place)
        if raw is None:
            if waits is not None:
                # A look was faster, and nobody knows any more what came of it.
                waits.say(line.SETTLED, line.UNKNOWN)
            return
        try:
            one = _Reported(Report.decode(raw), place, len(raw), waits)
        except Exception:
            # Whoever overwrote it has not found the checksum by chance. Its attempt ends with its lease.
            log.exception("a report can't be read, and is dropped")
            self.spool.free(place)
            self._changed.set()
            return
        self._reported[place] = one
        self._settles.put(one)

    async def _settle(self, some: Sequence[_Reported]) -> None:
        try:
            settled = await lifecycle.settle_all(self.db, [_done(one.report) for one in some])
        except Exception as failed:  # noqa: BLE001  # each of them is tried alone
            log.debug("attempts are settled one by one: %s", failed)
            for one in some:
                # One of them may be at fault, or its row locked. The others have nothing to do with it.
                self._start(self._settle_alone(one))
            return
        for one, written in zip(some, settled, strict=True):
            self._tell(one, written)

    async def _settle_alone(self, one: _Reported) -> None:
        try:
            settled = await self._insist_on(_done(one.report))
        except Exception as failed:  # noqa: BLE001  # whatever it is, the task ends
            settled = await self._settle_unfit(one, failed)
        self._tell(one, settled)

    async def _insist_on(self, done: Done) -> Settled | None:
        """Settle an attempt, however long it takes. Raises StatementRefused if its data can't be stored."""

        async def once() -> Settled | None:
            try:
                async with self.in_turn() as alone:
                    [settled] = await lifecycle.settle_all(alone, [done])
            except errors.StatementRefused as refused:
                if refused.of_data:
                    raise
                # The statement is always the same: the attempt is not to blame, and its end must not be lost.
                raise errors.DatabaseUnavailable(str(refused)) from refused
            return settled

        return await db.insist(once, what="a settle")

    async def _settle_unfit(self, one: _Reported, failed: Exception) -> Settled | None:
        """What can't be stored ends the task all the same; else it would be run again and again."""
        claim = one.report.claim
        expected = isinstance(failed, errors.StatementRefused)
        log.error(
            "the outcome of task %s can't be stored: %s", claim.task_id, failed, exc_info=None if expected else failed
        )
        kind = "ResultNotSerializable" if isinstance(one.report.outcome, Succeeded) else "OutcomeNotStorable"
        try:
            transition = lifecycle.decide(one.report.budgets, Failed(Error(type=kind, message=str(failed))))
            return await self._insist_on(Done(claim, transition))
        except Exception:
            # Whatever Postgres has against it. The attempt ends with its lease.
            log.exception("nor can it be stored that task %s has failed", claim.task_id)
            return None

    def _tell(self, one: _Reported, settled: Settled | None) -> None:
        """Tell whoever is to hear of it, now that it is durable, and give its place away."""
        report = one.report
        if one.waits is not None:
            one.waits.say(line.SETTLED, settled.status.encode() if settled is not None else b"")
        self.spool.free(one.place)
        del self._reported[one.place]
        self._changed.set()
        _log(report, settled)
        if settled is None:
            return
        tally.count_attempt(report.name, report.queue, report.outcome, settled, run_seconds=report.run_seconds)
        if settled.ended is not None:
            self._ends.put(settled.ended)
        if report.limited_with is not None:
            self._make_room(report.queue, report.limited_with)

    def _make_room(self, queue: str, key: str) -> None:
        """Have those start for which an end has made room, unless somebody is about to look."""
        looks = (queue, key) in self._rooms
        self._rooms[queue, key] = looks
        if not looks:
            self._start(self._let_go(queue, key))

    async def _let_go(self, queue: str, key: str) -> None:
        again = True
        while again:
            self._rooms[queue, key] = False
            try:
                async with self.in_turn() as alone:
                    await publisher.let_go(alone, self.broker, queue, key)
            except Exception:
                log.exception("nobody was let go in %s; a relay looks again", queue)
            again = self._rooms[queue, key]
        del self._rooms[queue, key]

    async def _announce(self, ended: Sequence[Ended]) -> None:
        await publisher.announce_ends(self.broker, ended)


def _done(report: Report) -> Done:
    return Done(report.claim, lifecycle.decide(report.budgets, report.outcome), report.log)


def _log(report: Report, settled: Settled | None) -> None:
    if not log.isEnabledFor(logging.INFO):
        return
    task_id, attempt, outcome = report.claim.task_id, report.claim.attempt, report.outcome
    about = tracing.Attempt(
        task_id=task_id, number=attempt, task=report.name, queue=report.queue, traceparent=report.traceparent
    ).fields()
    if settled is None:
        log.info("%s %s attempt %d was superseded", report.name, task_id, attempt, extra=about)
        return
    error = outcome.error if isinstance(outcome, Failed | lifecycle.RetryAsked | lifecycle.Misfit) else None
    reason = f" ({error.type})" if error else ""
    log.info("%s %s attempt %d ended %s%s", report.name, task_id, attempt, settled.status, reason, extra=about)

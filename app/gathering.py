"""Calls that come while others are answered share the next statement.

A round trip to Postgres costs this process more than a row does, and a commit
about as much for fifty rows as for one. So a call that finds nobody asking is
asked at once, by itself, and whoever comes while the lanes are taken goes with the
next statement: batches become as large as the load makes them, and no timer makes
anybody wait. For submits databases call it a group commit: an answer still means
that the row is durable.

What is large goes alone (`SHARED_BYTES`): together it would keep others waiting,
and fill the memory. Who waits in line waits as long as for a connection, no longer.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from typing import Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

from app import lifecycle
from app.core import errors
from app.core.statuses import TaskStatus
from app.db import STATEMENT_TIMEOUT_SECONDS, Database

LANES = 2
"""Statements of one kind under way: while one is being answered, the next is sent."""
SUBMIT_LANES = 1
"""As `LANES`, of submits: one statement takes its places in line after the other, and its messages are pushed in that
order. What is pushed out of its order looks lost once those behind it are next, and is pushed again. Little is idle
for it: while one half of the clients waits for Postgres, the other half's answers are written and their next submits
read, which takes this process longer. With two statements each would have half the rows, and cost as much."""
BATCH = 100
"""Calls of one statement at most."""
SHARED_BYTES = 16 * 1024
"""Arguments of a submit that shares a statement, at most."""

W_contra = TypeVar("W_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)
W = TypeVar("W")
R = TypeVar("R")


class Question(Protocol[W_contra, R_co]):
    """What can be asked of Postgres for one, or for several at once."""

    async def alone(self, one: W_contra, /) -> R_co:
        """The answer for one. Raises as `app.db.Database.fetch`."""
        ...

    async def together(self, some: Sequence[W_contra], /) -> Sequence[R_co]:
        """The answers for several, in their order. Raises as `alone`."""
        ...


class _Call(NamedTuple, Generic[W, R]):
    one: W
    answer: "asyncio.Future[R]"
    came: float


class Gathering(Generic[W, R]):
    """Asks one kind of question for all the requests of an API process."""

    def __init__(
        self, question: Question[W, R], *, lanes: int = LANES, patience_seconds: float = STATEMENT_TIMEOUT_SECONDS
    ) -> None:
        self._question = question
        self._patience = patience_seconds
        self._waiting: deque[_Call[W, R]] = deque()
        self._free = lanes
        self._asking: set[asyncio.Task[None]] = set()
        self._impatient: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many calls stand in line."""
        return len(self._waiting)

    async def ask(self, one: W) -> R:
        """The answer for one, whoever it is asked with.

        Raises:
            DatabaseUnavailable: also if those before it take too long.
            Whatever else the question raises.
        """
        if self._free and not self._waiting:
            self._free -= 1
            try:
                return await self._question.alone(one)
            finally:
                self._free += 1
                self._go_on()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        self._waiting.append(_Call(one, answer, loop.time()))
        if self._impatient is None:
            self._impatient = loop.call_later(self._patience, self._give_up)
        try:
            return await answer
        finally:
            del answer  # A failure that it holds knows this frame: neither would go before the next collection.

    def _give_up(self) -> None:
        """Tell those who have stood in line for too long. One timer does for all: the first in line came first."""
        loop = asyncio.get_running_loop()
        while self._waiting and self._waiting[0].came + self._patience <= loop.time():
            answer = self._waiting.popleft().answer
            if not answer.done():
                answer.set_exception(errors.DatabaseUnavailable("Postgres did not answer those before in time"))
        first = self._waiting[0].came if self._waiting else None
        self._impatient = None if first is None else loop.call_at(first + self._patience, self._give_up)

    def _go_on(self) -> None:
        while self._free and self._waiting:
            some: list[_Call[W, R]] = []
            while self._waiting and len(some) < BATCH:
                call = self._waiting.popleft()
                if not call.answer.done():  # Whoever has left wants nothing any more.
                    some.append(call)
            if some:
                self._free -= 1
                # In a context of its own: it is nobody's request, least of all that of whoever freed the lane.
                task = asyncio.create_task(self._ask_together(some), context=Context())
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)

    async def _ask_together(self, some: list[_Call[W, R]]) -> None:
        try:
            if not await self._answered(some):
                # One of them is at fault. The others have nothing to do with it.
                while some:
                    await self._ask_alone(some.pop(0))
        except BaseException as failed:
            _fail(some, failed)
            if not isinstance(failed, Exception):
                raise
        finally:
            # The failure knows this frame, and the answers the failure: together they would keep all arguments.
            some.clear()
            self._free += 1
            self._go_on()

    async def _answered(self, some: Sequence[_Call[W, R]]) -> bool:
        """Answer them all with one statement. Returns whether it was not refused."""
        try:
            _tell(some, await self._question.together([call.one for call in some]))
        except errors.StatementRefused:
            return False
        return True

    async def _ask_alone(self, call: _Call[W, R]) -> None:
        try:
            found = await self._question.alone(call.one)
        except Exception as failed:  # noqa: BLE001  # whoever asked is told; the others wait for theirs
            _fail([call], failed)
        else:
            _tell([call], [found])
        finally:
            del call  # as above


def _tell(some: Sequence[_Call[W, R]], answers: Sequence[R]) -> None:
    for call, found in zip(some, answers, strict=True):
        if not call.answer.done():  # Whoever asked may have left.
            call.answer.set_result(found)


def _fail(some: Sequence[_Call[W, R]], failed: BaseException) -> None:
    for call in some:
        if not call.answer.done():
            call.answer.set_exception(failed)


class Submits:
    """Plain submits: a task, and whether its message is left to the relay; the answer is the message to push."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def alone(self, one: tuple[lifecycle.NewTask, bool], /) -> lifecycle.Bell | None:
        """See `lifecycle.submit`."""
        new, hold_back = one
        return await lifecycle.submit(self._db, new, hold_back=hold_back)

    async def together(self, some: Sequence[tuple[lifecycle.NewTask, bool]], /) -> Sequence[lifecycle.Bell | None]:
        """See `lifecycle.submit_together`, which stores all of them or none."""
        held_back = {new.queue for new, hold_back in some if hold_back}
        return await lifecycle.submit_together(self._db, [new for new, _ in some], held_back=held_back)


class Statuses:
    """Looks at the status of a task of an owner."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def alone(self, one: tuple[UUID, str], /) -> TaskStatus | None:
        """See `lifecycle.status`."""
        return await lifecycle.status(self._db, one[0], owner=one[1])

    async def together(self, some: Sequence[tuple[UUID, str]], /) -> Sequence[TaskStatus | None]:
        """See `lifecycle.statuses`."""
        return await lifecycle.statuses(self._db, some)

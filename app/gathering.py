"""Calls that come while others are answered share the next statement.

A round trip to Postgres costs this process more than a row does, and a commit
about as much for fifty rows as for one. So a call that finds nobody asking is
asked at once, by itself, and whoever comes while the lanes are taken goes with the
next statement: batches become as large as the load makes them, and no timer makes
anybody wait. For submits databases call it a group commit: an answer still means
that the row is durable.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar
from uuid import UUID

from app import lifecycle
from app.core import errors
from app.core.statuses import TaskStatus
from app.db import Database

LANES = 2
"""Statements of one kind under way: while one is being answered, the next is sent."""
BATCH = 100
"""Calls of one statement at most."""

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


class Gathering(Generic[W, R]):
    """Asks one kind of question for all the requests of an API process."""

    def __init__(self, question: Question[W, R]) -> None:
        self._question = question
        self._waiting: deque[tuple[W, asyncio.Future[R]]] = deque()
        self._free = LANES
        self._asking: set[asyncio.Task[None]] = set()

    async def ask(self, one: W) -> R:
        """The answer for one, whoever it is asked with. Raises as the question does."""
        if self._free and not self._waiting:
            self._free -= 1
            try:
                return await self._question.alone(one)
            finally:
                self._free += 1
                self._go_on()
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((one, answer))
        return await answer

    def _go_on(self) -> None:
        while self._free and self._waiting:
            some = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
            self._free -= 1
            task = asyncio.create_task(self._ask_together(some))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    async def _ask_together(self, some: Sequence[tuple[W, "asyncio.Future[R]"]]) -> None:
        try:
            answers = await self._question.together([one for one, _ in some])
        except errors.StatementRefused:
            # One of them is at fault. The others have nothing to do with it.
            for one, answer in some:
                await self._ask_alone(one, answer)
        except BaseException as failed:
            for _, answer in some:
                if not answer.done():
                    answer.set_exception(failed)
            if not isinstance(failed, Exception):
                raise
        else:
            for (_, answer), found in zip(some, answers, strict=True):
                if not answer.done():  # Whoever asked may have left.
                    answer.set_result(found)
        finally:
            self._free += 1
            self._go_on()

    async def _ask_alone(self, one: W, answer: "asyncio.Future[R]") -> None:
        try:
            found = await self._question.alone(one)
        except errors.TaskQueueError as failed:
            if not answer.done():
                answer.set_exception(failed)
        else:
            if not answer.done():
                answer.set_result(found)


class Submits:
    """Plain submits: a task, and whether its message is left to the relay; the answer is the message to push."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def alone(self, one: tuple[lifecycle.NewTask, bool], /) -> lifecycle.Bell | None:
        """See `lifecycle.submit`."""
        new, hold_back = one
        return await lifecycle.submit(self._db, new, hold_back=hold_back)

    async def together(self, some: Sequence[tuple[lifecycle.NewTask, bool]], /) -> Sequence[lifecycle.Bell | None]:
        """See `lifecycle.submit_batch`, which stores all of them or none."""
        held_back = {new.queue for new, hold_back in some if hold_back}
        made = await lifecycle.submit_batch(self._db, [new for new, _ in some], held_back=held_back)
        bells = {} if made is None else {bell.task_id: bell for bell in made.bells}
        return [bells.get(new.id) for new, _ in some]


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

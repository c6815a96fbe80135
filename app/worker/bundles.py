"""How messages go from Redis to a child of the pool: one by one, or several at once while tasks are short.

What Celery, kombu and the pool do for a message costs several times as much as
a task that does nothing. So while tasks end within milliseconds, a worker takes
several messages at once, as one message of Celery's and one job of the pool:
a bundle, which one child works off in order.

What waits inside a worker is seen by nobody: not by an idle worker beside it,
not by whoever counts the queue. So nothing is taken ahead but what the tasks
just before it make believable that it begins within `AHEAD_SECONDS`; and what
has not begun after `WAIT_SECONDS`, because a task took longer after all, goes
back to where it was in the queue. While tasks take longer than that, each
message is taken alone, by a child that is free.
"""

import mmap
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from app import broker
from app.broker import Received

AHEAD_SECONDS = 0.05
"""How long the tasks of a bundle are to take together, as far as those before them tell."""
WAIT_SECONDS = 0.1
"""How long a message may wait inside a worker before it is put back."""
MEMORY_SECONDS = 1.0
"""For how long the last bundle tells about the next."""
HOLD_SECONDS = 0.25
"""How long messages are taken alone after some had to be put back."""
EMPTY_SECONDS = 0.05
"""How long they are after a queue had no other."""
MOST = 50
"""Messages of a bundle."""

_SHARED_CELLS = 1024
_CELL: Final = struct.Struct("<BB")  # how many have begun; whether no more may


class Pace:
    """How many messages may be taken at once, as the last bundle tells."""

    def __init__(self) -> None:
        self._most = 1
        self._measured = -MEMORY_SECONDS
        self._held_until = 0.0

    def most(self, now: float) -> int:
        """How many, at this time of the monotonic clock (seconds)."""
        if now < self._held_until or now - self._measured > MEMORY_SECONDS:
            return 1
        return self._most

    def ended(self, count: int, seconds: float, now: float) -> None:
        """Learn that a bundle of `count` tasks took so long. The next may have twice as many at most."""
        self._most = max(1, min(2 * count, MOST, int(AHEAD_SECONDS * count / max(seconds, 1e-6))))
        self._measured = now

    def hold(self, now: float, seconds: float) -> None:
        """Take one at a time for so long, at least."""
        self._held_until = max(self._held_until, now + seconds)


class Cells:
    """Memory that the worker's main process shares with the pool's children: a cell for each bundle on its way.

    The child writes which message of its bundle begins, then looks whether the bundle was closed; who closes it
    writes that, then looks which have begun. So at worst a message that never began counts as begun: then the child
    says so when it is done.
    """

    def __init__(self, count: int) -> None:
        self._memory = mmap.mmap(-1, count * _CELL.size)
        self._free = deque(range(count))
        self._closed = False

    def free(self) -> bool:
        """Whether there is a cell for a bundle."""
        return bool(self._free) and not self._closed

    def take(self) -> int:
        """A cell for a new bundle. Raises IndexError if there is none."""
        # The one that was free for longest: whoever had it last may write to it once more.
        cell = self._free.popleft()
        _CELL.pack_into(self._memory, cell * _CELL.size, 0, 0)
        return cell

    def give_back(self, cell: int) -> None:
        """No process uses this cell any more."""
        self._free.append(cell)

    def begin(self, cell: int, number: int) -> bool:
        """Say that a message of a bundle begins, counted from 1. Returns whether it may."""
        self._memory[cell * _CELL.size] = number
        return not self._memory[cell * _CELL.size + 1]

    def begun(self, cell: int) -> int:
        """How many messages of a bundle have begun."""
        return self._memory[cell * _CELL.size]

    def close(self, cell: int) -> None:
        """Let no other message of a bundle begin."""
        self._memory[cell * _CELL.size + 1] = 1

    def close_all(self) -> None:
        """Let no other message begin, of any bundle on its way, and have no cell for another."""
        self._closed = True
        for cell in range(len(self._memory) // _CELL.size):
            self.close(cell)


_cells: Cells | None = None


def share() -> None:
    """Have bundles made in this process; called once in a worker's main process, before it forks."""
    global _cells  # noqa: PLW0603  # one pool per process
    _cells = Cells(_SHARED_CELLS)


def begin(cell: int, number: int) -> bool:
    """In a child: say that a message of a bundle begins, counted from 1. Returns whether it may."""
    return _cells is None or _cells.begin(cell, number)


def possible() -> bool:
    """Whether several messages may go together: this process has a pool, and does not stop."""
    return _cells is not None and _cells.free()


def stop() -> None:
    """Let no message begin that is in a bundle on its way, and make no other. Fit for a signal handler."""
    if _cells is not None:
        _cells.close_all()


@dataclass(frozen=True, slots=True)
class Taken:
    """A message that was taken from a queue: which queue, its bytes, and what they say."""

    queue: str
    raw: bytes
    received: Received


class Offer(NamedTuple):
    """What a child is told of a message. It is pickled for each, so it is plain."""

    queue: str
    task_id: str
    name: str
    attempt: int
    position: int
    time_limit: float | None
    traceparent: str | None


class Bundle:
    """Messages that go to a child together. Each of them is run, put back, or found by the search for lost messages.

    Several only while that is `possible`.
    """

    def __init__(self, messages: Sequence[Taken], pace: Pace, put_back: Callable[[Sequence[Taken]], None]) -> None:
        self.messages = messages
        self.pace = pace
        self._put_back = put_back
        self.accepted = False
        """Whether a child has taken it, and so begun the first of them."""
        self._end = len(messages)
        """Those behind it were put back."""
        self._cell = _cells.take() if _cells is not None and len(messages) > 1 else None

    def __del__(self) -> None:
        if _cells is not None and self._cell is not None:
            _cells.give_back(self._cell)

    def envelope(self) -> dict[str, Any]:
        """What Celery is told of it: the envelope of its first message, made anew."""
        return broker.envelope(self.messages[0].received, self.messages[0].queue)

    def job(self) -> tuple[int | None, list[Offer]]:
        """What the child is given: the arguments of `jobs.run`."""
        return self._cell, [
            Offer(
                one.queue,
                str(one.received.task_id),
                one.received.name,
                one.received.attempt,
                one.received.position,
                one.received.time_limit,
                one.received.traceparent,
            )
            for one in self.messages
        ]

    def withdraw(self) -> int:
        """Put back what no child has begun, and have none begin any more. Returns how many that were."""
        if _cells is None or self._cell is None:
            return self.keep(1 if self.accepted else 0)
        _cells.close(self._cell)
        return self.keep(_cells.begun(self._cell))

    def keep(self, count: int) -> int:
        """Put back all but the first so many, but for those that were before. Returns how many that were."""
        back, self._end = self.messages[count : self._end], min(count, self._end)
        if back:
            self._put_back(back)
        return len(back)

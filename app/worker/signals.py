"""Signals wait while a claim or a settle is on the wire.

A pool child is told to stop (SIGTERM; SIGHUP or SIGQUIT by a terminal), or that
its task is cancelled or past its soft limit (SIGUSR1), by exceptions that Python
raises between two instructions of the main thread. In the middle of a claim that
would leave an attempt that nobody runs; in the middle of a settle, an outcome that
nobody knows. So signals are held for the whole of an attempt, but for the stretch
in which the task's own code runs.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

HELD = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)

_holding = False
_waiting: list[int] = []
_handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}


def hold() -> None:
    """Let signals wait from here on. Holding twice is holding once."""
    global _holding  # noqa: PLW0603  # of this process's one main thread
    for number in HELD:
        # The pool installs its handlers after the fork, and again after each delivery: wrap what is there now.
        handler = signal.getsignal(number)
        if callable(handler) and handler is not _receive:
            _handlers[number] = handler
            signal.signal(number, _receive)
    _holding = True


def on_interrupt(handler: Callable[[], None]) -> None:
    """Have `handler` called for SIGUSR1, in place of the pool's soft limits, which are not used here."""
    _handlers[signal.SIGUSR1] = lambda _, __: handler()
    signal.signal(signal.SIGUSR1, _receive)


def release() -> None:
    """Handle what waited, in the caller's frame, and hold nothing any more."""
    global _holding  # noqa: PLW0603  # as above
    _holding = False
    while _waiting:
        _dispatch(_waiting.pop(0), None)


@contextlib.contextmanager
def let_through() -> Iterator[None]:
    """Handle signals inside this block as they come, those that waited first; hold again behind it."""
    try:
        release()
        yield
    finally:
        hold()


def _receive(number: int, frame: FrameType | None) -> None:
    if not _holding:
        _dispatch(number, frame)
    elif number not in _waiting:
        _waiting.append(number)


def _dispatch(number: int, frame: FrameType | None) -> None:
    try:
        _handlers[number](number, frame)
    finally:
        # billiard's handler sets the default action before it raises; a second signal in the middle of
        # the settle that follows would kill the process.
        signal.signal(number, _receive)

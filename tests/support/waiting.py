"""Waiting for a condition: the one place where tests sleep."""

import asyncio
import contextlib
import inspect
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

POLL_SECONDS = 0.015

T = TypeVar("T")


@overload
async def until(condition: Callable[[], Awaitable[T]], deadline_seconds: float = ..., what: str = ...) -> T: ...
@overload
async def until(condition: Callable[[], T], deadline_seconds: float = ..., what: str = ...) -> T: ...
async def until(condition: Callable[[], Any], deadline_seconds: float = 10, what: str = "the condition") -> Any:
    """Poll a condition, sync or async, until it is true, and return what it said.

    Raises:
        AssertionError: if it is still false at the deadline.
    """
    deadline = time.monotonic() + deadline_seconds
    while True:
        asked = condition()
        answer = await asked if inspect.isawaitable(asked) else asked
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not come true within {deadline_seconds:g} s"
        await asyncio.sleep(POLL_SECONDS)


def wait_until(condition: Callable[[], T], deadline_seconds: float = 10, what: str = "the condition") -> T:
    """Poll a condition until it is true, and return what it said.

    Raises:
        AssertionError: if it is still false at the deadline.
    """
    deadline = time.monotonic() + deadline_seconds
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what} did not come true within {deadline_seconds:g} s"
        time.sleep(POLL_SECONDS)


def lasting(seconds: float) -> None:
    """Let a fault last: the one wait whose condition is that time has passed."""
    until_then = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= until_then, seconds + 60, "the end of a fault")


def aside(work: Callable[..., T], *args: object, **kwargs: object) -> "asyncio.Future[T]":
    """As `asyncio.to_thread`, for what may never end: the test's end does not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(set_it: Callable[[Any], None], answer: object) -> None:
        if not done.done():
            set_it(answer)

    def run() -> None:
        answer: object
        try:
            set_it, answer = done.set_result, work(*args, **kwargs)
        except BaseException as failed:  # noqa: BLE001  # it is raised where the future is awaited
            set_it, answer = done.set_exception, failed  # type: ignore[assignment]  # another setter
        with contextlib.suppress(RuntimeError):  # nobody waits any more
            loop.call_soon_threadsafe(finish, set_it, answer)

    threading.Thread(target=run, daemon=True).start()
    return done

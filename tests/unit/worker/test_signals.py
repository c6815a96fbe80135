import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from app.worker import signals

ALL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Stop(BaseException):
    """What a handler raises, as the pool's does."""


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """All of them raise `Stop` and are noted here."""
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        raise Stop

    before = {number: signal.signal(number, handler) for number in ALL}
    yield seen
    signals.release()
    for number, previous in before.items():
        signal.signal(number, previous)


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_waits_for_the_release(handled: list[int], number: int) -> None:
    signals.hold()
    kill(number)
    assert handled == []

    with pytest.raises(Stop):
        signals.release()
    assert handled == [number]


def test_a_signal_reaches_the_code_that_it_is_let_through_to(handled: list[int]) -> None:
    signals.hold()
    with pytest.raises(Stop), signals.let_through():
        kill(signal.SIGTERM)
    kill(signal.SIGTERM)
    assert handled == [signal.SIGTERM], "behind the block it is held again"
    with pytest.raises(Stop):
        signals.release()


def test_a_signal_that_waited_is_handled_inside_the_block(handled: list[int]) -> None:
    signals.hold()
    kill(signal.SIGUSR1)
    ran = []
    with pytest.raises(Stop), signals.let_through():
        ran.append("the task's own code")
    assert ran == []
    assert handled == [signal.SIGUSR1]


def test_a_second_signal_during_the_settle_does_not_kill_the_process(handled: list[int]) -> None:
    signals.hold()
    with pytest.raises(Stop), signals.let_through():
        kill(signal.SIGTERM)
    # billiard's handler leaves the default action behind; the wrapper must be back in its place.
    assert signal.getsignal(signal.SIGTERM) is signals._receive
    kill(signal.SIGTERM)
    assert handled == [signal.SIGTERM]
    with pytest.raises(Stop):
        signals.release()


def test_without_a_hold_a_signal_is_handled_at_once(handled: list[int]) -> None:
    signals.hold()
    signals.release()
    with pytest.raises(Stop):
        kill(signal.SIGTERM)
    assert handled == [signal.SIGTERM]

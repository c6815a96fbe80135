"""How what comes together is worked on together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from app.core.stopping import stop
from app.worker import recorder
from app.worker.recorder import Lane
from tests.support.waiting import until


class Works:
    """Notes what is worked on together, and when, and can be made to wait."""

    def __init__(self) -> None:
        self.done: list[list[int]] = []
        self.begun: list[float] = []
        self.may = asyncio.Event()
        self.may.set()

    async def __call__(self, some: list[int]) -> None:
        self.done.append(some)
        self.begun.append(asyncio.get_running_loop().time())
        await self.may.wait()


@contextlib.asynccontextmanager
async def running(lane: Lane[int]) -> AsyncIterator[None]:
    task = asyncio.create_task(lane.run())
    try:
        yield
    finally:
        await stop(task)


async def test_what_comes_meanwhile_is_worked_on_together() -> None:
    works = Works()
    works.may.clear()
    lane = Lane(works)
    async with running(lane):
        lane.put(1)
        await until(lambda: works.done == [[1]], what="the first")
        for one in (2, 3, 4):
            lane.put(one)
        assert lane.drop(lambda one: one == 3) == [3]
        assert lane.drop(lambda one: one == 1) == [], "it is under way"
        assert lane
        works.may.set()
        await until(lambda: not lane, what="its end")
    assert works.done == [[1], [2, 4]]


async def test_what_is_large_goes_alone_and_no_batch_is_endless() -> None:
    works = Works()
    works.may.clear()
    lane = Lane(works, size=lambda one: one)
    large = recorder.SHARED_BYTES
    async with running(lane):
        lane.put(0)
        await until(lambda: bool(works.done), what="the first")
        for one in (large + 5, 1, large, 2, 3, *([0] * recorder.BATCH)):
            lane.put(one)
        works.may.set()
        await until(lambda: not lane, what="its end")
    assert works.done[1:4] == [[large + 5], [1], [large]]
    assert works.done[4][:2] == [2, 3]
    assert [len(some) for some in works.done[4:]] == [recorder.BATCH, 2]


async def test_only_those_that_come_together_wait_for_more() -> None:
    works = Works()
    lane = Lane(works, apart_seconds=0.2)
    async with running(lane):
        for number in range(5):
            lane.put(number)
            await until(lambda: len(works.done) == number + 1, what="its turn")  # noqa: B023  # asked at once
        assert works.begun[-1] - works.begun[0] < 0.15, "one after another is not kept waiting"
        lane.put(5)
        lane.put(6)
        await until(lambda: [5, 6] in works.done, what="two at once")
        lane.put(7)
        await until(lambda: [7] in works.done, what="the one behind them")
    assert works.begun[-1] - works.begun[-2] > 0.15


async def test_a_lane_that_fails_says_so() -> None:
    async def fails(_: list[int]) -> None:
        raise ZeroDivisionError

    lane = Lane(fails)
    lane.put(1)
    with pytest.raises(ZeroDivisionError):
        await lane.run()

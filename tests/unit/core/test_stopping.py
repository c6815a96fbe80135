import asyncio

import pytest

from app.core import stopping


async def test_a_task_that_swallows_its_first_cancel_is_stopped_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "AGAIN_SECONDS", 0.01)
    cancels = 0

    async def deaf() -> None:
        nonlocal cancels
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancels += 1
                if cancels == 2:
                    raise

    async def failing() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise RuntimeError

    tasks = [asyncio.create_task(deaf()), asyncio.create_task(failing())]
    await asyncio.sleep(0)

    async with asyncio.timeout(5):
        await stopping.stop(*tasks)

    assert all(task.done() for task in tasks)
    assert cancels == 2
    await stopping.stop(*tasks)

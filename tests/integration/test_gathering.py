"""Submits that share statements: all are stored, each is answered for itself, and nobody waits for a timer."""

import asyncio
import gc
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextvars import ContextVar

import pytest

from app import lifecycle
from app.core import errors, ids
from app.core.config import Settings
from app.db import Database
from app.gathering import BATCH, LANES, SUBMIT_LANES, Gathering, Statuses, Submits
from tests.support.database import Counting, counting, opened

TIMEOUT_SECONDS = 20.0
Writer = Gathering[tuple[lifecycle.NewTask, bool], lifecycle.Bell | None]


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Counting]:
    async with counting(settings) as database:
        yield database


def new(**fields: object) -> lifecycle.NewTask:
    return lifecycle.NewTask(**({"id": ids.uuid7(), "name": "sample.echo", "queue": "default"} | fields))  # type: ignore[arg-type]  # as given


async def written(
    writer: Writer, wanted: list[lifecycle.NewTask], *, hold_back: bool = False
) -> list[lifecycle.Bell | BaseException | None]:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        answers = (writer.ask((one, hold_back)) for one in wanted)
        return await asyncio.gather(*answers, return_exceptions=True)


async def stored(settings: Settings) -> dict[str, int | None]:
    async with opened(settings) as other:
        return {str(row["id"]): row["position"] for row in await other.fetch("SELECT id, position FROM task")}


async def test_those_that_come_together_share_statements(db: Counting, settings: Settings) -> None:
    wanted = [new(kwargs=f'{{"value": {number}}}', tags=("a", "b")) for number in range(3 * BATCH)]
    bells = await written(Gathering(Submits(db), lanes=SUBMIT_LANES), wanted)
    assert db.asked <= LANES + 3
    found = await stored(settings)
    assert len(found) == len(wanted)
    for one, bell in zip(wanted, bells, strict=True):
        assert isinstance(bell, lifecycle.Bell)
        assert (bell.task_id, bell.name, bell.queue) == (one.id, one.name, one.queue)
        assert bell.position == found[str(one.id)]


async def test_they_stand_in_line_in_the_order_in_which_they_came(db: Counting, settings: Settings) -> None:
    wanted = [new() for _ in range(50)]
    await written(Gathering(Submits(db), lanes=SUBMIT_LANES), wanted)
    found = await stored(settings)
    places = [found[str(one.id)] for one in wanted]
    assert places == sorted(places, key=lambda position: position or 0)


async def test_one_that_comes_alone_is_a_statement_of_its_own(db: Counting, settings: Settings) -> None:
    writer = Gathering(Submits(db), lanes=SUBMIT_LANES)
    for number in range(1, 4):
        assert await writer.ask((new(), False)) is not None
        assert db.asked == number
    assert len(await stored(settings)) == 3


async def test_one_that_cannot_be_stored_keeps_no_other_out(db: Counting, settings: Settings) -> None:
    wanted = [new(queue="x" * 65) if number == 7 else new() for number in range(20)]
    bells = await written(Gathering(Submits(db), lanes=SUBMIT_LANES), wanted)
    assert isinstance(bells[7], errors.StatementRefused)
    assert all(isinstance(bell, lifecycle.Bell) for number, bell in enumerate(bells) if number != 7)
    assert set(await stored(settings)) == {str(one.id) for number, one in enumerate(wanted) if number != 7}


async def test_those_that_are_held_back_have_no_message_to_push(db: Counting, settings: Settings) -> None:
    wanted = [new() for _ in range(20)]
    assert await written(Gathering(Submits(db), lanes=SUBMIT_LANES), wanted, hold_back=True) == [None] * 20
    assert None not in (await stored(settings)).values()


async def test_a_task_that_is_not_due_has_no_place_and_no_message(db: Counting, settings: Settings) -> None:
    wanted = [new(delay_seconds=60.0) for _ in range(20)]
    assert await written(Gathering(Submits(db), lanes=SUBMIT_LANES), wanted) == [None] * 20
    assert set((await stored(settings)).values()) == {None}


async def test_one_that_left_before_it_was_asked_is_not_stored(db: Counting, settings: Settings) -> None:
    writer = Gathering(Submits(db), lanes=SUBMIT_LANES)
    wanted = [new() for _ in range(20)]
    answers = [asyncio.create_task(writer.ask((one, False))) for one in wanted]
    await asyncio.sleep(0)  # All of them have come, and none is written.
    answers[-1].cancel()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        bells = await asyncio.gather(*answers, return_exceptions=True)
    assert isinstance(bells.pop(), asyncio.CancelledError)
    assert all(isinstance(bell, lifecycle.Bell) for bell in bells)
    assert len(await stored(settings)) == 19
    # The lanes are free again.
    assert await writer.ask((new(), False)) is not None


async def test_with_postgres_away_all_are_told_and_the_lanes_are_free_again() -> None:
    nowhere = Database(
        "postgresql://nobody@127.0.0.1:1/nothing", max_connections=2, application_name="test", patience_seconds=1.0
    )
    writer = Gathering(Submits(nowhere), lanes=SUBMIT_LANES)
    for _ in range(2):
        answers = await written(writer, [new() for _ in range(20)])
        assert {type(answer) for answer in answers} == {errors.DatabaseUnavailable}
    await nowhere.close()


async def test_looks_that_come_together_share_statements_and_see_no_others_task(db: Counting) -> None:
    tasks = [new(owner=f"team-{number % 3}") for number in range(30)]
    await written(Gathering(Submits(db), lanes=SUBMIT_LANES), tasks)
    await lifecycle.cancel(db, tasks[4].id, owner="team-1")
    db.asked = 0
    looks = Gathering(Statuses(db))
    asked = [(one.id, owner) for one in tasks for owner in ("team-0", "team-1", "team-2", "")]
    asked += [(ids.uuid7(), "team-0"), asked[0]]
    async with asyncio.timeout(TIMEOUT_SECONDS):
        found = await asyncio.gather(*(looks.ask(one) for one in asked))
    assert db.asked <= LANES + 3
    owners = {one.id: one.owner for one in tasks}
    for (task_id, owner), status in zip(asked, found, strict=True):
        expected = ("REVOKED" if task_id == tasks[4].id else "PENDING") if owners.get(task_id) == owner else None
        assert status == expected


class Echo:
    """Answers with what it was asked, once it is let; and notes what it was asked together."""

    def __init__(self) -> None:
        self.may = asyncio.Event()
        self.seen: list[object] = []
        self.failure: type[Exception] | None = None

    async def alone(self, one: object, /) -> object:
        self.seen.append((of_request.get(), one))
        await self.may.wait()
        if self.failure is not None:
            raise self.failure("in vain")
        return one

    async def together(self, some: Sequence[object], /) -> Sequence[object]:
        self.seen.append((of_request.get(), len(some)))
        await self.may.wait()
        if self.failure is not None:
            raise self.failure("in vain")
        return list(some)


of_request: ContextVar[str] = ContextVar("of_request", default="nobody's")


async def test_who_stands_in_line_for_too_long_is_told() -> None:
    echo = Echo()
    line = Gathering[object, object](echo, patience_seconds=0.2)
    first = [asyncio.create_task(line.ask(number)) for number in range(LANES)]
    await asyncio.sleep(0)
    began = time.monotonic()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        answers = await asyncio.gather(*(line.ask(number) for number in range(50)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {errors.DatabaseUnavailable}
    assert 0.2 <= time.monotonic() - began < TIMEOUT_SECONDS / 2
    assert len(line) == 0
    echo.may.set()
    assert await asyncio.gather(*first) == [0, 1]
    assert await line.ask("the next") == "the next"


async def test_what_is_asked_together_is_nobodys_request() -> None:
    echo = Echo()
    line = Gathering[object, object](echo)

    async def request(name: str) -> object:
        of_request.set(name)
        return await line.ask(name)

    requests = [asyncio.create_task(request(f"request {number}")) for number in range(LANES + 3)]
    await asyncio.sleep(0)
    echo.may.set()
    async with asyncio.timeout(TIMEOUT_SECONDS):
        assert await asyncio.gather(*requests) == [f"request {number}" for number in range(LANES + 3)]
    assert echo.seen[LANES:] == [("nobody's", 3)]


@pytest.mark.parametrize("failure", [errors.StatementRefused, errors.DatabaseUnavailable, ValueError])
async def test_what_was_asked_in_vain_is_not_kept(failure: type[Exception]) -> None:
    class Asked:
        """Can be referred to weakly."""

    echo = Echo()
    echo.failure = failure
    line = Gathering[object, object](echo)
    asked = [Asked() for _ in range(LANES + 5)]
    kept = [weakref.ref(one) for one in asked]
    gc.collect()
    gc.disable()
    try:
        requests = [asyncio.create_task(line.ask(one)) for one in asked]
        await asyncio.sleep(0)
        echo.may.set()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answers = await asyncio.gather(*requests, return_exceptions=True)
        assert {type(answer) for answer in answers} == {failure}
        del requests, answers
        asked.clear()
        echo.seen.clear()
        echo.failure = None
        await asyncio.sleep(0)
        assert sum(one() is not None for one in kept) == 0
    finally:
        gc.enable()

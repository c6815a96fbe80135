import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.synchronize import Event
from uuid import UUID

import pytest

from app.broker import Received
from app.worker import bundles
from app.worker.bundles import AHEAD_SECONDS, HOLD_SECONDS, MEMORY_SECONDS, MOST, Bundle, Cells, Pace, Taken


@pytest.fixture
def cells() -> Iterator[Cells]:
    """Cells for the bundles of a test."""
    bundles.share()
    assert bundles._cells is not None
    yield bundles._cells
    bundles._cells = None


def messages(count: int) -> list[Taken]:
    return [
        Taken("default", str(number).encode(), Received(task_id=UUID(int=number), name="x", attempt=0, position=number))
        for number in range(count)
    ]


class Redis:
    """What was put back."""

    def __init__(self) -> None:
        self.back: list[int] = []

    def __call__(self, some: Sequence[Taken]) -> None:
        self.back += [int(one.raw) for one in some]


def test_the_first_messages_are_taken_alone_and_more_of_them_while_tasks_are_short() -> None:
    pace = Pace()
    now, found = 100.0, []
    for _ in range(8):
        most = pace.most(now)
        found.append(most)
        now += most * 0.0001
        pace.ended(most, most * 0.0001, now)

    assert found == [1, 2, 4, 8, 16, 32, MOST, MOST]


def test_no_more_is_taken_than_is_likely_to_begin_in_time() -> None:
    pace = Pace()
    for _ in range(10):
        pace.ended(pace.most(1.0), pace.most(1.0) * 0.01, 1.0)
    assert pace.most(1.0) == round(AHEAD_SECONDS / 0.01)

    pace.ended(pace.most(1.0), AHEAD_SECONDS * 3, 1.0)
    assert pace.most(1.0) == 1, "at once, without a step in between"


@pytest.mark.parametrize("seconds", [AHEAD_SECONDS * 0.6, 1.0, 3600.0])
def test_tasks_that_are_not_short_are_always_taken_alone(seconds: float) -> None:
    pace = Pace()
    pace.ended(1, seconds, 5.0)
    assert pace.most(5.0) == 1


def test_a_queue_that_was_almost_empty_is_not_taken_for_a_long_one() -> None:
    pace = Pace()
    for _ in range(10):
        pace.ended(pace.most(1.0), 0.0, 1.0)
    pace.ended(1, 0.0, 1.0)  # there was one
    assert pace.most(1.0) == 2


def test_what_was_measured_is_soon_forgotten() -> None:
    pace = Pace()
    pace.ended(10, 0.001, 50.0)
    assert pace.most(50.0 + MEMORY_SECONDS) == 20
    assert pace.most(50.1 + MEMORY_SECONDS) == 1


def test_after_a_put_back_messages_are_taken_alone_for_a_while() -> None:
    pace = Pace()
    pace.hold(50.0, HOLD_SECONDS)
    pace.hold(50.0, 0.01)
    pace.ended(10, 0.001, 50.0)
    assert pace.most(50.1) == 1
    pace.ended(1, 0.001, 50.0 + HOLD_SECONDS)
    assert pace.most(50.0 + HOLD_SECONDS) == 2


def test_a_child_begins_nothing_of_a_bundle_that_was_closed(cells: Cells) -> None:
    context = multiprocessing.get_context("fork")
    cell, other = cells.take(), cells.take()
    begun, closed = context.Event(), context.Event()
    child = context.Process(target=_work, args=(cells, cell, begun, closed))
    child.start()
    assert begun.wait(10)
    assert cells.begun(cell) == 2
    cells.close(cell)
    closed.set()
    child.join(10)

    assert child.exitcode == 0
    assert cells.begin(other, 1), "the other is open"


def _work(cells: Cells, cell: int, begun: Event, closed: Event) -> None:
    assert cells.begin(cell, 1)
    assert cells.begin(cell, 2)
    begun.set()
    closed.wait(10)
    assert not cells.begin(cell, 3)


def test_a_cell_is_used_again_once_nobody_has_it_and_starts_open(cells: Cells) -> None:
    cell = Bundle(messages(2), Pace(), Redis()).job()[0]
    assert cell is not None
    cells.begin(cell, 2)
    cells.close(cell)
    again = {cells.take() for _ in range(bundles._SHARED_CELLS)}

    assert cell in again
    assert cells.begun(cell) == 0
    assert cells.begin(cell, 1)
    assert not bundles.possible(), "they are all taken"


def test_what_no_child_has_begun_is_put_back_once(cells: Cells) -> None:
    redis = Redis()
    bundle = Bundle(messages(5), Pace(), redis)
    cell, offers = bundle.job()
    assert cell is not None
    assert [offer.position for offer in offers] == [0, 1, 2, 3, 4]
    cells.begin(cell, 1)
    cells.begin(cell, 2)

    assert bundle.withdraw() == 3
    assert redis.back == [2, 3, 4]
    assert (bundle.withdraw(), redis.back) == (0, [2, 3, 4])
    assert bundle.keep(2) == 0
    assert redis.back == [2, 3, 4]


def test_what_was_taken_for_begun_and_was_not_is_put_back_when_the_child_says_so(cells: Cells) -> None:
    redis = Redis()
    bundle = Bundle(messages(4), Pace(), redis)
    cell, _ = bundle.job()
    assert cell is not None
    cells.begin(cell, 1)
    cells.begin(cell, 2)  # it says so, and then looks whether the bundle is closed
    bundle.withdraw()
    assert redis.back == [2, 3]

    bundle.keep(1)
    assert redis.back == [2, 3, 1]


@pytest.mark.usefixtures("cells")
def test_a_child_that_ran_all_of_a_bundle_has_nothing_put_back() -> None:
    redis = Redis()
    bundle = Bundle(messages(3), Pace(), redis)
    bundle.keep(3)
    assert redis.back == []


def test_a_message_alone_is_put_back_until_a_child_has_it() -> None:
    redis = Redis()
    waiting, running = (Bundle(messages(1), Pace(), redis) for _ in range(2))
    running.accepted = True

    assert (waiting.withdraw(), running.withdraw()) == (1, 0)
    assert redis.back == [0]


@pytest.mark.usefixtures("cells")
def test_a_worker_that_stops_begins_nothing_that_is_in_a_bundle_and_makes_none() -> None:
    bundle = Bundle(messages(3), Pace(), Redis())
    cell, _ = bundle.job()
    assert cell is not None
    assert bundles.possible()

    bundles.stop()
    assert not bundles.begin(cell, 1)
    assert not bundles.possible()


def test_a_program_without_a_pool_makes_none() -> None:
    assert not bundles.possible()
    bundles.stop()
    assert Bundle(messages(1), Pace(), Redis()).envelope()["headers"]["id"] == str(UUID(int=0))

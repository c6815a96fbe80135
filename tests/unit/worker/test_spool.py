"""What children report, in shared memory."""

import os
from collections.abc import Iterator
from dataclasses import replace
from uuid import uuid4

import pytest

from app import lifecycle
from app.lifecycle import Budgets, Claim, Error, Log, Outcome
from app.worker import spool
from app.worker.spool import LARGE_BYTES, SMALL_BYTES, SMALL_CELLS, Place, Report, Spool

ERROR = Error(type="OSError", message="no \u2603", traceback="Traceback …")
REPORT = Report(
    claim=Claim(uuid4(), 3, uuid4()),
    name="reports.render",
    queue="reports",
    budgets=Budgets(failures=1, crashes=2, losses=3, refusals=4, max_retries=5),
    traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    limited_with="key",
    outcome=lifecycle.Succeeded('{"sum": "\u2603"}'),
    log=Log('[{"message": "\u2603"}]', dropped=7),
    run_seconds=1.5,
)


@pytest.fixture
def shared() -> Iterator[Spool]:
    made = Spool.create(slots=3)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize(
    "outcome",
    [
        lifecycle.Succeeded("null"),
        lifecycle.Failed(ERROR),
        lifecycle.Misfit(replace(ERROR, traceback=None)),
        lifecycle.RetryAsked(ERROR, 2.5, None),
        lifecycle.RetryAsked(ERROR, float("inf"), 0),
        lifecycle.Interrupted(),
        lifecycle.Cancelled(),
    ],
)
def test_a_report_is_read_as_it_was_written(outcome: Outcome) -> None:
    for one in (replace(REPORT, outcome=outcome), replace(REPORT, outcome=outcome, log=None, limited_with=None)):
        assert Report.decode(one.encode()) == one


def test_a_child_reports_no_death() -> None:
    with pytest.raises(TypeError):
        replace(REPORT, outcome=lifecycle.Crashed()).encode()
    with pytest.raises(ValueError, match="Crashed"):
        spool._outcome("Crashed", [], b"")


def test_the_largest_report_has_room(shared: Spool) -> None:
    worst = Error(type="\x01" * 20_000, message="\x01" * 20_000, traceback="\x01" * 20_000)
    raw = replace(REPORT, outcome=lifecycle.Failed(worst), log=Log('"' * 16_384)).encode()
    assert shared.put(0, raw) is not None
    raw = replace(REPORT, outcome=lifecycle.Succeeded("1" * 1024 * 1024), log=Log('"' * 16_384)).encode()
    assert shared.put(1, raw) is not None


def test_what_is_put_is_found_by_whoever_shares_the_memory(shared: Spool) -> None:
    small, large = REPORT.encode(), b"x" * SMALL_BYTES
    places = [shared.put(0, small), shared.put(2, large), shared.put(2, small)]
    other = Spool(os.dup(shared.fd))

    assert set(other.places()) == set(places) == {Place(0, 0), Place(2, SMALL_CELLS), Place(2, 0)}
    assert [other.get(place) for place in other.places()] == [small, small, large]

    for place in other.places():
        other.free(place)
    assert shared.places() == []
    assert shared.get(Place(0, 0)) is None
    os.close(other.fd)


def test_there_is_room_again_once_a_report_is_freed(shared: Spool) -> None:
    raw = REPORT.encode()
    places = [shared.put(1, raw) for _ in range(SMALL_CELLS)]
    assert None not in places
    assert shared.put(1, raw) is None
    assert shared.put(0, raw) is not None, "another child has cells of its own"
    large = b"x" * SMALL_BYTES
    assert shared.put(1, large) is not None
    assert shared.put(1, large) is None

    shared.free(Place(1, 5))
    assert shared.put(1, raw) == Place(1, 5)


def test_what_is_too_large_is_refused_and_breaks_nothing(shared: Spool) -> None:
    raw = REPORT.encode()
    shared.put(1, raw)
    with pytest.raises(ValueError, match="bytes"):
        shared.put(0, b"x" * LARGE_BYTES)
    assert shared.places() == [Place(1, 0)]
    assert shared.get(Place(1, 0)) == raw


def test_a_report_that_was_overwritten_is_none(shared: Spool) -> None:
    place = shared.put(1, REPORT.encode())
    assert place is not None
    at = shared._offset(*place) + 20
    shared._memory[at : at + 1] = b"\xff"
    assert shared.get(place) is None
    shared._memory[at - 20 : at - 16] = b"\xff\xff\xff\xff"
    assert shared.get(place) is None


def test_what_was_large_takes_no_memory_once_it_is_freed(shared: Spool) -> None:
    before = os.fstat(shared.fd).st_blocks
    place = shared.put(0, b"x" * 1024 * 1024)
    assert place is not None
    taken = os.fstat(shared.fd).st_blocks
    shared.free(place)
    if not hasattr(os, "memfd_create"):
        pytest.skip("only Linux takes back a part of a file's memory")
    assert taken - before >= 2000
    assert os.fstat(shared.fd).st_blocks - before < 100

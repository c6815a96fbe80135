"""What is kept of the lines that a task logs."""

import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from app.worker import bridge
from app.worker.journal import LINES, MESSAGE_LIMIT, SIZE_LIMIT_BYTES, Journal

log = logging.getLogger("somebody.tasks")


@pytest.fixture
def journal() -> Iterator[Journal]:
    root = logging.getLogger()
    level = root.level
    root.setLevel("INFO")
    yield (own := Journal())
    root.removeHandler(own)
    root.setLevel(level)


def kept(journal: Journal) -> list[dict[str, Any]]:
    found = journal.end()
    lines: list[dict[str, Any]] = [] if found is None else json.loads(found.lines)
    return lines


def test_an_attempt_that_logs_nothing_has_no_log(journal: Journal) -> None:
    journal.begin()
    assert journal.end() is None


def test_lines_are_kept_from_its_beginning_to_its_end(journal: Journal) -> None:
    log.info("before")
    journal.begin()
    log.info("page %d of %d", 4, 10)
    log.debug("below the level")
    [line] = kept(journal)
    assert 0 <= line.pop("after") < 10
    assert line == {"level": "INFO", "logger": "somebody.tasks", "message": "page 4 of 10"}
    log.info("after")
    journal.begin()
    assert journal.end() is None


def test_the_last_lines_are_kept_and_the_others_counted(journal: Journal) -> None:
    journal.begin()
    for number in range(LINES + 7):
        log.info("line %d", number)
    found = journal.end()
    assert found is not None
    assert [line["message"] for line in json.loads(found.lines)] == [f"line {7 + number}" for number in range(LINES)]
    assert found.dropped == 7


def test_lines_that_are_too_much_together_are_dropped_from_the_front(journal: Journal) -> None:
    journal.begin()
    for number in range(LINES):
        log.info("%d %s", number, "é" * 1500)
    found = journal.end()
    assert found is not None
    lines = json.loads(found.lines)
    assert len(found.lines.encode()) <= SIZE_LIMIT_BYTES
    assert 1 < len(lines) < LINES
    assert lines[-1]["message"].startswith(f"{LINES - 1} ")
    assert found.dropped == LINES - len(lines)


def test_the_largest_line_there_can_be_is_kept(journal: Journal) -> None:
    journal.begin()
    log.info("\x01" * 100_000)
    [line] = kept(journal)
    assert len(line["message"]) == MESSAGE_LIMIT


def test_whatever_is_logged_can_be_stored(journal: Journal) -> None:
    class Mute:
        def __str__(self) -> str:
            raise ValueError

    journal.begin()
    # Past the root logger, where pytest would take them as well, and can't pass half a surrogate pair on.
    for message, args in [("a\x00b\ud800c", ()), ("fits %d", ("not",)), ("%s", (Mute(),)), (Mute(), ())]:
        journal.handle(logging.LogRecord("somebody.tasks", logging.INFO, "tasks.py", 1, message, args, None))
    assert [line["message"] for line in kept(journal)] == ["ab?c", *["(could not be formatted)"] * 3]


def test_a_traceback_is_part_of_its_line(journal: Journal) -> None:
    journal.begin()
    try:
        os.environ["NO_SUCH_PAGE"]
    except KeyError:
        log.exception("caught")
    [line] = kept(journal)
    assert line["message"].startswith("caught\nTraceback")
    assert line["message"].endswith("KeyError: 'NO_SUCH_PAGE'")


def test_threads_of_the_task_are_heard_and_ours_is_not(journal: Journal) -> None:
    journal.begin()
    for name in ("the task's own", bridge.THREAD_NAME):
        thread = threading.Thread(target=log.info, args=(f"from {name}",), name=name)
        thread.start()
        thread.join()
    assert [line["message"] for line in kept(journal)] == ["from the task's own"]


def test_code_that_configures_its_own_logging_silences_nothing(journal: Journal) -> None:
    journal.begin()
    logging.getLogger().removeHandler(journal)
    journal.begin()
    log.info("heard")
    assert len(kept(journal)) == 1
    assert logging.getLogger().handlers.count(journal) == 1

"""What is believed of the log lines that Redis brings."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest

from app import loglines
from app.core.statuses import TaskStatus
from app.lifecycle import Claim, Log, Snapshot

BEGAN = datetime(2030, 1, 1, tzinfo=UTC)
CLAIM = Claim(uuid4(), 2, uuid4())
LINE = {"after": 1.5, "level": "INFO", "logger": "somebody.tasks", "message": "page 4 é\n"}


def seen(attempt: int = 2, token: UUID | None = CLAIM.token) -> Snapshot:
    return Snapshot(
        status=TaskStatus.STARTED,
        attempt=attempt,
        progress=None,
        progress_message=None,
        error_type=None,
        started_at=BEGAN,
        token=token,
    )


def sealed(body: object) -> bytes:
    text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return loglines._seal(CLAIM.token, text) + text


def test_lines_arrive_with_their_numbers() -> None:
    found = loglines.decode(loglines.encode(CLAIM, Log(json.dumps([LINE, LINE]), dropped=7)), seen())
    assert found is not None
    assert (found.attempt, [line.number for line in found.lines]) == (2, [8, 9])
    first = found.lines[0]
    assert first.at == BEGAN + timedelta(seconds=1.5)
    assert (first.level, first.logger, first.message) == ("INFO", "somebody.tasks", "page 4 é\n")


def test_what_another_attempt_has_sealed_is_not_believed() -> None:
    told = loglines.encode(CLAIM, Log(json.dumps([LINE])))
    assert loglines.decode(told, seen()) is not None
    assert loglines.decode(told, seen(token=uuid4())) is None
    assert loglines.decode(told, seen(token=None)) is None
    assert loglines.decode(told, seen(attempt=3)) is None
    assert loglines.decode(told[:-1] + b" ", seen()) is None


def test_a_picture_shows_nobody_its_token() -> None:
    assert str(CLAIM.token) not in repr(seen())


@pytest.mark.parametrize("raw", [b"", b"\xff" * 31, b"{}", b"\x00" * 100, b"x" * 100_000])
def test_what_is_not_sealed_is_nothing(raw: bytes) -> None:
    assert loglines.decode(raw, seen()) is None


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "[" * 20_000,
        [],
        {},
        7,
        {"attempt": 2, "dropped": 0, "lines": 7},
        {"attempt": 2, "dropped": 0, "lines": [7]},
        {"attempt": 2, "dropped": 0, "lines": ["line"]},
        {"attempt": 2, "dropped": "many", "lines": [LINE]},
        {"attempt": 2, "dropped": float("inf"), "lines": [LINE]},
        {"attempt": 2, "dropped": None, "lines": [LINE]},
        {"attempt": 2, "lines": [LINE]},
        {"dropped": 0, "lines": [LINE]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "after": float("nan")}]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "after": 1e300}]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "after": "soon"}]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "message": None}]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "level": 20}]},
        {"attempt": 2, "dropped": 0, "lines": [{**LINE, "message": "x" * 40_000}]},
    ],
)
def test_what_another_release_may_seal_does_no_harm(body: object) -> None:
    assert loglines.decode(sealed(body), seen()) is None


def test_what_this_release_does_not_know_is_ignored() -> None:
    found = loglines.decode(sealed({"attempt": 2, "dropped": 0, "lines": [{**LINE, "new": 1}], "new": 2}), seen())
    assert found is not None
    assert len(found.lines) == 1

"""The shapes of requests: strict, bounded, and with a field for each fault."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from app.core.fields import field_errors
from app.schemas import SubmitRequest, plain_submit, shown_url

SOON = (datetime.now(UTC) + timedelta(days=1)).replace(microsecond=0)


def pointers(**fields: Any) -> list[str]:
    with pytest.raises(ValidationError) as invalid:
        SubmitRequest.model_validate_json(json.dumps(fields))
    return [fault.pointer for fault in field_errors(invalid.value.errors(), fields)]


def test_nothing_at_all_is_a_long_task() -> None:
    wanted = SubmitRequest.model_validate_json("{}")
    assert (wanted.task, wanted.args, wanted.kwargs, wanted.tags) == ("long_task", [], {}, [])


@pytest.mark.parametrize(
    "fields",
    [
        {"countdown": 0},
        {"countdown": 31_536_000},
        {"countdown": 0.5, "expires": 10},
        {"eta": "2020-01-01T00:00:00Z"},
        {"eta": SOON.isoformat(), "countdown": None},
        {"eta": "2024-02-29t12:00:00.123456+05:30", "expires": SOON.isoformat()},
        {"max_retries": 0, "time_limit": 86_400},
        {"max_retries": 100, "time_limit": 0.1},
        {"tags": ["x" * 64] * 20},
        {"webhook_url": None, "queue": None},
        {"webhook_events": ["task.started", "task.retrying", "task.succeeded", "task.failed", "task.revoked"]},
    ],
)
def test_what_is_within_its_bounds_passes(fields: dict[str, Any]) -> None:
    SubmitRequest.model_validate_json(json.dumps(fields))


def test_a_moment_is_kept_in_utc() -> None:
    wanted = SubmitRequest.model_validate_json('{"eta": "2024-02-29T12:00:00+05:30"}')
    assert wanted.eta == datetime(2024, 2, 29, 6, 30, tzinfo=UTC)
    assert str(wanted.eta).endswith("+00:00")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("task", [1, None, "", "x" * 256, ["long_task"]]),
        ("args", [None, {}, "[]"]),
        ("kwargs", [None, [], "{}"]),
        ("queue", [1, "", "x" * 65]),
        ("countdown", [-1, 31_536_001, "5", True, []]),
        ("eta", [5, "5", "tomorrow", "2020-01-01", "2020-01-01T00:00:00", True, "2020-13-01T00:00:00Z"]),
        ("eta", ["9999-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00"]),
        ("eta", ["2020-01-01T00:00:00+99:99", "2020-01-01T00:00:00Z\n", "２０２０-01-01T00:00:00Z"]),  # noqa: RUF001
        ("expires", [0, -1, "5", True, {}, "2020-01-01", 31_536_001]),
        ("max_retries", [-1, 101, 1.5, 3.0, "3", True]),
        ("time_limit", [0, -1, 86_401, "5", True]),
        ("tags", ["x", {}, ["x"] * 21]),
        ("webhook_url", [1, "", "x" * 2049]),
        ("webhook_events", ["task.failed", [], ["task.failed"] * 6, {}]),
        ("surprise", [1]),
        ("task_id", ["x"]),
    ],
)
def test_what_is_not_names_its_field(field: str, values: list[object]) -> None:
    for value in values:
        assert pointers(**{field: value}) == [f"/{field}"]


@pytest.mark.parametrize("tag", ["", "x" * 65, 1])
def test_a_wrong_tag_is_named_by_its_index(tag: object) -> None:
    assert pointers(tags=["fine", tag]) == ["/tags/1"]


def test_eta_and_countdown_exclude_each_other() -> None:
    assert pointers(eta=SOON.isoformat(), countdown=1) == ["/eta"]


def test_all_faults_are_named_at_once() -> None:
    assert pointers(task=1, countdown="x", surprise=0) == ["/task", "/countdown", "/surprise"]


def test_the_faults_of_one_answer_are_bounded() -> None:
    assert len(pointers(**{f"field{number}": 1 for number in range(500)})) == 20


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com/hook", "https://example.com/hook"),
        ("https://example.com:8443/hook?token=x&y=1", "https://example.com:8443/hook?…"),
        ("https://example.com/?", "https://example.com/?…"),
    ],
)
def test_the_query_of_a_url_is_not_shown(url: str, shown: str) -> None:
    assert shown_url(url) == shown


VALUES = [
    None, True, 0, 1.5, "", "x", "é\U0001f600", "x" * 64, "x" * 65, "x" * 255, "x" * 256, "x" * 2048, "x" * 2049,
    [], [1], ["x"], {}, {"x": [None, {"y": 1e300}]}, 10**30,
]  # fmt: skip
NAMES = [*SubmitRequest.model_fields, "unknown"]


@pytest.mark.parametrize("name", NAMES)
def test_a_short_look_at_a_submit_says_what_the_schema_says(name: str) -> None:
    """About each field alone, and beside one that is fine: the same request, or nothing."""
    for value in VALUES:
        for beside in ({}, {"kwargs": {"x": 1}, "task": "y"}):
            fields = {**beside, name: value}
            found = plain_submit(fields)
            if found is not None:
                schema = SubmitRequest.model_validate_json(json.dumps(fields))
                assert found == schema
                assert found.model_fields_set == schema.model_fields_set
                assert found.model_dump() == schema.model_dump()
                assert repr(found) == repr(schema)


def test_most_submits_need_no_more_than_a_short_look() -> None:
    fields = {"task": "x", "args": [1], "kwargs": {"x": 1}, "queue": "y", "webhook_url": "https://example.com"}
    assert plain_submit(fields) == SubmitRequest.model_validate_json(json.dumps(fields))
    one, other = plain_submit({}), plain_submit({})
    assert one is not None
    assert other is not None
    assert one.args is not other.args
    assert one.kwargs is not other.kwargs
    assert one.tags is not other.tags

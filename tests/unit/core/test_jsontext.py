"""The quick writer says what Python's own says."""

import json
import math
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.core import jsontext

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_what_was_written_is_read_again(value: object) -> None:
    found = json.loads(jsontext.written(value))
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("\ud800", '"\\ud800"'),
        ("\x00", '"\\u0000"'),
        (math.inf, "Infinity"),
        (math.nan, "NaN"),
        (("a", 1), '["a",1]'),
        (10**40, str(10**40)),
    ],
)
def test_what_some_reader_may_refuse_is_left_to_it(value: object, text: str) -> None:
    assert jsontext.written(value) == text


def test_what_is_no_json_is_not_made_any() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        jsontext.written(deep)
    assert json.loads(jsontext.written({str(one := uuid4()): 1})) == {str(one): 1}

"""Every hostile body gets its 4xx, names its field, and is not repeated."""

import asyncio
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from app.core import errors
from app.routers import body

JSON = "application/json"


def request_of(chunks: Iterable[bytes], headers: dict[str, str], *, ends: bool = True) -> Request:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False} if ends else {"type": "http.disconnect"})
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        return next(waiting)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}, receive)


async def read(raw: bytes | str, content_type: str | None = JSON, **headers: str) -> body.Body:
    sent = raw.encode() if isinstance(raw, str) else raw
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content_type is not None:
        named["content-type"] = content_type
    return await body.read(request_of([sent], named))


async def refused(raw: bytes | str, content_type: str | None = JSON, **headers: str) -> errors.RequestError:
    with pytest.raises(errors.RequestError) as raised:
        await read(raw, content_type, **headers)
    return raised.value


@pytest.mark.parametrize("content_type", [None, JSON, "text/plain", "application/x-www-form-urlencoded"])
async def test_no_body_is_an_empty_object_whatever_its_type(content_type: str | None) -> None:
    assert await read(b"", content_type) == body.Body("{}", {}, sent=False)


@pytest.mark.parametrize(
    "content_type",
    [JSON, "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"',
     "application/vnd.api+json", "application/json; version=1"],
)  # fmt: skip
async def test_json_in_utf_8_passes(content_type: str) -> None:
    assert (await read('{"a": ["é", 1, 2.5, null, true]}', content_type)).value == {"a": ["é", 1, 2.5, None, True]}


@pytest.mark.parametrize(
    "content_type",
    [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "text/json", "json",
     "application/json; charset=latin-1", "application/json; charset=utf-16", "multipart/form-data; boundary=x"],
)  # fmt: skip
async def test_a_body_of_another_type_is_415(content_type: str | None) -> None:
    assert (await refused("{}", content_type)).status == 415


async def test_a_compressed_body_is_415() -> None:
    assert (await refused(b"\x1f\x8b", content_encoding="gzip")).status == 415


@pytest.mark.parametrize("length", [str(body.LIMITS.size_bytes + 1), "9" * 5000])
async def test_a_body_that_says_it_is_too_large_is_413_before_it_is_read(length: str) -> None:
    with pytest.raises(errors.PayloadTooLarge):
        await body.read(request_of([], {"content-type": JSON, "content-length": length}))


async def test_a_body_that_grows_too_large_is_413() -> None:
    chunks = (b" " * 65536 for _ in range(1000))
    with pytest.raises(errors.PayloadTooLarge):
        await body.read(request_of(chunks, {"content-type": JSON}))


async def test_a_body_of_the_largest_size_passes() -> None:
    raw = '{"a": "' + "x" * (body.LIMITS.size_bytes - 9) + '"}'
    assert len((await read(raw)).text) == body.LIMITS.size_bytes


async def test_a_client_that_hangs_up_is_no_error_of_ours() -> None:
    with pytest.raises(errors.MalformedBody):
        await body.read(request_of([b'{"a":'], {"content-type": JSON}, ends=False))


@pytest.mark.parametrize(
    "raw",
    [b"{", b"nope", b"{'a': 1}", b'{"a": 1,}', b'{"a": 01}', b'{"a": "\n"}', b"{} {}", b" ", b'{"a": "\\x"}',
     b'\xef\xbb\xbf{"a": 1}', '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32"), b'{"a": "\xff"}',
     b'{"a": "\xed\xa0\x80"}', b"[" * 100_000, b'{"a":' * 5000, b"[" * 1000 + b"]" * 1000],
)  # fmt: skip
async def test_what_is_no_json_is_400(raw: bytes) -> None:
    problem = await refused(raw)
    assert (problem.status, problem.slug) == (400, "malformed-body")


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ('{"kwargs": {"x": NaN}}', "/kwargs/x"),
        ('{"kwargs": {"x": Infinity}}', "/kwargs/x"),
        ('{"args": [1, -Infinity]}', "/args/1"),
        ('{"countdown": 1e999}', "/countdown"),
        ('{"countdown": -1e999}', "/countdown"),
        ('{"x": ' + "9" * 5000 + "}", "/x"),
        ('{"x": -' + "9" * 5000 + "}", "/x"),
        ('{"a/b~": {"c": 1, "c": 1}}', "/a~1b~0/c"),
        ('{"task": "x", "task": "y", "queue": 1}', "/task"),
        ("NaN", ""),
    ],
)
async def test_values_that_json_has_not_are_400_and_name_the_field(raw: str, pointer: str) -> None:
    problem = await refused(raw)
    assert (problem.status, [fault.pointer for fault in problem.errors]) == (400, [pointer])


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        (r'{"kwargs": {"x": "a\u0000b"}}', "/kwargs/x"),
        (r'{"args": ["\ud800"]}', "/args/0"),
        (r'{"args": ["\udc00\ud800"]}', "/args/0"),
        (r'{"tags": ["fine", "\u0000"]}', "/tags/1"),
        (r'{"a\u0000": 1}', "/a?"),
        (r'{"kwargs": {"\ud83d": 1}}', "/kwargs/?"),
        (r'"\u0000"', ""),
    ],
)
async def test_text_that_cannot_be_stored_is_422_and_names_the_field(raw: str, pointer: str) -> None:
    problem = await refused(raw)
    assert (problem.status, [fault.pointer for fault in problem.errors]) == (422, [pointer])


async def test_whole_surrogate_pairs_are_text() -> None:
    assert (await read(r'{"a": "\ud83d\ude00"}')).value == {"a": "😀"}


@pytest.mark.parametrize("raw", ["[]", "1", '"text"', "null", "true"])
async def test_a_body_that_is_no_object_is_422(raw: str) -> None:
    assert (await refused(raw)).status == 422


def nested(levels: int) -> str:
    return '{"a":' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


async def test_nesting_is_bounded() -> None:
    assert (await read(nested(body.LIMITS.depth))).value
    assert (await refused(nested(body.LIMITS.depth + 1))).status == 400


async def test_the_number_of_items_is_bounded() -> None:
    most = body.LIMITS.items - 1
    assert (await read(json.dumps({"a": [0] * most}))).value
    assert (await refused(json.dumps({"a": [0] * (most + 1)}))).status == 400
    assert (await refused(json.dumps({"a": [[0] * 10] * (most // 10)}))).status == 400


async def test_commas_in_texts_are_no_items() -> None:
    text = '\\",' * body.LIMITS.items
    raw = json.dumps({"a": [text, {"b": text}], text: 1})
    assert (await read(raw)).value == json.loads(raw)
    assert (await refused(json.dumps({"a": [text, *[0] * body.LIMITS.items]}))).status == 400


@pytest.mark.parametrize(
    "item", ["[],", "1,", '{"a":1},', '"",', '"a":1,', '\\",', '"\\', '""', ",", '"' + "," * 9], ids=repr
)
async def test_a_body_of_a_million_items_is_refused_before_it_is_parsed(item: str) -> None:
    raw = f"[{item * (body.BATCH_LIMITS.size_bytes // len(item))}"[: body.BATCH_LIMITS.size_bytes]
    began = time.process_time()
    with pytest.raises(errors.RequestError) as raised:
        await body.read(request_of([raw.encode()], {"content-type": JSON}), body.BATCH_LIMITS)
    assert raised.value.status == 400
    assert time.process_time() - began < 1.0


async def test_the_longest_integer_passes() -> None:
    digits = "9" * body.DIGITS_LIMIT
    assert (await read(f'{{"x": [{digits}, -{digits}]}}')).value["x"] == [int(digits), -int(digits)]


async def test_field_names_are_cut_and_values_not_repeated() -> None:
    secret = "hunter2"
    problem = await refused(json.dumps({"n" * 500: [secret + "\x00"]}))
    assert problem.errors[0].pointer == "/" + "n" * 64 + "/0"
    assert secret not in repr((problem.detail, problem.errors))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=4)
    ),
)


@given(raw=st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()))
@settings(deadline=None, max_examples=300)
def test_any_body_is_an_object_or_a_problem(raw: bytes) -> None:
    came = asyncio.run(tried(raw))
    if isinstance(came, errors.RequestError):
        assert came.status in {400, 413, 415, 422}
    else:
        # What passed can be stored as text, and read again as the same.
        text = json.dumps(came.value, ensure_ascii=False, allow_nan=False)
        assert json.loads(text.encode()) == came.value


async def tried(raw: bytes) -> body.Body | errors.RequestError:
    try:
        return await read(raw)
    except errors.RequestError as problem:
        return problem


MANY = ",".join("1" * 9_999)
HOSTILE = [
    '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[NaN]", '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}',
    '{"a": -1e999}', f'{{"a": {"9" * 4301}}}', f'{{"a": -{"9" * 4300}}}', '{"a": "\\u0000"}', '{"\\u0000": 1}',
    '{"a": "\\ud800"}', '{"a": "\\ud83d\\ude00"}', '{"a": "\x00"}', '{"a": "\n"}', '{"a": "\\n"}', '{"a": 1,}',
    "null", '"text"', "7", "[]", "{", "}", "", " ", '{"a": 1} x', '{"a": "é\U0001f600"}', "{'a': 1}", '{"a": 0x1}',
    "[" * 33 + "]" * 33, '{"a":' * 33 + "1" + "}" * 33, '{"a":' * 32 + "1" + "}" * 32, f'{{"a": "{"[" * 40}"}}',
    f'{{"a": [{MANY}]}}', f'{{"a": [{MANY},1]}}', f'{{"a": "{MANY}"}}', f'{{"a": "{"x" * 20_000}"}}',
    "\ufeff{}", '{"a": 01}', '{"a": 1.}', '{"a": -0}', '{"a": 1.5e3}',
]  # fmt: skip
JSON_TEXTS = st.recursive(
    st.sampled_from(["1", "-2.5", "1e400", "NaN", "null", "true", '"x"', '"\\u0000"', '"é"', '"\\ud800"', "", "01"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda some: f"[{','.join(some)}]")
        | st.lists(st.tuples(st.sampled_from("ab"), inner), max_size=3).map(
            lambda some: "{{{}}}".format(",".join(f'"{name}": {text}' for name, text in some))
        )
    ),
    max_leaves=8,
)


def outcome(text: str) -> Any:
    try:
        found = asyncio.run(read(text.encode("utf-8")))
    except errors.RequestError as problem:
        return type(problem), problem.detail, problem.errors
    # The texts say what == does not: 1 is no 1.0, and -0.0 no 0.0.
    return found, repr(found.value)


def both_ways(monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[Any, Any]:
    short = outcome(text)
    with monkeypatch.context() as patched:
        patched.setattr(body, "_plain", lambda *_: None)
        return short, outcome(text)


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_short_look_finds_what_a_long_one_finds(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    short, long = both_ways(monkeypatch, HOSTILE[number])
    assert short == long


@given(text=JSON_TEXTS)
@settings(max_examples=300, deadline=None)
def test_a_short_look_finds_what_a_long_one_finds_in_anything(text: str) -> None:
    with pytest.MonkeyPatch.context() as patched:
        short, long = both_ways(patched, text)
    assert short == long


def test_most_bodies_need_no_more_than_a_short_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "check", None)
    for text in ('{"task": "sample.echo", "args": [1, "é"], "webhook_url": "https://example.com/hook"}', "{}"):
        assert asyncio.run(read(text)).value == json.loads(text)

"""The one reader of request bodies: what passes is a JSON object that can be stored and shown again.

FastAPI's own reader accepts NaN, duplicate keys, lone surrogates and nesting up
to Python's recursion limit; each of these becomes an error later, somewhere
else. Here a body is refused before anything looks at it, with the field at
fault where there is one, and nothing of its values in the answer.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from app.core import errors
from app.core.errors import FieldError
from app.core.fields import field_errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much a body may be.

    Attributes:
        size_bytes: of the text.
        depth: arrays and objects inside each other, the body itself included.
        items: members of all objects and elements of all arrays together.
    """

    size_bytes: int
    depth: int
    items: int


LIMITS = Limits(size_bytes=1024 * 1024, depth=32, items=10_000)
"""Of a body that is about one thing."""
BATCH_LIMITS = Limits(size_bytes=4 * 1024 * 1024, depth=LIMITS.depth + 2, items=50_000)
"""Of one that is a list of such: each may be as deep, and all together have about 4 KiB and 50 items each."""
DIGITS_LIMIT = 4300
"""Of an integer: what Python turns into a number and back in reasonable time."""

PLAIN_CHARACTERS = 16 * 1024
"""Of a body that is parsed in the hope that there is nothing about it. A longer one would take long to parse twice."""

_JSON_TYPE = re.compile(r"application/(json|[a-z0-9!#$&^_.+-]+\+json)", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*(utf-8|"utf-8")""", re.IGNORECASE)

_TEXT_OR_COMMA = re.compile(r""""[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|,""", re.DOTALL)
"""A text that does not end goes to the end of the body, so that looking for all of them takes one pass."""
_SURROGATE = re.compile("[\ud800-\udfff]")

Place = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON object that passed.

    Attributes:
        text: as it was sent; `{}` if nothing was.
        value: as Python has it.
        sent: whether anything was.
    """

    text: str
    value: dict[str, Any]
    sent: bool = True


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands in the parsed body where something is no JSON, so that its field can be named."""

    reason: str


async def read(request: Request, limits: Limits = LIMITS) -> Body:
    """The body of a request; an empty one counts as `{}`.

    Raises:
        PayloadTooLarge: if it is, or says it is, larger than `limits` allow.
        UnsupportedMediaType: if it is not declared as JSON in UTF-8.
        MalformedBody: if it is no JSON (RFC 8259), is ambiguous, too deep or too long.
        ValidationFailed: if it is no object, or holds text that can't be stored.
    """
    raw = await _received(request, limits.size_bytes)
    if not raw:
        return Body("{}", {}, sent=False)
    text = _decoded(raw)
    value = _plain(text, limits)
    if value is None:
        value = _parsed(text, limits)
        check(value, limits)
    if not isinstance(value, dict):
        raise errors.ValidationFailed([FieldError("", "The body must be a JSON object")])
    return Body(text, value)


async def wanted(request: Request, model: type[M], *, required: bool = False) -> M:
    """The body of a request as one of the `schemas`.

    Args:
        request: whose body.
        model: the schema.
        required: whether an empty body is refused, where `{}` would mean something.

    Raises:
        ValidationFailed: naming each field at fault; and whatever `read` raises.
    """
    posted = await read(request)
    if required and not posted.sent:
        raise errors.ValidationFailed([FieldError("", "A body is required")])
    return parsed(posted, model)


def parsed(posted: Body, model: type[M]) -> M:
    """A body that was read, as one of the `schemas`. Raises ValidationFailed, naming each field at fault."""
    try:
        return model.model_validate_json(posted.text)
    except ValidationError as invalid:
        findings = invalid.errors(include_url=False, include_context=False, include_input=False)
        raise errors.ValidationFailed(field_errors(findings, posted.value)) from None


def declared(model: type[BaseModel], *, required: bool, description: str = "") -> dict[str, Any]:
    """What a route declares of the body that it reads, for FastAPI's `openapi_extra`; see `openapi.install`."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    shown: dict[str, Any] = {"required": required, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": shown | ({"description": description} if description else {})}


async def _received(request: Request, most_bytes: int) -> bytes:
    # Of a header that is there twice the first counts.
    headers = dict(reversed(request.scope["headers"]))
    declared = headers.get(b"content-length", b"").decode("latin-1")
    if declared.isdecimal() and (len(declared) > len(str(most_bytes)) or int(declared) > most_bytes):
        raise _too_large(most_bytes)
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            # Nobody reads the answer; it only has to be no error of ours.
            raise errors.MalformedBody("The connection was closed before the body ended")
        chunk = message.get("body", b"")
        if chunk and not size:
            _check_type(headers)
        chunks.append(chunk)
        size += len(chunk)
        if size > most_bytes:
            raise _too_large(most_bytes)
        more = message.get("more_body", False)
    return b"".join(chunks)


def _too_large(most_bytes: int) -> errors.PayloadTooLarge:
    return errors.PayloadTooLarge(f"The body must not be larger than {most_bytes} bytes")


def _check_type(headers: Mapping[bytes, bytes]) -> None:
    declared = headers.get(b"content-type", b"")
    if declared != b"application/json":
        kind, *parameters = declared.decode("latin-1").split(";")
        if not _JSON_TYPE.fullmatch(kind.strip()):
            raise errors.UnsupportedMediaType("A body must be sent with Content-Type: application/json")
        charsets = [text.strip() for text in parameters if text.strip().lower().startswith("charset")]
        if not all(_CHARSET.fullmatch(text) for text in charsets):
            raise errors.UnsupportedMediaType("A body must be in UTF-8")
    encoding = headers.get(b"content-encoding")
    if encoding is not None and encoding.strip().lower() != b"identity":
        raise errors.UnsupportedMediaType("A body must not be compressed")


def _decoded(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise errors.MalformedBody("The body is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise errors.MalformedBody("The body must not begin with a byte order mark")
    return text


def _plain(text: str, limits: Limits) -> dict[str, Any] | None:
    """The body, if one look at its text says that nothing in it has to be looked for; None if it doesn't.

    Without an escape no text holds NUL, which JSON wants escaped, or half a surrogate pair, which UTF-8 has not. No
    body is deeper than it has brackets that open, and it has an item for each of those and each comma, at most.
    """
    if len(text) > PLAIN_CHARACTERS or "\\" in text:
        return None
    opened = text.count("[") + text.count("{")
    if opened > limits.depth or opened + text.count(",") > limits.items:
        return None
    try:
        value = _PLAIN_DECODER.decode(text)
    except (_NotPlainError, json.JSONDecodeError):
        return None
    return value if type(value) is dict else None


def _parsed(text: str, limits: Limits) -> Any:
    if text.count(",") > limits.items:
        _count_commas(text, limits)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as bad:
        where = f"line {bad.lineno}, column {bad.colno}"
        raise errors.MalformedBody(f"The body is not JSON: {bad.msg} ({where})") from None
    except RecursionError:
        raise _too_deep(limits) from None


def _count_commas(text: str, limits: Limits) -> None:
    """Refuse what has too many items without parsing them: others wait meanwhile.

    A comma stands between two items, and an item has two texts at most, its name and itself.
    """
    commas = 0
    for number, found in enumerate(_TEXT_OR_COMMA.finditer(text)):
        commas += found[0] == ","
        if commas > limits.items or number > 4 * limits.items:
            raise _too_many(limits)


def _too_many(limits: Limits) -> errors.MalformedBody:
    return errors.MalformedBody(f"The body must not have more than {limits.items} members and elements")


def _too_deep(limits: Limits) -> errors.MalformedBody:
    return errors.MalformedBody(f"The body must not be nested deeper than {limits.depth} levels")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                members[name] = _Refused("The member is given twice")
            seen.add(name)
    return members


def _float(digits: str) -> float | _Refused:
    number = float(digits)
    return number if math.isfinite(number) else _Refused("The number is too large")


def _int(digits: str) -> int | _Refused:
    if len(digits.removeprefix("-")) > DIGITS_LIMIT:
        return _Refused(f"The integer has more than {DIGITS_LIMIT} digits")
    return int(digits)


def _constant(_: str) -> _Refused:
    return _Refused("NaN and Infinity are not JSON")


class _NotPlainError(Exception):
    """Something in the body has to be looked at."""


def _plain_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise _NotPlainError
    return members


def _not_plain(_: str) -> Any:
    raise _NotPlainError


def _plain_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotPlainError
    return number


def _plain_int(digits: str) -> int:
    if len(digits) > DIGITS_LIMIT:
        raise _NotPlainError
    return int(digits)


_PLAIN_DECODER = json.JSONDecoder(
    object_pairs_hook=_plain_object, parse_float=_plain_float, parse_int=_plain_int, parse_constant=_not_plain
)
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)


def check(body: Any, limits: Limits = LIMITS) -> None:
    """Look at every value, without recursion.

    Raises:
        MalformedBody: if it is too deep or too long, or no JSON somewhere.
        ValidationFailed: if it holds text that can't be stored.
    """
    items = 0
    waiting: list[tuple[Any, Place]] = [(body, ())]
    while waiting:
        value, place = waiting.pop()
        if isinstance(value, _Refused):
            fault = FieldError(errors.pointer(*place), value.reason)
            raise errors.MalformedBody(_sentence(fault), errors=[fault])
        if isinstance(value, str):
            _check_text(value, place, "The text")
        elif isinstance(value, dict | list):
            items += len(value)
            if items > limits.items:
                raise _too_many(limits)
            if len(place) >= limits.depth:
                raise _too_deep(limits)
            waiting.extend((child, (*place, name)) for name, child in _children(value, place))


def _sentence(fault: FieldError) -> str:
    return f"{fault.detail} (see {fault.pointer or 'the body'})"


def _children(value: dict[str, Any] | list[Any], place: Place) -> Iterable[tuple[str | int, Any]]:
    if isinstance(value, list):
        return enumerate(value)
    for name in value:
        _check_text(name, (*place, _presentable(name)), "The name")
    return value.items()


def _check_text(text: str, place: Place, what: str) -> None:
    if "\x00" in text:
        raise errors.ValidationFailed([FieldError(errors.pointer(*place), f"{what} must not hold NUL")])
    if not text.isascii() and _SURROGATE.search(text):
        sentence = f"{what} must not hold half a surrogate pair"
        raise errors.ValidationFailed([FieldError(errors.pointer(*place), sentence)])


def _presentable(name: str) -> str:
    return name.replace("\x00", "?").encode("utf-8", "replace").decode("utf-8")

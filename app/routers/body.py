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
from starlette.requests import ClientDisconnect

from app.core import errors
from app.core.errors import FieldError
from app.core.fields import field_errors

SIZE_LIMIT_BYTES = 1024 * 1024
DEPTH_LIMIT = 32
"""Arrays and objects inside each other, the body itself included."""
ITEMS_LIMIT = 10_000
"""Members of all objects and elements of all arrays together."""
DIGITS_LIMIT = 4300
"""Of an integer: what Python turns into a number and back in reasonable time."""

_JSON_TYPE = re.compile(r"application/(json|[a-z0-9!#$&^_.+-]+\+json)", re.IGNORECASE)
_CHARSET = re.compile(r"""charset\s*=\s*(utf-8|"utf-8")""", re.IGNORECASE)

Place = tuple[str | int, ...]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Body:
    """A JSON object that passed.

    Attributes:
        text: as it was sent; `{}` if nothing was.
        value: as Python has it.
    """

    text: str
    value: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Refused:
    """Stands in the parsed body where something is no JSON, so that its field can be named."""

    reason: str


async def read(request: Request) -> Body:
    """The body of a request; an empty one counts as `{}`.

    Raises:
        PayloadTooLarge: if it is, or says it is, over `SIZE_LIMIT_BYTES`.
        UnsupportedMediaType: if it is not declared as JSON in UTF-8.
        MalformedBody: if it is no JSON (RFC 8259), is ambiguous, too deep or too long.
        ValidationFailed: if it is no object, or holds text that can't be stored.
    """
    raw = await _received(request)
    if not raw:
        return Body("{}", {})
    text = _decoded(raw)
    value = _parsed(text)
    _check(value)
    if not isinstance(value, dict):
        raise errors.ValidationFailed([FieldError("", "The body must be a JSON object")])
    return Body(text, value)


async def wanted(request: Request, model: type[M]) -> M:
    """The body of a request as one of the `schemas`.

    Raises:
        ValidationFailed: naming each field at fault; and whatever `read` raises.
    """
    posted = await read(request)
    try:
        return model.model_validate_json(posted.text)
    except ValidationError as invalid:
        findings = invalid.errors(include_url=False, include_context=False, include_input=False)
        raise errors.ValidationFailed(field_errors(findings, posted.value)) from None


def declared(model: type[BaseModel], *, required: bool) -> dict[str, Any]:
    """What a route declares of the body that it reads with `wanted`, for FastAPI's `openapi_extra`."""
    schema = model.model_json_schema()
    whole = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": whole}}}}


def _inlined(schema: Any, definitions: Mapping[str, Any]) -> Any:
    """The schema with what it refers to in its place: in the middle of a document, its references lead nowhere."""
    if isinstance(schema, list):
        return [_inlined(one, definitions) for one in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in definitions:
        return _inlined(definitions[name] | {key: one for key, one in schema.items() if key != "$ref"}, definitions)
    return {key: _inlined(one, definitions) for key, one in schema.items()}


async def _received(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > len(str(SIZE_LIMIT_BYTES)) or int(declared) > SIZE_LIMIT_BYTES):
        raise _too_large()
    raw = bytearray()
    try:
        async for chunk in request.stream():
            if chunk and not raw:
                _check_type(request)
            raw += chunk
            if len(raw) > SIZE_LIMIT_BYTES:
                raise _too_large()
    except ClientDisconnect:
        # Nobody reads the answer; it only has to be no error of ours.
        raise errors.MalformedBody("The connection was closed before the body ended") from None
    return bytes(raw)


def _too_large() -> errors.PayloadTooLarge:
    return errors.PayloadTooLarge(f"The body must not be larger than {SIZE_LIMIT_BYTES} bytes")


def _check_type(request: Request) -> None:
    kind, *parameters = request.headers.get("content-type", "").split(";")
    if not _JSON_TYPE.fullmatch(kind.strip()):
        raise errors.UnsupportedMediaType("A body must be sent with Content-Type: application/json")
    charsets = [text.strip() for text in parameters if text.strip().lower().startswith("charset")]
    if not all(_CHARSET.fullmatch(text) for text in charsets):
        raise errors.UnsupportedMediaType("A body must be in UTF-8")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise errors.UnsupportedMediaType("A body must not be compressed")


def _decoded(raw: bytes) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise errors.MalformedBody("The body is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise errors.MalformedBody("The body must not begin with a byte order mark")
    return text


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant)
    except json.JSONDecodeError as bad:
        where = f"line {bad.lineno}, column {bad.colno}"
        raise errors.MalformedBody(f"The body is not JSON: {bad.msg} ({where})") from None
    except RecursionError:
        raise _too_deep() from None


def _too_deep() -> errors.MalformedBody:
    return errors.MalformedBody(f"The body must not be nested deeper than {DEPTH_LIMIT} levels")


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


def _check(body: Any) -> None:
    """Look at every value, without recursion."""
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
            if items > ITEMS_LIMIT:
                raise errors.MalformedBody(f"The body must not have more than {ITEMS_LIMIT} members and elements")
            if len(place) >= DEPTH_LIMIT:
                raise _too_deep()
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
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        sentence = f"{what} must not hold half a surrogate pair"
        raise errors.ValidationFailed([FieldError(errors.pointer(*place), sentence)])


def _presentable(name: str) -> str:
    return name.replace("\x00", "?").encode("utf-8", "replace").decode("utf-8")

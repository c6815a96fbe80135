"""What pydantic found wrong, as the field errors of a problem: pointers into the request, and no values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from app.core.errors import FieldError, pointer

FIELD_ERRORS_LIMIT = 20
"""Fields at fault that one answer names."""

# These sentences of pydantic's repeat a piece of the value, or speak of Python. What a validator of a
# task's author says with ValueError may repeat it too; one who wants to be heard raises
# `PydanticCustomError`, whose sentence is passed on.
_OWN_WORDS: Mapping[str, str] = {
    "extra_forbidden": "Unknown field",
    "missing": "Required",
    "value_error": "Not a valid value",
    "assertion_error": "Not a valid value",
    "uuid_parsing": "Input should be a valid UUID",
    "uuid_version": "Input should be a valid UUID",
    "union_tag_invalid": "Input should name one of the known kinds",
    "timezone_offset": "Input should have the required time zone",
    "json_invalid": "Not valid JSON",
    "bytes_invalid_encoding": "Input should be encoded text",
}

Part = str | int
Place = tuple[Part, ...]


def field_errors(
    findings: Iterable[Mapping[str, Any]], document: object, *, root: Callable[[str], Place] | None = None
) -> list[FieldError]:
    """Findings of a `ValidationError.errors()`, one per field, in their order, `FIELD_ERRORS_LIMIT` at most.

    Args:
        findings: each with `type`, `loc` and `msg`.
        document: what was validated. Pydantic's locations name union members and the like as well; only
            the parts that lead somewhere in the document become parts of the pointer.
        root: where a top-level member of the document stands in the request; unless given, at its top.
    """
    sentences: dict[str, list[str]] = {}
    for finding in findings:
        kind = str(finding["type"])
        place = _place(finding["loc"], document, missing=kind == "missing")
        if root is not None and place:
            place = root(str(place[0])) + place[1:]
        said = sentences.setdefault(pointer(*place), [])
        sentence = _OWN_WORDS.get(kind, str(finding["msg"]))
        if sentence not in said:
            said.append(sentence)
    faults = [FieldError(where, ", or: ".join(said)) for where, said in sentences.items()]
    return faults[:FIELD_ERRORS_LIMIT]


def _place(location: Sequence[Part], document: object, *, missing: bool) -> Place:
    place: list[Part] = []
    here = document
    for index, part in enumerate(location):
        if _leads(here, part):
            here = here[part]  # type: ignore[index]  # `_leads` looked
        elif not (missing and index == len(location) - 1):
            continue
        place.append(part)
    return tuple(place)


def _leads(here: object, part: Part) -> bool:
    if isinstance(here, list):
        return isinstance(part, int) and 0 <= part < len(here)
    return isinstance(here, dict) and part in here

"""The catalogue over HTTP: what may be submitted, and each task as a route of its own.

There the body is nothing but the arguments. What else a submit may say stands in
the query, typed as in the body of a plain submit; only the webhook's URL is a
header, because access logs keep queries, and such a URL often holds a token.
"""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import ValidationError

from app import catalog, schemas
from app.core import errors, metrics
from app.core.errors import FieldError
from app.core.fields import field_errors
from app.routers import admission, body, door, openapi, problems
from app.routers.state import Resources
from app.routers.tasks import created

PATH = "/api/catalog"
ANY = f"{PATH}/{{name}}"
WEBHOOK_HEADER = "Webhook-URL"

_NOT_OPTIONS = {"task", "args", "kwargs", "webhook_url"}
_SUBMIT = schemas.SubmitRequest.model_json_schema(ref_template="#/components/schemas/{model}")
_OPTIONS: Mapping[str, Any] = {
    name: schema for name, schema in _SUBMIT["properties"].items() if name not in _NOT_OPTIONS
}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,20})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?", flags=re.ASCII)

router = APIRouter(prefix=PATH, tags=["catalog"])

TaskName = Annotated[str, Path(min_length=1, max_length=255, description="Name of a registered task.")]


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The JSON types that an option may have."""
    return {str(one["type"]) for one in (schema, *schema.get("anyOf", ())) if "type" in one}


def _given(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an option as a parameter: one that is not given is not there, rather than null."""
    members = [one for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    shown = {name: value for name, value in schema.items() if name not in {"anyOf", "default", "title", "description"}}
    return shown | (members[0] if len(members) == 1 else {"anyOf": members} if members else {})


_PARAMETERS: list[dict[str, Any]] = [
    dict(openapi.KEY_PARAMETER),
    {
        "name": WEBHOOK_HEADER,
        "in": "header",
        "required": False,
        "description": _SUBMIT["properties"]["webhook_url"]["description"],
        "schema": {"type": "string", "minLength": 1, "maxLength": 2048},
    },
    *(
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": _given(schema),
        }
        for name, schema in _OPTIONS.items()
    ),
]
_ANY_ARGUMENTS = {
    "requestBody": {
        "required": False,
        "description": "The arguments by name, as the `parameters` of the task say.",
        "content": {"application/json": {"schema": {"type": "object"}}},
    }
}


@router.get("", responses=problems.responses(503))
async def read_catalog(state: Resources, caller: door.Reader) -> schemas.CatalogPage:
    """Every task that may be submitted, with the JSON Schema of its arguments."""
    del caller
    queue = state["settings"].queues[0]
    return schemas.CatalogPage(data=[_shown(entry, queue) for entry in catalog.entries()], next_cursor=None)


@router.get("/{name}", responses=problems.responses(404, 422, 503))
async def read_catalog_entry(name: TaskName, state: Resources, caller: door.Reader) -> schemas.CatalogEntry:
    """A task that may be submitted."""
    del caller
    return _shown(_entry(name), state["settings"].queues[0])


@router.post(
    "/{name}",
    status_code=202,
    response_model=schemas.TaskCreated,
    responses=openapi.ACCEPTED | problems.responses(400, 404, 413, 415, 422, 503),
    openapi_extra={"parameters": _PARAMETERS, **_ANY_ARGUMENTS},
)
async def submit_by_name(name: TaskName, request: Request, state: Resources, caller: door.Writer) -> Response:
    """Submit a task with the arguments as the body. What a submit may say besides stands in the query."""
    entry = _entry(name)
    with metrics.counting_rejections():
        posted = await body.read(request)
        options = _options(request)
        key = admission.key_of(request, caller, posted.value, options)
        wanted = _wanted(entry, posted.value, options)
        accepted = await admission.accept(request, state, caller, [wanted], key=key, place=_in_arguments)
    return created(accepted)


def _entry(name: str) -> catalog.Entry:
    entry = catalog.find(name)
    if entry is None:
        raise errors.TaskNotRegistered
    return entry


def _shown(entry: catalog.Entry, default_queue: str) -> schemas.CatalogEntry:
    return schemas.CatalogEntry(
        name=entry.name,
        description=entry.description,
        parameters=entry.parameters_schema(),
        queue=entry.queue or default_queue,
        max_retries=entry.max_retries,
        retry=schemas.RetryRead(
            exceptions=list(entry.retry.exceptions),
            backoff_seconds=entry.retry.backoff_seconds,
            backoff_most_seconds=entry.retry.backoff_most_seconds,
            jitter=entry.retry.jitter,
        ),
        time_limit=entry.time_limit,
        soft_time_limit=entry.soft_time_limit,
    )


def _options(request: Request) -> dict[str, Any]:
    """What the query and the headers say, as a plain submit would have it in JSON. Raises ValidationFailed."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(request.query_params.keys()):
        if name not in _OPTIONS:
            raise errors.ValidationFailed([FieldError(errors.pointer(name), "Unknown field")])
        texts = request.query_params.getlist(name)
        kinds = _kinds(_OPTIONS[name])
        if "array" in kinds:
            found[name] = texts
        elif len(texts) > 1:
            raise errors.ValidationFailed([FieldError(errors.pointer(name), "Given twice")])
        else:
            numeric = kinds & {"number", "integer"} and _NUMBER.fullmatch(texts[0])
            found[name] = json.loads(texts[0]) if numeric else texts[0]
    urls = request.headers.getlist(WEBHOOK_HEADER)
    if len(urls) > 1:
        raise errors.MalformedHeader(WEBHOOK_HEADER, "Given twice")
    found |= {"webhook_url": urls[0]} if urls else {}
    body.check(found)
    return found


def _wanted(entry: catalog.Entry, arguments: dict[str, Any], options: dict[str, Any]) -> schemas.SubmitRequest:
    document = {"task": entry.name, "kwargs": arguments, **options}
    try:
        return schemas.SubmitRequest.model_validate_json(json.dumps(document))
    except ValidationError as invalid:
        findings = invalid.errors(include_url=False, include_context=False, include_input=False)
        raise errors.ValidationFailed(
            [FieldError(_in_arguments(0, fault.pointer), fault.detail) for fault in field_errors(findings, document)]
        ) from None


def _in_arguments(_: int, pointer: str) -> str:
    """The body is the arguments; whatever else is wrong was said outside of it."""
    if pointer == "/webhook_url":
        return errors.pointer(WEBHOOK_HEADER)
    return pointer.removeprefix("/kwargs")

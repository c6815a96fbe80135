"""How every error leaves the API: problem details (RFC 9457) that stay a superset of `{"detail": …}`.

A problem names fields, never values. Whatever is not meant for the caller is a
plain 500 here and a traceback in the log.
"""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.core import errors
from app.core.fields import field_errors
from app.routers import methods
from app.schemas import Problem

MEDIA_TYPE = "application/problem+json"

_DETAILS = {
    400: "The body is not JSON that this service reads.",
    401: "No API key was shown, or it is unknown, expired or revoked.",
    403: "The API key has not the scope that this needs.",
    404: "Nothing has this id or name, or it has not what is asked for.",
    409: "As things are, it can't be done; `detail` says why.",
    410: "The task ended so long ago that it was removed.",
    413: "The body is too large.",
    415: "The body is not declared as JSON in UTF-8.",
    422: "Fields are missing, unknown or wrong.",
    429: "Too much at once, or the budget of the API key is spent; try again after Retry-After seconds.",
    503: "Postgres can't be reached, or too much is waiting; try again after Retry-After seconds.",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "RFC 6750, section 3.", "schema": {"type": "string"}}}
_HEADERS = {401: _CHALLENGE, 403: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares of its problems."""
    return {
        status: {"model": Problem, "description": _DETAILS[status]}
        | ({"headers": _HEADERS[status]} if status in _HEADERS else {})
        for status in statuses
    }


def declared(*statuses: int) -> dict[str, dict[str, Any]]:
    """As `responses`, as it stands in the finished OpenAPI."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        str(status): {"description": _DETAILS[status], "content": content, "headers": dict(_HEADERS[status])}
        for status in statuses
    }


def install(api: FastAPI) -> None:
    """Render every error of `api` as a problem, and declare it so in its OpenAPI."""
    handlers: Mapping[Any, Any] = {
        errors.RequestError: _request_error,
        errors.DatabaseUnavailable: _unavailable,
        RequestValidationError: _invalid_request,
        HTTPException: _http_error,
        Exception: _unexpected,
    }
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)
    generated = api.openapi

    def openapi() -> dict[str, Any]:
        # FastAPI keeps what it made, so this changes it once and then finds it changed.
        schema = generated()
        for operations in schema["paths"].values():
            for operation in operations.values():
                _declare(operation["responses"])
        return schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _declare(answers: dict[str, Any]) -> None:
    # FastAPI declares models under the route's own media type.
    for answer in answers.values():
        content = answer.get("content", {})
        model = content.get("application/json", {}).get("schema", {}).get("$ref", "")
        if model.endswith("/Problem"):
            content[MEDIA_TYPE] = content.pop("application/json")


def render(
    *,
    status: int,
    slug: str,
    title: str,
    detail: str,
    faults: Sequence[errors.FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A problem as a response. `slug` makes its stable `type`, which is no address to call."""
    problem: dict[str, Any] = {"type": f"/problems/{slug}", "title": title, "status": status, "detail": detail}
    if faults:
        problem["errors"] = [{"pointer": fault.pointer, "detail": fault.detail} for fault in faults]
    # Escaped, so that no text whatever makes the answer itself fail.
    return Response(json.dumps(problem), status, headers, MEDIA_TYPE)


async def _request_error(_: Request, problem: errors.RequestError) -> Response:
    headers = problem.headers
    if problem.retry_after_seconds is not None:
        headers = {**headers, "Retry-After": str(problem.retry_after_seconds)}
    return render(
        status=problem.status,
        slug=problem.slug,
        title=problem.title,
        detail=problem.detail,
        faults=problem.errors,
        headers=headers,
    )


async def _unavailable(request: Request, _: errors.DatabaseUnavailable) -> Response:
    sentence = "The database can't be reached; try again"
    return await _request_error(request, errors.ServiceUnavailable(sentence, retry_after_seconds=1))


async def _invalid_request(request: Request, invalid: RequestValidationError) -> Response:
    # Locations begin with where the value was, which is the whole document here: {"path": {"id": …}}.
    document = {
        "path": request.path_params,
        "query": dict(request.query_params),
        "header": dict(request.headers),
    }
    faults = field_errors(invalid.errors(), document)
    faults = [errors.FieldError(_within(fault.pointer), fault.detail) for fault in faults]
    return await _request_error(request, errors.ValidationFailed(faults))


def _within(pointer: str) -> str:
    return "/" + pointer.removeprefix("/").partition("/")[2]


async def _http_error(request: Request, error: HTTPException) -> Response:
    title = HTTPStatus(error.status_code).phrase
    slug = title.lower().replace(" ", "-")
    details = {404: "There is nothing at this path", 405: "This path does not answer this method"}
    detail = details.get(error.status_code, title)
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"Allow": ", ".join(sorted(methods.allowed(request.app, request.url.path)))}
    return render(status=error.status_code, slug=slug, title=title, detail=detail, headers=headers)


async def _unexpected(_: Request, __: Exception) -> Response:
    # Starlette raises it again behind this answer, and the server logs it with its traceback.
    return render(
        status=500, slug="internal-error", title="Internal error", detail="Something went wrong here; it is logged"
    )

"""What `/openapi.json` says beyond what FastAPI finds out by itself.

Bodies are read by `body`, not by FastAPI, so their schemas are declared here.
Every registered task is a path of its own, with the schema of its arguments, so
that generated clients are typed; one route answers all of them.
"""

import copy
import itertools
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from app import catalog, schemas
from app.routers import admission

_COMPONENTS = "#/components/schemas/"
_TRUE = {"type": "string", "const": "true"}

KEY_PARAMETER: Mapping[str, Any] = {
    "name": admission.KEY_HEADER,
    "in": "header",
    "required": False,
    "description": "1 to 255 visible ASCII characters. The same key with the same request is answered with the ids of "
    "the first time for 24 hours, however often it comes; with another request it is a 422.",
    "schema": {"type": "string", "pattern": admission.KEY_PATTERN},
    "example": "order-4711",
}
"""The header of a request that may come again."""

REPLAYED: Mapping[str, Any] = {
    admission.REPLAYED_HEADER: {
        "description": f"There if an earlier request under the same {admission.KEY_HEADER} was answered so.",
        "schema": _TRUE,
    },
}
SUBMIT_HEADERS: Mapping[str, Any] = {
    **REPLAYED,
    admission.DEDUPLICATED_HEADER: {
        "description": "There if `unique_for` found an unfinished task that will do.",
        "schema": _TRUE,
    },
    admission.TRACE_HEADER: {
        "description": "The trace of what was made, as W3C Trace Context has it: tell it to whoever runs this service. "
        "Not there if something was made before.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    },
}
LOCATION: Mapping[str, Any] = {
    "Location": {"description": "Where the task can be read.", "schema": {"type": "string", "format": "uri-reference"}}
}
_LINKS: Mapping[str, Any] = {
    operation: {"operationId": operation, "parameters": {"id": "$response.body#/task_id"}}
    for operation in ("read_status", "read_result", "read_task", "cancel")
}
ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "description": "Stored: the task will run.",
        "headers": {**LOCATION, **SUBMIT_HEADERS},
        "links": dict(_LINKS),
    }
}
"""What a route declares that submits one task."""


def operation_id(route: APIRoute) -> str:
    """The name of an operation: that of its function, which no two routes share."""
    return route.name


def install(api: FastAPI, any_task: str) -> None:
    """Complete the OpenAPI of `api`.

    Args:
        api: all its routes are included, and its errors declared.
        any_task: the path that submits any task by its `{name}`.
    """
    generated = api.openapi
    complete: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not complete:
            complete.update(copy.deepcopy(generated()))
            components = complete["components"]["schemas"]
            described = complete["paths"][any_task]
            taken = {operation["operationId"] for operation in _operations(complete)}
            for entry in catalog.entries():
                path = any_task.replace("{name}", entry.name)
                complete["paths"][path] = {
                    "get": _of_task(entry, described["get"], "read", taken),
                    "post": _submit_of_task(entry, described["post"], components, taken),
                }
            for operation in _operations(complete):
                _hoist(operation, components)
            _show_examples(components)
        return complete

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


def _operations(schema: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    for path in schema["paths"].values():
        yield from path.values()


def _show_examples(components: dict[str, Any]) -> None:
    """Put the examples back as they were written: FastAPI leaves out whatever is null."""
    for name, model in vars(schemas).items():
        extra = getattr(model, "model_config", {}).get("json_schema_extra")
        if name in components and extra is not None:
            components[name] |= copy.deepcopy(extra)


def _of_task(entry: catalog.Entry, described: Mapping[str, Any], verb: str, taken: set[str]) -> dict[str, Any]:
    """An operation that answers for any task, as it is for this one."""
    operation = copy.deepcopy(dict(described))
    operation["parameters"] = [one for one in operation["parameters"] if one["in"] != "path"]
    operation["operationId"] = _free(f"{verb}_" + re.sub(r"\W|-", "_", entry.name), taken)
    taken.add(operation["operationId"])
    return operation


def _submit_of_task(
    entry: catalog.Entry, described: Mapping[str, Any], components: dict[str, Any], taken: set[str]
) -> dict[str, Any]:
    """A task as a path of its own: the operation that answers all of them, and what its arguments are."""
    arguments = entry.parameters_schema()
    prefix = _free("task." + entry.name.replace(":", "_"), components)
    # Models of two tasks may have one name.
    for name, definition in arguments.pop("$defs", {}).items():
        components[f"{prefix}.{name}"] = _renamed(definition, prefix)
    components[prefix] = _renamed(arguments, prefix)
    operation = _of_task(entry, described, "submit", taken)
    operation["summary"] = entry.name
    operation["description"] = entry.description
    needed = bool(arguments.get("required"))
    operation["requestBody"] = {
        "required": needed,
        "content": {"application/json": {"schema": {"$ref": _COMPONENTS + prefix}}},
    }
    return operation


def _free(name: str, taken: Container[str]) -> str:
    """The name, or one like it that nobody has: what tells two tasks apart may not be allowed here."""
    others = (f"{name}_{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([name], others) if one not in taken)


def _renamed(value: Any, prefix: str) -> Any:
    if isinstance(value, list):
        return [_renamed(one, prefix) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        name: one.replace("#/$defs/", f"{_COMPONENTS}{prefix}.")
        if name == "$ref" and isinstance(one, str)
        else _renamed(one, prefix)
        for name, one in value.items()
    }


def _hoist(operation: dict[str, Any], components: dict[str, Any]) -> None:
    """Give a body's schema, and those that it needs, the place where clients look for names."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    if "title" in schema and "$ref" not in schema:
        components.update(schema.pop("$defs", {}))
        components[schema["title"]] = schema
        content["schema"] = {"$ref": _COMPONENTS + schema["title"]}

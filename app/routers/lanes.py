"""The routes that are asked for thousands of times a second, answered without looking for what they need.

FastAPI finds out for each request which route it is for and what each parameter
of that route's function is; for a submit and a look at a status that takes longer
than all that they do. A lane stands before the routes, knows one of them, and calls
the very function of that route, with the arguments that FastAPI would have found.
Whatever is not in the plainest form (an id in capitals, a parameter in the query)
matches no lane and goes the usual way, which also stands in the OpenAPI.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send

from app.routers import door, state, tasks

_HEADER_LIMIT = 2000
_ID = "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"

Answer = Callable[[Request, Sequence[str]], Awaitable[Response]]
"""What a lane does: the request, and what the groups of its pattern matched."""


def install(api: FastAPI) -> None:
    """Put the lanes before all routes of `api`, whose routers are included."""
    api.router.routes[:0] = [
        Lane(_route(tasks.submit), re.escape(f"{tasks.PATH}/submit"), _submit),
        Lane(_route(tasks.read_status), f"{re.escape(tasks.PATH)}/{_ID}/status", _status),
    ]


def _route(function: Callable[..., Any]) -> APIRoute:
    [route] = [one for one in tasks.router.routes if isinstance(one, APIRoute) and one.endpoint is function]
    return route


async def _submit(request: Request, _: Sequence[str]) -> Response:
    caller = await door.WRITES(request)
    return await tasks.submit(request, await state.of(request), caller)


async def _status(request: Request, groups: Sequence[str]) -> Response:
    caller = await door.READS(request)
    return await tasks.read_status(
        UUID(groups[0]), await state.of(request), caller, request.headers.get("if-none-match")
    )


class Lane(BaseRoute):
    """A short way to one route.

    Args:
        route: where it leads.
        pattern: of the paths, whole.
        answer: what stands there.
    """

    def __init__(self, route: APIRoute, pattern: str, answer: Answer) -> None:
        [self._method] = route.methods or {""}
        self._matches = re.compile(pattern).fullmatch
        self._answer = answer
        self._found = {"route": route, "endpoint": route.endpoint}
        self.path = route.path
        """As other routes have it: what traces and metrics call it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this request may take the lane."""
        if scope["type"] != "http" or scope["method"] != self._method or scope["query_string"]:
            return Match.NONE, {}
        found = self._matches(scope["path"])
        if found is None or scope.get("root_path") or any(len(value) > _HEADER_LIMIT for _, value in scope["headers"]):
            return Match.NONE, {}
        return Match.FULL, {**self._found, "path_params": {}, "lane": found.groups()}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer it."""
        response = await self._answer(Request(scope, receive, send), scope["lane"])
        await response(scope, receive, send)

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """It has no name: who looks for one finds the route that it leads to."""
        raise NoMatchFound(name, path_params)

"""The routes that are asked for thousands of times a second, answered without looking for what they need.

FastAPI finds out for each request which route it is for and what each parameter
of that route's function is; for a submit and a look at a status or a result that takes longer
than all that they do. A lane stands before the routes, knows one of them, and calls
the very function of that route, with the arguments that FastAPI would have found.
Whatever is not in the plainest form (an id in capitals, a parameter in the query)
matches no lane and goes the usual way, which also stands in the OpenAPI.

A lane is looked for ahead of what FastAPI wraps around its routes, and an error in
one is raised again where the lane stands among the routes, so that it is answered as
any other.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import ASGIApp, Receive, Scope, Send

from app.routers import door, state, tasks

_CONDITION_LIMIT = 2000
_FAILED = "taskqueue.failed"
"""Where a request keeps why it could not be answered ahead of the routes."""
_ID = "([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})"

Answer = Callable[[Request, Sequence[str]], Awaitable[Response]]
"""What a lane does: the request, and what the groups of its pattern matched."""


def install(api: FastAPI) -> None:
    """Put the lanes before all routes of `api`, whose routers are included."""
    lanes = [
        Lane(_route(tasks.submit), re.escape(f"{tasks.PATH}/submit"), _submit),
        Lane(_route(tasks.read_status), f"{re.escape(tasks.PATH)}/{_ID}/status", _status),
        Lane(_route(tasks.read_result), f"{re.escape(tasks.PATH)}/{_ID}/result", _result, without=b"prefer"),
    ]
    api.router.routes[:0] = lanes
    api.add_middleware(_Ahead, lanes=lanes)


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


async def _result(request: Request, groups: Sequence[str]) -> Response:
    caller = await door.READS(request)
    return await tasks.read_result(UUID(groups[0]), request, await state.of(request), caller)


class Lane(BaseRoute):
    """A short way to one route.

    Args:
        route: where it leads.
        pattern: of the paths, whole.
        answer: what stands there.
        without: a header, in lower case, whose requests go the usual way.
    """

    def __init__(self, route: APIRoute, pattern: str, answer: Answer, *, without: bytes = b"") -> None:
        [self._method] = route.methods or {""}
        self._matches = re.compile(pattern).fullmatch
        self._answer = answer
        self._without = without
        self._found = {"route": route, "endpoint": route.endpoint}
        self.path = route.path
        """As other routes have it: what traces and metrics call it."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Whether this request may take the lane."""
        if scope["type"] != "http" or scope["method"] != self._method or scope["query_string"]:
            return Match.NONE, {}
        found = self._matches(scope["path"])
        if found is None or scope.get("root_path") or _asks_for_more(scope, self._without):
            return Match.NONE, {}
        return Match.FULL, {**self._found, "path_params": {}, "lane": found.groups()}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer it."""
        if _FAILED in scope:
            raise scope.pop(_FAILED)
        response = await self.answer(scope, receive, send)
        await response(scope, receive, send)

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> Response:
        """The answer to it. Raises what its route does."""
        return await self._answer(Request(scope, receive, send), scope["lane"])

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        """It has no name: who looks for one finds the route that it leads to."""
        raise NoMatchFound(name, path_params)


def _asks_for_more(scope: Scope, unwanted: bytes) -> bool:
    """Whether there is a header that only the usual way knows, or a condition that only it refuses."""
    for name, value in scope["headers"]:  # `any` takes three times as long
        if name == unwanted or (name == b"if-none-match" and len(value) > _CONDITION_LIMIT):
            return True
    return False


class _Ahead:
    """Answers what may take a lane, ahead of all that is wrapped around the routes."""

    def __init__(self, app: ASGIApp, lanes: Sequence[Lane]) -> None:
        self._app = app
        self._lanes = lanes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for lane in self._lanes:
            match, found = lane.matches(scope)
            if match is Match.FULL:
                break
        else:
            await self._app(scope, receive, send)
            return
        scope.update(found)
        try:
            response = await lane.answer(scope, receive, send)
        except Exception as failed:  # noqa: BLE001  # it is raised again
            scope[_FAILED] = failed
            await self._app(scope, receive, send)
        else:
            await response(scope, receive, send)

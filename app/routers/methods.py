"""What a path answers, and that it answers nothing else.

A path without parameters is a resource of its own: `GET /api/tasks/submit` is
not the task with the id `submit`. And what is allowed is all that is, whichever
route would have answered it (RFC 9110, section 10.2.1).
"""

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import Receive, Scope, Send


def install(api: FastAPI) -> None:
    """Refuse with `405` what a path does not answer. All routes of `api` are included."""
    api.router.routes.insert(0, _Undeclared(_declared(api)))


def allowed(api: FastAPI, path: str) -> set[str]:
    """The methods that this path answers."""
    declared = _declared(api)
    own = [route for route in declared if route.path == path]
    return _methods(own or [route for route in declared if route.path_regex.match(path)])


def _methods(routes: Iterable[APIRoute]) -> set[str]:
    return {method for route in routes for method in route.methods or ()}


def _declared(api: FastAPI) -> list[APIRoute]:
    # An included router stays one route of the application, which has the router's own.
    routers = (getattr(route, "original_router", None) for route in api.router.routes)
    return [route for router in routers if router is not None for route in router.routes if isinstance(route, APIRoute)]


class _Undeclared(BaseRoute):
    """Every path without parameters, asked with a method that it does not have."""

    def __init__(self, routes: Iterable[APIRoute]) -> None:
        self._methods: dict[str, set[str]] = {}
        for route in routes:
            if not route.param_convertors:
                self._methods.setdefault(route.path, set()).update(_methods([route]))

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        methods = self._methods.get(scope.get("path", "")) if scope["type"] == "http" else None
        return (Match.NONE, {}) if methods is None or scope["method"] in methods else (Match.FULL, {})

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        raise HTTPException(405)

    def url_path_for(self, name: str, /, **path_params: Any) -> Any:
        raise NoMatchFound(name, path_params)

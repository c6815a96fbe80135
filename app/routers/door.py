"""Who calls, what they may do, and how often.

Every route names the scope that it needs, as a parameter: `caller: door.Reader`.
With `TASKQUEUE_AUTH_MODE=none` nobody has to say who they are: everybody is the
same caller, whose tasks have an empty owner, and may do everything. With
`api-key` a request shows a key (`Authorization: Bearer tq_live_…`), and its
caller is whoever holds it. A key that is unknown, revoked or expired gets one
and the same `401`. Who stays, to follow a task or to wait for it, is asked again
while they do: a stream ends with its key.

Whoever tries keys gets a `429` after some, by their address, but nobody is
locked out by it: a true key is let in all the same.
"""

import ipaddress
import math
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, cast

from fastapi import FastAPI, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as Connection

from app import allowances
from app.core import errors, metrics
from app.core.config import Settings
from app.core.scopes import Scope
from app.db import Database
from app.keys import Holder, Keyring, Masters
from app.routers import problems

FAILURES_A_MINUTE = 60
"""Wrong keys that one address may show; so many at once, and one a second after that."""
ADDRESSES = 10_000
"""Addresses whose failures are remembered."""
ASK_SECONDS = 1.5
"""How often who stays is asked whether their key still holds. What is known of it may be `keys.FRESH_SECONDS` old, and
is then looked up beside the question: the next one, which has the answer, comes within `keys.STALE_SECONDS` of all."""

BUDGETS = {
    Scope.TASKS_WRITE: "submit",
    Scope.TASKS_READ: "poll",
    Scope.WEBHOOKS: "webhooks",
    Scope.ADMIN: "submit",
}
"""Of which of a key's budgets a route spends, by the scope that it needs."""


def _nothing(_: int) -> None:
    return


async def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        owner: whose tasks they are, those submitted and those seen: nobody else's exist for this caller.
        scopes: what they may do.
        spend: takes so many more units of the budget that the route spends of, for a request that is worth
            many; raises QuotaExceeded.
        holds: asks again whether they may be here, as for a request, but spends nothing; raises DatabaseUnavailable
            if nobody knows now.
        ask_seconds: how often who stays is to be asked; infinite where nobody has to say who they are.
    """

    owner: str
    scopes: frozenset[Scope] = frozenset(Scope)
    spend: Callable[[int], None] = field(default=_nothing, repr=False, compare=False)
    holds: Callable[[], Awaitable[bool]] = field(default=_always, repr=False, compare=False)
    ask_seconds: float = field(default=math.inf, compare=False)

    def may(self, scope: Scope) -> bool:
        """Whether they have this scope. `admin` has them all, for their own tasks."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


_ANYBODY = Caller(owner="")


class Needs(SecurityBase):
    """The dependency of a route that needs a scope, which stands in its OpenAPI."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self._budget = BUDGETS[scope]
        self.scheme_name = "ApiKey"
        self.model = HTTPBearer(
            bearerFormat="tq_live_…",
            description="A key that `taskqueue keys create` made. `admin` has all scopes, for its own tasks.",
        )

    async def __call__(self, request: Request) -> Caller:
        """Who calls. Raises as `Door.admit`."""
        door = cast("Door | None", request.scope["state"]["door"])
        return _ANYBODY if door is None else await door.admit(request, self.scope, self._budget)


READS = Needs(Scope.TASKS_READ)
WRITES = Needs(Scope.TASKS_WRITE)

Reader = Annotated[Caller, Security(READS, scopes=[Scope.TASKS_READ.value])]
"""The parameter of a route that reads tasks."""
Writer = Annotated[Caller, Security(WRITES, scopes=[Scope.TASKS_WRITE.value])]
"""The parameter of a route that submits tasks, or changes them."""
WebhookKeeper = Annotated[Caller, Security(Needs(Scope.WEBHOOKS), scopes=[Scope.WEBHOOKS.value])]
"""The parameter of a route that acts on webhooks, or is about their secrets."""
Admin = Annotated[Caller, Security(Needs(Scope.ADMIN), scopes=[Scope.ADMIN.value])]
"""The parameter of a route that concerns everybody, such as one that pauses a queue."""


class Door:
    """Lets in who shows a key that has the scope, as often as they may."""

    def __init__(self, keyring: Keyring, settings: Settings) -> None:
        self._keyring = keyring
        self._allowed = {
            "submit": settings.rate_limit_submit,
            "poll": settings.rate_limit_poll,
            "webhooks": settings.rate_limit_webhooks,
        }
        self._spent = allowances.Allowances()
        self._failures = allowances.Allowances(remembered=ADDRESSES)

    @classmethod
    def of(cls, settings: Settings, database: Database) -> "Door | None":
        """The door that these settings want: none, or one that asks for keys."""
        if settings.auth_mode == "none":
            return None
        return cls(Keyring(database, Masters.of(settings.secret_keys)), settings)

    async def run(self) -> None:
        """Write down which keys were used, until cancelled."""
        await self._keyring.run()

    async def admit(self, request: Request, scope: Scope, budget: str) -> Caller:
        """The caller of this request.

        Args:
            request: with the key.
            scope: what they must be allowed to do.
            budget: of which it is taken, one of `BUDGETS`.

        Raises:
            Unauthenticated: if no key is shown, or one that opens nothing.
            Forbidden: if it has not the scope.
            QuotaExceeded: if it was shown too often, or too many wrong ones were, from the same address.
            DatabaseUnavailable: if nobody knows now who holds it.
        """
        if scope is not Scope.TASKS_WRITE:
            return await self._admit(request, scope, budget)
        with metrics.counting_rejections():
            return await self._admit(request, scope, budget)

    async def _admit(self, request: Request, scope: Scope, budget: str) -> Caller:
        holder = await self._holder(request)
        if not _has(holder, scope):
            metrics.turned_away("scope")
            raise errors.Forbidden(scope)
        holds = partial(self._holds, request.headers["authorization"], scope)
        allowed = self._allowed[budget]
        if not allowed:
            return Caller(holder.owner, holder.scopes, holds=holds, ask_seconds=ASK_SECONDS)
        self._spend(request, holder.key_id, budget, allowed, 1)
        more = partial(self._spend_more, request, holder.key_id, budget, allowed)
        return Caller(holder.owner, holder.scopes, more, holds, ASK_SECONDS)

    async def _holds(self, shown: str, scope: Scope) -> bool:
        holder = await self._found(shown)
        return holder is not None and _has(holder, scope)

    def _spend_more(self, request: Request, key_id: str, budget: str, allowed: int, units: int) -> None:
        # The request has taken one already, and does so again when it comes back: what it asks for must fit beside
        # that, and be there beside that when it is told to come back.
        self._spend(request, key_id, budget, allowed, min(units, allowed - 1), beside=1)

    def _spend(self, request: Request, key_id: str, budget: str, allowed: int, units: int, *, beside: int = 0) -> None:
        answer = self._spent.take((key_id, budget), allowed, units)
        request.scope["state"]["quota"] = (budget, allowed, answer)
        if not answer.granted:
            metrics.turned_away("quota")
            raise errors.QuotaExceeded(
                f"The budget of this key for {budget} requests is spent; try again later",
                retry_after_seconds=math.ceil(answer.wait_seconds + beside * allowances.WINDOW_SECONDS / allowed),
            )

    async def _holder(self, request: Request) -> Holder:
        shown = request.headers.get("authorization")
        if shown is None:
            metrics.turned_away("credentials")
            raise errors.Unauthenticated(shown=False)
        holder = await self._found(shown)
        if holder is None:
            metrics.turned_away("credentials")
            answer = self._failures.take(_address(request), FAILURES_A_MINUTE)
            if not answer.granted:
                raise errors.QuotaExceeded(
                    "Too many wrong API keys came from this address; try again later",
                    retry_after_seconds=max(1, math.ceil(answer.wait_seconds)),
                )
            raise errors.Unauthenticated(shown=True)
        return holder

    async def _found(self, shown: str) -> Holder | None:
        """Who holds the key that an `Authorization` shows; None if it shows none."""
        scheme, _, text = shown.partition(" ")
        return await self._keyring.holder(text.strip(" ")) if scheme.lower() == "bearer" else None


def _has(holder: Holder, scope: Scope) -> bool:
    return scope in holder.scopes or Scope.ADMIN in holder.scopes


def _address(request: Request) -> str:
    """Where the request comes from: an IPv4 address, or the network of an IPv6 one, which has many to itself."""
    host = request.client.host if request.client is not None else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:  # noqa: PLR2004
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))


def _told(budget: str, allowed: int, answer: allowances.Answer) -> list[tuple[bytes, bytes]]:
    """The headers that say how much is left (draft-ietf-httpapi-ratelimit-headers-10)."""
    until = math.ceil(answer.wait_seconds or answer.seconds_to_full)
    return [
        (b"ratelimit-policy", f'"{budget}";q={allowed};w={allowances.WINDOW_SECONDS}'.encode()),
        (b"ratelimit", f'"{budget}";r={answer.remaining};t={until}'.encode()),
    ]


def install(api: FastAPI, settings: Settings) -> None:
    """Have every route of `api` say in its OpenAPI what it needs, and every answer how much is left."""
    required = settings.auth_mode != "none"
    if required:
        api.add_middleware(_Quotas)
    generated = api.openapi

    def openapi() -> dict[str, Any]:
        # As in `problems`: what was made once is kept, and found changed.
        schema = generated()
        _declare(schema, required=required)
        return schema

    api.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it


class _Quotas:
    """Puts the headers about a key's budget on every answer, however it was made."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        if connection["type"] != "http":
            await self._app(connection, receive, send)
            return
        state: MutableMapping[str, Any] = connection.setdefault("state", {})

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start" and (quota := state.get("quota")) is not None:
                message["headers"] = [*message.get("headers", ()), *_told(*quota)]
            await send(message)

        await self._app(connection, receive, told)


def _declare(schema: dict[str, Any], *, required: bool) -> None:
    """Complete what FastAPI says of the routes that need a scope: what they answer without, and how much is left."""
    told = {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS}
    schema["components"]["headers"] = _HEADERS
    for operations in schema["paths"].values():
        for operation in operations.values():
            needed = operation.get("security")
            if not needed or {} in needed:
                continue
            operation["security"] = needed if required else [{}, *needed]
            answers = operation["responses"]
            for status, answer in problems.declared(401, 403, 429).items():
                answers.setdefault(status, answer)
            for answer in answers.values():
                answer["headers"] = told | answer.get("headers", {})


_HEADERS = {
    "RateLimit-Policy": {
        "description": "The budget of the key that the request spent of, its size and its seconds, such as "
        '`"poll";q=60000;w=60`. Only with API keys.',
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": 'What is left of it, such as `"poll";r=59999;t=1`: requests, and seconds until it is whole, '
        "or until one more may come. Only with API keys.",
        "schema": {"type": "string"},
    },
}

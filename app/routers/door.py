"""Who calls, and what they may do.

Every route names the scope that it needs. With `TASKQUEUE_AUTH_MODE=none` nobody has to say who they are:
everybody is the same caller, whose tasks have an empty owner, and may do everything.
"""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends

from app.core.scopes import Scope


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls.

    Attributes:
        owner: whose tasks they are, those submitted and those seen: nobody else's exist for this caller.
    """

    owner: str


_ANYBODY = Caller(owner="")


class _Needs:
    """The dependency of a route that needs a scope."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self) -> Caller:
        return _ANYBODY


Reader = Annotated[Caller, Depends(_Needs(Scope.TASKS_READ))]
"""The parameter of a route that reads tasks."""
Writer = Annotated[Caller, Depends(_Needs(Scope.TASKS_WRITE))]
"""The parameter of a route that submits tasks, or changes them."""
WebhookKeeper = Annotated[Caller, Depends(_Needs(Scope.WEBHOOKS))]
"""The parameter of a route about webhooks, their secrets included."""
Admin = Annotated[Caller, Depends(_Needs(Scope.ADMIN))]
"""The parameter of a route that concerns everybody, such as one that pauses a queue."""

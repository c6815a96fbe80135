"""What the lifespan makes once and every request finds."""

from typing import Annotated, TypedDict, cast
from uuid import UUID

from fastapi import Depends, Request

from app.backlog import Backlog
from app.broker import Broker
from app.core.config import Settings
from app.core.statuses import TaskStatus
from app.db import Database
from app.gathering import Gathering
from app.lifecycle import Bell, NewTask
from app.publisher import Publisher
from app.routers.door import Door
from app.routers.health import Readiness
from app.turns import Turns
from app.utils.guard import EgressRules
from app.utils.sealing import Seal
from app.watch import Watch


class State(TypedDict):
    """The resources of one API process."""

    settings: Settings
    db: Database
    broker: Broker
    publisher: Publisher
    submits: Gathering[tuple[NewTask, bool], Bell | None]
    statuses: Gathering[tuple[UUID, str], TaskStatus | None]
    backlog: Backlog
    rules: EgressRules
    readiness: Readiness
    door: Door | None
    seal: Seal | None
    trial_turns: Turns
    redelivery_turns: Turns
    watch: Watch


async def of(request: Request) -> State:
    """The resources of the process that answers this request."""
    # A function that awaits nothing would be run in a thread.
    return cast(State, request.scope["state"])


Resources = Annotated[State, Depends(of)]
"""A parameter of a route that wants them."""

"""What the lifespan makes once and every request finds."""

from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request

from app.backlog import Backlog
from app.broker import Broker
from app.core.config import Settings
from app.db import Database
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
    backlog: Backlog
    rules: EgressRules
    readiness: Readiness
    door: Door | None
    seal: Seal | None
    trial_turns: Turns
    redelivery_turns: Turns
    watch: Watch


def _state(request: Request) -> State:
    return cast(State, request.state)


Resources = Annotated[State, Depends(_state)]
"""A parameter of a route that wants them."""

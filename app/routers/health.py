"""Probes: alive, and ready to accept tasks."""

import asyncio
import time
from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends, Request, Response

from app import db
from app.broker import Broker
from app.core import errors
from app.schemas import Alive, Ready

CHECK_TIMEOUT_SECONDS = 2.0
FRESH_SECONDS = 1.0
"""How long an answer is given again: probes of many callers must not become load."""

Check = Literal["ok", "degraded", "unreachable", "missing", "unknown"]


class Readiness:
    """Asks Postgres and Redis whether they answer, at most once a second."""

    def __init__(self, database: db.Database, broker: Broker, *, needed_revision: str) -> None:
        """Revisions are numbered, so that the order of their names is theirs.

        Args:
            database: without it nothing can be accepted.
            broker: without it tasks are accepted, and run later.
            needed_revision: the oldest state of the tables that this release can work with.
        """
        self._db = database
        self._broker = broker
        self._needed_revision = needed_revision
        self._asking = asyncio.Lock()
        self._found: Ready | None = None
        self._found_at = 0.0

    async def ask(self) -> Ready:
        """What the checks say now, or said within `FRESH_SECONDS`."""
        async with self._asking:
            if self._found is None or time.monotonic() - self._found_at > FRESH_SECONDS:
                (postgres, migrations), redis = await asyncio.gather(self._postgres(), self._redis())
                ready = postgres == "ok" and migrations == "ok"
                checks = {"postgres": postgres, "migrations": migrations, "redis": redis}
                self._found = Ready(status="ready" if ready else "not ready", checks=dict(checks))
                self._found_at = time.monotonic()
            return self._found

    async def _postgres(self) -> tuple[Check, Check]:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                revision = await db.revision(self._db)
        except (errors.DatabaseUnavailable, TimeoutError):
            return "unreachable", "unknown"
        # A newer release migrates while this one still serves, so a later revision is fine.
        return "ok", "ok" if revision is not None and revision >= self._needed_revision else "missing"

    async def _redis(self) -> Check:
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
                await self._broker.ping()
        except (errors.BrokerUnavailable, TimeoutError):
            return "degraded"
        return "ok"


def _readiness(request: Request) -> Readiness:
    return cast(Readiness, request.state.readiness)


router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Alive:
    """The process is alive, whatever its surroundings do."""
    return Alive()


@router.get("/readyz", responses={503: {"model": Ready, "description": "Tasks can't be accepted now."}})
async def readyz(readiness: Annotated[Readiness, Depends(_readiness)], response: Response) -> Ready:
    """Tasks can be accepted: Postgres answers and has the tables. Redis may be away (`degraded`)."""
    found = await readiness.ask()
    if found.status != "ready":
        response.status_code = 503
    return found

"""The real API on real servers, called in process."""

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

import httpx
import pytest

from app.core.config import Settings
from app.db import Database
from app.main import create_app

Serve = Callable[[Settings], AbstractAsyncContextManager[httpx.AsyncClient]]


@contextlib.asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    api = create_app(settings)
    async with api.router.lifespan_context(api) as state:

        async def with_state(scope: object, receive: object, send: object) -> None:
            # What a server does with the lifespan's state; httpx's transport does not.
            await api({**scope, "state": dict(state)}, receive, send)  # type: ignore[dict-item, arg-type]

        # An exception that is not handled fails the test, whatever the answer was.
        transport = httpx.ASGITransport(app=with_state, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://api.test") as client:
            yield client


@pytest.fixture
def serve() -> Serve:
    """Runs an API under other settings than the usual ones."""
    return serving


@pytest.fixture
def api_settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"metrics_port": 0, "queues": ("default", "reports")})


@pytest.fixture
async def api(api_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API on this test's own Postgres and Redis."""
    async with serving(api_settings) as client:
        yield client


@pytest.fixture
async def db(api_settings: Settings) -> AsyncIterator[Database]:
    """Another connection to the API's database: what it sees is committed."""
    database = Database(api_settings.postgres_dsn, max_connections=2, application_name="test")
    yield database
    await database.close()

"""Alive, and ready: what each outage makes of them."""

import httpx
from pydantic import SecretStr

from app.core.config import Settings
from app.db import Database
from tests.integration.routers.conftest import Serve

NOBODY = "127.0.0.1:1"
"""Nothing listens on port 1."""


async def test_a_whole_service_is_alive_and_ready(api: httpx.AsyncClient) -> None:
    alive = await api.get("/healthz")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    ready = await api.get("/readyz")
    assert (ready.status_code, ready.json()) == (
        200,
        {"status": "ready", "checks": {"postgres": "ok", "migrations": "ok", "redis": "ok"}},
    )


async def test_without_redis_it_is_degraded_and_ready(api_settings: Settings, serve: Serve) -> None:
    away = api_settings.model_copy(update={"redis_url": SecretStr(f"redis://{NOBODY}/0")})
    async with serve(away) as api:
        ready = await api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ready")
        assert ready.json()["checks"] == {"postgres": "ok", "migrations": "ok", "redis": "degraded"}


async def test_without_postgres_it_is_alive_and_not_ready(api_settings: Settings, serve: Serve) -> None:
    away = api_settings.model_copy(update={"database_url": SecretStr(f"postgresql://user:pw@{NOBODY}/none")})
    async with serve(away) as api:
        assert (await api.get("/healthz")).status_code == 200
        ready = await api.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "not ready")
        assert ready.json()["checks"] == {"postgres": "unreachable", "migrations": "unknown", "redis": "ok"}


async def test_an_empty_database_is_not_ready(api_settings: Settings, empty_postgres_url: str, serve: Serve) -> None:
    empty = api_settings.model_copy(update={"database_url": SecretStr(empty_postgres_url)})
    async with serve(empty) as api:
        ready = await api.get("/readyz")
        assert ready.status_code == 503
        assert ready.json()["checks"] == {"postgres": "ok", "migrations": "missing", "redis": "ok"}


async def test_an_older_database_is_not_ready_and_a_newer_one_is(
    api_settings: Settings, db: Database, serve: Serve
) -> None:
    for revision, status in (("0000", 503), ("9999", 200)):
        await db.execute(f"UPDATE alembic_version SET version_num = '{revision}'")
        async with serve(api_settings) as api:
            assert (await api.get("/readyz")).status_code == status


async def test_an_answer_is_kept_for_a_moment(api: httpx.AsyncClient, db: Database) -> None:
    assert (await api.get("/readyz")).status_code == 200
    await db.execute("DROP TABLE alembic_version")
    assert (await api.get("/readyz")).status_code == 200

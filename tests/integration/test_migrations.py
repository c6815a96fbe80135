import asyncio
import threading

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

from app import migrations
from app.core import errors
from app.core.config import Settings
from tests.conftest import settings_for
from tests.support.servers import apart


def migrate(settings: Settings, revision: str = "head") -> None:
    apart(lambda: migrations.migrate(settings, revision=revision))


async def _difference(url: str) -> list[object]:
    def compare(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, SQLModel.metadata))

    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(compare)
    finally:
        await engine.dispose()


async def _constraints(url: str) -> set[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT conname FROM pg_constraint WHERE contype = 'c'")
        return {row["conname"] for row in rows}
    finally:
        await connection.close()


async def test_the_models_and_the_migrations_agree(postgres_url: str) -> None:
    assert await _difference(postgres_url) == []
    declared = {
        str(constraint.name)
        for table in SQLModel.metadata.tables.values()
        for constraint in table.constraints
        if constraint.name is not None
    }
    assert {name for name in declared if name.startswith(("task_", "delivery_"))} <= await _constraints(postgres_url)


async def test_a_downgrade_to_the_previous_revision_works_and_so_does_coming_back(
    empty_postgres_url: str, redis_url: str
) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    migrate(settings)
    migrate(settings, "-1")
    migrate(settings)
    assert await _difference(empty_postgres_url) == []
    migrate(settings, "base")
    connection = await asyncpg.connect(empty_postgres_url)
    left = await connection.fetch(
        "SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = 'public'"
        " AND relname NOT LIKE 'alembic%'"
    )
    await connection.close()
    assert left == []


def test_migrations_that_start_at_once_take_turns(empty_postgres_url: str, redis_url: str) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            migrations.migrate(settings)
        except BaseException as error:  # noqa: BLE001  # reported by the assertion below
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []


async def test_a_lock_that_cannot_be_had_fails_the_migration_instead_of_stopping_everybody(
    postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.1)
    holder = await asyncpg.connect(postgres_url)
    try:
        async with holder.transaction():
            await holder.execute("SELECT FROM task")
            with pytest.raises(errors.DatabaseUnavailable, match="lock timeout"):
                await asyncio.to_thread(migrations.migrate, settings_for(postgres_url, redis_url), revision="base")
    finally:
        await holder.close()


def test_a_database_that_is_newer_than_this_release_is_left_alone(postgres_url: str, redis_url: str) -> None:
    async def pretend() -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("UPDATE alembic_version SET version_num = '9999'")
        await connection.close()

    asyncio.run(pretend())
    migrations.migrate(settings_for(postgres_url, redis_url))


def test_an_unreachable_postgres_is_one_line(redis_url: str) -> None:
    settings = settings_for("postgresql://nobody@127.0.0.1:1/none", redis_url)
    with pytest.raises(errors.DatabaseUnavailable) as failed:
        migrations.migrate(settings)
    assert "\n" not in str(failed.value)

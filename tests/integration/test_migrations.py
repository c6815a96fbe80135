import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import asyncpg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import SQLModel

from app import db, migrations
from app.core import errors
from app.core.config import Settings
from tests.conftest import settings_for
from tests.support import schema
from tests.support.proxy import proxied
from tests.support.servers import apart
from tests.support.waiting import until


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


async def test_no_migration_takes_away_what_the_previous_release_uses(empty_postgres_url: str, redis_url: str) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    revisions = migrations.revisions()
    migrate(settings, revisions[0].revision)
    for revision in revisions[1:]:
        before = await _schema(empty_postgres_url)
        migrate(settings, revision.revision)
        found = schema.breaches(before, await _schema(empty_postgres_url))
        unused: dict[str, str] = getattr(revision.module, "unused_since", {})
        assert found.keys() == unused.keys(), f"{revision.revision}: {found}; see docs/upgrading.md"
        assert all(unused.values()), "the release that stopped using it"


def test_the_revision_that_processes_wait_for_is_the_newest() -> None:
    assert db.needed_revision() == migrations.head()


async def _schema(url: str) -> schema.Schema:
    connection = await asyncpg.connect(url)
    try:
        return await schema.look(connection)
    finally:
        await connection.close()


@pytest.mark.parametrize(
    ("change", "thing"),
    [
        ("DROP TABLE task_tombstone", "task_tombstone"),
        ("DROP SEQUENCE task_position", "task_position"),
        ("ALTER TABLE task DROP COLUMN tags", "task.tags"),
        ("ALTER TABLE task RENAME COLUMN tags TO words", "task.tags"),
        ("ALTER TABLE task ALTER COLUMN attempt TYPE bigint", "task.attempt"),
        ("ALTER TABLE task ALTER COLUMN worker SET NOT NULL", "task.worker"),
        ("ALTER TABLE task ALTER COLUMN tags DROP DEFAULT", "task.tags"),
        ("ALTER TABLE task ADD COLUMN tenant text NOT NULL", "task.tenant"),
        ("ALTER TABLE task ADD CHECK (attempt < 100)", "task_attempt_check"),
        ("ALTER TABLE task DROP CONSTRAINT task_pkey CASCADE", "task_pkey"),
        ("ALTER TABLE task ADD UNIQUE (name, position)", "task_name_position_key"),
        ("CREATE UNIQUE INDEX one_worker ON task (worker)", "one_worker"),
        ("DROP INDEX task_started", "task_started"),
        ("CREATE TRIGGER t AFTER UPDATE ON task EXECUTE FUNCTION suppress_redundant_updates_trigger()", "t"),
        (
            (
                "ALTER TABLE webhook_delivery DROP CONSTRAINT delivery_status_known,"
                " ADD CONSTRAINT delivery_status_known CHECK (status IN ('delivering', 'delivered', 'pending'))"
            ),
            "delivery_status_known",
        ),
        (
            (
                "ALTER TABLE task DROP CONSTRAINT task_error_named, ADD CONSTRAINT task_error_named"
                " CHECK (status NOT IN ('FAILURE', 'REVOKED', 'SUCCESS') OR error_type IS NOT NULL)"
            ),
            "task_error_named",
        ),
        (
            "ALTER TABLE webhook_delivery DROP CONSTRAINT webhook_delivery_task_id_fkey",
            "webhook_delivery_task_id_fkey",
        ),
    ],
)
async def test_a_change_that_breaks_the_previous_release_is_seen(postgres_url: str, change: str, thing: str) -> None:
    assert thing in await _breaches(postgres_url, change)


@pytest.mark.parametrize(
    "change",
    [
        "CREATE TABLE more (id uuid PRIMARY KEY, name text NOT NULL CHECK (name <> ''))",
        "ALTER TABLE task ADD COLUMN tenant text",
        "ALTER TABLE task ADD COLUMN priority smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN 0 AND 9)",
        "CREATE INDEX task_names ON task (name)",
        "ALTER TABLE task ALTER COLUMN name DROP NOT NULL",
        "ALTER TABLE task DROP CONSTRAINT task_queue_length",
        (
            "ALTER TABLE task DROP CONSTRAINT task_status_known, ADD CONSTRAINT task_status_known"
            " CHECK (status IN ('FAILURE', 'HELD', 'PENDING', 'RETRY', 'REVOKED', 'STARTED', 'SUCCESS'))"
        ),
    ],
)
async def test_a_change_that_the_previous_release_can_ignore_is_allowed(postgres_url: str, change: str) -> None:
    assert await _breaches(postgres_url, change) == {}


async def _breaches(url: str, change: str) -> dict[str, str]:
    connection = await asyncpg.connect(url)
    try:
        before = await schema.look(connection)
        await connection.execute(change)
        return schema.breaches(before, await schema.look(connection))
    finally:
        await connection.close()


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


async def test_an_index_that_could_not_be_finished_is_made_by_the_next_try(
    empty_postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "LOCK_TIMEOUT_SECONDS", 0.1)
    settings = settings_for(empty_postgres_url, redis_url)
    migrate(settings, "0004")
    backup, onlooker = await asyncpg.connect(empty_postgres_url), await asyncpg.connect(empty_postgres_url)
    try:
        async with backup.transaction(isolation="repeatable_read"):
            await backup.execute("SELECT FROM alembic_version")
            migrating = asyncio.create_task(asyncio.to_thread(migrations.migrate, settings, revision="0005"))
            # Longer than anything else may wait for a lock.
            waiting = await until(
                lambda: onlooker.fetchval(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                    " AND query LIKE 'CREATE INDEX CONCURRENTLY%' AND now() - query_start > interval '0.3 s'"
                ),
                what="the index that waits for a backup",
            )
            await onlooker.execute("SELECT pg_cancel_backend($1)", waiting)
            with pytest.raises(errors.DatabaseUnavailable, match="canceling statement"):
                await migrating
        whole = "SELECT indisvalid FROM pg_index WHERE indexrelid = 'webhook_delivery_created'::regclass"
        assert await onlooker.fetchval(whole) is False, "the column is there, the index is not, nor the revision"

        migrate(settings, "0005")
        assert await onlooker.fetchval(whole) is True
        assert await onlooker.fetchval("SELECT version_num FROM alembic_version") == "0005"
    finally:
        await backup.close()
        await onlooker.close()


async def test_a_revision_that_ended_before_its_number_was_written_can_run_again(
    empty_postgres_url: str, redis_url: str
) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    connection = await asyncpg.connect(empty_postgres_url)
    try:
        for revision in migrations.revisions():
            migrate(settings, revision.revision)
            # The others are one transaction each.
            if hasattr(revision.module, "steps"):
                before = await schema.look(connection)
                await connection.execute("UPDATE alembic_version SET version_num = $1", revision.down_revision)
                migrate(settings, revision.revision)
                assert await schema.look(connection) == before, revision.revision
        broken = await connection.fetch("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
        assert broken == []
    finally:
        await connection.close()
    assert await _difference(empty_postgres_url) == []


def test_every_revision_that_leaves_its_transaction_can_be_made_again() -> None:
    for revision in migrations.revisions():
        written = Path(revision.path).read_text()
        assert "autocommit_block" not in written, f"{revision.revision}: see app/migrations/steps.py"
        assert "concurrently=True" not in written, f"{revision.revision}: see app/migrations/steps.py"


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


def test_the_tables_are_waited_for_until_somebody_else_has_made_them(empty_postgres_url: str, redis_url: str) -> None:
    settings = settings_for(empty_postgres_url, redis_url)
    with pytest.raises(errors.DatabaseUnavailable, match=f"revision none, and {migrations.head()} is needed"):
        migrations.check(settings)
    waiting = threading.Thread(target=migrations.check, args=(settings,), kwargs={"patience_seconds": 60.0})
    waiting.start()

    migrations.migrate(settings)

    waiting.join(timeout=10)
    assert not waiting.is_alive()
    migrations.check(settings)


def test_tables_that_are_newer_than_this_release_will_do(postgres_url: str, redis_url: str) -> None:
    async def pretend(revision: str) -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("UPDATE alembic_version SET version_num = $1", revision)
        await connection.close()

    asyncio.run(pretend("9999"))
    migrations.check(settings_for(postgres_url, redis_url))
    asyncio.run(pretend("0001"))
    with pytest.raises(errors.DatabaseUnavailable, match="revision 0001"):
        migrations.check(settings_for(postgres_url, redis_url))


def test_a_postgres_that_is_not_there_yet_is_waited_for(empty_postgres_url: str, redis_url: str) -> None:
    with proxied(empty_postgres_url) as network:
        settings = settings_for(network.url, redis_url)
        network.cut()
        with pytest.raises(errors.DatabaseUnavailable, match="can't be reached"):
            migrations.check(settings)
        late = threading.Timer(0.7, network.restore)
        late.start()
        migrations.migrate(settings, patience_seconds=60.0)
        late.join()
    migrations.check(settings_for(empty_postgres_url, redis_url))


def test_a_wait_ends_at_once_when_its_pod_is_deleted(redis_url: str) -> None:
    """The first process of a container ignores a SIGTERM that it has no handler for, so the default won't do."""
    settings = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "REDIS_URL": redis_url,
        "TASKQUEUE_AUTH_MODE": "none",
    }
    waiting = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "migrate", "--check", "--patience", "60"],
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.stderr is not None
    with waiting:
        assert "waiting: Postgres can't be reached" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGTERM)
        assert waiting.wait(10) == 128 + signal.SIGTERM

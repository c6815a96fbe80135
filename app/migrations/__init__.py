"""Alembic, configured in code, under an advisory lock and with timeouts.

Migrations run while the previous release still serves, so each must fit the
code that is running: add first, move the code, remove in a later release
(docs/upgrading.md; a test compares the tables before and after each). No
statement may hold a lock for long: better that a migration fails and is tried
again than that every submit queues behind it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from app.core import errors
from app.core.config import Settings

ADVISORY_LOCK = 0x7461736B71756575
"""`taskqueu` in ASCII: the key under which only one migration runs at a time."""
LOCK_TIMEOUT_SECONDS = 4
STATEMENT_TIMEOUT_SECONDS = 60
WAIT_FOR_OTHERS_SECONDS = 120
CONNECT_TIMEOUT_SECONDS = 5
LOOK_AGAIN_SECONDS = 0.5

log = logging.getLogger(__name__)


def head() -> str:
    """The revision that this code needs."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:  # pragma: no cover - the package ships revisions
        raise errors.SettingsError("The installation has no migrations")
    return revision


def revisions() -> list[Script]:
    """Every revision, oldest first."""
    return list(ScriptDirectory.from_config(_config()).walk_revisions())[::-1]


def migrate(settings: Settings, *, revision: str = "head", patience_seconds: float = 0.0) -> None:
    """Bring the database to `revision`, waiting for whoever else is migrating.

    Args:
        settings: name the database.
        revision: where to.
        patience_seconds: how long Postgres may take to be there.

    Raises:
        DatabaseUnavailable: if Postgres can't be reached, or a lock could not be had in time.
    """
    try:
        if patience_seconds:
            asyncio.run(_wait(settings, lambda _: True, patience_seconds))
        asyncio.run(_run(settings, revision))
    except (OSError, DBAPIError) as failed:
        raise errors.DatabaseUnavailable(f"The migration failed: {_reason(failed)}") from failed


def check(settings: Settings, *, patience_seconds: float = 0.0) -> None:
    """Return once the database is at the revision that this code needs, or at a later one. Changes nothing.

    Raises:
        DatabaseUnavailable: if that is not so after `patience_seconds`.
    """
    asyncio.run(_wait(settings, lambda found: found is not None and found >= head(), patience_seconds))


async def _wait(settings: Settings, good: Callable[[str | None], bool], patience_seconds: float) -> None:
    """Look until `good` says so of the database's revision."""
    deadline = time.monotonic() + patience_seconds
    told = ""
    while True:
        try:
            found = await _revision(settings)
            if good(found):
                return
            reason = f"The database is at revision {found or 'none'}, and {head()} is needed"
        except (OSError, DBAPIError) as failed:
            reason = f"Postgres can't be reached: {_reason(failed)}"
        if time.monotonic() >= deadline:
            raise errors.DatabaseUnavailable(reason)
        if reason != told:
            log.info("waiting: %s", reason)
            told = reason
        await asyncio.sleep(LOOK_AGAIN_SECONDS)


async def _revision(settings: Settings) -> str | None:
    arguments = {"timeout": CONNECT_TIMEOUT_SECONDS, "command_timeout": CONNECT_TIMEOUT_SECONDS}
    engine = create_async_engine(settings.sqlalchemy_url, poolclass=NullPool, connect_args=arguments)
    try:
        async with engine.connect() as connection:
            return await connection.run_sync(_known)
    finally:
        await engine.dispose()


def _known(connection: Connection) -> str | None:
    current = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar()
    known = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if current else None
    return None if known is None else str(known)


def _reason(failed: Exception) -> str:
    cause = failed.orig if isinstance(failed, DBAPIError) and failed.orig is not None else failed
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


async def _run(settings: Settings, revision: str) -> None:
    engine = create_async_engine(settings.sqlalchemy_url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await _wait_for_turn(connection)
            await connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
            await connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'"))
            await connection.commit()
            await connection.run_sync(_move, revision)
            await connection.commit()
    finally:
        await engine.dispose()


async def _wait_for_turn(connection: AsyncConnection) -> None:
    """Take the advisory lock. It belongs to the session, so it is let go even if this process is killed.

    Asked again and again, without a statement that waits: an index that is made CONCURRENTLY waits for every
    statement that was there before, and this one would wait for it.

    Raises:
        TimeoutError: if somebody else has migrated for `WAIT_FOR_OTHERS_SECONDS`.
    """
    async with asyncio.timeout(WAIT_FOR_OTHERS_SECONDS):
        while not (await connection.execute(text(f"SELECT pg_try_advisory_lock({ADVISORY_LOCK})"))).scalar():
            await connection.rollback()
            await asyncio.sleep(LOOK_AGAIN_SECONDS)


def _move(connection: Connection, revision: str) -> None:
    config = _config()
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    known = _known(connection)
    down = revision.startswith("-") or revision == "base"
    if not down and known is not None and known not in {one.revision for one in script.walk_revisions()}:
        log.warning("the database is at a newer revision (%s) than this release; nothing to do", known)
        return
    # Without a transaction of ours, Alembic has one for each revision, and can leave it for what needs none.
    connection.rollback()
    (command.downgrade if down else command.upgrade)(config, revision)

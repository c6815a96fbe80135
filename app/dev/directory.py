"""A data directory: held by one process at a time, and remembering what was made up once."""

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

from app.core import errors


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[None]:
    """Hold `path` for this process alone; the lock ends with the process, however it ends.

    Raises:
        SettingsError: if another process holds it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (path / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise errors.SettingsError(f"TASKQUEUE_DATA_DIR is in use by another process: {path}") from None
        yield


def remembered(path: Path, make: Callable[[], str]) -> str:
    """What the file holds; when there is none, what `make` says, written where only its owner reads."""
    with contextlib.suppress(FileNotFoundError):
        return path.read_text()
    value = make()
    keep(path, value)
    return value


def keep(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.touch(mode=0o600)
    unfinished.write_text(text)
    unfinished.rename(path)

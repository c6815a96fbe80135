"""How the children of a worker's pool count: they tell the keeper, which alone has the metrics.

A pool's children are forked, killed and replaced, and none of them can serve a
port. Prometheus's client would have each write files of its own, which stay
when it dies and are all read at each scrape. Here there is one pipe instead,
made by the worker's main process: a child writes what happened as one line, which
goes into the pipe whole or not at all (POSIX: up to PIPE_BUF bytes), so `kill -9`
loses the line that was not written yet and spoils none. The keeper reads, and
counts. While there is no keeper the pipe keeps the lines; when it is full, they
are dropped and counted. Nobody ever waits.
"""

import contextlib
import fcntl
import functools
import json
import logging
import os
import select
from collections.abc import Callable
from typing import Any, ParamSpec

ROOM_BYTES = 1024 * 1024
"""What the pipe is asked to hold: thousands of attempts. It holds 64 KiB at least."""
READ_BYTES = 1024 * 1024

log = logging.getLogger(__name__)

P = ParamSpec("P")

_known: dict[str, Callable[..., None]] = {}
_outlet: "Callable[[str, tuple[Any, ...]], None] | None" = None
_dropped = 0


def event(count: Callable[P, None]) -> Callable[P, None]:
    """Make a function that counts something one that may be told elsewhere. Its arguments are JSON, by position."""
    _known[count.__name__] = count

    @functools.wraps(count)
    def tell(*args: P.args, **kwargs: P.kwargs) -> None:
        if _outlet is None:
            count(*args, **kwargs)
        else:
            _outlet(count.__name__, args)

    return tell


def silence() -> None:
    """Count nothing from now on in this process: nobody can ask for it."""
    global _outlet  # noqa: PLW0603  # one per process
    _outlet = _nowhere


def _nowhere(name: str, args: tuple[Any, ...]) -> None:
    del name, args


class Pipe:
    """A pipe for what happens in a worker. Both ends stay open in the main process, so a keeper may come and go."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        for end in (self.reader, self.writer):
            os.set_blocking(end, False)
        with contextlib.suppress(OSError, AttributeError):
            fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, ROOM_BYTES)

    def forward(self) -> None:
        """Tell whoever reads, from now on, in this process and in those that are forked from it."""
        global _outlet  # noqa: PLW0603  # one per process
        _outlet = functools.partial(_write, self.writer, _identity(self.writer))

    def close(self) -> None:
        """Close both ends, and count in this process again."""
        global _outlet  # noqa: PLW0603  # as above
        _outlet = None
        os.close(self.reader)
        os.close(self.writer)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _write(fd: int, pipe: tuple[int, int], name: str, args: tuple[Any, ...]) -> None:
    global _dropped  # noqa: PLW0603  # one per process
    line = _line(name, args)
    try:
        # A task may close every file descriptor and open a file of its own: that is not written to.
        if len(line) > select.PIPE_BUF or _identity(fd) != pipe:
            _dropped += 1
            return
        if _dropped:
            os.write(fd, _line("events_dropped", (_dropped,)))
            _dropped = 0
        os.write(fd, line)
    except OSError:
        _dropped += 1


def _line(name: str, args: tuple[Any, ...]) -> bytes:
    return json.dumps([name, *args], separators=(",", ":")).encode() + b"\n"


class Reader:
    """The keeper's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""

    def absorb(self) -> int:
        """Count what was told since the last time, without waiting; returns how many events. Never fails."""
        try:
            told = self._rest + os.read(self._fd, READ_BYTES)
        except OSError:
            return 0
        *lines, self._rest = told.split(b"\n")
        for line in lines:
            try:
                name, *args = json.loads(line)
                _known[name](*args)
            except Exception as strange:  # noqa: BLE001  # whatever it is, the next line may be right
                log.debug("an event of a child is not understood: %s", type(strange).__name__)
        return len(lines)

"""The one writer of the supervisor's output: whole lines, in order, never waiting for a reader.

A reader that stops reading must not stop the supervisor: what does not fit is
kept, and beyond a limit the oldest lines are let go.
"""

import asyncio
import contextlib
import os
import re
import select
import time
from collections import deque
from datetime import datetime

LINES_KEPT = 10_000
PIPE_ROOM = 4096
"""Bytes that a pipe takes without waiting once it says that it is writable (POSIX PIPE_BUF on Linux)."""

OWN_TIME = re.compile(r"(\d\d:\d\d:\d\d\.\d{3}) ")
"""How our own processes begin a line (`core.telemetry`)."""

LONGEST_LINE = 65_536
"""Bytes after which a line without an end is passed on as it is."""


class Console:
    """Writes lines to a file descriptor, from one event loop."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._waiting: deque[bytes] = deque(maxlen=LINES_KEPT)
        self._rest = b""
        self._watched = False

    def tell(self, name: str, message: str) -> None:
        """Write `HH:MM:SS.mmm  name    | message`, with the message's own time if it begins with one."""
        own = OWN_TIME.match(message)
        now = own[1] if own else datetime.now().astimezone().isoformat(timespec="milliseconds")[11:23]
        self.say(f"{now}  {name:<8}| {message[own.end() :] if own else message}")

    def say(self, line: str) -> None:
        """Write one line as it is."""
        self._waiting.append(line.encode(errors="replace") + b"\n")
        self._write()

    def finish(self, deadline_seconds: float = 0.5) -> None:
        """Wait for the reader, but not longer than this, so that the last lines are seen."""
        deadline = time.monotonic() + deadline_seconds
        while (self._rest or self._waiting) and time.monotonic() < deadline:
            select.select([], [self._descriptor], [], 0.05)
            self._write()

    def _write(self) -> None:
        try:
            while (self._rest or self._waiting) and self._writable():
                self._rest = self._rest or self._waiting.popleft()
                written = os.write(self._descriptor, self._rest[:PIPE_ROOM])
                self._rest = self._rest[written:]
        except OSError:  # the reader has gone for good: there is nobody to tell
            self._rest = b""
            self._waiting.clear()
        self._watch(bool(self._rest or self._waiting))

    def _writable(self) -> bool:
        return bool(select.select([], [self._descriptor], [], 0)[1])

    def _watch(self, wanted: bool) -> None:
        """Have the event loop go on when there is room again."""
        if wanted == self._watched:
            return
        with contextlib.suppress(RuntimeError):  # no loop runs any more
            loop = asyncio.get_running_loop()
            if wanted:
                loop.add_writer(self._descriptor, self._write)
            else:
                loop.remove_writer(self._descriptor)
            self._watched = wanted


class Lines(asyncio.Protocol):
    """Reads a process's output and passes it on line by line."""

    def __init__(self, console: Console, name: str) -> None:
        self._console = console
        self._name = name
        self._partial = b""

    def data_received(self, data: bytes) -> None:
        """Pass on every line that has ended, or is too long to wait for its end."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LONGEST_LINE:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._tell(line)

    def connection_lost(self, _error: Exception | None) -> None:
        """Pass on what was written last, even if its line never ended."""
        if self._partial:
            self._tell(self._partial)

    def _tell(self, line: bytes) -> None:
        self._console.tell(self._name, line.decode(errors="replace").rstrip("\r"))

"""One process under the supervisor: started, listened to, started again when it dies, ended."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any

from app.core import errors
from app.dev import linux
from app.dev.console import Console, Lines

STEADY_SECONDS = 5.0
"""A process that lived as long is started again at once; one that dies sooner waits a little longer each time."""

FIRST_DELAY_SECONDS = 0.05
LONGEST_DELAY_SECONDS = 0.8
MTIME_LAG_SECONDS = 0.01
"""A file's mtime comes from a clock that ticks; a start is dated so much earlier, to be compared with it."""


def _nothing() -> None:
    """Prepare nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """What to run, and how.

    Attributes:
        name: in the log.
        command: asked before every start.
        options: keyword arguments for `subprocess.Popen`, asked before every start.
        prepare: done before every start.
        stop_signal: asks it to end well.
    """

    name: str
    command: Callable[[], list[str]]
    options: Callable[[], Mapping[str, Any]]
    prepare: Callable[[], None] = _nothing
    stop_signal: signal.Signals = signal.SIGTERM


class Reaper:
    """Hears of every child's end, adopted ones included. Its loop must call `reap` on SIGCHLD."""

    def __init__(self) -> None:
        self._watched: dict[int, tuple[subprocess.Popen[bytes], asyncio.Future[int]]] = {}

    def watch(self, process: "subprocess.Popen[bytes]") -> "asyncio.Future[int]":
        """The exit code of a process that was just started, once it has ended."""
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._watched[process.pid] = (process, ended)
        return ended

    def reap(self) -> None:
        """Take leave of all that have ended."""
        for pid, (process, ended) in list(self._watched.items()):
            if process.poll() is not None:
                del self._watched[pid]
                if not ended.done():
                    ended.set_result(process.returncode)
        for pid in linux.children():
            if pid not in self._watched:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


class Child:
    """A program that is kept running until it is stopped.

    Attributes:
        starts: how often it was started.
        started_at: Unix time of its last start, in seconds.
    """

    def __init__(self, program: Program, console: Console, reaper: Reaper) -> None:
        self.program = program
        self.starts = 0
        self.started_at = 0.0
        self._console = console
        self._reaper = reaper
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self._ended: asyncio.Future[int] | None = None

    async def keep(self, given_up: Callable[[int], bool] = lambda _code: False) -> None:
        """Run it again and again until it is stopped.

        Args:
            given_up: whether an exit code means that another start would end the same way.

        Raises:
            SettingsError: if it was given up, having said why itself, or can't be prepared at all.
        """
        delay = 0.0
        while not self._has_to_end():
            began = time.monotonic()
            outcome = await self._attempt()
            if self._has_to_end():
                return
            if isinstance(outcome, int) and given_up(outcome):
                raise errors.SettingsError(f"{self.program.name} can't start: see above")
            steady = time.monotonic() - began > STEADY_SECONDS
            delay = FIRST_DELAY_SECONDS if steady else min(delay * 2 or FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS)
            self._console.tell(self.program.name, f"{_told(outcome)}; starting it again")
            await asyncio.sleep(delay)

    async def run(self) -> int:
        """Start it once, and return its exit code when it and its whole process group have ended.

        A negative code is the number of the signal that ended it, as in `subprocess`.
        """
        process, output = self._start()
        ended = self._ended = self._reaper.watch(process)
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: Lines(self._console, self.program.name), output)
        code = await asyncio.shield(ended)
        self.kill()
        return code

    async def stop(self, deadline_seconds: float) -> None:
        """End it well, and by force what is left of it at the deadline; return when it is gone."""
        self._stopping = True
        if self._process is None or self._ended is None:
            return
        if not self._ended.done():
            self._process.send_signal(self.program.stop_signal)
            await asyncio.wait([self._ended], timeout=deadline_seconds)
        self.kill()
        await self._ended

    def kill(self) -> None:
        """SIGKILL it and everything in its process group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _start(self) -> "tuple[subprocess.Popen[bytes], IO[bytes]]":
        """The process and what it writes. Nothing may be awaited here: `reap` must know the process first."""
        self.program.prepare()
        command, options = self.program.command(), self.program.options()
        reading, writing = os.pipe()
        output = os.fdopen(reading, "rb", 0)
        try:
            self.started_at = time.time() - MTIME_LAG_SECONDS
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, **options
            )
        except BaseException:
            output.close()
            raise
        finally:
            os.close(writing)
        self.starts += 1
        return self._process, output

    def _has_to_end(self) -> bool:
        """Whether `stop` has been called, perhaps while this was waiting."""
        return self._stopping

    async def _attempt(self) -> int | str:
        """Run it; its exit code, or why it could not even be started."""
        try:
            return await self.run()
        except errors.SettingsError as wrong:
            if self.starts == 0:  # it never worked here, so waiting will not help
                raise
            return str(wrong)
        except (OSError, subprocess.SubprocessError) as failed:
            return str(failed)


def _told(outcome: int | str) -> str:
    if isinstance(outcome, str):
        return f"could not be started ({outcome})"
    if outcome < 0:
        return f"ended by {signal.Signals(-outcome).name}"
    return f"ended with exit code {outcome}"

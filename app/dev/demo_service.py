"""The whole service as a fault drill sees it: a supervisor of its own, and every process below that.

It lives in a directory of its own, on free ports, and hears nothing of what the
user has set: the drill empties its Redis, so that must never be somebody's.
Processes are found below the supervisor alone; nothing else can be hit.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.core import config, errors
from app.dev import environment, linux, ports

START_SECONDS = 90.0
STOP_SECONDS = 15.0
LEAVE_SECONDS = 5.0
"""How long what a killed supervisor left behind may take to end."""
POLL_SECONDS = 0.05
LEASE_SECONDS = 5
"""Short, so that what dies with its worker is found within the drill."""

_PROC = Path("/proc")


async def until(condition: Callable[[], Awaitable[bool]], deadline_seconds: float, what: str) -> None:
    """Poll a condition until it is true.

    Raises:
        TimeoutError: if it is still false at the deadline.
    """
    deadline = time.monotonic() + deadline_seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took longer than {deadline_seconds:g} s")
        await asyncio.sleep(POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class Process:
    """A process that was seen.

    Attributes:
        parent: the id of its parent.
        started: in ticks since the machine's start; with the id it names one process for ever.
        command: its command line, words separated by spaces.
    """

    pid: int
    parent: int
    started: int
    command: str

    def lives(self) -> bool:
        """Whether it is still there, and not another one that was given its id."""
        seen = _look(self.pid)
        return seen is not None and seen.started == self.started

    def kill(self) -> None:
        """SIGKILL it, unless it has gone."""
        with contextlib.suppress(ProcessLookupError):
            if self.lives():
                os.kill(self.pid, signal.SIGKILL)


def descendants(root: int) -> list[Process]:
    """Every living process below `root`, parents before their children."""
    below: dict[int, list[Process]] = {}
    for entry in _PROC.glob("[0-9]*"):
        process = _look(int(entry.name))
        if process is not None:
            below.setdefault(process.parent, []).append(process)
    return list(_walk(root, below))


def _walk(root: int, below: dict[int, list[Process]]) -> Iterator[Process]:
    for process in below.get(root, []):
        yield process
        yield from _walk(process.pid, below)


def _look(pid: int) -> Process | None:
    """A process as it is now; None if it has gone, or is dead and only not yet waited for."""
    try:
        state, parent, *rest = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        words = (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if state in {"Z", "X"}:
        return None
    return Process(pid, int(parent), int(rest[17]), " ".join(words).strip())


async def _none_lives(processes: list[Process]) -> bool:
    return not any(process.lives() for process in processes)


class Service:
    """A supervisor with its processes, in a directory of its own.

    Attributes:
        url: of the API.
        database_url: of its Postgres.
        redis_url: of its Redis.
        data_dir: what the service keeps.
        log_file: what all its processes say.
        webhook_secret: what it signs webhooks with.
    """

    def __init__(self, home: Path, *, concurrency: int) -> None:
        self.data_dir = home / "data"
        self.data_dir.mkdir(mode=0o700)
        self.log_file = home / "service.log"
        self.concurrency = concurrency
        self._environment = _environment(home, self.data_dir, concurrency)
        # The supervisor will make the same plan: the data directory remembers what was made up.
        planned = environment.plan(self._environment).environment
        self.url = f"http://{ports.ADDRESS}:{planned['PORT']}"
        self.database_url = planned["DATABASE_URL"]
        self.redis_url = planned["REDIS_URL"]
        self.webhook_secret = planned["TASKQUEUE_WEBHOOK_SECRET"]
        self._supervisor: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the supervisor; it ends with this process, however this one ends."""
        with self.log_file.open("wb") as log:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "dev"],
                cwd=self.data_dir,  # there is no .env
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a terminal's Ctrl-C is for the drill, which ends it in order
                preexec_fn=linux.before_exec(parent_death_signal=signal.SIGTERM),  # noqa: PLW1509  # no threads yet
            )

    async def wait_ready(self) -> None:
        """Return once it says that it is ready.

        Raises:
            SettingsError: if it ended instead.
            TimeoutError: if it takes too long.
        """
        await until(self._is_ready, START_SECONDS, "the start of the service")

    async def stop(self) -> list[Process]:
        """End it, by force if it takes too long; returns what it left behind, which is ended as well."""
        supervisor = self._supervisor
        if supervisor is None:
            return []
        everyone = descendants(supervisor.pid)
        supervisor.terminate()
        try:
            await asyncio.to_thread(supervisor.wait, STOP_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        left = [process for process in everyone if process.lives()]
        with contextlib.suppress(TimeoutError):
            await until(lambda: _none_lives(left), LEAVE_SECONDS, "the end of what was left behind")
        for process in left:
            process.kill()
        return left

    def main(self, words: str) -> Process | None:
        """The supervisor's own child whose command line holds these words, if it runs now."""
        root = 0 if self._supervisor is None else self._supervisor.pid
        for process in descendants(root):
            if process.parent == root and words in process.command:
                return process
        return None

    def family(self, main: Process) -> list[Process]:
        """A process and all below it."""
        return [main, *descendants(main.pid)]

    def keeper(self) -> Process | None:
        """The keeper beside the worker's pool, if it runs now."""
        return next((process for process in self._below_worker() if "app.worker.keeper" in process.command), None)

    def pool(self) -> list[Process]:
        """The children of the worker's pool that run now."""
        return [process for process in self._below_worker() if "app.worker.keeper" not in process.command]

    def beats(self, name: str, since: float) -> bool:
        """Whether a process has shown a sign of life since then (Unix time, seconds)."""
        with contextlib.suppress(FileNotFoundError):
            return (self.data_dir / "run" / f"{name}.beat").stat().st_mtime > since
        return False

    def _below_worker(self) -> list[Process]:
        worker = self.main("taskqueue worker")
        return [] if worker is None else descendants(worker.pid)

    async def _is_ready(self) -> bool:
        if self._supervisor is None or self._supervisor.poll() is not None:
            raise errors.SettingsError(f"the service ended instead of starting: see {self.log_file}")
        return f"\nready: {self.url}\n" in self.log_file.read_text(errors="replace")


@contextlib.asynccontextmanager
async def following(log_file: Path, *, wanted: bool) -> AsyncIterator[None]:
    """Copy what the service says to stderr while the block runs."""
    task = asyncio.create_task(_follow(log_file)) if wanted else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _follow(log_file: Path) -> None:
    with log_file.open(errors="replace") as log:  # a local file that is read as it grows
        while True:
            sys.stderr.write(log.read())
            await asyncio.sleep(POLL_SECONDS)


def _environment(home: Path, data_dir: Path, concurrency: int) -> dict[str, str]:
    """What this process has, without any setting of a service, and the drill's own settings."""
    settings = config.variables()
    kept = {name: value for name, value in os.environ.items() if name not in settings and not name.startswith("OTEL_")}
    return {
        **kept,
        "TMPDIR": str(home),
        "PORT": str(ports.free_ports(1)[0]),
        "TASKQUEUE_DATA_DIR": str(data_dir),
        "TASKQUEUE_CONCURRENCY": str(concurrency),
        "TASKQUEUE_LEASE_SECONDS": str(LEASE_SECONDS),
        "TASKQUEUE_METRICS_PORT": "0",
        # A receiver that is asked again after minutes would make the drill wait as long.
        "TASKQUEUE_WEBHOOK_SCHEDULE": "0 1 2 5 5 5 10 10 10 10",
    }

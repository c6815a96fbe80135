"""The real processes of the service, on the servers of a test."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import psutil

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
START_SECONDS = 30.0


class Process:
    """One `taskqueue` command. Its log is a file that a failing test prints."""

    def __init__(self, command: str, environment: Mapping[str, str], directory: Path, *, code: Path = ROOT) -> None:
        self.command = command
        self.log = directory / f"{command}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "app.cli", command],
                cwd=code,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self, seconds: float) -> int:
        return self._popen.wait(seconds)

    def running(self) -> bool:
        return self._popen.poll() is None

    def children(self) -> list[psutil.Process]:
        """The pool's children (for a worker: without the keeper)."""
        return [one for one in self._descendants() if "app.worker.keeper" not in " ".join(_command(one))]

    def keeper(self) -> psutil.Process | None:
        """The keeper of a worker, while it runs."""
        found = [one for one in self._descendants() if "app.worker.keeper" in " ".join(_command(one))]
        return found[0] if found else None

    def stop(self) -> None:
        """End it and all that it started, whatever that takes."""
        family = [*self._descendants(), *([psutil.Process(self.pid)] if self.running() else [])]
        if self.running():
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(10)
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.wait(10)

    def _descendants(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [one for one in psutil.Process(self.pid).children() if one.status() != psutil.STATUS_ZOMBIE]
        return []


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


class Service:
    """API, worker and relay on one database and one Redis."""

    def __init__(
        self,
        environment: Mapping[str, str],
        directory: Path,
        changes: Mapping[str, Mapping[str, str]] | None = None,
        *,
        code: Path = ROOT,
    ) -> None:
        """Describe it; nothing is started.

        Args:
            environment: what all commands see.
            directory: for their own files.
            changes: variables that one command sees otherwise.
            code: the directory with the `app` that is run.
        """
        self.code = code
        self.environment = {"TASKQUEUE_DATA_DIR": str(directory), **environment}
        self.directory = directory
        self.changes = changes or {}
        self.processes: list[Process] = []
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{environment['PORT']}", timeout=10)

    def start(self, command: str, **changes: str) -> Process:
        environment = {**self.environment, **self.changes.get(command, {}), **changes}
        process = Process(command, environment, self.directory, code=self.code)
        self.processes.append(process)
        return process

    def run(self, command: str) -> int:
        """Run a command to its end, and return its exit code."""
        return self.start(command).wait(START_SECONDS)

    def start_all(self, *commands: str) -> None:
        """Start these, or all three, and wait until each of them works."""
        commands = commands or ("api", "worker", "relay")
        for name in commands:
            self.beat(name).unlink(missing_ok=True)
        processes = [self.start(command) for command in commands]

        def works() -> bool:
            for process in processes:
                assert process.running(), f"{process.command} ended at once:\n{process.log.read_text()}"
            beats = all(self.beat(name).exists() for name in commands if name != "api")
            return beats and ("api" not in commands or self.ready())

        try:
            wait_until(works, START_SECONDS, "the start of the service")
        except AssertionError as late:
            raise AssertionError(f"{late}\n{self.logs()}") from None

    def start_worker(self, **changes: str) -> Process:
        """Start a worker in place of those that run, and wait until it works."""
        for process in self.processes:
            if process.command == "worker":
                process.stop()
        self.beat("worker").unlink(missing_ok=True)
        started = self.start("worker", **changes)
        wait_until(self.beat("worker").exists, START_SECONDS, "the worker's start")
        return started

    def beat(self, command: str) -> Path:
        """The file that a worker or a relay touches while it works."""
        return self.directory / "run" / f"{command}.beat"

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/readyz").status_code == 200
        return False

    def process(self, command: str) -> Process:
        """The newest process of this command."""
        return next(one for one in reversed(self.processes) if one.command == command)

    def submit(self, task: str, *args: Any, **fields: Any) -> UUID:
        answer = self.http.post("/api/tasks/submit", json={"task": task, "args": list(args), **fields})
        assert answer.status_code == 202, answer.text
        return UUID(answer.json()["task_id"])

    def status(self, task_id: UUID) -> str:
        return str(self.http.get(f"/api/tasks/{task_id}/status").json()["status"])

    def view(self, task_id: UUID) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/api/tasks/{task_id}").json()
        return found

    def result(self, task_id: UUID) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/api/tasks/{task_id}/result").json()
        return found

    def reaches(self, task_id: UUID, *statuses: str, seconds: float = 20) -> str:
        """Wait until a task has one of these statuses."""
        return wait_until(
            lambda: found if (found := self.status(task_id)) in statuses else "",
            seconds,
            f"{'/'.join(statuses)} of {task_id} (now {self.status(task_id)})",
        )

    def ends(self, task_id: UUID, seconds: float = 20) -> dict[str, Any]:
        """Wait until a task has ended; returns what is known of it."""
        self.reaches(task_id, "SUCCESS", "FAILURE", "REVOKED", seconds=seconds)
        return self.view(task_id)

    def value(self, sql: str, *args: object) -> Any:
        """Ask Postgres itself: the first column of the first row."""

        async def ask() -> object:
            connection = await asyncpg.connect(self.environment["DATABASE_URL"])
            try:
                return await connection.fetchval(sql, *args)
            finally:
                await connection.close()

        return asyncio.run(ask())

    def execute(self, statements: str) -> None:
        """Have Postgres do several things at once."""

        async def run() -> None:
            connection = await asyncpg.connect(self.environment["DATABASE_URL"])
            try:
                await connection.execute(statements)
            finally:
                await connection.close()

        asyncio.run(run())

    def child_of(self, task_id: UUID) -> psutil.Process:
        """The pool child that last claimed a task."""
        worker = str(self.value("SELECT worker FROM task WHERE id = $1", task_id))
        return psutil.Process(int(worker.rpartition("/")[2]))

    def logs(self) -> str:
        return "\n".join(f"--- {one.command}\n{one.log.read_text()}" for one in self.processes)

    def close(self) -> None:
        self.http.close()
        for process in self.processes:
            process.stop()


@contextlib.contextmanager
def service(
    environment: Mapping[str, str],
    directory: Path,
    changes: Mapping[str, Mapping[str, str]] | None = None,
    *,
    code: Path = ROOT,
) -> Iterator[Service]:
    """A service that is ended with the block."""
    one = Service(environment, directory, changes, code=code)
    try:
        yield one
    finally:
        one.close()

"""The whole service on one machine: what `taskqueue dev` and `make run` do.

Embedded servers first, then the migrations, then API, worker and relay, all
children of this process. Whatever dies is started again; a signal ends all of
it, the servers last. It runs in one thread, because a child's death signal is
tied to the thread that started it.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from app.core import config, errors
from app.dev import directory, environment, linux, ports
from app.dev.child import Child, Program, Reaper
from app.dev.console import Console
from app.dev.embedded import EmbeddedServer

EXIT_SETTINGS = 2
"""What the processes return when a setting is wrong: starting them again would not help."""

SERVER_START_SECONDS = 120.0
"""How long a server may take to answer: it may have to recover first."""

SERVER_STARTS = 5
"""How often a server may die before its first answer until it is given up."""

SERVER_STOP_SECONDS = 1.2
GRACE_MARGIN_SECONDS = 0.3
"""Beyond its grace a process is killed. With a grace of 8 s, all of it ends within 10."""

KEY_WANTED = (
    "Each request must show a key, -H 'Authorization: Bearer <key>'."
    " With the settings as below, .venv/bin/taskqueue keys create makes one."
)
POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run() -> int:
    """Run the service until SIGINT or SIGTERM.

    Returns:
        0 after such a signal.

    Raises:
        SettingsError: if a setting is wrong, a port is taken, a server can't be embedded, or the
            data directory is in use.
    """
    user = environment.chosen()
    home = environment.data_dir(user)
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        with directory.exclusively(home):
            plan = environment.plan(user)
            os.environ.update(plan.environment)
            settings = config.load()
            address = ports.listening_address(settings.host, settings.port)
            return asyncio.run(Supervisor(plan, settings, address).run())
    except OSError as failed:
        raise errors.SettingsError(f"TASKQUEUE_DATA_DIR can't be used: {failed.strerror}") from None


class Supervisor:
    """Parent of everything that runs."""

    def __init__(self, plan: environment.Plan, settings: config.Settings, address: tuple[str, int]) -> None:
        self._plan = plan
        self._settings = settings
        self._address = address
        self._script = _script()
        self._console = Console()
        self._reaper = Reaper()
        self._stop = asyncio.Event()
        self._ready = False
        self._servers: list[Child] = []
        self._processes: list[Child] = []

    async def run(self) -> int:
        """Start everything, keep it running until a signal comes, and end it."""
        linux.adopt_orphans()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGCHLD, self._reaper.reap)
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            async with asyncio.TaskGroup() as tasks:
                work = tasks.create_task(self._work())
                await self._until_stopped(work)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            await self._end()
            self._console.finish()
        return 0

    async def _until_stopped(self, work: "asyncio.Task[None]") -> None:
        """Wait for a signal, or for the work to fail, which the task group tells."""
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([stopped, work], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        work.cancel()

    async def _work(self) -> None:
        (self._plan.data_dir / "run").mkdir(exist_ok=True)
        async with asyncio.TaskGroup() as tasks:
            for server in self._plan.servers:
                child = self._child(_server_program(server))
                self._servers.append(child)
                tasks.create_task(child.keep())
            for server, child in zip(self._plan.servers, self._servers, strict=True):
                await self._until_answering(server, child)
            await self._migrate()
            for name in environment.PROCESSES:
                child = self._child(self._own_program(name))
                self._processes.append(child)
                tasks.create_task(child.keep(given_up=self._is_final))
            await self._until_working()
            self._announce()

    def _is_final(self, code: int) -> bool:
        return code == EXIT_SETTINGS and not self._ready

    async def _until_answering(self, server: EmbeddedServer, child: Child) -> None:
        deadline = time.monotonic() + SERVER_START_SECONDS
        while not server.answers():
            if child.starts > SERVER_STARTS or time.monotonic() > deadline:
                raise errors.SettingsError(f"TASKQUEUE_DATA_DIR: the embedded {server.name} does not start: see above")
            await asyncio.sleep(POLL_SECONDS)

    async def _migrate(self) -> None:
        child = self._child(self._own_program("migrate"))
        self._processes.append(child)
        code = await child.run()
        self._processes.remove(child)
        if code != 0:
            raise errors.SettingsError("the migrations failed, see above: is DATABASE_URL right?")

    async def _until_working(self) -> None:
        _, worker, relay = self._processes
        while not self._ready:
            await asyncio.sleep(POLL_SECONDS)
            self._ready = self._beats(worker) and self._beats(relay) and await _answers_ready(self._address)

    def _beats(self, child: Child) -> bool:
        """Whether the process has shown a sign of life since its last start."""
        with contextlib.suppress(FileNotFoundError):
            beat = self._plan.data_dir / "run" / f"{child.program.name}.beat"
            return child.starts > 0 and beat.stat().st_mtime >= child.started_at
        return False

    def _announce(self) -> None:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        url = f"http://{host}:{self._settings.port}"
        self._console.say(f"ready: {url}")
        for line in _hints(url, self._plan):
            self._console.say(line)

    def _signalled(self) -> None:
        """End well on the first signal, at once on the second."""
        if self._stop.is_set():
            for child in self._processes:
                child.kill()
        self._stop.set()

    async def _end(self) -> None:
        """First those that use the servers, then the servers, then whatever else has been left behind."""
        grace = self._settings.grace_seconds + GRACE_MARGIN_SECONDS
        await asyncio.gather(*(child.stop(grace) for child in self._processes))
        await asyncio.gather(*(child.stop(SERVER_STOP_SECONDS) for child in self._servers))
        deadline = time.monotonic() + 1.0
        while (left := linux.children()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reaper.reap()
            await asyncio.sleep(0)

    def _child(self, program: Program) -> Child:
        return Child(program, self._console, self._reaper)

    def _own_program(self, name: str) -> Program:
        return Program(
            name=name,
            command=lambda: [sys.executable, self._script, name],
            options=partial(_own_options, self._plan.environment_of(name)),
        )


def _own_options(variables: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "env": dict(variables),
        "start_new_session": True,  # a terminal's Ctrl-C is for the supervisor alone
        "preexec_fn": linux.before_exec(parent_death_signal=signal.SIGTERM),
    }


def _server_program(server: EmbeddedServer) -> Program:
    return Program(
        name=server.name,
        command=server.command,
        options=server.popen_options,
        prepare=server.prepare,
        stop_signal=server.stop_signal,
    )


def _script() -> str:
    """The `taskqueue` command that started us, so that our processes are called by its name."""
    candidates: list[Callable[[], str | None]] = [
        lambda: sys.argv[0],
        lambda: str(Path(sys.executable).with_name("taskqueue")),
        lambda: shutil.which("taskqueue"),
    ]
    for candidate in candidates:
        path = Path(candidate() or "")
        if path.name == "taskqueue" and path.is_file():
            return str(path.absolute())
    raise errors.SettingsError("the taskqueue command is not installed: run `pip install -e .`")


async def _answers_ready(address: tuple[str, int]) -> bool:
    """Whether `GET /readyz` answers 200 within half a second."""
    try:
        async with asyncio.timeout(0.5):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n")
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


def _hints(url: str, plan: environment.Plan) -> list[str]:
    served = {process: port for process, port in plan.metrics_ports.items() if port}
    guarded = plan.environment["TASKQUEUE_AUTH_MODE"] == "api-key"
    ending = "Ctrl-C ends everything; the data stays."
    metrics = "   ".join(f"{process} http://{ports.ADDRESS}:{port}/metrics" for process, port in served.items())
    return [
        "",
        *([KEY_WANTED] if guarded else []),
        "Try:",
        f"  curl -X POST {url}/api/tasks/submit",
        f"  curl -X POST {url}/api/tasks/submit -H 'content-type: application/json' \\",
        '       -d \'{"webhook_url": "http://127.0.0.1:9000/"}\'',
        f"  curl {url}/api/tasks/<task_id>/status",
        f"  curl {url}/api/tasks/<task_id>/result",
        f"From Python, with the same settings:  set -a; . {plan.data_dir / environment.ENVIRONMENT_FILE}; set +a",
        "  .venv/bin/python -c 'from app.worker.tasks import long_task; print(long_task.delay(1).get(timeout=10))'",
        *([f"Metrics: {metrics}"] if metrics else []),
        ending if guarded else f"Documentation: {url}/docs   {ending}",
        "",
    ]


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong: a wrong setting if there is one among the failures, else all of them."""
    wrong = group.subgroup(errors.SettingsError)
    if wrong is None:
        return group
    found: BaseException = wrong
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found

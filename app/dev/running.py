"""An embedded server with its process, for tests and fault drills."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator

from app.dev.directory import exclusively
from app.dev.embedded import EmbeddedServer


class RunningServer:
    """An embedded server and its process, for tests: to be killed, started again, stopped."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where to connect; it stays the same over restarts."""
        return self.server.url

    @property
    def pid(self) -> int | None:
        """The id of its main process, or None while it is down."""
        return None if self._process is None else self._process.pid

    def start(self, deadline_seconds: float = 60.0) -> None:
        """Start it and return once it answers.

        Raises:
            SettingsError: if it can't be prepared.
            TimeoutError: if it ends, or does not answer in time.
        """
        self.server.prepare()
        with (self.server.directory / "log").open("ab") as log:
            options = self.server.popen_options()
            self._process = subprocess.Popen(
                self.server.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )
        try:
            self.server.wait_ready(deadline_seconds, self._process)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL it, as a fault would, and return once it is gone."""
        self._end(signal.SIGKILL)

    def stop(self, deadline_seconds: float = 10.0) -> None:
        """End it well; SIGKILL if that takes too long."""
        self._end(self.server.stop_signal, deadline_seconds)

    def restart(self) -> None:
        """End it well and start it again."""
        self.stop()
        self.start()

    def _end(self, number: signal.Signals, deadline_seconds: float | None = None) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(deadline_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(server: EmbeddedServer) -> Iterator[RunningServer]:
    """A server that answers, for as long as the block runs.

    Raises:
        SettingsError: if it can't be prepared, or its directory is in use.
        TimeoutError: if it does not answer within a minute.
    """
    started = RunningServer(server)
    with exclusively(server.directory):
        try:
            started.start()
            yield started
        finally:
            started.stop()

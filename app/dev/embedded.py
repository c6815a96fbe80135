"""A Redis and a Postgres of our own, for one machine: prepared, started, asked, never daemonised.

A server lives in one directory, which remembers its port and its password, so
that its URL is the same after every start. Whoever starts it is its parent;
when the parent dies, even by SIGKILL, the server ends as well, politely.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from app.core import errors
from app.dev import binaries, directory, linux, ports

NAME = "taskqueue"
"""The superuser and the database of the embedded Postgres."""

INITDB_FLAGS = ("--auth=scram-sha-256", "--no-instructions")

LEFTOVERS_SECONDS = 5.0
"""How long a server whose parent died may take to end before it is killed."""

POLL_SECONDS = 0.02


class EmbeddedServer(ABC):
    """A server on this machine's loopback.

    Attributes:
        directory: everything it keeps, as an absolute path; its command line names it.
        name: what it is, in logs.
        stop_signal: asks it to end soon and well.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]

    def __init__(self, home: Path) -> None:
        self.directory = home.resolve()
        self._port: int | None = None

    @property
    def port(self) -> int:
        """Its TCP port: the one of last time if that is free, and the same for the life of this object."""
        if self._port is None:
            self._port = ports.remembered_port(self._own_directory() / "port")
        return self._port

    @property
    def password(self) -> str:
        """Its password, made when first asked for and kept where only its owner reads."""
        return directory.remembered(self._own_directory() / "password", lambda: secrets.token_hex(24))

    @property
    @abstractmethod
    def url(self) -> str:
        """Where and how to connect, password included."""

    @abstractmethod
    def prepare(self) -> None:
        """Make it ready to start; may be repeated, and must be before every start. Blocks.

        Raises:
            SettingsError: if its program is not on this machine, or can't use the directory.
        """

    @abstractmethod
    def command(self) -> list[str]:
        """What to run, in the foreground."""

    @abstractmethod
    def popen_options(self) -> Mapping[str, Any]:
        """How to run it: keyword arguments for `subprocess.Popen`."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes connections and requests now. Waits half a second at most."""

    def wait_ready(self, deadline_seconds: float, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """Return once it answers.

        Args:
            deadline_seconds: how long to wait at most.
            process: where given, its death ends the waiting.

        Raises:
            TimeoutError: if it does not answer in time, or ended.
        """
        deadline = time.monotonic() + deadline_seconds
        while not self.answers():
            if process is not None and process.poll() is not None:
                raise TimeoutError(f"{self.name} ended with {process.returncode} before it answered")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not answer within {deadline_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def _own_directory(self) -> Path:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.directory


class EmbeddedRedis(EmbeddedServer):
    """A Redis that keeps an append-only file and refuses to forget."""

    name = "redis"
    stop_signal = signal.SIGTERM

    def __init__(self, home: Path, *, databases: int = 16) -> None:
        super().__init__(home)
        self._databases = databases

    @property
    def url(self) -> str:
        """`redis://:password@127.0.0.1:port/0`."""
        return f"redis://:{self.password}@{ports.ADDRESS}:{self.port}/0"

    def prepare(self) -> None:
        """Write its configuration, and wait until no former process of it is left."""
        binaries.redis_server()
        _end_leftovers(self._own_directory(), "redis-server", LEFTOVERS_SECONDS)
        path = self._configuration
        path.touch(mode=0o600)
        path.write_text("".join(f"{line}\n" for line in self._directives()))

    def command(self) -> list[str]:
        """`redis-server <directory>/redis.conf`."""
        return [str(binaries.redis_server()), str(self._configuration)]

    def popen_options(self) -> Mapping[str, Any]:
        """In a session of its own, ending with its parent."""
        return {
            "cwd": self.directory,
            "start_new_session": True,
            "preexec_fn": linux.before_exec(parent_death_signal=self.stop_signal),
        }

    def answers(self) -> bool:
        """Whether it answers PING, which it does not while it still loads its file."""
        return b"+PONG" in _ask(self.port, f"AUTH {self.password}\r\nPING\r\n".encode(), until=b"\r\n", times=2)

    @property
    def _configuration(self) -> Path:
        return self.directory / "redis.conf"

    def _directives(self) -> Iterator[str]:
        yield f"bind {ports.ADDRESS}"
        yield f"port {self.port}"
        yield f"requirepass {self.password}"
        yield f"dir {_quoted(self.directory)}"
        yield f"databases {self._databases}"
        yield "appendonly yes"
        yield "appendfsync everysec"
        yield 'save ""'
        yield "maxmemory-policy noeviction"
        yield "set-proc-title no"  # its title would hide the directory
        yield "daemonize no"
        yield "loglevel warning"


class EmbeddedPostgres(EmbeddedServer):
    """A Postgres that keeps its promises (fsync on), with one superuser and one database, `taskqueue`.

    Postgres refuses to run as root. Started by root it runs as `nobody`, who
    owns its files and is let through the directories above them.
    """

    name = "postgres"
    stop_signal = signal.SIGINT  # fast shutdown: SIGTERM would wait for clients to leave

    def __init__(self, home: Path, *, max_connections: int = 100, durable: bool = True) -> None:
        """Describe the server; nothing is touched yet.

        Args:
            home: the directory where it lives.
            max_connections: of all clients together.
            durable: False gives up safety from a loss of power, for speed in tests.
        """
        super().__init__(home)
        self._max_connections = max_connections
        self._durable = durable

    @property
    def url(self) -> str:
        """`postgresql://taskqueue:password@127.0.0.1:port/taskqueue`."""
        return f"postgresql://{NAME}:{self.password}@{ports.ADDRESS}:{self.port}/{NAME}"

    def prepare(self) -> None:
        """Make the database cluster if there is none, and clear up after a crash."""
        binaries.postgres_directory()
        self._own_directory()
        if not self._data.exists():
            self._initialise()
        self._give_to_its_user()
        _end_leftovers(self._data, "postgres", LEFTOVERS_SECONDS if self._postmaster_lives() else 0.0)
        if linux.IS_LINUX:  # nobody is left, so this names no one; its number may have been given to another
            (self._data / "postmaster.pid").unlink(missing_ok=True)

    def command(self) -> list[str]:
        """`postgres -D <directory>/data`, and its settings."""
        settings = {
            "listen_addresses": ports.ADDRESS,
            "port": self.port,
            "unix_socket_directories": "",  # the path of a socket may not be long
            "max_connections": self._max_connections,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_line_prefix": "",
            "log_checkpoints": "off",
            "log_min_error_statement": "panic",  # a statement may carry what is not for logs
        }
        if not self._durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", str(self._data), *flags]

    def popen_options(self) -> Mapping[str, Any]:
        """In a session of its own, as a user that is not root, ending with its parent."""
        return self._options(self.stop_signal)

    def answers(self) -> bool:
        """Whether it asks a new connection for its password, which it does not while it recovers."""
        parameters = f"user\0{NAME}\0database\0{NAME}\0\0".encode()
        startup = struct.pack("!ii", 8 + len(parameters), 3 << 16) + parameters
        return _ask(self.port, startup)[:1] == b"R"

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def _program(self, name: str) -> str:
        return str(binaries.postgres_directory() / name)

    def _options(self, parent_death_signal: signal.Signals) -> Mapping[str, Any]:
        user = linux.unprivileged_user()
        return {
            "cwd": self.directory,
            "env": {"LC_ALL": "C", "PATH": os.defpath},
            "start_new_session": True,
            "preexec_fn": linux.before_exec(parent_death_signal=parent_death_signal, user=user),
        }

    def _initialise(self) -> None:
        """Make the cluster beside its place and move it there whole: half a cluster is never found."""
        unfinished = self.directory / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        self.password  # noqa: B018  # written to the file that initdb reads
        self._give_to_its_user()
        sync = [] if self._durable else ["--no-sync"]
        secret = f"--pwfile={self.directory / 'password'}"
        self._run(
            [
                "initdb",
                "-D",
                str(unfinished),
                "-U",
                NAME,
                "-E",
                "UTF8",
                "--locale=C",
                *INITDB_FLAGS,
                secret,
                *sync,
            ]
        )
        self._run(["postgres", "--single", "-D", str(unfinished), "postgres"], f"CREATE DATABASE {NAME}\n")
        unfinished.rename(self._data)

    def _run(self, command: list[str], text: str = "") -> None:
        try:
            subprocess.run(
                [self._program(command[0]), *command[1:]],
                input=text.encode(),
                capture_output=True,
                check=True,
                **self._options(signal.SIGKILL),
            )
        except subprocess.CalledProcessError as failed:
            said = failed.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {failed.returncode}"]
            raise errors.SettingsError(f"TASKQUEUE_DATA_DIR can't hold a Postgres: {said[-1]}") from None

    def _give_to_its_user(self) -> None:
        user = linux.unprivileged_user()
        if user is None or self.directory.stat().st_uid == user.uid:
            return
        for parent, _, names in os.walk(self.directory):
            for path in [parent, *(os.path.join(parent, name) for name in names)]:  # noqa: PTH118  # os.walk's own words
                os.chown(path, user.uid, user.gid, follow_symlinks=False)

    def _postmaster_lives(self) -> bool:
        try:
            pid = int((self._data / "postmaster.pid").read_text().split("\n", 1)[0])
        except (OSError, ValueError):
            return False
        return pid in linux.processes_in(self._data, "postgres")


def _ask(port: int, request: bytes, *, until: bytes = b"", times: int = 1) -> bytes:
    """Send one request and read the answer until it holds `until` so many times, or is there at all."""
    answer = b""
    try:
        with socket.create_connection((ports.ADDRESS, port), timeout=0.5) as connection:
            connection.sendall(request)
            while answer.count(until) < times or not answer:
                part = connection.recv(4096)
                if not part:
                    break
                answer += part
    except OSError:
        return b""
    return answer


def _end_leftovers(home: Path, program: str, patience_seconds: float) -> None:
    """Wait for processes of a former start, which end because their parent died; kill what stays."""
    deadline = time.monotonic() + patience_seconds
    while left := list(linux.processes_in(home, program)):
        if time.monotonic() >= deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'

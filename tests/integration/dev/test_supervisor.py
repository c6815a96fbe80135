"""What the supervisor does with processes, shown with stand-ins for ours and the real servers."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil
import pytest

from app.dev import linux, ports
from tests.support import stand_in
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not linux.IS_LINUX, reason="it looks into /proc, and relies on death signals"),
]

LINE = re.compile(r"\d\d:\d\d:\d\d\.\d{3}  (api|worker|relay|migrate|redis|postgres) *\| ")


class Supervised:
    """A supervisor with its processes, started in `directory`; what it prints is read from a file."""

    def __init__(self, directory: Path, **variables: str) -> None:
        self.port = ports.free_ports(1)[0]
        self._output = directory / "output"
        self._errors = directory / "errors"
        script = stand_in.install(directory)
        environment = {**os.environ, "PORT": str(self.port), **variables}
        with self._output.open("wb") as output, self._errors.open("wb") as complaints:
            self.process = subprocess.Popen(
                [script, "dev"], cwd=directory, env=environment, stdout=output, stderr=complaints
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def complaints(self) -> str:
        return self._errors.read_text()

    def wait_ready(self) -> None:
        wait_until(
            lambda: f"\nready: http://127.0.0.1:{self.port}\n" in self.output or self.process.poll() is not None,
            deadline_seconds=30,
            what="ready",
        )
        assert self.process.poll() is None, self.output + self.complaints

    def child(self, words: str) -> psutil.Process:
        """The child whose command line holds these words."""
        return wait_until(lambda: list(self._children(words)), what=f"a child called {words}")[0]

    def has_another(self, words: str, former: psutil.Process) -> bool:
        return any(child != former for child in self._children(words))

    def everyone(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def _children(self, words: str) -> Iterator[psutil.Process]:
        for child in psutil.Process(self.process.pid).children():
            try:
                if words in " ".join(child.cmdline()):
                    yield child
            except psutil.Error:  # it has gone meanwhile
                continue


class Start(Protocol):
    """Starts a supervisor, with these variables in its environment, in a directory of its own."""

    def __call__(self, **variables: str) -> Supervised: ...


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    started: list[Supervised] = []

    def starting(**variables: str) -> Supervised:
        home = directory / str(len(started))
        home.mkdir()
        started.append(Supervised(home, **variables))
        return started[-1]

    yield starting
    for supervised in started:
        if supervised.process.poll() is None:
            supervised.process.terminate()
        supervised.process.wait(20)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_everything_is_started_said_and_ended(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    everyone = supervised.everyone()
    for words in ("taskqueue api", "taskqueue worker", "taskqueue relay", "postgres -D", "redis-server"):
        assert supervised.child(words) in everyone
    before_ready = supervised.output.split("\nready: ")[0].splitlines()
    assert all(LINE.match(line) for line in before_ready), before_ready
    began = time.monotonic()
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(10) == 0
    assert time.monotonic() - began < 5
    assert gone(everyone)
    assert supervised.complaints == ""


def test_whatever_dies_is_started_again_within_a_second(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    for words in ("taskqueue api", "taskqueue worker", "taskqueue relay", "postgres -D", "redis-server"):
        victim = supervised.child(words)
        victim.send_signal(signal.SIGKILL)
        wait_until(partial(supervised.has_another, words, victim), 1.0, f"another {words}")


def test_a_killed_process_takes_its_own_children_with_it(start: Start) -> None:
    supervised = start(STAND_IN="worker-has-a-child")
    supervised.wait_ready()
    worker = supervised.child("taskqueue worker")
    children = wait_until(worker.children, what="the worker's child")
    worker.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(children), what="the end of the worker's child")


def test_what_does_not_end_is_killed_within_ten_seconds(start: Start) -> None:
    supervised = start(STAND_IN="worker-is-deaf relay-has-a-child")
    supervised.wait_ready()
    wait_until(supervised.child("taskqueue relay").children, what="the relay's child")
    everyone = supervised.everyone()
    began = time.monotonic()
    supervised.process.send_signal(signal.SIGTERM)
    assert supervised.process.wait(10) == 0
    assert time.monotonic() - began < 10
    assert gone(everyone)


def test_a_second_signal_does_not_wait_for_the_grace(start: Start) -> None:
    supervised = start(STAND_IN="worker-is-deaf")
    supervised.wait_ready()
    supervised.process.send_signal(signal.SIGINT)
    api = supervised.child("taskqueue api")
    wait_until(lambda: gone([api]), what="the end of the API")
    supervised.process.send_signal(signal.SIGINT)
    assert supervised.process.wait(3) == 0


def test_nothing_outlives_a_supervisor_that_was_killed(start: Start) -> None:
    supervised = start()
    supervised.wait_ready()
    everyone = supervised.everyone()
    supervised.process.send_signal(signal.SIGKILL)
    supervised.process.wait(5)
    wait_until(lambda: gone(everyone), what="the end of everyone")


def test_a_reader_that_stops_reading_does_not_stop_the_supervisor(directory: Path) -> None:
    script = stand_in.install(directory)
    variables = {**os.environ, "PORT": str(ports.free_ports(1)[0]), "STAND_IN": "worker-is-noisy"}
    with subprocess.Popen([script, "dev"], cwd=directory, env=variables, stdout=subprocess.PIPE) as process:
        beat = directory / ".taskqueue" / "run" / "worker.beat"
        wait_until(lambda: beat.exists() and beat.read_text() == "said it all", 30, "the worker's last word")
        process.terminate()
        assert process.wait(10) == 0


def test_a_port_in_use_is_one_line_that_names_it(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        supervised = start(PORT=str(port))
        assert supervised.process.wait(10) == 2
    assert supervised.complaints == f"taskqueue: PORT {port} is in use: stop what listens there, or set PORT\n"
    assert supervised.output == ""


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"HOST": "203.0.113.9"}, "taskqueue: HOST is wrong: "),
        ({"TASKQUEUE_QUEUES": "a,a"}, "taskqueue: TASKQUEUE_QUEUES is wrong: "),
        ({"TASKQUEUE_METRICS_PORT": "x"}, "taskqueue: TASKQUEUE_METRICS_PORT is wrong: "),
        ({"TASKQUEUE_DATA_DIR": "/proc/nowhere"}, "taskqueue: TASKQUEUE_DATA_DIR can't be used: "),
        ({"STAND_IN": "worker-refuses"}, "taskqueue: worker can't start: see above"),
        ({"STAND_IN": "no-migration"}, "taskqueue: the migrations failed"),
    ],
)
def test_a_wrong_setting_ends_it_with_one_line(start: Start, variables: dict[str, str], line: str) -> None:
    supervised = start(**variables)
    assert supervised.process.wait(20) == 2
    assert supervised.complaints.startswith(line)
    assert supervised.complaints.count("\n") == 1


def test_two_with_one_data_directory_are_refused_and_with_two_do_not_meet(start: Start, directory: Path) -> None:
    first, other = start(), start()
    first.wait_ready()
    other.wait_ready()
    second = start(TASKQUEUE_DATA_DIR=str(directory / "0" / ".taskqueue"))
    assert second.process.wait(10) == 2
    assert second.complaints.startswith("taskqueue: TASKQUEUE_DATA_DIR is in use by another process")
    other.process.terminate()
    assert other.process.wait(10) == 0
    assert first.child("postgres -D").is_running()

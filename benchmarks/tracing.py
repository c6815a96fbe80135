"""What traces cost: submits and no-op tasks without a collector, and with 1 %, 10 % and 100 % of them sampled.

    python -m benchmarks.tracing [--rounds N] [--tasks N] [--json FILE]

It starts a Postgres, a Redis, a collector that throws away what it gets, and for
each of the four an API and a worker with a queue of their own. In turns, which are
short and begin with another each time, each is given the same number of tasks, one
after another, so that the machine's drift meets all alike. What counts is the
median of the ratios, turn by turn, of the processor time that the API spends on a
submit and the worker on a task: it includes making, encoding and sending the
spans, wherever in the process that happens, and hardly depends on what else runs.
Spans are sent once in a turn, so that a batch has those of a hundred tasks: fewer
than under load (512 spans at once), so what sending costs is told rather too high.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil

from app import migrations
from app.core.config import Settings
from app.dev import ports
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import running
from benchmarks.clocks import cpu_seconds, turns
from benchmarks.waiting import process

MODES = {"off": None, "1 %": "0.01", "10 %": "0.1", "100 %": "1"}
START_SECONDS = 120.0
ENOUGH_SECONDS = 300.0
SEND_SECONDS = 1.0
"""How long spans are gathered before they are sent."""


class _Discard(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Take a batch and forget it."""
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def collector() -> Iterator[str]:
    """The URL of a collector that keeps nothing."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Discard)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(slots=True)
class Side:
    """One of the four, and what was measured of it: seconds for each task, round by round."""

    http: httpx.Client
    queue: str
    api: psutil.Process
    worker: psutil.Process
    found: dict[str, list[float]] = field(default_factory=dict)

    def round(self, tasks: int) -> None:
        """Submit so many tasks, one after another, and see them run."""
        before = self._spent()
        latencies = []
        for number in range(tasks):
            began = time.perf_counter()
            wanted = {"task": "sample.echo", "args": [number], "queue": self.queue}
            answer = self.http.post("/api/tasks/submit", json=wanted)
            latencies.append(time.perf_counter() - began)
            answer.raise_for_status()
        deadline = time.monotonic() + ENOUGH_SECONDS
        while self.http.get(f"/api/tasks/{answer.json()['task_id']}/status").json()["status"] != "SUCCESS":
            if time.monotonic() > deadline:
                raise TimeoutError("the tasks did not end")
            time.sleep(0.05)
        # Until all that is gathered has been sent.
        time.sleep(SEND_SECONDS + 0.3)
        for name, spent in self._spent().items():
            self.found.setdefault(name, []).append((spent - before[name]) / tasks)
        self.found.setdefault("submit latency", []).append(statistics.median(latencies))

    def _spent(self) -> dict[str, float]:
        children = self.worker.children(recursive=True)
        keepers = [one for one in children if "app.worker.keeper" in one.cmdline()]
        pool = [one for one in children if one not in keepers]
        return {
            "submit, API": cpu_seconds(*self.api.children(recursive=True)),
            "task, pool": cpu_seconds(*pool),
            "task, whole worker": cpu_seconds(self.worker, *children),
        }


def _command(environment: dict[str, str], command: str, home: Path, stack: contextlib.ExitStack) -> psutil.Process:
    known = set(psutil.Process().children())
    stack.enter_context(process(command, environment, home / f"{command}.log"))
    [started] = set(psutil.Process().children()) - known
    return started


def _side(name: str, given: dict[str, str], endpoint: str, home: Path, stack: contextlib.ExitStack) -> Side:
    [port] = ports.free_ports(1)
    queue = "queue-" + name.replace(" %", "")
    directory = home / queue
    directory.mkdir()
    environment = given | {"PORT": str(port), "TASKQUEUE_QUEUES": queue, "TASKQUEUE_DATA_DIR": str(directory)}
    ratio = MODES[name]
    if ratio is not None:
        environment |= {
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": ratio,
            "OTEL_BSP_SCHEDULE_DELAY": str(int(SEND_SECONDS * 1000)),
        }
    api, worker = (_command(environment, command, directory, stack) for command in ("api", "worker"))
    http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/readyz").is_success and (directory / "run" / "worker.beat").exists():
                return Side(http, queue, api, worker)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} did not start")
        time.sleep(0.1)


def measured(options: argparse.Namespace) -> dict[str, Side]:
    """All four, with what was measured of them."""
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(running(EmbeddedPostgres(home / "postgres")))
        bell = stack.enter_context(running(EmbeddedRedis(home / "redis")))
        given = {
            "DATABASE_URL": postgres.url,
            "REDIS_URL": bell.url,
            "TASKQUEUE_AUTH_MODE": "none",
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_METRICS_PORT": "0",
            "TASKQUEUE_CONCURRENCY": "1",
        }
        migrations.migrate(Settings.model_validate({**given, "TASKQUEUE_METRICS_PORT": 0}))
        endpoint = stack.enter_context(collector())
        sides = {name: _side(name, given, endpoint, home, stack) for name in MODES}
        for side in sides.values():
            side.round(20)
            side.found.clear()
        for order in turns(list(sides), options.rounds):
            for name in order:
                sides[name].round(options.tasks)
        return sides


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=24, help="8, or some times as many, are fair to all")
    parser.add_argument("--tasks", type=int, default=100, help="in each round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sides = measured(options)
    base = sides["off"].found
    for what in base:
        for name, side in sides.items():
            ratios = [one / other for one, other in zip(side.found[what], base[what], strict=True)]
            low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(
                f"{what + ', ' + name:<28} {statistics.median(side.found[what]) * 1e3:7.3f} ms; "
                f"ratio {ratio:.3f} (half of the rounds: {low:.2f} to {high:.2f})"
            )
    if options.json:
        options.json.write_text(json.dumps({name: side.found for name, side in sides.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

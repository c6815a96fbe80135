"""The API against its own description: schemathesis, in all its phases and with all its checks.

`make test-api` starts the whole service on servers of its own, has schemathesis
make up requests from `/openapi.json`, right ones and wrong ones, alone and one
after the other, and counts. A seed repeats what was made up. The service
asks for API keys; `--url` goes to one that runs already, with the `--key` given.

What the tasks of made-up requests would do to the machine is bounded: no URL
may be called, and none gets much memory.
"""

import argparse
import contextlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.core.scopes import Scope
from app.dev import ports
from tests.support import servers
from tests.support.service import ROOT, service
from tests.support.waiting import wait_until

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
RATES = [f"TASKQUEUE_RATE_LIMIT_{budget}" for budget in ("SUBMIT", "POLL", "WEBHOOKS")]
CASES = 10_000
PER_OPERATION = 280
"""How many cases one run makes up for an operation in its fuzzing phase, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run until there were enough cases, and say what came of them; 1 if anything was found."""
    options = _parser().parse_args(argv)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    # So that a run that is told to end leaves no service behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    cases = 0
    with tempfile.TemporaryDirectory(prefix="taskqueue-conformance-") as home, contextlib.ExitStack() as stack:
        url, key = (options.url, options.key) if options.url else stack.enter_context(_running(Path(home)))
        while cases < options.cases:
            report = Path(home) / "report.json"
            found = _schemathesis(url, key, seed, options.examples, report)
            made = _cases(report)
            cases += made
            outcome = "something was found" if found else "nothing found"
            sys.stdout.write(f"seed {seed}: {made} cases, {outcome}; {cases} in all\n")
            sys.stdout.flush()
            if found or not made:
                return 1
            seed += 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--cases", type=int, default=CASES, help="how many at least (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the first run; each further one has the next number")
    parser.add_argument("--examples", type=int, default=PER_OPERATION, help="for an operation at most (%(default)s)")
    parser.add_argument("--url", help="a service that runs already; one of its own unless given")
    parser.add_argument("--key", help="an API key, for a service that asks for one")
    return parser


def _schemathesis(url: str, key: str | None, seed: int, examples: int, report: Path) -> int:
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION), "run", f"{url}/openapi.json",
        "--phases", "examples,coverage,fuzzing,stateful", "--checks", "all", "--mode", "all",
        "--seed", str(seed), "--max-examples", str(examples), "--generation-database", "none",
        # No schema can say that a text has no NUL; that it is refused, tests of our own say.
        "--generation-allow-x00", "false", "--request-timeout", "30", "--continue-on-failure",
        # A long poll takes as long as it was asked to.
        "--max-response-time", "28",
        "--report", "json", "--report-json-path", str(report),
    ]  # fmt: skip
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    # Its caches go where the report goes, and with it.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, check=False, cwd=report.parent, env=environment).returncode


def _cases(report: Path) -> int:
    told: dict[str, Any] = json.loads(report.read_text())
    return int(told["test_cases"]["generated"])


@contextlib.contextmanager
def _running(home: Path) -> Iterator[tuple[str, str]]:
    """The address of a whole service that nobody else uses, and a key that opens all of it."""
    session = servers.SessionServers()
    with contextlib.closing(session), servers.database(session.started().postgres) as database:
        [port] = ports.free_ports(1)
        environment = {
            "DATABASE_URL": database,
            "REDIS_URL": servers.with_database(session.started().redis, 0),
            "PORT": str(port),
            "TASKQUEUE_AUTH_MODE": "api-key",
            "TASKQUEUE_SECRET_KEY": secrets.token_hex(32),
            **dict.fromkeys(RATES, "0"),
            "TASKQUEUE_SAMPLE_TASKS": "true",
            "TASKQUEUE_METRICS_PORT": "0",
            "TASKQUEUE_CONCURRENCY": "2",
            "TASKQUEUE_TASK_MEMORY_MEBIBYTES": "256",
            "TASKQUEUE_WEBHOOK_BLOCKED_CIDRS": "0.0.0.0/0,::/0",
        }
        with service(environment, home) as one:
            assert one.run("migrate") == 0, one.logs()
            one.start_all()
            wait_until(one.ready, 30, "the service")
            yield f"http://127.0.0.1:{port}", _key(environment)
            assert all(process.running() for process in one.processes if process.command != "migrate"), one.logs()


def _key(environment: Mapping[str, str]) -> str:
    scopes = [f"--scope={scope}" for scope in Scope]
    made = subprocess.run(
        [sys.executable, "-m", "app.cli", "keys", "create", "--owner", "schemathesis", "--json", *scopes],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return str(json.loads(made.stdout)["key"])


if __name__ == "__main__":
    sys.exit(main())

"""A real Prometheus on loopback, and its tool, where the machine has them."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from app.dev import ports
from k8s.observability import prometheus as observed
from tests.support.waiting import wait_until

START_SECONDS = 30.0
WHERE = "is not on PATH (Debian: prometheus; .ci/run fetches it)"
MISSING = None if shutil.which(observed.PROGRAM) else f"{observed.PROGRAM} {WHERE}"
"""Why tests that need the server are skipped, if they are."""


def program(name: str) -> str:
    """The path of `promtool` or `prometheus`; the test is skipped where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} {WHERE}")
    return found


def promtool(*words: str | Path, directory: Path | None = None) -> str:
    """What the tool says; it is an error if it complains."""
    ended = subprocess.run(
        [program("promtool"), *map(str, words)],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=590,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


class Prometheus:
    """A Prometheus that scrapes every second, until the block ends."""

    def __init__(self, directory: Path, targets: Path, rules: Sequence[Path]) -> None:
        """Start it.

        Args:
            directory: for its data, its configuration and its log.
            targets: who is scraped, as its file_sd reads it.
            rules: files of rules.
        """
        found = program(observed.PROGRAM)
        [port] = ports.free_ports(1)
        (directory / "prometheus.yml").write_text(observed.configuration(targets, rules, interval_seconds=1))
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                observed.command(found, directory, port), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._http = httpx.Client(base_url=f"http://{ports.ADDRESS}:{port}", timeout=10)
        wait_until(self._ready, START_SECONDS, "Prometheus's start")

    def _ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer; what Prometheus complains of is an error."""
        answer = self._http.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, f"{parameters}: {answer.text}"
        return answer.json()["data"]

    def values(self, expression: str) -> list[float]:
        """The values of an expression now, one for each series; NaN is none."""
        found = self.ask("query", query=expression)
        pairs = [found["result"]] if found["resultType"] == "scalar" else [one["value"] for one in found["result"]]
        numbers = [float(text) for _, text in pairs]
        return [number for number in numbers if number == number]  # noqa: PLR0124  # NaN differs from itself

    def reaches(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until an expression has a value."""
        wait_until(lambda: self.values(expression), seconds, expression)

    def close(self) -> None:
        self._http.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""An API that is stopped while clients talk to it."""

import signal
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from tests.faults.audit import Figures
from tests.faults.stack import Stack
from tests.support.waiting import wait_until

Report = Callable[[Figures], None]

CLIENTS = 8

pytestmark = pytest.mark.timeout(240)


class Talk:
    """One client that submits as fast as it is answered, over a connection that it keeps or a new one each time."""

    def __init__(self, running: Stack, *, keeps: bool) -> None:
        self.answers: list[int] = []
        self.failures: list[httpx.TransportError] = []
        self._running = running
        self._stop = threading.Event()
        limits = httpx.Limits(max_keepalive_connections=None if keeps else 0)
        self._http = httpx.Client(base_url=running.service.http.base_url, timeout=10, limits=limits)
        self._thread = threading.Thread(target=self._talk)
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        self._http.close()

    def _talk(self) -> None:
        wanted = self._running._wanted("faults.work", [0.0], False, {})
        while not self._stop.wait(0.02):
            try:
                answer = self._http.post("/api/tasks/submit", json=wanted)
            except httpx.TransportError as failed:
                self.failures.append(failed)
                continue
            self.answers.append(answer.status_code)
            if answer.status_code == 202:
                with self._running.client.lock:
                    self._running.client.acknowledged[answer.json()["task_id"]] = None


def test_an_api_that_is_stopped_answers_what_it_accepted(running: Stack, report: Report) -> None:
    talks = [Talk(running, keeps=number % 2 == 0) for number in range(CLIENTS)]
    try:
        recovery = 0.0
        for _ in range(3):
            acknowledge(running, 50)
            old = running.api
            running.expect_end(old)
            old.signal(signal.SIGTERM)
            running.start_api()
            assert old.wait(10) == 0
            ended = time.time()
            acknowledge(running, 1)
            recovery = max(recovery, time.time() - ended)
    finally:
        for talk in talks:
            talk.end()
    assert {answer for talk in talks for answer in talk.answers} == {202}
    [row] = running.fetch("SELECT count(*) AS n FROM task")
    assert row["n"] == len(running.client.acknowledged), "a submit was carried out and not answered"
    # Refused, or closed before the API took the request; never an answer that breaks off, and never silence.
    failures = [one for talk in talks for one in talk.failures]
    assert {type(one) for one in failures} <= {httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError}
    assert not [one for one in failures if "incomplete" in str(one) or "complete message" in str(one)]
    report(running.finish("API stopped under load, three times", recovery_seconds=recovery, allowed_seconds=15))


def acknowledge(running: Stack, more: int) -> None:
    """Wait until so many more tasks were acknowledged."""
    known = len(running.client.acknowledged)
    wait_until(lambda: len(running.client.acknowledged) >= known + more, 30, f"{more} more acknowledged tasks")

"""Tasks that note each of their runs in a file, for the fault suite: what happened, whatever the rows say.

A line is written by one `write` to a file opened for appending, so lines of
many processes don't mix, and none is lost with its process.
"""

import ctypes
import os
import signal
import time

from app.catalog import task
from app.worker import execution

LEDGER_VARIABLE = "FAULTS_LEDGER"
STEP_SECONDS = 0.02


def _note(what: str) -> None:
    attempt = execution._running
    assert attempt is not None
    claim = attempt.claimed.claim
    line = f"{what} {claim.task_id} {claim.attempt} {claim.token} {time.time():.3f} {os.getpid()}\n"
    ledger = os.open(os.environ[LEDGER_VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(ledger, line.encode())
    finally:
        os.close(ledger)


def _work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(STEP_SECONDS, left))


@task("faults.work", max_retries=5, autoretry_for=(OSError,), retry_backoff=True)
def work(seconds: float = 0.0, failures: int = 0) -> str:
    """Work for that long; the first so many runs fail at the end of it."""
    _note("begin")
    _work(seconds)
    if execution.current_failures() < failures:
        raise OSError("on purpose")
    _note("end")
    return "done"


@task("faults.die")
def die(deaths: int = 1, seconds: float = 0.0) -> str:
    """Kill the process that runs it, in each of the first so many attempts."""
    _note("begin")
    _work(seconds)
    attempt = execution._running
    assert attempt is not None
    if attempt.claimed.budgets.crashes < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    _note("end")
    return "survived"


@task("faults.hold_the_gil")
def hold_the_gil(seconds: int) -> str:
    """Spend that long in one C call that lets no other thread run."""
    _note("begin")
    until = time.monotonic() + seconds
    libc = ctypes.PyDLL(None)
    while (left := until - time.monotonic()) > 0:  # a signal ends the call early
        libc.usleep(int(left * 1e6))
    _note("end")
    return "done"

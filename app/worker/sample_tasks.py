"""Tasks for trying things out, for the fault suite and for the cluster tests.

They exist only with TASKQUEUE_SAMPLE_TASKS=true: some of them do harm on purpose.
"""

import os
import signal
import time
from typing import Annotated, Any, NoReturn

from pydantic import Field

from app.catalog import task
from app.worker import execution

STEP_SECONDS = 0.05
MEBIBYTE = 1024 * 1024


class SampleError(Exception):
    """What `sample.fail` and `sample.flaky` raise."""


@task("sample.echo")
def echo(value: Any) -> Any:
    """Return the argument."""
    return value


@task("sample.fail", autoretry_for=(SampleError,), retry_backoff=True)
def fail(message: Annotated[str, Field(max_length=10_000)] = "This task always fails") -> NoReturn:
    """Raise, after every retry too."""
    raise SampleError(message)


@task("sample.flaky", autoretry_for=(SampleError,), retry_backoff=True)
def flaky(failures: Annotated[int, Field(ge=0, le=101)] = 1) -> str:
    """Raise that many times, then succeed."""
    spent = execution.current_failures()
    if spent < failures:
        raise SampleError(f"Failure {spent + 1} of {failures}")
    return f"Succeeded after {failures} failure{'' if failures == 1 else 's'}"


@task("sample.sleep")
def sleep(seconds: Annotated[float, Field(ge=0, le=86400)] = 1.0) -> str:
    """Do nothing for that long."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(STEP_SECONDS, left))
    return f"Slept for {seconds:g} seconds"


@task("sample.crash")
def crash() -> NoReturn:
    """Kill the process that runs it with SIGKILL, as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL can't be survived")


@task("sample.allocate")
def allocate(mebibytes: Annotated[int, Field(ge=0, le=65_536)] = 64) -> str:
    """Fill that much memory, and let it go again."""
    # Each page is written, so that it is really there.
    held = [bytearray(b"\x01") * MEBIBYTE for _ in range(mebibytes)]
    return f"Held {len(held)} MiB"


@task("sample.large")
def large(bytes: Annotated[int, Field(ge=0, le=64 * MEBIBYTE)] = 1024) -> str:  # noqa: A002  # its public name
    """Return a text of that many bytes."""
    return "x" * bytes

"""A keeper without a worker, and what the children of one would have shown it."""

import contextlib
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from app.core import metrics
from app.core.config import Settings
from app.lifecycle import Claim
from app.worker import slots
from app.worker.desk import Desk
from tests.support.service import ROOT


@contextlib.contextmanager
def alone(settings: Settings, desk: Desk, worker_pid: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A keeper whose worker is somebody else, or this process."""
    given = {
        "DATABASE_URL": settings.postgres_dsn,
        "REDIS_URL": settings.redis_url.get_secret_value(),
        "TASKQUEUE_AUTH_MODE": "none",
        "TASKQUEUE_METRICS_PORT": "0",
        "TASKQUEUE_LOG_FORMAT": "console",
    }
    pipe = metrics.Pipe()
    inherited = [*desk.descriptors, pipe.reader]
    command = [sys.executable, "-m", "app.worker.keeper", *map(str, (worker_pid, *inherited))]
    with (
        contextlib.closing(pipe),
        log.open("wb") as output,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **given},
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            bufsize=0,
        ) as keeper,
    ):
        try:
            yield keeper
        finally:
            keeper.kill()
            print(log.read_text())  # noqa: T201  # pytest shows it with a failure only


def occupy(
    desk: Desk,
    pid: int,
    claim: Claim,
    *,
    limit_seconds: float,
    slot: int = 0,
    started: float = 1.0,
    lives: bool = False,
) -> None:
    """Take a slot as a process with this pid would have; unless it lives, as one that was started at another time."""
    born = slots._look_up(pid)[1] - (not lives)
    times = started, limit_seconds, 0.0
    record = slots._RECORD.pack(pid, born, claim.task_id.bytes, claim.attempt, claim.token.bytes, *times)
    start = slots._HEADER + slot * slots._SLOT
    raw = record + slots._SUM.pack(zlib.crc32(record))
    desk.slots._memory[start : start + len(raw)] = raw

"""Tasks that do what tasks should not, for the tests of the worker."""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import ItemsView
from pathlib import Path

from celery import current_task
from celery.exceptions import SoftTimeLimitExceeded

from app.catalog import task
from app.worker.execution import RetryLater


@task("odd.result")
def result(kind: str) -> object:
    """Return what JSON can't hold, or can only just."""
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    kinds: dict[str, object] = {
        "set": {1},
        "nan": float("nan"),
        "infinity": [float("inf")],
        "surrogate": "\ud800",
        "digits": 10**5000,
        "deep": deep,
        "object": object(),
        "nul": "a\x00b",
        "type": {"__type__": "decimal", "__value__": "1"},
        "none": None,
    }
    return kinds[kind]


class _UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@task("odd.raise")
def raise_(kind: str) -> None:
    """Raise what tasks should not raise."""
    kinds: dict[str, BaseException] = {
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "memory": MemoryError(),
        "generator": GeneratorExit(),
        "unspeakable": _UnspeakableError(),
        "nul": ValueError("a\x00b\ud800"),
    }
    raise kinds[kind]


@task("odd.log", max_retries=1, autoretry_for=(OSError,), retry_backoff=True)
def log(kind: str, lines: int = 1) -> str:
    """Log what tasks log, and what they should not."""
    own = logging.getLogger("odd.tasks")
    if kind == "lines":
        for number in range(lines):
            own.info("line %d", number)
    elif kind == "odd":
        own.info("fits %d", "not")
        own.warning("a\x00b\ud800 %s", "x" * 10_000)
        threading.Thread(target=own.error, args=("from a thread",)).start()
        own.debug("below the level")
        try:
            os.environ[kind]
        except KeyError:
            own.exception("caught")
    elif kind == "fail":
        own.info("before it failed")
        raise OSError("no such page")
    elif kind == "die":
        own.info("before it died")
        os.kill(os.getpid(), signal.SIGKILL)
    return kind


@task("odd.talks", max_retries=1, autoretry_for=(OSError,), retry_backoff=True)
def talks(path: str, lines: int, fails: bool = False) -> None:
    """Log lines, run until a file is there, and log as many again."""
    own = logging.getLogger("odd.tasks")
    for number in range(lines):
        own.info("line %d", number)
    while not Path(path).exists():
        time.sleep(0.05)
    for number in range(lines):
        own.info("late line %d", number)
    if fails:
        raise OSError("no such page")


@task("odd.floods")
def floods(seconds: float) -> int:
    """Log as fast as it can for that long; returns how many lines that were."""
    own, until, number = logging.getLogger("odd.tasks"), time.monotonic() + seconds, 0
    while time.monotonic() < until:
        number += 1
        own.info("line %d %s", number, "x" * 200)
    return number


@task("odd.report")
def report(times: int, seconds: float) -> None:
    """Say very often how far it is, then once more, and go on for that long."""
    for number in range(times):
        task.progress(number / times / 2, f"step {number}")
    task.progress(0.75, "the last\ud800\x00 word")
    time.sleep(seconds)


@task("odd.hold_the_gil", time_limit=1.5)
def hold_the_gil() -> bool:
    """Spend minutes in one C call that never lets another thread run, and looks at no signal."""
    return sum(range(10**11)) > 0


@task("odd.limited", time_limit=1.0)
def limited() -> None:
    """Run longer than it may."""
    time.sleep(60)


@task("odd.quit")
def quit_() -> None:
    """Leave without a word."""
    os._exit(0)


@task("odd.signal_yourself")
def signal_yourself(name: str) -> None:
    """Send this process a signal, as libraries do that end their own server."""
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(60)


@task("odd.ignore_signals_to_yourself")
def ignore_signals_to_yourself() -> int:
    """The same, but survive it; returns the process's id."""
    with contextlib.suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    return os.getpid()


@task("odd.stop_yourself")
def stop_yourself(seconds: float) -> str:
    """Freeze this process; somebody else must let it go on."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(seconds)
    return "went on"


@task("odd.retry", max_retries=2)
def retry(countdown: float) -> int:
    """Ask for a retry by hand, until there are none left."""
    raise current_task.retry(countdown=countdown, exc=KeyError("again"))


@task("odd.retry_as_often", max_retries=2)
def retry_as_often(most: str) -> None:
    """Ask for a retry by hand, at most so often: a text, as from the environment."""
    raise current_task.retry(countdown=0, max_retries=most, exc=KeyError("again"))


@task("odd.retry_very_often", max_retries=1)
def retry_very_often() -> None:
    """Ask for a retry by hand, more often than anybody can write down."""
    raise current_task.retry(countdown=0, max_retries=10**5000, exc=KeyError("again"))


@task("odd.retry_unspeakably", max_retries=2)
def retry_unspeakably(kind: str) -> None:
    """Ask for a retry past `retry()`, which looks at what it is given."""
    kinds: dict[str, tuple[object, object]] = {"digits": (0.0, 10**5000), "object": (object(), 1)}
    delay, most = kinds[kind]
    raise RetryLater(KeyError("again"), delay, most)  # type: ignore[arg-type]  # that is what is odd of it


@task("odd.retry_late", max_retries=2)
def retry_late(countdown: str) -> None:
    """Ask for a retry at a time for which no clock has a date. A text, because JSON has no infinity."""
    raise current_task.retry(countdown=float(countdown))


@task("odd.attempts", max_retries=5, autoretry_for=(OSError,), retry_backoff=True)
def attempts(path: str) -> str:
    """Note each run in a file, and sleep."""
    with open(path, "a") as ledger:  # noqa: PTH123  # plain text
        ledger.write(f"{os.getpid()}\n")
    time.sleep(3)
    return "done"


@task("odd.cleans_up")
def cleans_up(path: str) -> None:
    """Note by what it was ended."""
    try:
        time.sleep(60)
    except BaseException as told:
        with open(path, "w") as mark:  # noqa: PTH123  # plain text
            mark.write(type(told).__name__)
        raise


@task("odd.returns_when_told", soft_time_limit=1.0, time_limit=30.0)
def returns_when_told(mark: str = os.devnull) -> float:
    """Come to an end when the soft limit says so, and take time for it; returns the seconds of both."""
    began = time.monotonic()
    try:
        time.sleep(20)
    except SoftTimeLimitExceeded:
        Path(mark).write_text("told")
        time.sleep(1.5)
    return time.monotonic() - began


@task("odd.lets_it_pass", soft_time_limit=0.5)
def lets_it_pass() -> None:
    """Sleep past the soft limit."""
    time.sleep(20)


@task("odd.tries_again", soft_time_limit=0.5, max_retries=1, autoretry_for=(Exception,), retry_backoff=True)
def tries_again() -> None:
    """Sleep past the soft limit, in each attempt."""
    time.sleep(20)


@task("odd.holds_the_gil_softly", soft_time_limit=0.5, time_limit=2.0)
def holds_the_gil_softly() -> bool:
    """Spend minutes in one C call that does not hear of its soft limit."""
    return sum(range(10**11)) > 0


class _SlowDict(dict[str, int]):
    """What takes two seconds to be made JSON of."""

    def items(self) -> ItemsView[str, int]:  # type: ignore[override]  # the type it wants has no name at run time
        time.sleep(2)
        return super().items()


@task("odd.ends_at_its_soft_limit", soft_time_limit=1.0)
def ends_at_its_soft_limit() -> dict[str, int]:
    """Return in time something that is still being written down when the limit passes."""
    return _SlowDict(pages=3)


@task("odd.keeps")
def keeps(mebibytes: int) -> int:
    """Keep that much memory for as long as the process lives; returns the process's id."""
    _kept.append(bytearray(b"\x01") * (mebibytes * 1024 * 1024))
    return os.getpid()


_kept: list[bytearray] = []


@task("odd.holds")
def holds(mebibytes: int, seconds: float) -> str:
    """Fill memory and keep it for a while, or for as long as the kernel allows."""
    held = [bytearray(b"\x01") * (1024 * 1024) for _ in range(mebibytes)]
    time.sleep(seconds)
    return f"held {len(held)}"


@task("odd.kill_the_worker")
def kill_the_worker(mark: str) -> None:
    """Kill the main process of the worker, and with it every process of the pool; but only the first time."""
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)


@task("odd.waits_for")
def waits_for(path: str) -> str:
    """Run until a file is there."""
    while not Path(path).exists():
        time.sleep(0.05)
    return "saw it"


@task("odd.stubborn")
def stubborn() -> None:
    """Survive whatever is raised in it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            time.sleep(0.1)
        except BaseException:  # noqa: BLE001, S112  # as the name says
            continue

"""`make demo-faults`: kill everything under 500 tasks, and count what was lost.

A service of its own is started and given tasks by a client that submits until
all of them are acknowledged. Meanwhile one fault after another hits it, each
where tasks wait and run; the next one comes when what was hit is back. When all
has ended, the rows, the acknowledgements and the webhooks are laid beside each
other. The exit code is 0 only if nothing was lost and nobody was told twice
under different ids.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from app.core import errors
from app.core.stopping import stop
from app.db import Database, insist
from app.dev import demo_ledger, linux
from app.dev.demo_hits import FAILURES, MEET_SECONDS, Faults, Strike
from app.dev.demo_ledger import Job, Ledger, Receiver
from app.dev.demo_service import Service, following, until

TASKS = 500
FEWEST_TASKS = 20
"""Fewer do not meet every fault waiting and running."""
DEADLINE_SECONDS = 240.0
AUDIT_SECONDS = 20.0
BACK_SECONDS = 45.0
"""How long what was hit may take to be back; a lost message alone takes ten."""
CONCURRENCY = 4
ANSWERS_AFTER_SECONDS = 0.05
EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says.

    Attributes:
        tasks: how many are to be acknowledged.
        seed: of everything that is left to chance here.
        keep: the service's directory, also after a good end.
        verbose: show what the service says.
        quick: for a small number: receivers answer at once, and the relay and Postgres are killed between
            two deliveries, since one that was under way is only sent again when its lease of a minute ends.
    """

    tasks: int
    seed: int
    keep: bool = False
    verbose: bool = False
    quick: bool = False


_UNFINISHED = """
SELECT (SELECT count(*) FROM task WHERE finished_at IS NULL)
     + (SELECT count(*) FROM webhook_delivery WHERE status <> 'delivered')
"""


@dataclass(slots=True)
class Drill:
    """One run: the client, the faults, and what is told of both."""

    service: Service
    db: Database
    ledger: Ledger
    receiver: Receiver
    faults: Faults
    began: float
    complaints: list[str] = field(default_factory=list)

    async def run(self, portions: Sequence[Sequence[Job]]) -> None:
        """Submit a portion of the jobs, then one more for each fault, then wait for the end of everything."""
        _say(_LINE.format("at", "fault", "waiting", "running", "hit", "back after"))
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._left()):
                await self.ledger.submit(portions[0])
                for (name, strike), portion in zip(self.faults.all(), portions[1:], strict=True):
                    await self._meet(name, strike, portion)
                await until(self._is_over, DEADLINE_SECONDS, "the end of every task and webhook")
        except TimeoutError:
            self.complaints.append(f"the run was cut off after {DEADLINE_SECONDS:g} s")

    async def _meet(self, name: str, strike: Strike, portion: Sequence[Job]) -> None:
        """One fault, once the last one's tasks are few, while its own are submitted, wait and run."""
        with contextlib.suppress(TimeoutError):
            await until(partial(self._waits_at_most, len(portion)), MEET_SECONDS, "a short queue")
        wanted = len(self.ledger.acknowledged) + len(portion) // 2
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.ledger.submit(portion))
            with contextlib.suppress(TimeoutError):
                await until(partial(self._are_acknowledged, wanted), MEET_SECONDS, "half of a portion")
            await self._strike(name, strike)

    async def _strike(self, name: str, strike: Strike) -> None:
        try:
            await until(self._is_busy, MEET_SECONDS, "a moment with tasks that wait and run")
            waiting, running = await self.faults.load()
            at = time.monotonic()
            blow = await strike()
            struck = time.monotonic()
            await until(lambda: _unless_away(blow.is_back), BACK_SECONDS, "what was hit")
        except FAILURES as failed:
            self.complaints.append(f"{name}: {failed}")
            return
        back = f"{time.monotonic() - struck:.1f} s"
        _say(_LINE.format(f"{at - self.began:.1f} s", name, waiting, running, blow.hit, back))

    async def _is_busy(self) -> bool:
        waiting, running = await self.faults.load()
        return waiting > 0 and running > 0

    async def _waits_at_most(self, number: int) -> bool:
        waiting, _ = await self.faults.load()
        return waiting <= number

    async def _are_acknowledged(self, number: int) -> bool:
        return len(self.ledger.acknowledged) >= number

    async def _is_over(self) -> bool:
        if self.ledger.acknowledged.keys() - self.receiver.task_ids:
            return False
        return not await insist(lambda: self.db.fetchval(_UNFINISHED), what="the drill")

    def _left(self) -> float:
        return DEADLINE_SECONDS - (time.monotonic() - self.began)


async def _unless_away(is_back: Callable[[], Awaitable[bool]]) -> bool:
    try:
        return await is_back()
    except errors.DatabaseUnavailable:
        return False


_LINE = "{:>8}  {:<19}{:>8}{:>9}  {:<36}{:>11}"


def _say(line: str) -> None:
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


class Interrupted(Exception):  # it is no error
    """Somebody wants the drill to end."""


async def drill(options: Options, home: Path, interrupted: asyncio.Event) -> list[str]:
    """Start a service in `home`, hit it, and print what was done and counted.

    Args:
        options: of the command line.
        home: an empty directory.
        interrupted: set to have everything ended at once.

    Returns:
        What is wrong; nothing if all is well.

    Raises:
        Interrupted: if it was; nothing is left of the service then either.
    """
    service = Service(home, concurrency=CONCURRENCY)
    db = Database(service.database_url, max_connections=2, application_name="taskqueue-demo")
    complaints: list[str] = []
    hitting = asyncio.create_task(_hit(service, db, options, complaints))
    waiting = asyncio.create_task(interrupted.wait())
    try:
        await asyncio.wait({hitting, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not hitting.done():
            raise Interrupted
        hitting.result()
    except TimeoutError as late:
        complaints.append(str(late) or "Postgres did not answer the audit")
    finally:
        # A driver may swallow a cancel, and the drill would go on to its end.
        await stop(hitting, waiting)
        await db.close()
        complaints += [f"left behind: {process.command} (pid {process.pid})" for process in await service.stop()]
    return complaints


async def _hit(service: Service, db: Database, options: Options, complaints: list[str]) -> None:
    began = time.monotonic()
    chance = random.Random(options.seed)  # noqa: S311  # a seed, so that a run can be repeated
    wait = 0.0 if options.quick else ANSWERS_AFTER_SECONDS
    service.start()
    async with (
        following(service.log_file, wanted=options.verbose),
        Receiver(service.webhook_secret, answers_after_seconds=wait) as receiver,
    ):
        await service.wait_ready()
        _say(f"The service is ready after {time.monotonic() - began:.1f} s: {service.url}")
        ledger = Ledger(service.url, receiver.url, chance)
        faults = Faults(service, db, options.quick)
        run = Drill(service, db, ledger, receiver, faults, began, complaints)
        await run.run(demo_ledger.jobs(options.tasks, len(faults.all()) + 1, CONCURRENCY, chance))
        async with asyncio.timeout(AUDIT_SECONDS):
            found = await demo_ledger.audit(db, ledger, receiver)
        tracebacks = service.log_file.read_text(errors="replace").count("Traceback (most recent call last)")
        _tell({**found.counts, "tracebacks in the log": tracebacks}, time.monotonic() - began)
        complaints += found.complaints
        if len(ledger.acknowledged) < options.tasks:
            complaints.append(f"{len(ledger.acknowledged)} of {options.tasks} tasks were acknowledged")


def _tell(counts: Mapping[str, int], seconds: float) -> None:
    _say("")
    for what, count in counts.items():
        _say(f"  {what:<26}{count:>7}")
    _say(f"  {'seconds in all':<26}{seconds:>7.1f}")


async def _until_interrupted(options: Options, home: Path) -> list[str]:
    """The drill, ended in order by SIGTERM and by Ctrl-C."""
    interrupted = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    return await drill(options, home, interrupted)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the drill.

    Args:
        argv: the words of the command line; those of the process unless given.

    Returns:
        The exit code: 0 if nothing was lost and every webhook came, 1 if not, 130 if it was interrupted.
    """
    options = _options(argv)
    if not linux.IS_LINUX:
        sys.stderr.write("demo-faults: it finds its victims in /proc, so it needs Linux\n")
        return 1
    logging.getLogger("app").addHandler(logging.NullHandler())  # an outage of ours is no news here
    home = Path(tempfile.mkdtemp(prefix="taskqueue-demo-"))
    _say(f"{options.tasks} tasks, seed {options.seed}")
    good = False
    try:
        complaints = asyncio.run(_until_interrupted(options, home))
        good = not complaints
    except (KeyboardInterrupt, Interrupted):
        _say("interrupted: everything was ended")
        good = True  # nobody will want its log
        return EXIT_INTERRUPTED
    except errors.SettingsError as wrong:
        complaints = [str(wrong)]
    finally:
        if options.keep or not good:
            _say(f"\nThe service's log is {home / 'service.log'}, its data beside it")
        else:
            shutil.rmtree(home)
    for complaint in complaints:
        _say(f"WRONG: {complaint}")
    _say("\nNothing was lost." if good else "\nSee what is WRONG above.")
    return 0 if good else 1


def _options(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="demo-faults", description="Kill everything under load; count what was lost.")
    parser.add_argument("--tasks", type=int, default=TASKS, help=f"how many are acknowledged ({TASKS})")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)), help="of everything left to chance")
    parser.add_argument("--keep", action="store_true", help="keep the service's data and log")
    parser.add_argument("--verbose", action="store_true", help="show the service's log")
    parser.add_argument(
        "--quick", action="store_true", help="no fault in the middle of a delivery: those wait a minute"
    )
    given = parser.parse_args(argv)
    if given.tasks < FEWEST_TASKS:
        parser.error(f"--tasks must be {FEWEST_TASKS} or more")
    return Options(given.tasks, given.seed, given.keep, given.verbose, given.quick)


if __name__ == "__main__":
    sys.exit(main())

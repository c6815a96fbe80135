"""The keeper: what must happen to running tasks whatever their code does to its own process.

A process of its own beside a worker's pool, outside every interpreter that runs
user code: a C call may hold the GIL for longer than a lease. It reads what the
children show (`slots`), and

- claims for them, and writes what they report (`recorder`),
- renews all their leases in one statement,
- settles at once what died with a child: a crash if only the child died, a
  release if the worker is stopping, a loss if the whole worker is gone,
- ends tasks past their hard time limit, by settling first and killing then,
- tells an attempt once that it has passed its soft time limit,
- tells an attempt whose cancel was asked for, and ends it if it does not listen,
- kills an attempt that was superseded, so that its slot does useful work again,
- counts what the children tell of (`metrics.Pipe`), serves the worker's metrics, and
  says every few seconds that the worker is there,
- hands back tasks that this worker does not know, which the main process names
  on the keeper's standard input.

If the keeper dies, the worker starts another; leases bridge the gap.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any
from uuid import UUID

import uvloop

from app import db, lifecycle, publisher, tally
from app.broker import Broker
from app.core import config, errors, metrics, stopping, telemetry
from app.core.config import Settings
from app.db import STATEMENT_TIMEOUT_SECONDS, Database
from app.lifecycle import Budgets, Cancelled, Claim, Crashed, Interrupted, Lost, Outcome, Settled, TimedOut
from app.worker import memory, recorder
from app.worker.recorder import Recorder
from app.worker.slots import Running, Slot, Slots
from app.worker.spool import Spool

LOOK_SECONDS = 0.2
"""How often the slots are looked at: for dead children and passed limits."""
PRESENCE_SECONDS = 10.0
"""How often Postgres is told that this worker is there."""
RENEW_SECONDS = 1.0
"""How often Postgres is asked about what runs; a lease is only written when a third of it is used."""
CANCEL_GRACE_SECONDS = 5.0
"""How long a task may go on after it was told of its cancel."""
SETTLE_LAST_SECONDS = 10.0
"""How long the keeper stays, after the worker went, to settle what it left behind."""

CONNECTIONS = recorder.CONNECTIONS + recorder.CONNECTIONS_ALONE + 1
"""To Postgres, at most."""

LAST_SPANS_SECONDS = 0.5
"""How long the keeper waits for the last spans once the worker went: they are there, unless a task left a process."""

log = logging.getLogger("app.worker.keeper")  # also when run as `python -m`


def main(argv: list[str]) -> int:
    """Run until the worker is gone.

    Args:
        argv: the worker's process id, and the file descriptors of its slots, its spool, the inside of its door, its
            metrics' pipe, and if its tasks are traced that of the line on which its children hand over their spans.
    """
    settings = config.load()
    if settings.metrics_port == 0:
        metrics.silence()
    telemetry.configure_logging(settings, "worker")
    # The terminal's Ctrl-C and the pod's SIGTERM mean the worker; the keeper stays until that has ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    worker_pid, slots, spool, door, pipe, *spans = map(int, argv)
    with _traces(settings, spans):
        keeper = Keeper(
            settings,
            worker_pid=worker_pid,
            slots=Slots(slots),
            spool=Spool(spool),
            door=socket.socket(fileno=door),
            told=metrics.Reader(pipe),
        )
        uvloop.run(keeper.run())
    return 0


@contextlib.contextmanager
def _traces(settings: Settings, line: list[int]) -> Iterator[None]:
    """Take the spans of the children to the collector, and what the keeper itself has to tell of dead ones."""
    telemetry.configure(settings, "worker")
    pipeline = telemetry.pipeline()
    if pipeline is None or pipeline.processor is None or not line:
        yield
        return
    from app.worker import spans  # noqa: PLC0415  # the SDK is only loaded where there is a collector

    receiver = spans.Receiver(socket.socket(fileno=line[0]), pipeline, pipeline.processor)
    try:
        yield
    finally:
        receiver.join(LAST_SPANS_SECONDS)
        telemetry.shutdown()


class Keeper:
    """Looks after the attempts of one worker."""

    def __init__(
        self,
        settings: Settings,
        *,
        worker_pid: int,
        slots: Slots,
        spool: Spool,
        door: socket.socket,
        told: metrics.Reader,
    ) -> None:
        self._settings = settings
        self._slots = slots
        self._worker_pid = worker_pid
        self._told_by_children = told
        self._name = f"{socket.gethostname()}/{worker_pid}"
        # No claim and no settle keeps a renewal waiting.
        self._leases = Database(
            settings.postgres_dsn,
            max_connections=1,
            application_name="taskqueue-keeper",
            # A renewal that hangs in a dead connection must be given up while there is still time for another.
            patience_seconds=max(1.0, min(STATEMENT_TIMEOUT_SECONDS, settings.lease_seconds / 3)),
        )
        self._broker = Broker(settings.redis_url.get_secret_value(), client_name="taskqueue-keeper", max_connections=1)
        self._recorder = Recorder(
            db=_recording(settings, worker_pid, recorder.CONNECTIONS),
            alone=_recording(settings, worker_pid, recorder.CONNECTIONS_ALONE),
            broker=Broker(
                settings.redis_url.get_secret_value(), client_name=f"taskqueue-{worker_pid}", max_connections=2
            ),
            spool=spool,
            door=door,
            lease_seconds=settings.lease_seconds,
        )
        self._busy: dict[tuple[int, Claim | None], asyncio.Task[Any]] = {}
        self._unheld: set[Claim] = set()
        self._told: dict[Claim, float] = {}
        self._told_softly: set[Claim] = set()
        self._oom_kills = memory.OomKills(memory.find_oom_counter())

    async def run(self) -> None:
        """Look, renew and record until the worker is gone and nothing of it is left to settle."""
        recording = asyncio.create_task(self._recorder.run())
        commands = asyncio.create_task(self._take_commands())
        renewals = asyncio.create_task(self._renew_forever())
        metrics_server = asyncio.create_task(self._serve_metrics())
        presence = asyncio.create_task(self._announce_forever())
        try:
            # Should one of them end, this keeper is no good any more, and the worker starts another.
            while self._worker_lives() and not (renewals.done() or commands.done() or recording.done()):
                self._slots.beat()
                self._look()
                await asyncio.sleep(LOOK_SECONDS)
            if not self._worker_lives():
                await self._settle_the_rest()
            elif recording.done():
                recording.result()
        finally:
            await stopping.stop(recording, commands, renewals, metrics_server, presence, *self._busy.values())
            if not self._worker_lives():
                await self._leave()
            await self._recorder.close()
            await self._broker.close()
            await self._leases.close()

    def _worker_lives(self) -> bool:
        return os.getppid() == self._worker_pid

    async def _settle_the_rest(self) -> None:
        """The worker is gone; its children follow (PR_SET_PDEATHSIG). Settle each as it does."""
        began = time.monotonic()
        while not self._is_done(time.monotonic() - began):
            self._look()
            await asyncio.sleep(LOOK_SECONDS / 4)

    def _is_done(self, seconds: float) -> bool:
        """Whether there is nothing left to settle, or no time: so long after the end of the worker."""
        if self._recorder.is_done():
            return not self._slots.all() or seconds > SETTLE_LAST_SECONDS
        # Of a report it is certain how its task has ended. After a lease that is nobody's any more.
        return seconds > max(SETTLE_LAST_SECONDS, self._settings.lease_seconds)

    def _look(self) -> None:
        taken = self._slots.all()
        busy = sum(slot.running is not None for slot in taken)
        metrics.show_pool(self._settings.queues, slots=self._settings.concurrency, busy=busy)
        self._told_by_children.absorb()
        self._recorder.look()
        self._oom_kills.look()
        self._told_softly &= {slot.running.claim for slot in taken if slot.running is not None}
        for slot in taken:
            if not slot.lives():
                self._start(slot, self._bury(slot))
            elif slot.running is not None and slot.running.overdue():
                self._start(slot, self._end(slot, slot.running, TimedOut(slot.running.limit_seconds)))
            elif slot.running is not None and slot.running.softly_overdue():
                self._tell_softly(slot, slot.running.claim)

    def _start(self, slot: Slot, work: Coroutine[Any, Any, None]) -> None:
        """Do one thing at a time about each attempt."""
        key = (slot.index, slot.running.claim if slot.running else None)
        if key in self._busy:
            work.close()
            return
        task = asyncio.create_task(work)
        self._busy[key] = task
        task.add_done_callback(lambda _: self._busy.pop(key, None))

    async def _bury(self, slot: Slot) -> None:
        """Settle what a dead child was running, then let its successor have the slot."""
        if slot.running is not None:
            cause = await self._cause_of_death()
            # What it has asked for or reported comes first: it may have lived to see the end of this attempt.
            await self._recorder.finish(slot.index, slot.running.claim)
            await self._settle(slot.running, cause)
        self._slots.free(slot.index)

    async def _cause_of_death(self) -> Outcome:
        # When the main process is killed, its children follow within microseconds: see who died first.
        await asyncio.sleep(LOOK_SECONDS / 2)
        if self._slots.stopping:
            return Interrupted()
        if not self._worker_lives():
            return Lost()
        return Crashed(out_of_memory=self._oom_kills.explain_a_death())

    async def _end(self, slot: Slot, running: Running, outcome: Outcome) -> None:
        """End an attempt whose process lives: the row first, so that the truth does not wait for the kill."""
        if await self._settle(running, outcome):
            self._kill(slot, running.claim)

    async def _settle(self, running: Running, outcome: Outcome) -> bool:
        """Write what became of an attempt. False if its row says something else by now."""
        ran = time.monotonic() - running.started if running.started else None
        return await db.insist(lambda: self._settle_once(running.claim, outcome, ran), what="the keeper")

    async def _settle_once(self, claim: Claim, outcome: Outcome, run_seconds: float | None) -> bool:
        async with self._recorder.in_turn() as alone:
            spent: Budgets | None = await lifecycle.budgets(alone, claim)
            if spent is None:
                return False
            transition = lifecycle.decide(spent, outcome)
            settled = await lifecycle.settle_for(alone, claim, transition)
        if settled is None:
            return False
        name = type(outcome).__name__.lower()
        told = publisher.tell_of_attempt(settled, transition)
        log.warning("task %s attempt %d is now %s (%s)", claim.task_id, claim.attempt, settled.status, name, extra=told)
        tally.count_attempt(settled.name, settled.queue, outcome, settled, run_seconds=run_seconds)
        if settled.ended is not None:
            await publisher.announce_end(self._broker, settled.ended)
        return True

    def _kill(self, slot: Slot, claim: Claim) -> None:
        if self._slots.order_death(slot.index, claim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.pid, signal.SIGKILL)

    async def _renew_forever(self) -> None:
        seconds = min(RENEW_SECONDS, self._settings.lease_seconds / 6)
        while True:
            await asyncio.sleep(seconds)
            running = {slot.running.claim: slot for slot in self._slots.all() if slot.running is not None}
            over = [claim for claim in self._recorder.unsettled() if claim not in running]
            if running or over:
                try:
                    await self._renew(running, over)
                except errors.DatabaseUnavailable as away:
                    # The tasks go on: whether they were cut off is decided when Postgres answers again.
                    log.warning("leases could not be renewed: %s", away)
                except Exception:
                    log.exception("leases could not be renewed")

    async def _renew(self, running: dict[Claim, Slot], over: Sequence[Claim]) -> None:
        """Renew the leases of what runs, and of what is over and not yet written."""
        held = await lifecycle.renew(self._leases, [*running, *over], lease_seconds=self._settings.lease_seconds)
        leases = [lease for lease in held if lease.claim in running]
        # What is still being claimed is not judged, and a settle may just be done: only what is not held
        # twice running is superseded.
        unheld = {lease.claim for lease in leases if not lease.held and _started(running[lease.claim])}
        for claim in unheld & self._unheld:
            log.warning("task %s attempt %d was superseded; its process is killed", claim.task_id, claim.attempt)
            self._kill(running[claim], claim)
        self._unheld = unheld
        self._cancel({lease.claim for lease in leases if lease.held and lease.cancel_requested}, running)

    def _cancel(self, claims: set[Claim], running: dict[Claim, Slot]) -> None:
        """Tell each once, and end what goes on for longer than its grace."""
        self._told = {claim: when for claim, when in self._told.items() if claim in claims}
        for claim in claims:
            slot = running[claim]
            if claim not in self._told:
                self._told[claim] = time.monotonic()
                if self._slots.order_cancel(slot.index, claim):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(slot.pid, signal.SIGUSR1)
            elif time.monotonic() - self._told[claim] > CANCEL_GRACE_SECONDS and slot.running is not None:
                self._start(slot, self._end(slot, slot.running, Cancelled()))

    def _tell_softly(self, slot: Slot, claim: Claim) -> None:
        """Tell an attempt once that it has passed its soft limit; never one that was told of its cancel."""
        if claim in self._told_softly or claim in self._told:
            return
        self._told_softly.add(claim)
        if self._slots.order_soft_limit(slot.index, claim):
            with contextlib.suppress(ProcessLookupError):
                os.kill(slot.pid, signal.SIGUSR1)

    async def _announce_forever(self) -> None:
        """Say that the worker is there, until it takes no more messages."""
        while not self._slots.stopping:
            busy = sum(slot.running is not None for slot in self._slots.all())
            try:
                async with self._recorder.in_turn() as alone:
                    await lifecycle.announce(
                        alone, self._name, queues=self._settings.queues, slots=self._settings.concurrency, busy=busy
                    )
            except errors.DatabaseUnavailable as away:
                log.debug("nobody was told that this worker is there: %s", away)
            except Exception:
                log.exception("nobody was told that this worker is there")
            await asyncio.sleep(PRESENCE_SECONDS)
        await self._leave()

    async def _leave(self) -> None:
        # Without an answer it counts as there for a while longer, and nothing depends on that.
        with contextlib.suppress(errors.DatabaseUnavailable):
            async with self._recorder.in_turn() as alone:
                await lifecycle.leave(alone, self._name)

    async def _serve_metrics(self) -> None:
        """Serve the worker's metrics from here: no fork copies this process's sockets and threads."""
        while True:
            try:
                metrics.serve(
                    self._settings.metrics_port, "worker", revision=self._settings.revision, pid=self._worker_pid
                )
            except errors.SettingsError as taken:
                # The keeper of a worker that has just gone may still have the port.
                log.warning("%s", taken)
                await asyncio.sleep(SETTLE_LAST_SECONDS)
            else:
                return

    async def _take_commands(self) -> None:
        """Read lines such as `{"refuse": {"id": …, "attempt": …, "name": …, "position": …}}` from the worker."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            try:
                refusal = json.loads(line)["refuse"]
                await self._refuse(UUID(refusal.pop("id")), **refusal)
            except Exception:
                log.exception("a refusal could not be written; the search for lost messages finds its task")
        # The worker has closed its end; whether it is gone, `_worker_lives` says.
        await asyncio.Event().wait()

    async def _refuse(self, task_id: UUID, *, attempt: int, name: str, position: int) -> None:
        async def once() -> Settled | None:
            async with self._recorder.in_turn() as alone:
                return await lifecycle.refuse(alone, task_id, attempt=attempt, name=name, position=position)

        settled = await db.insist(once, what="a refusal")
        if settled is not None and settled.ended is not None:
            await publisher.announce_end(self._broker, settled.ended)


def _recording(settings: Settings, worker_pid: int, connections: int) -> Database:
    return Database(settings.postgres_dsn, max_connections=connections, application_name=f"taskqueue-{worker_pid}")


def _started(slot: Slot) -> bool:
    return slot.running is not None and slot.running.started > 0.0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

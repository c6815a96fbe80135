"""The relay: what must happen to rows that nobody is looking at. Any number of replicas, no leader.

Each sweep is a function that runs once and returns how much it did; the loops
around them only repeat. Two relays that sweep at once skip each other's rows.
The publish sweeps read Redis first, so with Redis away nothing is stamped.
"""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from app import circuits, delivery, lifecycle, publisher, schedules, tally
from app.broker import END_OF_LINE, Broker
from app.circuits import Circuits
from app.core import errors, limits, metrics, stopping, telemetry, tracing
from app.core.config import Settings, webhook_key
from app.core.repeating import every
from app.core.statuses import JobKind
from app.db import Database
from app.delivery import Settling
from app.exporter import Exporter
from app.keyring import Keyring, Ring
from app.receipts import Receipts
from app.scheduler import Scheduler
from app.trials import Trials
from app.utils import sealing
from app.utils.webhook import Outcome, Receipt, Sender

TICK_SECONDS = 0.2
"""How often due rows are published: the most that a retry or a countdown is late."""
NOTE_SECONDS = 1.0
"""How often the tail of each queue is noted, and lost messages and leases are looked for."""
GRACE_SECONDS = 10.0
"""How old a note must be before it proves a message lost: longer than from commit to push, and from pop to claim."""
PUSH_SECONDS = 1.0
"""How long after its stamp a message may be pushed, and as a rule is not taken for lost."""
GAP_SECONDS = 3.0
"""How long after its last answer Postgres counts as connected: beyond it, leases may have run out unheard."""
KEYS_AT_ONCE = 500
"""How many keys of a queue are looked at for room in one sweep; the next one goes on where it ended."""
LET_GO_SHARE = 0.25
"""How much of the time of a queue may be spent on that."""
LET_GO_REST_SECONDS = 2.0
"""How long it rests at most after a sweep that took long: one that has waited for Redis or a lock has done no work."""
TURN_SECONDS = 2.0
"""How long after its message was pushed a held task that does not wait any more keeps its room."""
LOOK_SECONDS = 0.005
"""The least time from one look for due webhooks to the next, however often relays are told that there are some."""
LOCKED_SECONDS = 0.02
"""How long after relays were told of a webhook they look once more: as they did, its row may have been locked by who
gives events their numbers, and a claim waits for no lock."""
HEAR_AGAIN_SECONDS = 1.0
BATCH = 500
LOST_BATCH = 10_000
"""How many lost messages are found at once; that many rows take Postgres about a second."""
EXPORT_SECONDS = 5.0
COUNT_SECONDS = 10.0
COUNT_FAILED_SECONDS = 60.0
EXPORT_SHARE_OF_TIME = 0.02
"""How much of the time may be spent on counting the queues: the longer a backlog, the rarer its counts."""
PRUNE_SECONDS = 5.0
SCHEDULES_AT_ONCE = 100
STRAY_SECONDS = 60.0
GIVE_UP_SECONDS = 60.0
GIVE_UP_RECEIVERS = 100
GIVE_UP_BATCH = 100
"""How many receivers one statement gives up on, and how many webhooks of each."""
RESEAL_SECONDS = 60.0
DAY_SECONDS = 86_400.0
DELIVERIES_AT_ONCE = 100
"""POSTs that keep a relay busy."""
SLOW_SECONDS = 1.0
"""A POST that is older waits for its receiver, which costs a connection and nothing else: it keeps no other waiting."""
DELIVERIES_AT_MOST = 500
"""POSTs, the slow ones included. One owner can come to hold half of them, the next half of the rest, and so on: see
`Circuits.passed_over`. No claim takes more than half of what is free, so it leaves some whoever it is for."""
DELIVERY_LEASE_SECONDS = 30.0
"""How long a webhook waits whose relay was killed: the deadline of a POST (15 s), and as long again to settle it."""
HAND_BACK_SECONDS = 2.0
"""How long a relay that stops tries to hand back what it could not send; what it can't is claimed after its lease."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """Where the tail of a queue was.

    Attributes:
        taken_at: by Postgres's clock: what was published before can be compared with it.
        monotonic: by this machine's: how old it is does not depend on anybody's clock being set.
        position: of the message that was next.
    """

    taken_at: datetime
    monotonic: float
    position: int


@dataclass(frozen=True, slots=True)
class Sending:
    """A POST that is on its way, since a monotonic time."""

    claimed: delivery.Claimed
    since: float


@dataclass(slots=True)
class Relay:
    """One relay: its connections, and what it has noted."""

    settings: Settings
    db: Database
    broker: Broker
    sender: Sender
    grace_seconds: float = GRACE_SECONDS
    notes: dict[str, deque[Note]] = field(default_factory=dict)
    connected_since: float | None = None
    answered_at: float = 0.0
    sending: dict[asyncio.Task[None], Sending] = field(default_factory=dict)
    claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    told: asyncio.Event = field(default_factory=asyncio.Event)
    told_at: float = -math.inf
    looked_at: float = -math.inf
    circuits: Circuits = field(default_factory=Circuits)
    walked_to: delivery.Receiver = delivery.BEGINNING
    strays: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    restricted: Mapping[str, bool] = field(default_factory=dict)
    walked_keys: dict[str, str] = field(default_factory=dict)
    looked_at_held: dict[str, float] = field(default_factory=dict)
    keyring: Keyring = field(init=False)
    trials: Trials = field(init=False)
    receipts: Receipts = field(init=False)

    def __post_init__(self) -> None:
        self.keyring = Keyring(self.db, self.settings)
        self.trials = Trials(self.settings, self.db, self.sender, self.keyring)
        self.receipts = Receipts(self.db)

    async def publish_due(self, queue: str) -> int:
        """Push waiting rows that have no message and are due; as many as the queue has room for.

        What a stopping worker handed back needs no room: it had its turn. Rows of a queue that is paused or limited
        are held, and let go from there.
        """
        if queue in self.restricted:
            if held := await lifecycle.hold_due(self.db, queue, limit=BATCH):
                return held if self.restricted[queue] else BATCH  # There may be more, and the feed must not be faster.
            if self.restricted[queue]:
                return 0
        try:
            room = publisher.DEPTH_CAP - await self.broker.depth(queue)
        except errors.BrokerUnavailable:
            metrics.published(1, "error", [])
            raise
        if room > 0:
            bells = await lifecycle.take_due(self.db, queue, limit=min(self._batch(queue, BATCH), room))
        else:
            bells = await lifecycle.take_released(self.db, queue, among=self._batch(queue, BATCH))
        await self._push(queue, bells)
        return len(bells)

    async def look_at_limits(self) -> None:
        """Know which queues are paused or limited; only their claims and submits know it better."""
        self.restricted = await lifecycle.restricted_queues(self.db)
        if self.restricted:
            await lifecycle.end_turns(self.db, older_than_seconds=TURN_SECONDS)

    async def let_go(self, queue: str) -> int:
        """Push what is held and may start now: as many as limits and the queue in Redis have room for."""
        room = publisher.DEPTH_CAP - await self.broker.depth(queue)
        if room <= 0:
            return 0
        batch = min(self._batch(queue, BATCH), room)
        after = self.walked_keys.get(queue, "")
        try:
            bells, self.walked_keys[queue] = await lifecycle.let_go_round(
                self.db, queue, after=after, keys=KEYS_AT_ONCE, limit=batch
            )
        except errors.Locked:
            return 0  # Somebody else is at it.
        await self._push(queue, bells)
        return len(bells)

    async def note_tail(self, queue: str) -> None:
        """Note where the tail of a queue is. Without a message there that can be believed, there is no note."""
        now = await lifecycle.clock(self.db)
        position = await self._tail(queue)
        notes = self.notes.setdefault(queue, deque())
        if notes and notes[-1].taken_at > now:
            notes.clear()  # Postgres's clock was set back: what was published since can't be compared with them.
        monotonic = time.monotonic()
        if position is not None:
            notes.append(Note(now, monotonic, position))
        # The newest note that is old enough is the one to compare with; what is older has served.
        while len(notes) > 1 and notes[1].monotonic <= monotonic - self.grace_seconds:
            notes.popleft()

    async def _tail(self, queue: str) -> int | None:
        """The position that is next in line: the lowest near the tail that its row says too.

        A forged message, or a copy of one, can name a place that is further back, which would make all that
        stands before it look lost; too low a place only makes the search more careful.
        """
        messages = await self.broker.tail(queue)
        if messages is None:
            return END_OF_LINE
        places = await lifecycle.places(self.db, [message.task_id for message in messages])
        believed = [message.position for message in messages if places.get(message.task_id) == message.position]
        return min(believed, default=None)

    async def publish_lost(self, queue: str) -> int:
        """Push again, at the tail, what lies below the tail as it was one grace ago: its message was lost."""
        notes = self.notes.get(queue)
        if not notes or time.monotonic() - notes[0].monotonic < self.grace_seconds:
            return 0
        note = notes[0]
        # What was stamped just before the note may have been pushed just after it, and lies where it should: it proves
        # nothing. But where something older is missing it goes with that: pushed later, and at the tail, it would come
        # before what is ahead of it, which would look lost again for that.
        sure = note.taken_at - timedelta(seconds=min(PUSH_SECONDS, self.grace_seconds))
        below, found = note.position, 0
        while True:
            # All at once: a second relay that took the next batch might push it before this one is pushed,
            # and what stands in the line out of its order looks lost again.
            batch = self._batch(queue, LOST_BATCH)
            bells = await lifecycle.take_lost(
                self.db,
                queue,
                below_position=below,
                published_before=note.taken_at,
                limit=batch,
                surely_before=sure if not found else None,
            )
            await self._push(queue, bells, lost=True)
            found += len(bells)
            if len(bells) < batch:
                break
            # Further down: a search from the top would step over all that has just been pushed.
            below = bells[0].position
        if found:
            log.warning("%d messages of queue %s were lost and are pushed again", found, queue)
        return found

    async def reap(self, queue: str) -> int:
        """End or retry attempts whose lease ran out, once this relay has been connected for a lease."""
        lease = self.settings.lease_seconds
        if not self._connected_for(lease):
            return 0
        reaped = []
        expired = await lifecycle.expired_leases(self.db, queue, lease_seconds=lease, limit=BATCH)
        # Asked again: the question itself may have waited for the network, and the renewals beside it.
        for claim, spent in expired if self._connected_for(lease) else ():
            transition = lifecycle.decide(spent, lifecycle.Lost())
            try:
                settled = await lifecycle.reap(self.db, claim, transition)
            except errors.Locked:
                continue  # Until the next look. Nothing is wrong with the others.
            if settled is not None:
                told = publisher.tell_of_attempt(settled, transition)
                tally.count_attempt(settled.name, settled.queue, lifecycle.Lost(), settled, run_seconds=None)
                metrics.recovered("stale_running", 1)
                text = "task %s attempt %d lost its worker, now %s"
                log.warning(text, claim.task_id, claim.attempt, settled.status, extra=told)
                reaped.append(settled)
        await publisher.announce_ends(self.broker, [one.ended for one in reaped if one.ended is not None])
        return len(reaped)

    def _connected_for(self, seconds: float) -> bool:
        """Whether Postgres has answered without a gap for so long, and did just now."""
        now = time.monotonic()
        if self.connected_since is None or now - self.answered_at > GAP_SECONDS:
            return False
        return now - self.connected_since >= seconds

    async def expire(self, queue: str) -> int:
        """End waiting tasks whose time has passed."""
        ended = await lifecycle.expire(self.db, queue, limit=BATCH)
        await publisher.announce_ends(self.broker, ended)
        return len(ended)

    async def prune(self) -> int:
        """Remove a batch of what is past its time: tasks, jobs, tombstones, keys, notes, secrets, tests."""
        seconds = self.settings.retention_days * DAY_SECONDS
        pruned = await lifecycle.prune(self.db, older_than_seconds=seconds, limit=BATCH)
        pruned += await lifecycle.forget(self.db, older_than_seconds=seconds, limit=BATCH)
        pruned += await lifecycle.forget_jobs(self.db, older_than_seconds=seconds, limit=BATCH)
        pruned += await lifecycle.forget_keys(self.db, older_than_seconds=limits.KEY_SECONDS, limit=BATCH)
        pruned += await schedules.forget(self.db, older_than_seconds=DAY_SECONDS, limit=BATCH)
        return pruned + await delivery.prune_secrets(self.db, limit=BATCH) + await self.trials.prune()

    async def work_on_jobs(self) -> int:
        """Take a step of the job whose turn it is. One that makes tasks waits while too many wait already."""
        mine = await lifecycle.take_step(self.db)
        if mine is None:
            return 0
        if mine.kind is JobKind.RERUN and await self._too_many_wait():
            return 0
        stepped = await lifecycle.step(self.db, mine)
        await publisher.announce_ends(self.broker, stepped.ended)
        return stepped.acted

    async def _too_many_wait(self) -> bool:
        cap = self.settings.max_backlog
        # The first costs nothing to ask, and is never less than the second.
        if await lifecycle.most_waiting(self.db) < cap:
            return False
        return await lifecycle.count_waiting(self.db, limit=cap) >= cap

    async def deliver(self) -> int:
        """Start sending the webhooks that are due, as many as may be on their way at once."""
        now = time.monotonic()
        metrics.show_circuits(self.circuits.opened())
        room = self.room(now)
        if room <= 0:
            return 0
        free = DELIVERIES_AT_MOST - len(self.sending)
        # Whoever stops the relay takes the lock first: what was claimed, and not noted here, would wait for its lease.
        async with self.claiming:
            due = await delivery.claim_by_receiver(
                self.db,
                limit=min(room, (free + 1) // 2),
                lease_seconds=DELIVERY_LEASE_SECONDS,
                room=circuits.CAP,
                rooms=self.circuits.rooms(now),
                after=self.walked_to,
                patience_seconds=delivery.patience_seconds(self.settings.webhook_schedule),
                without=self.circuits.passed_over(now, free=free),
            )
            self.walked_to = due.walked_to
            try:
                rings = await self.keyring.rings({one.owner for one in due.claimed})
            except (errors.DatabaseUnavailable, asyncio.CancelledError):
                await delivery.release(self.db, due.claimed)
                raise
            for one in due.claimed:
                self.circuits.began(one.receiver)
                task = asyncio.create_task(self._send(one, rings[one.owner]))
                self.sending[task] = Sending(one, time.monotonic())
                task.add_done_callback(self._sent)
        return len(due.claimed)

    def room(self, now: float) -> int:
        """How many more POSTs may be begun at a monotonic time. Receivers that don't answer take none of it away."""
        quick = sum(now - one.since < SLOW_SECONDS for one in self.sending.values())
        return min(DELIVERIES_AT_ONCE - quick, DELIVERIES_AT_MOST - len(self.sending))

    async def hear(self) -> None:
        """Look for webhooks as soon as whoever has written some says so, for as long as Redis answers.

        What is not heard is found by the next look, so this is silent: others say that Redis is away.
        """
        with contextlib.suppress(errors.BrokerUnavailable):
            await self.broker.hear_of_webhooks(self._hear)

    def _hear(self) -> None:
        self.told_at = asyncio.get_running_loop().time()
        self.told.set()
        self.arrived.set()

    async def next_look(self) -> None:
        """Return when it is time to look for webhooks again; what is told from now on is a reason for one more."""
        now = asyncio.get_running_loop().time()
        if (early := self.looked_at + LOOK_SECONDS - now) > 0:
            await asyncio.sleep(early)
        self.looked_at = max(now, self.looked_at + LOOK_SECONDS)
        self.arrived.clear()
        self.told.clear()

    def _sent(self, task: asyncio.Task[None]) -> None:
        del self.sending[task]
        self.arrived.set()

    async def hand_back(self) -> int:
        """Break off what is on its way, and make it due again: nobody need wait for its lease.

        Its receiver may have heard of it, and hears again, under the same id. It spends no attempt.
        """
        left = [one.claimed for one in self.sending.values()]
        await stopping.stop(*self.sending)
        return await delivery.release(self.db, left)

    async def give_up(self) -> int:
        """End the webhooks that have waited too long for receivers whose circuits have been open for long."""
        hopeless = self.circuits.hopeless(time.monotonic())
        patience = delivery.patience_seconds(self.settings.webhook_schedule)
        given_up = 0
        for start in range(0, len(hopeless), GIVE_UP_RECEIVERS):
            some = hopeless[start : start + GIVE_UP_RECEIVERS]
            given_up += await delivery.give_up(self.db, some, older_than_seconds=patience, limit=GIVE_UP_BATCH)
        if given_up:
            metrics.webhooks_ended("exhausted", given_up, None)
            log.warning("%d webhooks were given up, whose receivers have not answered for long", given_up)
        return given_up

    async def number_events(self) -> int:
        """Give new events their place in the line that can be asked for."""
        return await delivery.number(self.db, limit=BATCH)

    async def look_for_strays(self) -> int:
        """Say which queues have tasks, and are not among TASKQUEUE_QUEUES: nobody publishes, runs or reaps those."""
        strays = await lifecycle.unfinished_queues(self.db) - set(self.settings.queues)
        if strays != self.strays and strays:
            log.error("tasks are stuck in queues that TASKQUEUE_QUEUES does not name: %s", ", ".join(sorted(strays)))
        self.strays = strays
        return len(strays)

    def _batch(self, queue: str, most: int) -> int:
        """How many rows to stamp at once: `most`, but only one where Redis refused the last push.

        A Redis that is full answers what is read and refuses what is written. A whole batch would be stamped,
        and its stamps taken back, several times a second for as long as that lasts.
        """
        return 1 if queue in self.refused else most

    async def _push(self, queue: str, bells: list[lifecycle.Bell], *, lost: bool = False) -> None:
        """Push what was stamped; what could not be pushed has its stamp taken back."""
        left = _portions(bells)
        try:
            while left:
                portion, at_tail = left[0]
                with tracing.send(queue, portion):
                    await self.broker.publish(queue, portion, at_tail=at_tail)
                tally.count_published(portion, lost=lost)
                left.pop(0)
        except errors.BrokerUnavailable:
            metrics.published(sum(len(portion) for portion, _ in left), "error", [])
            self.refused.add(queue)
            await lifecycle.unpublish(self.db, [bell for portion, _ in left for bell in portion])
            raise
        if bells:
            self.refused.discard(queue)

    async def _send(self, claimed: delivery.Claimed, ring: Ring) -> None:
        schedule, age, began = self.settings.webhook_schedule, claimed.age_seconds, time.monotonic()
        if delivery.is_spent(claimed.attempt, claimed.scheduled_attempt, schedule, age_seconds=age):
            self.circuits.ended(claimed.receiver, None, time.monotonic())
            log.error("webhook %s is ended unsent: relays have died of it, as it seems", claimed.id)
            await self.receipts.settle(Settling(claimed, delivery.UNSENT, delivery.ENDED_UNSENT), age_seconds=age)
            return
        outcome = None
        spans = tracing.Webhook(claimed.traceparent, webhook_id=claimed.id, attempt=claimed.attempt, url=claimed.url)
        try:
            receipt = await self.sender.post(
                claimed.url,
                webhook_id=str(claimed.id),
                body=delivery.body(claimed, self.settings.webhook_payload),
                traceparent=spans.traceparent,
                timestamp_seconds=int(claimed.claimed_at.timestamp()),
                owner=claimed.owner,
                keys=ring.keys(claimed.claimed_at),
            )
            outcome = receipt.outcome
        except sealing.Unreadable:
            receipt = Receipt(outcome=Outcome.SECRET_UNREADABLE)
            # The row of an earlier release may have no owner, and what is known of '' is not known of everybody else.
            if claimed.owner == claimed.receiver.owner:
                self.circuits.could_not_sign(claimed.owner, time.monotonic())
        finally:
            self.circuits.ended(claimed.receiver, outcome, time.monotonic())
        verdict = delivery.decide(claimed.scheduled_attempt, receipt, schedule, age_seconds=age)
        if verdict.spends:
            error = None if receipt.outcome is Outcome.SUCCESS else str(receipt.outcome)
            spans.end(status_code=receipt.status_code, error_type=error, event=claimed.event, facts=claimed.facts)
        metrics.webhook_attempted(receipt.outcome.value, receipt.duration_seconds)
        settling = Settling(claimed, receipt, verdict)
        await self.receipts.settle(settling, age_seconds=age + time.monotonic() - began)

    async def watch_connection(self) -> None:
        """Know since when Postgres answers, without a gap that this relay noticed."""
        try:
            await self.db.ping()
        except errors.DatabaseUnavailable:
            self.connected_since = None
            self.notes.clear()
            raise
        now = time.monotonic()
        if self.connected_since is None or now - self.answered_at > GAP_SECONDS:
            self.connected_since = now
        self.answered_at = now
        metrics.show_heartbeat()


def _portions(bells: list[lifecycle.Bell]) -> list[tuple[list[lifecycle.Bell], bool]]:
    """What to push with one command each, and whether at the tail; there the first in line is pushed last."""
    new = [bell for bell in bells if not bell.overdue]
    again = [bell for bell in bells if bell.overdue]
    ends = range(len(again), 0, -BATCH)
    return [(new, False)] * bool(new) + [(again[max(0, end - BATCH) : end], True) for end in ends]


async def serve(settings: Settings) -> None:
    """Sweep until SIGTERM or SIGINT, then let the webhooks that are on their way arrive."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    database = Database(settings.postgres_dsn, max_connections=8, application_name="taskqueue-relay")
    broker = Broker(settings.redis_url.get_secret_value(), client_name="taskqueue-relay", max_connections=9)
    async with Sender.from_settings(settings) as sender:
        relay = Relay(settings, database, broker, sender)
        loops = [asyncio.create_task(one) for one in _loops(relay)]
        await stop.wait()
        # From the signal on: ending the loops may itself take seconds, during which the webhooks go on.
        over_at = loop.time() + settings.grace_seconds / 2
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(over_at):
                await relay.claiming.acquire()
        await stopping.stop(*loops)
        if sending := {*relay.sending, *relay.trials.sending}:
            await asyncio.wait(sending, timeout=max(0.0, over_at - loop.time()))
        if relay.sending:
            await _hand_back(relay)
    await broker.close()
    await database.close()


def _loops(relay: Relay) -> list[Coroutine[Any, Any, None]]:
    scheduler = Scheduler(relay.settings, relay.db)
    exporter = Exporter(relay.settings, relay.db, relay.broker, relay.circuits)
    share = EXPORT_SHARE_OF_TIME
    loops = [
        every(NOTE_SECONDS, _measured("beat", partial(_beat, relay)), "the relay"),
        every(TICK_SECONDS, _measured("deliver", partial(_deliver, relay)), "delivering webhooks", at_once=relay.told),
        every(HEAR_AGAIN_SECONDS, relay.hear, "hearing of webhooks"),
        every(TICK_SECONDS, _measured("number_events", partial(_all, relay.number_events)), "numbering events"),
        every(TICK_SECONDS, _measured("fire", partial(_fire, scheduler)), "firing schedules"),
        every(TICK_SECONDS, _measured("jobs", relay.work_on_jobs), "acting on many tasks"),
        every(EXPORT_SECONDS, _measured("export_depths", exporter.depths), "exporting the depth of the queues"),
        every(EXPORT_SECONDS, _measured("export_ages", exporter.ages), "exporting ages", share_of_time=share),
        every(COUNT_SECONDS, _measured("export_counts", exporter.counts), "counting the queues", share_of_time=share),
        every(
            COUNT_FAILED_SECONDS, _measured("export_failed", exporter.failed), "counting failures", share_of_time=share
        ),
        every(PRUNE_SECONDS, _measured("prune", partial(_all, relay.prune)), "pruning"),
        every(STRAY_SECONDS, _measured("strays", relay.look_for_strays), "the look for stray queues"),
        every(NOTE_SECONDS, _measured("limits", relay.look_at_limits), "the look at limits"),
        every(STRAY_SECONDS, _measured("forget", partial(_forget, relay)), "forgetting rates and settings"),
        every(GIVE_UP_SECONDS, _measured("give_up", partial(_give_up, relay)), "giving up webhooks"),
        every(TICK_SECONDS, _measured("trials", relay.trials.send), "sending test events"),
        every(RESEAL_SECONDS, _measured("reseal", relay.keyring.reseal), "sealing secrets anew"),
    ]
    for queue in relay.settings.queues:
        of_queue: list[tuple[float, str, Callable[[], Awaitable[object]], str]] = [
            (TICK_SECONDS, "publish", partial(_all, relay.publish_due, queue), f"publishing to {queue}"),
            (NOTE_SECONDS, "lost", partial(_look_for_lost, relay, queue), f"the search for lost messages of {queue}"),
            (NOTE_SECONDS, "reap", partial(relay.reap, queue), f"reaping in {queue}"),
            (NOTE_SECONDS, "expire", partial(_all, relay.expire, queue), f"expiring in {queue}"),
        ]
        loops += [every(seconds, _measured(name, sweep), what) for seconds, name, sweep, what in of_queue]
        let_go = _measured("let_go", partial(_let_go, relay, queue))
        mend = _measured("mend", partial(_mend, relay, queue))
        loops += [
            every(
                TICK_SECONDS,
                let_go,
                f"letting go in {queue}",
                share_of_time=LET_GO_SHARE,
                rest_at_most=LET_GO_REST_SECONDS,
            ),
            every(STRAY_SECONDS, mend, f"looking for tasks of {queue} that stand in no line", share_of_time=share),
        ]
    return loops


def _measured(name: str, sweep: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[object]]:
    """A sweep that notes how long it took, and whether it failed."""

    async def measured() -> None:
        began, failed = time.perf_counter(), True
        try:
            await sweep()
            failed = False
        except asyncio.CancelledError:
            failed = False
            raise
        finally:
            metrics.swept(name, time.perf_counter() - began, failed)

    return measured


async def _all(sweep: Callable[..., Awaitable[int]], *queue: str) -> None:
    while await sweep(*queue) >= BATCH:
        pass


async def _let_go(relay: Relay, queue: str) -> None:
    # Where nothing is limited there may still be rows from when something was; those can wait for a second.
    now = time.monotonic()
    if relay.restricted.get(queue, False):
        return  # It is paused.
    if queue not in relay.restricted and now - relay.looked_at_held.get(queue, -math.inf) < NOTE_SECONDS:
        return
    relay.looked_at_held[queue] = now
    await _all(relay.let_go, queue)


async def _mend(relay: Relay, queue: str) -> None:
    while mended := await lifecycle.mend(relay.db, queue, limit=BATCH):
        log.error("%d tasks of %s were held and stood in no line; they are fed again", mended, queue)


async def _forget(relay: Relay) -> None:
    while await lifecycle.forget_rates(relay.db, limit=BATCH) == BATCH:
        pass
    await lifecycle.forget_settings(relay.db, older_than_seconds=STRAY_SECONDS)


async def _deliver(relay: Relay) -> None:
    while True:
        await relay.next_look()
        begun = await relay.deliver()
        if begun == 0 and relay.walked_to == delivery.BEGINNING:
            if relay.looked_at >= relay.told_at + LOCKED_SECONDS:
                return
            await _within(LOCKED_SECONDS, relay.told)
            continue
        # What has arrived makes room at once; what never does is waited for by nobody for whom there is room.
        if relay.walked_to == delivery.BEGINNING or relay.room(time.monotonic()) <= 0:
            await _within(TICK_SECONDS, relay.arrived)


async def _within(seconds: float, event: asyncio.Event) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


async def _give_up(relay: Relay) -> None:
    while await relay.give_up():
        pass


async def _hand_back(relay: Relay) -> None:
    """What a relay that stops does with the webhooks that did not arrive in time."""
    try:
        async with asyncio.timeout(HAND_BACK_SECONDS):
            handed_back = await relay.hand_back()
    except (errors.DatabaseUnavailable, TimeoutError):
        log.warning("webhooks that were on their way wait for their lease: Postgres does not answer")
    else:
        if handed_back:
            log.info("%d webhooks that were on their way are handed back", handed_back)


async def _fire(scheduler: Scheduler) -> None:
    while await scheduler.fire_due(limit=SCHEDULES_AT_ONCE) == SCHEDULES_AT_ONCE:
        pass


async def _look_for_lost(relay: Relay, queue: str) -> None:
    await relay.note_tail(queue)
    await relay.publish_lost(queue)


async def _beat(relay: Relay) -> None:
    beat_file(relay.settings).parent.mkdir(parents=True, exist_ok=True)
    try:
        await relay.watch_connection()
    except errors.DatabaseUnavailable:
        wait_file(relay.settings).touch()
        raise
    beat_file(relay.settings).touch()


def beat_file(settings: Settings) -> Path:
    """The file whose time tells that the relay works."""
    return settings.data_dir / "run" / "relay.beat"


def wait_file(settings: Settings) -> Path:
    """The file whose time tells that the relay waits for Postgres."""
    return settings.data_dir / "run" / "relay.wait"


def run(settings: Settings) -> None:
    """Run a relay until it is told to stop."""
    telemetry.configure_logging(settings, "relay")
    telemetry.configure(settings, "relay")
    metrics.serve(settings.metrics_port, "relay", revision=settings.revision)
    if settings.metrics_port == 0:
        metrics.silence()
    metrics.expect_sweeps(Outcome)
    for secret in settings.webhook_secrets:
        webhook_key(secret.get_secret_value())
    if not settings.webhook_secrets:
        log.warning("TASKQUEUE_WEBHOOK_SECRET is not set: webhooks are sent without a signature")
    if not settings.webhook_blocked_cidrs and not settings.webhook_allow_private:
        log.warning("TASKQUEUE_WEBHOOK_BLOCKED_CIDRS is not set: name your own ranges, so that no webhook reaches them")
    try:
        asyncio.run(serve(settings))
    finally:
        telemetry.shutdown()

"""What a relay exports of the queues and the webhooks, and what it counts of its own work."""

import time
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
import redis.asyncio

from app import delivery, lifecycle, publisher
from app.broker import Broker
from app.circuits import THRESHOLD, Circuits
from app.core import errors, ids
from app.core.config import Settings
from app.db import Database
from app.exporter import Exporter
from app.lifecycle import Error, Failed, Interrupted, Lost, RetryAsked, decide
from app.relay import Relay
from app.utils.webhook import Outcome, Sender
from tests.conftest import settings_for
from tests.support.database import opened, started, submitted
from tests.support.network import closed_port
from tests.support.scraping import sampled
from tests.support.waiting import until

QUEUES = "default,reports"


@pytest.fixture
def two_queues(postgres_url: str, redis_url: str) -> Settings:
    return settings_for(
        postgres_url,
        redis_url,
        TASKQUEUE_QUEUES=QUEUES,
        TASKQUEUE_LEASE_SECONDS=1,
        TASKQUEUE_LATENCY_OBJECTIVES="15 reports=600",
    )


@pytest.fixture
async def db(two_queues: Settings) -> AsyncIterator[Database]:
    async with opened(two_queues) as database:
        yield database


@pytest.fixture
async def wire(two_queues: Settings) -> AsyncIterator[Broker]:
    broker = Broker(two_queues.redis_url.get_secret_value(), client_name="test")
    yield broker
    await broker.close()


@pytest.fixture
def circuits() -> Circuits:
    return Circuits()


@pytest.fixture
def exporter(two_queues: Settings, db: Database, wire: Broker, circuits: Circuits) -> Exporter:
    return Exporter(two_queues, db, wire, circuits)


@pytest.fixture
async def plain(two_queues: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(two_queues.redis_url.get_secret_value()) as client:
        yield client


@pytest.fixture
async def relay(two_queues: Settings, db: Database, wire: Broker) -> AsyncIterator[Relay]:
    async with Sender.from_settings(two_queues) as sender:
        now = time.monotonic()
        yield Relay(two_queues, db, wire, sender, grace_seconds=0.0, connected_since=now - 60, answered_at=now + 600)


async def held_back(db: Database) -> UUID:
    """A task whose message was left to the relay."""
    new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default")
    await lifecycle.submit(db, new, hold_back=True)
    return new.id


async def aged(db: Database, task_id: UUID, seconds: float) -> None:
    """Have a task been submitted, and due, so long ago."""
    past = "now() - make_interval(secs => $2)"
    await db.execute(f"UPDATE task SET created_at = {past}, run_at = {past} WHERE id = $1", task_id, seconds)


def tasks(state: str, queue: str = "default") -> float | None:
    return sampled("taskqueue_tasks", queue=queue, state=state)


async def test_each_unfinished_task_is_in_one_state(exporter: Exporter, db: Database) -> None:
    for _ in range(3):
        await submitted(db)
    await held_back(db)
    await submitted(db, delay_seconds=60.0)
    await started(db, await submitted(db))
    claimed = await started(db, await submitted(db))
    again = RetryAsked(Error(type="ValueError"), delay_seconds=60.0)
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, again))
    failed = await started(db, await submitted(db))
    await lifecycle.settle(db, failed.claim, decide(failed.budgets, Failed(Error(type="ValueError"))))
    await lifecycle.pause_queue(db, "reports")
    await submitted(db, queue="reports")

    assert await exporter.counts() == 2
    assert [tasks(state) for state in ("PENDING", "SCHEDULED", "HELD", "STARTED")] == [4, 2, 0, 1]
    assert [tasks(state, "reports") for state in ("PENDING", "SCHEDULED", "HELD", "STARTED")] == [0, 0, 1, 0]
    assert sampled("taskqueue_outbox_unsent", kind="task") == 1
    assert await exporter.failed() == 1
    assert sampled("taskqueue_dead_letter_tasks", queue="default") == 1
    assert sampled("taskqueue_dead_letter_tasks", queue="reports") == 0


async def test_failures_are_counted_whosever_they_are_and_up_to_a_limit(db: Database) -> None:
    for owner in ("", "one", "two", "two"):
        failed = await started(db, await submitted(db, owner=owner))
        await lifecycle.settle(db, failed.claim, decide(failed.budgets, Failed(Error(type="ValueError"))))
    assert await lifecycle.failed_counts(db, ["default"], limit=100) == {"default": 4}
    assert await lifecycle.failed_counts(db, ["default"], limit=3) == {"default": 3}
    assert await lifecycle.failed_counts(db, ["nobody"], limit=100) == {"nobody": 0}


async def test_what_waits_for_longest_is_as_old_as_it_is_wherever_it_waits(exporter: Exporter, db: Database) -> None:
    name = "taskqueue_queue_oldest_message_age_seconds"

    async def age(queue: str = "default") -> float:
        await exporter.ages()
        found = sampled(name, queue=queue)
        assert found is not None
        return found

    assert await age() == 0
    await submitted(db, delay_seconds=600.0)
    assert await age() == 0
    published = await submitted(db)
    await aged(db, published, 100.0)
    assert 100 <= await age() < 160
    # A message that Redis lost, or never had, is no younger for that.
    await aged(db, await held_back(db), 1000.0)
    assert 1000 <= await age() < 1060
    unsent = sampled("taskqueue_outbox_oldest_unsent_age_seconds", kind="task")
    assert unsent is not None
    assert 1000 <= unsent < 1060
    assert await age("reports") == 0
    assert sampled("taskqueue_queue_latency_objective_seconds", queue="default") == 15
    assert sampled("taskqueue_queue_latency_objective_seconds", queue="reports") == 600


async def test_what_runs_for_longest_and_what_is_paused(exporter: Exporter, db: Database) -> None:
    for seconds in (50.0, 500.0):
        task_id = await submitted(db)
        await started(db, task_id)
        await db.execute(
            "UPDATE task SET started_at = now() - make_interval(secs => $2) WHERE id = $1", task_id, seconds
        )
    await lifecycle.pause_queue(db, "reports")
    await exporter.ages()
    running = sampled("taskqueue_tasks_oldest_running_age_seconds", queue="default")
    assert running is not None
    assert 500 <= running < 560
    assert sampled("taskqueue_queue_paused", queue="default") == 0
    assert sampled("taskqueue_queue_paused", queue="reports") == 1


async def test_a_source_that_is_away_shows_nothing_and_the_other_one_what_it_has(
    exporter: Exporter, two_queues: Settings, db: Database, circuits: Circuits
) -> None:
    await submitted(db)
    await exporter.depths()
    await exporter.counts()
    await exporter.ages()
    assert sampled("taskqueue_queue_depth", queue="default") == 0
    last = sampled("taskqueue_state_exporter_last_success_timestamp_seconds")
    assert last is not None
    assert time.time() - 60 < last <= time.time()
    away = Broker(f"redis://127.0.0.1:{closed_port()}", client_name="test")
    failed = sampled("taskqueue_state_exporter_errors_total", source="redis") or 0
    with pytest.raises(errors.BrokerUnavailable):
        await Exporter(two_queues, db, away, circuits).depths()
    await away.close()
    assert sampled("taskqueue_queue_depth", queue="default") is None
    assert sampled("taskqueue_state_exporter_errors_total", source="redis") == failed + 1
    assert tasks("PENDING") == 1
    closed = Database("postgresql://127.0.0.1:1/none", max_connections=1, application_name="test")
    broken = Exporter(two_queues, closed, exporter._broker, circuits)
    for part in (broken.counts, broken.ages, broken.failed):
        with pytest.raises(errors.DatabaseUnavailable):
            await part()
    await closed.close()
    assert tasks("PENDING") is None
    assert sampled("taskqueue_queue_oldest_message_age_seconds", queue="default") is None


async def webhook(db: Database, url: str, *, due_seconds: float) -> None:
    """A webhook that has been due for so long."""
    task_id = await submitted(db, webhook_url=url)
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, lifecycle.Succeeded("1")))
    await db.execute(
        "UPDATE webhook_delivery SET next_at = now() - make_interval(secs => $2) WHERE task_id = $1",
        task_id,
        due_seconds,
    )


async def test_webhooks_that_wait_for_a_dead_receiver_are_not_late(
    exporter: Exporter, db: Database, circuits: Circuits
) -> None:
    async def age() -> float | None:
        await exporter.ages()
        return sampled("taskqueue_webhook_oldest_due_age_seconds")

    assert await age() == 0
    await webhook(db, "https://dead.example/hook", due_seconds=5000.0)
    await webhook(db, "https://lives.example/hook", due_seconds=300.0)
    await webhook(db, "https://later.example/hook", due_seconds=-300.0)
    assert 5000 <= (await age() or 0) < 5060
    dead = delivery.Receiver("", "https://dead.example")
    for _ in range(THRESHOLD):
        circuits.began(dead)
        circuits.ended(dead, Outcome.CONNECT_ERROR, time.monotonic())
    assert 300 <= (await age() or 0) < 360
    await exporter.counts()
    assert sampled("taskqueue_webhook_due") == sampled("taskqueue_outbox_unsent", kind="webhook") == 2


class Counted:
    """How much counters have grown."""

    def __init__(self, *series: tuple[str, dict[str, str]]) -> None:
        self._series = series
        self._before = self._values()

    def _values(self) -> list[float]:
        return [sampled(name, **labels) or 0.0 for name, labels in self._series]

    def grown(self) -> list[float]:
        return [now - then for now, then in zip(self._values(), self._before, strict=True)]


async def test_what_a_relay_puts_right_is_counted(relay: Relay, db: Database, plain: redis.asyncio.Redis) -> None:
    recovered = "taskqueue_reconciler_recovered_total"
    counted = Counted(
        (recovered, {"reason": "lost_message"}),
        (recovered, {"reason": "stuck_outbox"}),
        (recovered, {"reason": "stale_running"}),
        ("taskqueue_outbox_published_total", {"kind": "task", "outcome": "sent"}),
        ("taskqueue_outbox_publish_delay_seconds_count", {"kind": "task"}),
        ("taskqueue_task_attempts_total", {"task": "sample.echo", "queue": "default", "outcome": "lost"}),
    )
    late = await held_back(db)
    await aged(db, late, 60.0)
    await held_back(db)
    assert await relay.publish_due("default") == 2
    assert counted.grown() == [0, 1, 0, 2, 2, 0]

    # The list was taken away: what was in it is found to be lost, and pushed again.
    await plain.delete("default")
    await relay.note_tail("default")
    assert await relay.publish_lost("default") == 2
    assert counted.grown() == [2, 1, 0, 4, 2, 0]

    await started(db, late, lease_seconds=0.0)
    assert await until(lambda: relay.reap("default"), what="the reap") == 1
    assert counted.grown() == [2, 1, 1, 4, 2, 1]


async def test_a_task_that_ends_without_a_worker_is_counted_by_who_ends_it(relay: Relay, db: Database) -> None:
    finished = {"task": "sample.echo", "queue": "default"}
    counted = Counted(
        ("taskqueue_tasks_finished_total", {**finished, "outcome": "expired"}),
        ("taskqueue_tasks_finished_total", {**finished, "outcome": "cancelled"}),
        ("taskqueue_task_end_to_end_seconds_count", {**finished, "outcome": "expired"}),
    )
    await submitted(db, expires_in_seconds=0.0)
    assert await relay.expire("default") == 1
    assert counted.grown() == [1, 0, 1]
    task_id = await submitted(db)
    cancelled = await lifecycle.cancel(db, task_id)
    assert cancelled is not None
    assert cancelled.ended is not None
    assert (cancelled.ended.name, cancelled.ended.queue) == ("sample.echo", "default")
    await publisher.announce_ends(relay.broker, [cancelled.ended])
    assert counted.grown() == [1, 1, 1]


async def test_whoever_settles_knows_what_it_is_counted_as(db: Database) -> None:
    claimed = await started(db, await submitted(db))
    released = await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Interrupted()))
    assert released is not None
    assert (released.name, released.queue) == ("sample.echo", "default")
    # The same hand again, whose first answer was lost, reads the row.
    again = await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Interrupted()))
    assert again is not None
    assert (again.name, again.queue) == ("sample.echo", "default")
    claimed = await started(db, await submitted(db))
    lost = await lifecycle.settle_for(db, claimed.claim, decide(claimed.budgets, Lost()))
    assert lost is not None
    assert (lost.name, lost.queue) == ("sample.echo", "default")

"""Exports the state of the cluster, source by source. A source that can't be read shows nothing, which is not 0."""

from app import delivery, lifecycle
from app.broker import Broker
from app.circuits import Circuits
from app.core import metrics
from app.core.config import Settings
from app.db import Database

FAILED_AT_MOST = 100_000
"""How far failed tasks are counted."""


class Exporter:
    """What a relay shows of the queues and the webhooks. Each part runs once, and returns how much it found."""

    def __init__(self, settings: Settings, database: Database, broker: Broker, circuits: Circuits) -> None:
        self._settings = settings
        self._db = database
        self._broker = broker
        self._circuits = circuits

    async def depths(self) -> int:
        """Export how many messages wait in Redis."""
        with metrics.collecting("redis", "depths") as show:
            for queue in self._settings.queues:
                show("taskqueue_queue_depth", await self._broker.depth(queue), queue)
        return len(self._settings.queues)

    async def ages(self) -> int:
        """Export since when the oldest wait and run. This costs the same, however many there are."""
        with metrics.collecting("postgres", "ages") as show:
            ages = await lifecycle.queue_ages(self._db, self._settings.queues)
            for one in ages:
                objective = self._settings.latency_objective_seconds(one.queue)
                show("taskqueue_queue_oldest_message_age_seconds", one.oldest_seconds, one.queue)
                show("taskqueue_queue_latency_objective_seconds", objective, one.queue)
                show("taskqueue_queue_paused", float(one.paused), one.queue)
                show("taskqueue_tasks_oldest_running_age_seconds", one.running_seconds, one.queue)
            unsent = max(one.unpublished_seconds for one in ages)
            show("taskqueue_outbox_oldest_unsent_age_seconds", unsent, "task")
            webhooks = await delivery.oldest_due_seconds(self._db, without=self._circuits.shut())
            show("taskqueue_outbox_oldest_unsent_age_seconds", webhooks, "webhook")
            show("taskqueue_webhook_oldest_due_age_seconds", webhooks)
        return len(ages)

    async def counts(self) -> int:
        """Export how many tasks wait and run, row by row, and how many webhooks are due."""
        with metrics.collecting("postgres", "counts") as show:
            counts = await lifecycle.queue_counts(self._db, self._settings.queues)
            for one in counts:
                show("taskqueue_tasks", one.published + one.unpublished, one.queue, "PENDING")
                show("taskqueue_tasks", one.scheduled, one.queue, "SCHEDULED")
                show("taskqueue_tasks", one.held, one.queue, "HELD")
                show("taskqueue_tasks", one.running, one.queue, "STARTED")
            due = await delivery.count_due(self._db)
            show("taskqueue_outbox_unsent", sum(one.unpublished for one in counts), "task")
            show("taskqueue_outbox_unsent", due, "webhook")
            show("taskqueue_webhook_due", due)
        return len(counts)

    async def failed(self) -> int:
        """Export how many failed tasks are kept."""
        with metrics.collecting("postgres", "failed") as show:
            failed = await lifecycle.failed_counts(self._db, self._settings.queues, limit=FAILED_AT_MOST)
            for queue, count in failed.items():
                show("taskqueue_dead_letter_tasks", count, queue)
        return sum(failed.values())

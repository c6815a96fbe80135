"""Submitting from Python: Celery's own calls, with a durable row behind each.

`delay`, `apply_async` and `send_task` write the same row as the API, in this
process's own connection to Postgres, and push its message. They work in a
process that was forked, and without Redis.
"""

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from celery import Celery
from celery.exceptions import NotRegistered
from celery.result import AsyncResult
from pydantic_core import to_jsonable_python

from app import lifecycle
from app.core import ids, limits, metrics, telemetry, tracing
from app.core.config import Settings
from app.core.statuses import WebhookEvent
from app.utils import guard
from app.worker import bridge
from app.worker.execution import Declared, DurableTask
from app.worker.transport import Wire

MEANINGLESS = frozenset(
    {
        "add_to_parent",
        "compression",
        "delivery_mode",
        "group_id",
        "group_index",
        "headers",
        "ignore_result",
        "origin",
        "parent_id",
        "priority",
        "replaced_task_nesting",
        "reply_to",
        "result_cls",
        "retry",
        "retry_policy",
        "root_id",
        "route_name",
        "routing_key",
        "serializer",
        "shadow",
        "stamped_headers",
    }
)
"""Options that Celery adds by itself, or that say how a message travels: here it carries no more than an id."""


class DurableCelery(Celery):  # type: ignore[misc]  # Celery ships no types
    """The Celery app, with a durable row behind every way of submitting."""

    task_cls = DurableTask
    amqp_cls = Wire

    def on_configure(self) -> None:
        """Load the configuration, for a program that imported only a module of tasks."""
        importlib.import_module("app.celery_app")

    def send_task(  # noqa: PLR0917  # Celery's signature
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: float | None = None,
        eta: datetime | None = None,
        task_id: str | None = None,
        producer: Any = None,
        connection: Any = None,
        router: Any = None,
        result_cls: Any = None,
        expires: float | datetime | None = None,
        queue: Any = None,
        retries: int = 0,
        time_limit: float | None = None,
        max_retries: int | None = None,
        webhook_url: str | None = None,
        webhook_events: Sequence[str] | None = None,
        tags: Sequence[str] = (),
        concurrency_key: str | None = None,
        **options: Any,
    ) -> AsyncResult:
        """Submit a catalogued task durably, as `POST /api/tasks/submit` does.

        Args:
            name: of a task that is registered here.
            args: positional arguments, checked against the task's signature.
            kwargs: as `args`.
            countdown: seconds from now until it is due; or `eta`.
            eta: when it is due.
            task_id: a UUID; made here unless given. An id that exists already is not submitted again.
            producer: ignored, as are `connection`, `router` and `result_cls`: the row is the queue.
            connection: ignored.
            router: ignored.
            result_cls: ignored.
            expires: seconds from now, or when, after which it must not start any more.
            queue: a name or a kombu Queue; the task's own unless given.
            retries: how many of its retries count as spent.
            time_limit: seconds that one attempt may take; the task's own unless given.
            max_retries: runs after a failed first one; the task's own unless given.
            webhook_url: who is told when it ends.
            webhook_events: what is told instead, such as `["task.started", "task.failed"]`.
            tags: words to find it by.
            concurrency_key: with whom of its queue it shares the limits for each key.
            options: what Celery itself adds is ignored; callbacks, chords and anything unknown are refused.

        Raises:
            NotRegistered: if no such task is known here.
            ValidationFailed: if the arguments don't fit its signature.
            ValueError: if the id, the queue, the webhook's URL or a number can't be used.
            TypeError: if an option is refused.
            DatabaseUnavailable: if Postgres is away; the task may be there all the same.
        """
        del producer, connection, router, result_cls
        refused = sorted(option for option in options if options[option] and option not in MEANINGLESS)
        if refused:
            raise TypeError(f"{name} can't be submitted with {', '.join(refused)}")
        here = bridge.current()
        entry = self._entry(name)
        as_json = _arguments(entry, args, kwargs)
        new = lifecycle.NewTask(
            id=UUID(task_id) if task_id else ids.uuid7(),
            name=name,
            queue=_queue_name(queue or entry.queue or here.settings.queues[0], here.settings),
            concurrency_key=concurrency_key or "",
            args=as_json[0],
            kwargs=as_json[1],
            tags=tuple(tags),
            webhook_url=_admitted(webhook_url, here.settings),
            webhook_events=None if webhook_events is None else tuple(dict.fromkeys(webhook_events)),
            max_retries=entry.max_retries if max_retries is None else max_retries,
            time_limit=entry.time_limit if time_limit is None else time_limit,
            delay_seconds=countdown or 0.0,
            due_at=_aware(eta),
            expires_in_seconds=None if isinstance(expires, datetime) else expires,
            expires_at=_aware(expires) if isinstance(expires, datetime) else None,
            traceparent=telemetry.current_traceparent({}),
            failures=retries,
        )
        _check(new)
        with tracing.create(new.queue, task=new.name, task_id=new.id) as traceparent:
            here.run(_submit(here, new if traceparent is None else replace(new, traceparent=traceparent)))
        return self.AsyncResult(str(new.id))

    def _entry(self, name: str) -> Declared:
        task = self.tasks.get(name)
        entry: Declared | None = getattr(task, "entry", None)
        if entry is None:
            raise NotRegistered(name)
        return entry


celery = DurableCelery("taskqueue", set_as_current=True)


async def _submit(here: bridge.Bridge, new: lifecycle.NewTask) -> None:
    await here.publisher.look(new.queue)
    bell = await lifecycle.submit(here.db, new, hold_back=here.publisher.away(new.queue))
    metrics.submitted(new.name, new.queue)
    if bell is not None:
        # The row is committed: whatever happens from here on is no error of the submit.
        await here.publisher.push(bell)


def _arguments(entry: Declared, args: Any, kwargs: Any) -> tuple[str, str]:
    """The arguments as JSON texts, checked against the signature."""
    positional, named = (
        json.dumps(value, allow_nan=False, ensure_ascii=False, default=to_jsonable_python)
        for value in (list(args or ()), dict(kwargs or {}))
    )
    entry.validate_call(json.loads(positional), json.loads(named))
    return positional, named


def _admitted(url: str | None, settings: Settings) -> str | None:
    if url is None:
        return None
    try:
        return guard.admit_url(url, guard.EgressRules.from_settings(settings))
    except ValueError as refused:
        raise ValueError(f"webhook_url {refused}") from None


def _check(new: lifecycle.NewTask) -> None:
    """The bounds that hold for HTTP as well. Raises ValueError."""
    ahead = limits.AHEAD_SECONDS
    if not 0 <= new.max_retries <= limits.MAX_RETRIES:
        raise ValueError(f"max_retries must be 0 to {limits.MAX_RETRIES}")
    if not 0 <= new.failures <= new.max_retries:
        raise ValueError("retries must be 0 to max_retries")
    if new.time_limit is not None and not 0 < new.time_limit <= limits.TIME_LIMIT_SECONDS:
        raise ValueError(f"time_limit must be more than 0 and at most {limits.TIME_LIMIT_SECONDS} seconds")
    if not -ahead <= new.delay_seconds <= ahead:
        raise ValueError(f"countdown must be at most {ahead} seconds")
    if new.expires_in_seconds is not None and not -ahead <= new.expires_in_seconds <= ahead:
        raise ValueError(f"expires must be at most {ahead} seconds")
    farthest = datetime.now(UTC) + timedelta(seconds=ahead)
    for option, moment in (("eta", new.due_at), ("expires", new.expires_at)):
        if moment is not None and moment > farthest:
            raise ValueError(f"{option} must be at most a year ahead")
    _check_words(new)
    if new.webhook_events is not None:
        _check_events(new, new.webhook_events)


def _check_words(new: lifecycle.NewTask) -> None:
    if len(new.tags) > limits.TAGS or not all(0 < len(tag) <= limits.TAG_LENGTH for tag in new.tags):
        raise ValueError(f"tags must be at most {limits.TAGS}, of 1 to {limits.TAG_LENGTH} characters each")
    if len(new.concurrency_key) > limits.CONCURRENCY_KEY_LENGTH:
        raise ValueError(f"concurrency_key must be at most {limits.CONCURRENCY_KEY_LENGTH} characters")


def _check_events(new: lifecycle.NewTask, events: Sequence[str]) -> None:
    if new.webhook_url is None:
        raise ValueError("webhook_events needs a webhook_url")
    if not events or not set(events) <= set(WebhookEvent):
        raise ValueError(f"webhook_events must be some of {', '.join(WebhookEvent)}")


def _queue_name(queue: Any, settings: Settings) -> str:
    name = str(getattr(queue, "name", queue))
    if name not in settings.queues:
        raise ValueError(f"queue {name!r} is not one of TASKQUEUE_QUEUES")
    return name


def _aware(when: datetime | None) -> datetime | None:
    """Celery takes a naive time for UTC (`enable_utc`)."""
    return when.replace(tzinfo=UTC) if when is not None and when.tzinfo is None else when

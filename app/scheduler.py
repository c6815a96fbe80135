"""Fires the schedules that are due: what each relay does beside its other sweeps, without a leader.

Whether a schedule's time has come is Postgres's to say. What is submitted is
looked at again each time: a release may have lost the task, or changed its
parameters. Then the schedule says so and is tried again, and no other waits
for it; of its times none is lost but by its own policy.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace

from pydantic import ValidationError

from app import lifecycle, schedules, schemas
from app.core import backoff, errors, ids, metrics, telemetry, tracing
from app.core.config import Settings
from app.db import Database
from app.schedules import Due, Schedule
from app.utils.guard import EgressRules

AGAIN_SECONDS = 15.0
"""When a schedule that could not be fired is tried again, about; the relay of another release may succeed before."""

log = logging.getLogger(__name__)

NewTask = Callable[..., lifecycle.NewTask]
"""`intake.new_task`."""


class Scheduler:
    """The schedules, as one relay sees to them."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._db = database
        self._rules = EgressRules.from_settings(settings)
        self._new_task: NewTask | None = None

    async def fire_due(self, *, limit: int) -> int:
        """Decide about schedules that are due.

        Returns:
            How many there were.
        """
        found = await schedules.due(self._db, limit=limit)
        for schedule, now in found:
            definition = schedule.definition
            if schedule.next_run is None:
                continue
            try:
                decided = schedules.decide(
                    definition.timing,
                    schedule.next_run,
                    now,
                    catch_up=definition.catch_up,
                    overlap=definition.overlap,
                )
                await self._fire(schedule, decided)
            except errors.DatabaseUnavailable:
                raise
            except Exception as failed:  # noqa: BLE001  # whatever is wrong with one schedule, the next one is fired
                await self._failed(schedule, failed)
        return len(found)

    async def _fire(self, schedule: Schedule, decided: Due) -> None:
        tasks = await self._tasks(schedule, len(decided.times)) if decided.times else []
        with contextlib.ExitStack() as spans:
            traced = [_traced(spans, task, schedule) for task in tasks]
            fired = await schedules.fire(self._db, schedule, decided, traced)
        if fired is None:
            return
        if decided.missed:
            log.warning("schedule %s has missed times before %s", schedule.name, decided.next_run)
        if fired.skipped:
            log.info("schedule %s skipped a time: its last task has not ended", schedule.name)
        for task in tasks[: fired.tasks]:
            metrics.submitted(task.name, task.queue)

    async def _tasks(self, schedule: Schedule, count: int) -> list[lifecycle.NewTask]:
        """So many tasks of a schedule, checked as a submit is. Raises whatever is wrong with them."""
        if self._new_task is None:
            self._new_task = await asyncio.to_thread(_with_catalog, self._settings)
        wanted = schemas.SubmitRequest.model_validate_json(schedule.definition.submit)
        one = self._new_task(wanted, self._settings, self._rules, owner=schedule.owner, traceparent="")
        return [replace(one, id=ids.uuid7(), traceparent=telemetry.current_traceparent({})) for _ in range(count)]

    async def _failed(self, schedule: Schedule, failed: Exception) -> None:
        reason = _reason(failed)
        if reason != schedule.last_error:
            known = isinstance(failed, errors.TaskQueueError | ValueError)
            log.error("schedule %s can't be fired: %s", schedule.name, reason, exc_info=None if known else failed)
        await schedules.fail(self._db, schedule, reason, again_in_seconds=backoff.spread(AGAIN_SECONDS))


def _traced(spans: contextlib.ExitStack, task: lifecycle.NewTask, schedule: Schedule) -> lifecycle.NewTask:
    """A task of a schedule begins a trace of its own, since years may lie between the first and the last of them."""
    creating = tracing.create(task.queue, task=task.name, task_id=task.id, schedule=schedule.name)
    traceparent = spans.enter_context(creating)
    return task if traceparent is None else replace(task, traceparent=traceparent)


def _with_catalog(settings: Settings) -> NewTask:
    """What makes a task of a request, once the tasks are registered. Raises SettingsError if they can't be."""
    # Imported here, with Celery and the operator's modules: a relay without schedules needs none of them.
    from app import catalog, intake  # noqa: PLC0415

    catalog.load_modules(settings)
    return intake.new_task


def _reason(failed: Exception) -> str:
    """What is wrong, for the owner of the schedule: fields, and no values."""
    if isinstance(failed, errors.ValidationFailed):
        return "; ".join(f"/submit{fault.pointer}: {fault.detail}" for fault in failed.errors)
    if isinstance(failed, ValidationError):
        return "/submit: this release can't read it"
    if isinstance(failed, errors.SettingsError):
        return "The relay can't import the tasks of TASKQUEUE_TASK_MODULES"
    if isinstance(failed, errors.StatementRefused):
        return "What is to be submitted can't be stored"
    return str(failed) if isinstance(failed, ValueError) else "Something went wrong here; it is logged"

"""Celery's result backend, made honest: what `AsyncResult` hears is the row's truth, and it never waits for nothing.

Redis holds a copy of each task's end, put there by whoever ended it. Celery's
own tracer stores nothing, because it would report what one attempt did. A copy
that is missing (Redis was down, flushed, or it is older than an hour) is read
from the row instead.
"""

import json
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from celery import states
from celery.backends.redis import RedisBackend, ResultConsumer
from kombu.utils.json import register_type

from app import broker, lifecycle, publisher
from app.core import errors
from app.worker import bridge

POLL_SECONDS = 2.0
"""How often a waiter looks at the rows, in case Redis lost what it waits for."""


class RawJson(str):
    """A JSON text that holds an object which kombu would take for one of its own types."""

    __slots__ = ()


register_type(RawJson, broker.RAW_JSON_MARKER, str, json.loads)


class RowResultConsumer(ResultConsumer):  # type: ignore[misc]  # Celery ships no types
    """Waits on Redis, with a slow poll of the rows behind it."""

    _polled = 0.0

    def drain_events(self, timeout: float | None = None) -> None:
        """Take what Redis published; every `POLL_SECONDS` look at the rows of all that wait."""
        super().drain_events(timeout)
        now = time.monotonic()
        if now - self._polled < POLL_SECONDS:
            return
        self._polled = now
        concrete, weak = self.backend._pending_results  # noqa: SLF001  # Celery's own name for who waits
        for meta in self.backend.row_metas([*concrete, *weak]):
            if meta["status"] in states.READY_STATES:
                self.on_state_change(meta, None)


class RowBackend(RedisBackend):  # type: ignore[misc]  # Celery ships no types
    """Celery's Redis backend, with the row behind it and without the tracer's opinion."""

    ResultConsumer = RowResultConsumer

    def store_result(self, task_id: str, result: Any, state: str, *args: Any, **kwargs: Any) -> Any:
        """Store nothing: only `Broker.put_results` writes, after the row is settled."""
        del task_id, state, args, kwargs
        return result

    def _get_task_meta_for(self, task_id: str) -> dict[str, Any]:
        meta: dict[str, Any] = super()._get_task_meta_for(task_id)
        if meta["status"] != states.PENDING:
            return meta
        return next(iter(self.row_metas([task_id])), meta)

    def row_metas(self, task_ids: Sequence[str]) -> list[dict[str, Any]]:
        """What the rows say, in the shape of this backend. Nothing of those unknown, or without Postgres."""
        try:
            wanted = [UUID(task_id) for task_id in task_ids]
            here = bridge.current()
            found = here.run(lifecycle.results(here.db, wanted)) if wanted else {}
        except (ValueError, errors.DatabaseUnavailable):
            return []
        return [self._row_meta(task_id, status, ended) for task_id, (status, ended) in found.items()]

    def _row_meta(self, task_id: UUID, status: str, ended: lifecycle.Ended | None) -> dict[str, Any]:
        if ended is None:
            return {"task_id": str(task_id), "status": str(status), "result": None}
        meta: dict[str, Any] = self.decode_result(publisher.meta_of(ended))
        return meta

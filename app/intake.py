"""From what somebody asked for to the task that is stored: all that is wrong is found before anything is written."""

import functools
import hashlib
import json
from datetime import datetime
from typing import Any

from app import catalog, lifecycle, schemas
from app.core import errors, ids
from app.core.config import Settings
from app.core.errors import FieldError
from app.utils import guard

ADMITTED = 500
"""Webhook URLs that are remembered as admitted: most tasks of a client tell the same receiver, and looking at its URL
takes as long as all else about a submit. What one is depends on its text and the rules, and on nothing else."""


def new_task(
    wanted: schemas.SubmitRequest, settings: Settings, rules: guard.EgressRules, *, owner: str, traceparent: str
) -> lifecycle.NewTask:
    """The task to be stored.

    Raises:
        ValidationFailed: naming all that is wrong with it.
    """
    faults: list[FieldError] = []
    webhook_url = _admitted(wanted.webhook_url, rules, faults)
    try:
        entry = catalog.lookup(wanted.task)
        entry.validate_call(wanted.args, wanted.kwargs)
    except errors.ValidationFailed as invalid:
        faults += invalid.errors
        entry = None
    queues = settings.queues
    queue = wanted.queue or (entry.queue if entry is not None else None) or queues[0]
    if queue not in queues:
        faults.append(FieldError("/queue", "No worker consumes a queue of this name"))
    if wanted.webhook_events is not None and wanted.webhook_url is None:
        faults.append(FieldError("/webhook_events", "Needs a webhook_url"))
    if entry is None or faults:
        raise errors.ValidationFailed(faults)
    moment = wanted.expires if isinstance(wanted.expires, datetime) else None
    return lifecycle.NewTask(
        id=ids.uuid7(),
        name=entry.name,
        queue=queue,
        concurrency_key=wanted.concurrency_key or "",
        args=_json(wanted.args) if wanted.args else "[]",
        kwargs=_json(wanted.kwargs) if wanted.kwargs else "{}",
        tags=tuple(wanted.tags),
        webhook_url=webhook_url,
        webhook_events=None if wanted.webhook_events is None else tuple(dict.fromkeys(wanted.webhook_events)),
        max_retries=entry.max_retries if wanted.max_retries is None else wanted.max_retries,
        time_limit=entry.time_limit if wanted.time_limit is None else wanted.time_limit,
        delay_seconds=wanted.countdown or 0.0,
        due_at=wanted.eta,
        expires_in_seconds=None if isinstance(wanted.expires, datetime) else wanted.expires,
        expires_at=moment,
        traceparent=traceparent,
        owner=owner,
        unique_key=None if wanted.unique_for is None else _unique_key(owner, entry, wanted),
        unique_for_seconds=wanted.unique_for,
    )


_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def _unique_key(owner: str, entry: catalog.Entry, wanted: schemas.SubmitRequest) -> bytes:
    call: list[Any] = [owner, entry.name, entry.named(wanted.args, wanted.kwargs)]
    return hashlib.sha256(json.dumps(call, sort_keys=True, separators=(",", ":")).encode()).digest()


class _Admitted:
    """The URLs that were admitted under one set of rules, as they are spelled then. A process has one set of them."""

    def __init__(self, rules: guard.EgressRules) -> None:
        self.rules = rules
        self.spelled = functools.lru_cache(maxsize=ADMITTED)(functools.partial(guard.admit_url, rules=rules))


_admitted_last = _Admitted(guard.EgressRules())


def _admit(url: str, rules: guard.EgressRules) -> str:
    global _admitted_last  # noqa: PLW0603  # one memory per process
    admitted = _admitted_last
    if admitted.rules is not rules:  # To compare them takes longer than to look at a URL.
        admitted = _admitted_last = _Admitted(rules)
    return admitted.spelled(url)


def _admitted(url: str | None, rules: guard.EgressRules, faults: list[FieldError]) -> str | None:
    if url is None:
        return None
    try:
        return _admit(url, rules)
    except ValueError as refused:
        faults.append(FieldError("/webhook_url", str(refused)))
        return None

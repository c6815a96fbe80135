"""What became of each attempt of a task: when, where, how it ended, and what its code logged last.

The statement that ends an attempt writes its row (`attempts`), but for one that
succeeded and logged nothing: that is known from the row of its task, as is one
that runs.
"""

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app.core.statuses import AttemptOutcome
from app.db import Database, Record
from app.lifecycle.rules import Error


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line that the code of a task has logged. `number` is 1 for the first of its attempt."""

    number: int
    at: datetime
    level: str
    logger: str
    message: str


@dataclass(frozen=True, slots=True)
class Logged:
    """The last lines that an attempt has logged, in order."""

    attempt: int
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt.

    Attributes:
        number: 1 for the first.
        ended_at: None while it runs.
        worker: who ran it.
        outcome: None while it runs, and where a worker of an earlier release has ended it.
        error: why it did not succeed, with its traceback; None if it did, or was handed back or cancelled.
        lines: the last that its code has logged. Those of a process that was killed are lost.
        dropped: how many lines came before those.
    """

    number: int
    started_at: datetime | None
    ended_at: datetime | None
    worker: str | None
    outcome: AttemptOutcome | None
    error: Error | None
    lines: tuple[Line, ...]
    dropped: int


_ATTEMPTS = """
SELECT number, started_at, ended_at, worker, outcome, error_type, error_message, error_traceback, log, log_dropped
  FROM task_attempt WHERE task_id = $1 AND number > $3
UNION ALL
SELECT attempt, started_at, finished_at, worker, CASE status WHEN 'SUCCESS' THEN 'succeeded' END,
       CASE WHEN status <> 'STARTED' THEN error_type END, error_message, error_traceback, NULL, 0
  FROM task
 WHERE id = $1 AND attempt > $3
   AND NOT EXISTS (SELECT FROM task_attempt a WHERE a.task_id = task.id AND a.number = task.attempt)
 ORDER BY number LIMIT $2
"""


async def attempts(db: Database, task_id: UUID, owner: str, *, after: int = 0, limit: int) -> list[Attempt] | None:
    """The attempts of an owner's task, the first one first.

    Args:
        db: where.
        task_id: whose.
        owner: of the task.
        after: number of the last one that is known already.
        limit: attempts at most.

    Returns:
        None if the task is unknown, or somebody else's.
    """
    if await db.fetchval("SELECT true FROM task WHERE id = $1 AND owner = $2", task_id, owner) is None:
        return None
    return [_attempt(row) for row in await db.fetch(_ATTEMPTS, task_id, limit, after)]


_LOGGED = """
SELECT number, started_at, log, log_dropped FROM task_attempt
 WHERE task_id = $1 AND number BETWEEN $2 AND $3 AND log IS NOT NULL
 ORDER BY number LIMIT $4
"""


async def logged(db: Database, task_id: UUID, *, first: int, last: int, limit: int) -> list[Logged]:
    """The lines that are kept of attempts that have ended, for who may see the task: from one number to another."""
    rows = await db.fetch(_LOGGED, task_id, first, last, limit)
    return [
        Logged(row["number"], read_lines(json.loads(row["log"]), row["started_at"], row["log_dropped"])) for row in rows
    ]


def read_lines(found: list[dict[str, Any]], began: datetime, dropped: int) -> tuple[Line, ...]:
    """Lines from what JSON says of them.

    Args:
        found: as in `Log`.
        began: when their attempt did.
        dropped: how many lines came before these.
    """
    return tuple(
        Line(
            number=number,
            at=began + timedelta(seconds=line["after"]),
            level=line["level"],
            logger=line["logger"],
            message=line["message"],
        )
        for number, line in enumerate(found, dropped + 1)
    )


def _attempt(row: Record) -> Attempt:
    kind, outcome = row["error_type"], row["outcome"]
    error = None
    # What earlier attempts said stays in the row of a task that succeeds.
    if kind is not None and outcome != AttemptOutcome.SUCCEEDED:
        error = Error(type=kind, message=row["error_message"] or "", traceback=row["error_traceback"])
    return Attempt(
        number=row["number"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        worker=row["worker"],
        outcome=None if outcome is None else AttemptOutcome(outcome),
        error=error,
        lines=read_lines(json.loads(row["log"]), row["started_at"], row["log_dropped"]) if row["log"] else (),
        dropped=row["log_dropped"],
    )

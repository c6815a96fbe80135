"""Finding tasks: newest first, page by page, at a cost that does not grow with the table.

A page is a walk along one index, which stops when the page is full, and after
`WALK` rows at the latest: a filter that few rows pass gives a short page, or an
empty one, and the place to go on from. So an answer never takes longer because
there is more to look through, and no filter needs an index of its own, which
every submit, claim and settle would pay for. The longest walk among a million
tasks is one that ten thousand tasks have room for, too, of the rarer statuses
as well: `make bench-listing` measures both.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from uuid import UUID

from app.core.statuses import TaskStatus
from app.db import Database, Record
from app.lifecycle.rules import Error

WALK = 1_000
"""Tasks that one page of a list looks at."""
COUNT_LIMIT = 10_000
"""Tasks of one status that are counted exactly."""
MESSAGE_SHOWN = 500
"""Characters of an error's message in a list."""

_ENDLESS = datetime.max.replace(tzinfo=UTC) - timedelta(days=1)
_FIRST_ID = UUID(int=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which tasks are meant. What is None or empty narrows nothing; all the rest must hold.

    Attributes:
        statuses: one of these.
        name: of the catalogue.
        tag: one of its tags.
        error_type: of what it shows as its error, be that its end or its newest failed attempt.
        created_after: at this moment or later.
        created_before: before this moment.
        finished_after: as `created_after`, of its end.
        finished_before: as `created_before`, of its end.
    """

    statuses: frozenset[TaskStatus] = frozenset()
    name: str | None = None
    queue: str | None = None
    tag: str | None = None
    error_type: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    finished_after: datetime | None = None
    finished_before: datetime | None = None

    @property
    def order(self) -> "Order":
        """What its pages are sorted by."""
        by_end = self.finished_after is not None or self.finished_before is not None
        return Order.FINISHED if by_end and self.error_type is None else Order.CREATED


class Order(StrEnum):
    """What a list is sorted by, newest first, and its ids where that is equal."""

    CREATED = "c"
    FINISHED = "f"


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a list: the moment that it is sorted by, and the id of the task there."""

    at: datetime
    id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a list shows of a task.

    Attributes:
        error: why it did not end well, or its newest attempt did not; the message is cut to `MESSAGE_SHOWN`.
    """

    id: UUID
    name: str
    queue: str
    status: TaskStatus
    attempt: int
    failures: int
    max_retries: int
    tags: tuple[str, ...]
    cancel_requested: bool
    rerun_of: UUID | None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: Error | None


@dataclass(frozen=True, slots=True)
class Page:
    """Some tasks.

    Attributes:
        tasks: newest first; fewer than were asked for, or none, if the walk came upon no more of them.
        end: where to go on; None if there is nothing behind.
    """

    tasks: list[Found] = field(default_factory=list)
    end: Mark | None = None


_SHOWN = f"""
id, name, queue, status, attempt, failures, max_retries, tags, cancel_requested, rerun_of, created_at, run_at,
started_at, finished_at, error_type, left(error_message, {MESSAGE_SHOWN}) AS error_message
"""
_OF_A_TASK = """
id, name, queue, status, attempt, failures, max_retries, tags, cancel_requested, rerun_of, created_at, run_at,
started_at, finished_at, error_type, error_message, owner
"""
_CREATED_WITHIN = """
created_at >= COALESCE($7::timestamptz, '-infinity') AND created_at < COALESCE($8::timestamptz, 'infinity')
"""
_ENDED_WITHIN = """
finished_at >= COALESCE($9::timestamptz, '-infinity') AND finished_at < COALESCE($10::timestamptz, 'infinity')
"""
_MATCHES = f"""
    status = ANY ($2::text[])
    AND ($3::text IS NULL OR name = $3) AND ($4::text IS NULL OR queue = $4)
    AND ($5::text IS NULL OR $5 = ANY (tags))
    AND ($6::text IS NULL OR error_type = $6 AND status <> 'SUCCESS')
    AND {_CREATED_WITHIN}
    AND ($9::timestamptz IS NULL AND $10::timestamptz IS NULL OR {_ENDED_WITHIN})
"""


def _page_of(walk: str, sorted_by: str) -> str:
    # The last row of a walk comes along even if it is not meant: it is the place to go on from. Rows are numbered as
    # they come, so a page that is full ends the walk.
    return f"""
WITH stepped AS (
    SELECT walked.*, row_number() OVER () AS step
      FROM (SELECT * FROM ({walk}) AS tasks ORDER BY {sorted_by} DESC, id DESC LIMIT $13::int) AS walked
), found AS (
    SELECT stepped.*, ({_MATCHES}) AS meant FROM stepped
)
SELECT {_SHOWN}, {sorted_by} AS place, meant, step FROM found WHERE meant OR step = $13 LIMIT $14::int
"""


# One branch for each status that may be wanted, which Postgres merges by their order; where none is named, NULL finds
# nothing at once. As no status stands in the statement, no index of one status alone is taken for it: that may be tiny
# when the statement is planned, and it is not in the order of the list.
_BY_STATUS = " UNION ALL ".join(
    f"""
    (SELECT {_OF_A_TASK} FROM task
      WHERE owner = $1 AND status = ($2::text[])[{nth}]
        AND {_CREATED_WITHIN} AND (created_at, id) < ($11::timestamptz, $12::uuid)
      ORDER BY created_at DESC, id DESC)"""
    for nth in range(1, len(TaskStatus) + 1)
)
_BY_END = f"""
    SELECT {_OF_A_TASK} FROM task
     WHERE owner = $1 AND finished_at IS NOT NULL AND {_ENDED_WITHIN}
       AND (finished_at, id) < ($11::timestamptz, $12::uuid)
"""
_BY_ERROR = f"""
    SELECT {_OF_A_TASK} FROM task
     WHERE owner = $1 AND error_type = $6 AND error_type IS NOT NULL AND status <> 'SUCCESS'
       AND {_CREATED_WITHIN} AND (created_at, id) < ($11::timestamptz, $12::uuid)
"""
_PAGE_BY_STATUS = _page_of(_BY_STATUS, "created_at")
_PAGE_BY_END = _page_of(_BY_END, "finished_at")
_PAGE_BY_ERROR = _page_of(_BY_ERROR, "created_at")


async def page(
    db: Database, owner: str, wanted: Filter, *, after: Mark | None = None, limit: int, walk: int | None = None
) -> Page:
    """Some of an owner's tasks, newest first: by creation, or by their end if `wanted.order` says so.

    Args:
        db: where.
        owner: whose; nobody else's are looked at.
        wanted: which of them.
        after: the `end` of the page before.
        limit: tasks at most.
        walk: tasks to look at, at most; `WALK` if None.
    """
    walk = WALK if walk is None else walk
    if wanted.error_type is not None:
        sql = _PAGE_BY_ERROR
    else:
        sql = _PAGE_BY_STATUS if wanted.order is Order.CREATED else _PAGE_BY_END
    rows = await db.fetch(
        sql,
        owner,
        [str(status) for status in wanted.statuses or frozenset(TaskStatus)],
        wanted.name,
        wanted.queue,
        wanted.tag,
        wanted.error_type,
        wanted.created_after,
        wanted.created_before,
        wanted.finished_after,
        wanted.finished_before,
        _ENDLESS if after is None else after.at,
        _FIRST_ID if after is None else after.id,
        walk,
        limit + 1,
    )
    meant = [row for row in rows if row["meant"]]
    tasks = [_found(row) for row in meant[:limit]]
    if len(meant) > limit:
        return Page(tasks, _mark(meant[limit - 1]))
    return Page(tasks, _mark(rows[-1]) if rows and rows[-1]["step"] == walk else None)


def _mark(row: Record) -> Mark:
    return Mark(row["place"], row["id"])


def _found(row: Record) -> Found:
    columns = dict(row)
    kind, message = columns.pop("error_type"), columns.pop("error_message")
    del columns["place"], columns["meant"], columns["step"]
    status = TaskStatus(columns.pop("status"))
    shown = kind is not None and status is not TaskStatus.SUCCESS
    error = Error(type=kind, message=message or "") if shown else None
    return Found(status=status, tags=tuple(columns.pop("tags")), error=error, **columns)


@dataclass(frozen=True, slots=True)
class Count:
    """How many tasks have a status.

    Attributes:
        tasks: how many; there may be more if `exact` is false.
        exact: whether all were counted.
    """

    tasks: int
    exact: bool


_COUNTS = """
SELECT wanted.status,
       (SELECT count(*) FROM (SELECT FROM task WHERE owner = $1 AND status = wanted.status LIMIT $3::int) AS of_it)
         AS tasks
  FROM unnest($2::text[]) AS wanted (status)
"""


async def counts(db: Database, owner: str) -> dict[TaskStatus, Count]:
    """How many of an owner's tasks have each status, counted up to `COUNT_LIMIT` each."""
    rows = await db.fetch(_COUNTS, owner, [str(status) for status in TaskStatus], COUNT_LIMIT + 1)
    return {
        TaskStatus(row["status"]): Count(min(row["tasks"], COUNT_LIMIT), exact=row["tasks"] <= COUNT_LIMIT)
        for row in rows
    }

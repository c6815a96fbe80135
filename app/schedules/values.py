"""What travels in and out of the schedules."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app.core.statuses import CatchUp, Overlap
from app.schedules.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """What its owner says of a schedule.

    Attributes:
        task: the name of the task.
        submit: what is submitted each time: the JSON of a submit's body.
    """

    timing: Timing
    catch_up: CatchUp
    overlap: Overlap
    paused: bool
    task: str
    submit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule, and how far it has come.

    Attributes:
        version: grows with every write.
        next_run: the first time for which nothing has been decided; None if it is paused, or none is left.
        last_run: the newest time for which a task was submitted.
        fired: tasks that were submitted.
        skipped: times at which the last task had not ended.
        last_error: why it could not be fired; None since it was.
    """

    owner: str
    name: str
    definition: Definition
    version: int
    next_run: datetime | None
    last_run: datetime | None
    last_task_id: UUID | None
    fired: int
    skipped: int
    last_error: str | None
    failing_since: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be done about a schedule that is due.

    Attributes:
        times: for each of which a task is to be submitted, in order; there may be none.
        next_run: the time after all that have come.
        missed: whether there were times for which nothing is fired, though overlap would allow it.
    """

    times: tuple[datetime, ...]
    next_run: datetime | None
    missed: bool


@dataclass(frozen=True, slots=True)
class Fired:
    """What came of a schedule that was due.

    Attributes:
        tasks: how many were submitted.
        skipped: whether none was because the last one has not ended.
    """

    tasks: int
    skipped: bool

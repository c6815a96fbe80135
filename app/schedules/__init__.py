"""Schedules: tasks that are submitted by themselves, each of its times once, by whichever relay comes first.

`timing` knows the times, `rules` decides what is fired of what has come due, `table` has the statements.
The one that fires moves the schedule on and submits its tasks, together or not
at all, so that neither a relay that dies nor two that race repeat or lose a time.
"""

from app.schedules.rules import CATCH_UP_LIMIT, LATE_SECONDS, decide, planned
from app.schedules.table import SCHEDULES_LIMIT, count_live, delete, due, fail, fire, forget, get, page, put
from app.schedules.timing import Timing
from app.schedules.values import Definition, Due, Fired, Schedule

__all__ = [
    "CATCH_UP_LIMIT",
    "LATE_SECONDS",
    "SCHEDULES_LIMIT",
    "Definition",
    "Due",
    "Fired",
    "Schedule",
    "Timing",
    "count_live",
    "decide",
    "delete",
    "due",
    "fail",
    "fire",
    "forget",
    "get",
    "page",
    "planned",
    "put",
]

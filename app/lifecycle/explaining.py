"""Why a task is where it is, in a sentence and in a word: `explain()`, from facts alone.

One statement finds the facts in Postgres; what Redis says of the queue is a fact
that the caller adds. Nothing here guesses: what can't be known is said to be
unknown, or is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from app.core.statuses import TERMINAL, HeldFor, Reason, TaskStatus
from app.db import Database
from app.lifecycle.presence import SEEN_SECONDS

AHEAD_LIMIT = 10_000
"""Tasks before one that are counted."""
MESSAGE_SHOWN = 200
"""Characters of an error's message in the sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a task. Times are in seconds, by Postgres's clock.

    Attributes:
        due_in: until it is due; negative if it has been for so long.
        expires_in: until it is not worth starting any more.
        published: whether it should have a message in Redis.
        held: what holds it back though it is due; None for nothing.
        ahead: tasks of its queue that come before it, `AHEAD_LIMIT` + 1 for more; None unless it waits and is due.
            Of one that is held, those that are held before it, for what it is held for.
        running_for: since its newest attempt began.
        lease_left: until its lease ends; negative if it has ended.
        ended_ago: since it ended.
        consumers: workers that consume its queue, and were seen within `SEEN_SECONDS`.
        slots: of those workers.
        busy: how many of these slots run something.
    """

    status: TaskStatus
    queue: str
    attempt: int
    failures: int
    max_retries: int
    cancel_requested: bool
    due_in: float
    expires_in: float | None
    published: bool
    held: HeldFor | None
    ahead: int | None
    running_for: float | None
    lease_left: float | None
    ended_ago: float | None
    worker: str | None
    progress: float | None
    progress_message: str | None
    error_type: str | None
    error_message: str | None
    consumers: int
    slots: int
    busy: int

    @property
    def in_line(self) -> bool:
        """Whether it waits for nothing but its turn."""
        return self.ahead is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is known besides the row.

    Attributes:
        queue_known: whether the queue is among TASKQUEUE_QUEUES.
        depth: messages of the queue in Redis; None if Redis does not answer, or was not asked.
        depth_cap: how many a queue may hold.
        lease_seconds: how long a claim lives.
    """

    queue_known: bool
    depth: int | None
    depth_cap: int
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a task is where it is.

    Attributes:
        reason: for programs.
        sentence: for people.
    """

    reason: Reason
    sentence: str


# What comes before it: in the line those of a lower place, and while it has no message also those without one that
# were due before; of what is held, those in the same line. All counts stop early, each has its index.
_FACTS = f"""
SELECT t.status, t.queue, t.attempt, t.failures, t.max_retries, t.cancel_requested, t.worker, t.progress,
       t.progress_message, t.error_type, t.error_message, t.published_at IS NOT NULL AS published,
       h.reason AS held,
       extract(epoch FROM t.run_at - now())::float8 AS due_in,
       extract(epoch FROM t.expires_at - now())::float8 AS expires_in,
       extract(epoch FROM now() - t.started_at)::float8 AS running_for,
       extract(epoch FROM t.lease_until - now())::float8 AS lease_left,
       extract(epoch FROM now() - t.finished_at)::float8 AS ended_ago,
       CASE WHEN t.status NOT IN ('PENDING', 'RETRY') OR t.run_at > now() THEN NULL ELSE
       (SELECT count(*) FROM (
            SELECT FROM task a
             WHERE a.queue = t.queue AND a.status IN ('PENDING', 'RETRY') AND a.published_at IS NOT NULL
               AND a.position < CASE WHEN t.published_at IS NOT NULL THEN t.position ELSE {2**63 - 1} END
             LIMIT {AHEAD_LIMIT + 1}) AS in_line)
     + (SELECT count(*) FROM (
            SELECT FROM task a
             WHERE a.queue = t.queue AND a.status IN ('PENDING', 'RETRY') AND a.published_at IS NULL
               AND (a.run_at, a.id) < (t.run_at, t.id) AND t.published_at IS NULL
             LIMIT {AHEAD_LIMIT + 1}) AS not_in_line)
     + (SELECT count(*) FROM (
            SELECT FROM held_task a
             WHERE a.queue = h.queue AND a.line = h.line AND a.let_go_at IS NULL
               AND (a.run_at, a.task_id) < (h.run_at, h.task_id)
             LIMIT {AHEAD_LIMIT + 1}) AS held_before) END AS ahead,
       w.consumers, w.slots, w.busy
  FROM task t LEFT JOIN held_task h ON h.task_id = t.id AND t.published_at = 'infinity', LATERAL (
       SELECT count(*) AS consumers, COALESCE(sum(slots), 0) AS slots, COALESCE(sum(busy), 0) AS busy FROM worker
        WHERE t.queue = ANY (queues) AND seen_at > now() - make_interval(secs => $3)) AS w
 WHERE t.id = $1 AND t.owner = $2
"""


async def facts(db: Database, task_id: UUID, owner: str) -> Facts | None:
    """What is known of an owner's task; None if it is unknown, or somebody else's."""
    row = await db.fetchrow(_FACTS, task_id, owner, SEEN_SECONDS)
    if row is None:
        return None
    columns = dict(row)
    held = columns.pop("held")
    return Facts(status=TaskStatus(columns.pop("status")), held=None if held is None else HeldFor(held), **columns)


def explain(known: Facts, around: Surroundings) -> Explanation:
    """Why a task is where it is. Pure."""
    if known.status in TERMINAL:
        return _ended(known)
    if known.status is TaskStatus.STARTED:
        return _running(known, around)
    for look in _WHILE_IT_WAITS:
        found = look(known, around)
        if found is not None:
            return Explanation(found.reason, found.sentence + _expiry(known))
    raise AssertionError("the last look always finds something")  # pragma: no cover


def _ended(known: Facts) -> Explanation:
    when = f"after {_times(known.attempt, 'attempt')}" if known.attempt else "before it was ever started"
    sentence = f"It ended as {known.status} {_seconds(known.ended_ago)} ago, {when}."
    if known.status is not TaskStatus.SUCCESS and known.error_type is not None:
        message = f": {known.error_message[:MESSAGE_SHOWN]}" if known.error_message else ""
        sentence = f"{sentence[:-1]}: {known.error_type}{message}."
    return Explanation(Reason.ENDED, sentence)


def _running(known: Facts, around: Surroundings) -> Explanation:
    where = f"attempt {known.attempt}, on worker {known.worker}"
    left = known.lease_left or 0.0
    if left <= 0.0:
        sentence = f"It lost its worker: the lease of {where}, ended {_seconds(-left)} ago; a relay will take it back."
        return Explanation(Reason.WORKER_SILENT, sentence)
    # A lease is pushed out as soon as a third of it is used.
    if left < around.lease_seconds / 2:
        sentence = (
            f"Its worker has not been heard of for about {_seconds(around.lease_seconds - left)}"
            f" ({where}); its lease ends in {_seconds(left)}, then it runs elsewhere."
        )
        return Explanation(Reason.WORKER_SILENT, sentence)
    lasting = f"has been running for {_seconds(known.running_for)} ({where})"
    if known.cancel_requested:
        return Explanation(Reason.CANCEL_REQUESTED, f"It {lasting}, and was asked to stop.")
    return Explanation(Reason.RUNNING, f"It {lasting}{_progress(known)}; its lease ends in {_seconds(left)}.")


def _progress(known: Facts) -> str:
    if known.progress is None:
        return ""
    message = f" ({known.progress_message})" if known.progress_message else ""
    return f": {known.progress:.0%} done{message}"


def _not_due(known: Facts, _: Surroundings) -> Explanation | None:
    if known.due_in <= 0.0:
        return None
    cause = ""
    if known.status is TaskStatus.RETRY and known.error_type in _LOSSES:
        cause = f", after it lost its process or its worker ({known.error_type})"
    elif known.status is TaskStatus.RETRY and known.failures:
        cause = f" (retry {known.failures} of {known.max_retries}, after {known.error_type})"
    return Explanation(Reason.NOT_DUE, f"It waits: it is due in {_seconds(known.due_in)}{cause}.")


_LOSSES = {"WorkerLost", "OutOfMemory"}


def _queue_unknown(known: Facts, around: Surroundings) -> Explanation | None:
    if around.queue_known:
        return None
    sentence = f"It waits: queue `{known.queue}` is not among TASKQUEUE_QUEUES, so nobody looks after it."
    return Explanation(Reason.QUEUE_UNKNOWN, sentence)


def _held(known: Facts, _: Surroundings) -> Explanation | None:
    if known.held is None:
        return None
    return Explanation(
        Reason.HELD, f"It is held: {_HOLDS[known.held].format(queue=known.queue)}; {_before(known)} held before it."
    )


_HOLDS = {
    HeldFor.PAUSED: "queue `{queue}` is paused, or is being worked off since it was",
    HeldFor.CONCURRENCY: "as many tasks of queue `{queue}` run as may",
    HeldFor.RATE: "as many tasks of queue `{queue}` have started as may in a while",
    HeldFor.KEY_CONCURRENCY: "as many tasks of its `concurrency_key` run in queue `{queue}` as may",
    HeldFor.KEY_RATE: "as many tasks of its `concurrency_key` have started in queue `{queue}` as may in a while",
}


def _redis_away(known: Facts, around: Surroundings) -> Explanation | None:
    if around.depth is not None:
        return None
    what = "no message can be taken" if known.published else "it can't be published"
    return Explanation(Reason.REDIS_AWAY, f"It waits: Redis does not answer, so {what}.")


def _no_consumer(known: Facts, _: Surroundings) -> Explanation | None:
    if known.consumers:
        return None
    sentence = f"It waits: no worker consumes queue `{known.queue}` (none was seen in the last {SEEN_SECONDS:.0f} s)."
    return Explanation(Reason.NO_CONSUMER, sentence)


def _unpublished(known: Facts, around: Surroundings) -> Explanation | None:
    if known.published:
        return None
    if (around.depth or 0) >= around.depth_cap * _ALMOST:
        sentence = f"It waits: queue `{known.queue}` is full, with {around.depth} messages in Redis; {_line(known)}."
        return Explanation(Reason.QUEUE_FULL, sentence)
    return Explanation(Reason.UNPUBLISHED, f"It waits: it is due, and a relay will publish it; {_line(known)}.")


_ALMOST = 0.9
"""Of the cap: a queue that was full is fed again once it has that much room."""


def _in_line(known: Facts, around: Surroundings) -> Explanation:
    if around.depth == 0:
        sentence = "Its message has left the queue: it is being claimed, or was lost and will be pushed again."
        return Explanation(Reason.MESSAGE_GONE, sentence)
    return Explanation(Reason.IN_LINE, f"It is in line in queue `{known.queue}`: {_line(known)}.")


_WHILE_IT_WAITS: tuple[Callable[[Facts, Surroundings], Explanation | None], ...] = (
    _not_due,
    _queue_unknown,
    # What holds a task on purpose comes before whatever is missing.
    _held,
    _redis_away,
    _no_consumer,
    _unpublished,
    _in_line,
)
"""What is looked at in turn; the first that finds something is the reason."""


def _line(known: Facts) -> str:
    consumed = f"{_times(known.consumers, 'worker')} consume{'s' if known.consumers == 1 else ''} it"
    return f"{_before(known)} before it, and {consumed}, {known.busy} of {known.slots} slots busy"


def _before(known: Facts) -> str:
    ahead = known.ahead or 0
    if ahead > AHEAD_LIMIT:
        return f"more than {AHEAD_LIMIT} tasks are"
    return {0: "no task is", 1: "1 task is"}.get(ahead, f"about {ahead} tasks are")


def _expiry(known: Facts) -> str:
    if known.expires_in is None:
        return ""
    if known.expires_in <= 0.0:
        return " Its time has passed: a relay will end it as expired."
    return f" It expires in {_seconds(known.expires_in)} unless it starts."


def _seconds(seconds: float | None) -> str:
    return f"{max(0.0, seconds or 0.0):.0f} s"


def _times(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"

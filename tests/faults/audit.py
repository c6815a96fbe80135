"""Whether a promise was broken: the invariants I1 to I7 over every row, every step, every run and every webhook.

I1: every acknowledged id has exactly one row. I2: every row ends. I3: a task
ends once, and its end never changes. I4: attempts only grow, none is given out twice,
and each is billed for how it ended, and for no more. I5: whoever asked for a
webhook is told of the end once or more often, under one id and with one body,
and hears it at least once. I6: a task runs again only after an attempt that was
released, failed, crashed or lost; what succeeded is the run that holds the row.
I7: statuses follow legal steps only.

Pure: what was seen goes in, what is wrong with it comes out. The legal steps
stand here once more, in the words of the design, not in those of the code.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

TERMINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
LEGAL = frozenset(
    {
        (None, "PENDING"),
        *((waiting, after) for waiting in ("PENDING", "RETRY") for after in ("STARTED", "REVOKED", "FAILURE")),
        *(("STARTED", after) for after in ("SUCCESS", "FAILURE", "REVOKED", "RETRY", "PENDING")),
    }
)
SPENT: Mapping[str, frozenset[int]] = {
    "SUCCESS": frozenset({0}),
    "PENDING": frozenset({0}),
    "RETRY": frozenset({1}),
    "FAILURE": frozenset({1}),
    # A cancel ends what would have been a retry, billed as one, or stops a run that is billed for nothing.
    "REVOKED": frozenset({0, 1}),
}
"""How much an attempt may add to all budgets together, by what it led to."""
RESULTS: Mapping[str, str] = {"faults.work": '"done"', "faults.hold_the_gil": '"done"', "faults.die": '"survived"'}
"""What a task returns that comes to its end, as JSON."""
CLOCK_SECONDS = 0.01
"""How far two readings of one clock may lie apart, one of which was rounded."""
EXAMPLES = 4

Workers = Literal["untouched", "killed", "cut off"]
"""What a test did to workers: nothing that may cost a lease; it killed some; or it stalled some or cut them off from
Postgres, so that a run may go on although the next has begun."""

# Written by a trigger, in the transaction of the step: it can't be missed, and it is lost only with the step.
HISTORY = """
CREATE TABLE step (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    task_id uuid NOT NULL, before text, status text NOT NULL, attempt int NOT NULL, token uuid, ended_before bool,
    failures int NOT NULL, crashes int NOT NULL, losses int NOT NULL, refusals int NOT NULL
);
CREATE FUNCTION note_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO step (task_id, status, attempt, token, ended_before, failures, crashes, losses, refusals)
        VALUES (NEW.id, NEW.status, NEW.attempt, NEW.token, false,
                NEW.failures, NEW.crashes, NEW.losses, NEW.refusals);
    ELSIF OLD.finished_at IS NOT NULL OR (OLD.status, OLD.attempt) IS DISTINCT FROM (NEW.status, NEW.attempt) THEN
        INSERT INTO step (task_id, before, status, attempt, token, ended_before, failures, crashes, losses, refusals)
        VALUES (NEW.id, OLD.status, NEW.status, NEW.attempt, NEW.token, OLD.finished_at IS NOT NULL,
                NEW.failures, NEW.crashes, NEW.losses, NEW.refusals);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_step AFTER INSERT OR UPDATE ON task FOR EACH ROW EXECUTE FUNCTION note_step();
"""
STEPS = """
SELECT extract(epoch FROM at)::float8 AS at, task_id::text AS task_id, before, status, attempt, token::text AS token,
       ended_before, failures, crashes, losses, refusals
  FROM step
"""
ROWS = """
SELECT t.id::text AS id, t.name, t.status, t.attempt, t.webhook_url, t.result::text AS result, t.error_type,
       t.crashes, t.losses, t.failures,
       ARRAY(SELECT d.id::text || ' ' || d.status FROM webhook_delivery d WHERE d.task_id = t.id) AS deliveries
  FROM task t
"""


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a row, as Postgres committed it, with what the task had spent by then."""

    at: float
    task_id: str
    before: str | None
    status: str
    attempt: int
    token: str | None
    ended_before: bool
    failures: int = 0
    crashes: int = 0
    losses: int = 0
    refusals: int = 0

    @property
    def spent(self) -> int:
        """All budgets together."""
        return self.failures + self.crashes + self.losses + self.refusals


@dataclass(frozen=True, slots=True)
class Effect:
    """What a run of a task noted itself: that it began, or came to its end."""

    what: str
    task_id: str
    attempt: int
    token: str
    at: float
    pid: int


@dataclass(frozen=True, slots=True)
class Post:
    """A webhook that arrived. `answered` is the status code that its sender got; None if it got none."""

    webhook_id: str
    body: bytes
    task_id: str
    status: str
    answered: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was counted, and every sentence that is untrue."""

    ended: int
    lost: int
    changed: int
    run_twice: int
    webhooks: int
    breaches: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One line of the fault table."""

    fault: str
    acknowledged: int
    ended: int
    lost: int
    changed: int
    run_twice: int
    webhooks: int
    recovery_seconds: float
    allowed_seconds: float
    seconds: float
    seed: str

    def line(self) -> str:
        """The line, under `HEADER`."""
        recovery = f"{self.recovery_seconds:.1f} of {self.allowed_seconds:g} s"
        return _LINE.format(
            self.fault,
            self.acknowledged,
            self.ended,
            self.lost,
            self.run_twice,
            self.webhooks,
            recovery,
            f"{self.seconds:.0f} s",
            self.seed,
        )


_LINE = "{:<58}{:>7}{:>7}{:>6}{:>11}{:>10}{:>16}{:>8}  {}"
HEADER = _LINE.format("fault", "acked", "ended", "lost", "run twice", "webhooks", "recovery", "in all", "seed")


def step(row: Mapping[str, Any]) -> Step:
    """A row of `STEPS`."""
    return Step(**dict(row))


def effects(ledger: str) -> list[Effect]:
    """The lines of a ledger."""
    found = []
    for line in ledger.splitlines():
        what, task_id, attempt, token, at, pid = line.split()
        found.append(Effect(what, task_id, int(attempt), token, float(at), int(pid)))
    return found


def post(webhook_id: str, body: bytes, answered: int | None) -> Post:
    """A webhook from what arrived, and from how that was answered."""
    data = json.loads(body)["data"]
    return Post(webhook_id, body, data["task_id"], data["status"], answered)


def skipped(test: str, report: Any) -> str:
    """The line of a test that was not run, from where and why pytest says it was skipped."""
    reason = report[2] if isinstance(report, tuple) else str(report)
    return f"skipped: {test}: {reason.removeprefix('Skipped: ')}"


def at_once(effects: Sequence[Effect], steps: Sequence[Step]) -> int:
    """How many runs there were at the same time at most, by what they noted themselves.

    A run that was killed noted no end: it counts until its attempt was over for the service, which is later.
    """
    over = {(one.task_id, one.attempt): one.at for one in steps if one.before == "STARTED"}
    noted = {(one.task_id, one.token): one.at for one in effects if one.what == "end"}
    changes = []
    for one in effects:
        if one.what == "begin":
            ended = noted.get((one.task_id, one.token), over.get((one.task_id, one.attempt), math.inf))
            # In the order of the clock; at the same moment first what ends.
            changes += [(one.at, 1), (ended, -1)]
    most = running = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def idle_in_transaction(log: str) -> Iterator[str]:
    """Promise 6, from the log of a Postgres that ends every session which leaves a transaction open for a second."""
    times = log.count("idle-in-transaction timeout")
    if times:
        yield f"promise 6: a transaction was left open for a second, {times} times"


def compare(
    *,
    acknowledged: Mapping[str, str | None],
    rows: Iterable[Mapping[str, Any]],
    steps: Sequence[Step],
    effects: Sequence[Effect],
    posts: Sequence[Post],
    workers: Workers = "untouched",
    reclaims: bool = False,
    exhausts: bool = False,
    one_clock: bool = True,
) -> Found:
    """Lay everything that was seen side by side.

    Args:
        acknowledged: the ids that clients were given, with the webhook they asked for.
        rows: of `ROWS`.
        steps: of `STEPS`, in their order.
        effects: what the tasks noted, in their order.
        posts: what the receiver got.
        workers: what was done to them; leases may only be lost, and runs only overlap, if something was.
        reclaims: whether claims may have been lost with Postgres, and given out again.
        exhausts: whether a webhook may have been given up.
        one_clock: whether tasks and Postgres went by the same clock.
    """
    by_id = {row["id"]: row for row in rows}
    ended = {one for one, row in by_id.items() if row["status"] in TERMINAL}
    lost = acknowledged.keys() - ended
    changed = {one.task_id for one in steps if one.ended_before}
    runs = Counter(one.task_id for one in effects if one.what == "begin")
    breaches = [
        *_named("I1: acknowledged, and there is no row", acknowledged.keys() - by_id.keys()),
        *_named("I2: never ended", by_id.keys() - ended),
        *_named("I3: changed after its end", changed),
        *_steps(steps),
        *_bills(by_id, steps, workers),
        *_claims(steps, effects, reclaims),
        *_overlaps(effects, workers),
        *_successes(by_id, steps, effects, one_clock),
        *_webhooks(acknowledged, by_id, ended, posts, exhausts),
    ]
    return Found(
        ended=len(acknowledged.keys() & ended),
        lost=len(lost),
        changed=len(changed),
        run_twice=sum(count > 1 for count in runs.values()),
        webhooks=len(posts),
        breaches=tuple(breaches),
    )


def _steps(steps: Sequence[Step]) -> Iterator[str]:
    """I3, I4 and I7."""
    ends = Counter(one.task_id for one in steps if one.status in TERMINAL and not one.ended_before)
    yield from _named("I3: ended more than once", {task_id for task_id, count in ends.items() if count > 1})
    illegal = {
        f"{one.task_id} {one.before}→{one.status}"
        for one in steps
        if not one.ended_before and (one.before, one.status) not in LEGAL
    }
    yield from _named("I7: illegal step", illegal)
    last: dict[str, int] = {}
    wrong = set()
    for one in steps:
        if one.status == "STARTED" and one.attempt != last.get(one.task_id, 0) + 1:
            wrong.add(f"{one.task_id} attempt {one.attempt} after {last.get(one.task_id, 0)}")
        last[one.task_id] = one.attempt
    yield from _named("I4: an attempt did not follow the one before", wrong)


def _bills(rows: Mapping[str, Mapping[str, Any]], steps: Sequence[Step], workers: Workers) -> Iterator[str]:
    """I4: what every claim came to adds up to what its task has spent.

    Refusals of a task that waits are no steps, so between two steps of its waiting only they may grow.
    """
    last: dict[str, Step] = {}
    wrong = set()
    for one in steps:
        before = last.get(one.task_id)
        last[one.task_id] = one
        if before is None:
            continue
        if one.before == "STARTED":
            fair = one.spent - before.spent in SPENT.get(one.status, ())
        else:
            fair = _by_the_task(one) == _by_the_task(before) and one.refusals >= before.refusals
        if not fair:
            wrong.add(f"{one.task_id} attempt {one.attempt} {one.before}→{one.status}")
    yield from _named("I4: billed for something else than what happened", wrong)
    unseen = {
        task_id
        for task_id in rows.keys() & last.keys()
        if (rows[task_id]["attempt"], *(rows[task_id][budget] for budget in ("failures", "crashes", "losses")))
        != (last[task_id].attempt, *_by_the_task(last[task_id]))
    }
    yield from _named("I4: billed without a step", unseen)
    if workers == "untouched":
        billed = {task_id for task_id, row in rows.items() if row["losses"]}
        yield from _named("I4: billed for a lost worker, and none was touched", billed)


def _by_the_task(one: Step) -> tuple[int, int, int]:
    return one.failures, one.crashes, one.losses


def _claims(steps: Sequence[Step], effects: Sequence[Effect], reclaims: bool) -> Iterator[str]:
    """I4 and I6, by what the tasks themselves saw."""
    begun = Counter((one.task_id, one.attempt, one.token) for one in effects if one.what == "begin")
    yield from _named("I6: one claim ran twice", {f"{key[0]} attempt {key[1]}" for key, n in begun.items() if n > 1})
    tokens: dict[tuple[str, int], set[str]] = defaultdict(set)
    for task_id, attempt, token in begun:
        tokens[task_id, attempt].add(token)
    if not reclaims:
        twice = {f"{task_id} attempt {attempt}" for (task_id, attempt), found in tokens.items() if len(found) > 1}
        yield from _named("I4: an attempt was given out twice", twice)
        given = {(one.task_id, one.attempt, one.token) for one in steps if one.status == "STARTED"}
        unknown = {f"{task_id} attempt {attempt}" for task_id, attempt, _ in begun.keys() - given}
        yield from _named("I6: ran without a claim", unknown)
    over: set[tuple[str, int]] = {(one.task_id, one.attempt) for one in steps if one.before == "STARTED"}
    early = {
        f"{task_id} attempt {attempt}"
        for task_id, attempt in tokens
        if attempt > 1 and (task_id, attempt - 1) not in over
    }
    yield from _named("I6: ran again although the attempt before was not over", early)


def _overlaps(effects: Sequence[Effect], workers: Workers) -> Iterator[str]:
    """I6: by the order in which runs noted something, which no clock decides."""
    newest: dict[str, int] = {}
    overlapping = set()
    for one in effects:
        if one.what == "begin":
            newest[one.task_id] = max(one.attempt, newest.get(one.task_id, 0))
        elif one.attempt < newest.get(one.task_id, 0):
            overlapping.add(f"{one.task_id} attempt {one.attempt}")
    if workers != "cut off":
        yield from _named("I6: went on although the next attempt had begun", overlapping)


def _successes(
    rows: Mapping[str, Mapping[str, Any]], steps: Sequence[Step], effects: Sequence[Effect], one_clock: bool
) -> Iterator[str]:
    """I6: whoever wrote SUCCESS is the run that holds the row, and had come to its end."""
    finished = {(one.task_id, one.token): one.at for one in effects if one.what == "end"}
    ours = {one.task_id for one in effects} | {task_id for task_id, row in rows.items() if row["name"] in RESULTS}
    unfounded = set()
    for one in steps:
        if one.status != "SUCCESS" or one.before == "SUCCESS" or one.task_id not in ours:
            continue
        at = None if one.token is None else finished.get((one.task_id, one.token))
        if at is None or (one_clock and at > one.at + CLOCK_SECONDS):
            unfounded.add(f"{one.task_id} attempt {one.attempt}")
    yield from _named("I6: SUCCESS of a run that had not come to its end", unfounded)
    other = {
        task_id
        for task_id, row in rows.items()
        if row["status"] == "SUCCESS" and row["result"] != RESULTS.get(row["name"], row["result"])
    }
    yield from _named("I6: SUCCESS with a result that the task never returns", other)


def _webhooks(
    acknowledged: Mapping[str, str | None],
    rows: Mapping[str, Mapping[str, Any]],
    ended: set[str],
    posts: Sequence[Post],
    exhausts: bool,
) -> Iterator[str]:
    """I5. Who is to be told is what clients asked for; of tasks that no client knows, what their rows say."""
    asked = {task_id for task_id, url in acknowledged.items() if url is not None}
    wanted = (asked | {task_id for task_id, row in rows.items() if row["webhook_url"] is not None}) & ended
    otherwise = {one for one in acknowledged.keys() & rows.keys() if acknowledged[one] != rows[one]["webhook_url"]}
    yield from _named("I5: the row has another webhook than its client asked for", otherwise)
    deliveries = {
        task_id: [tuple(one.split(" ")) for one in row["deliveries"]]
        for task_id, row in rows.items()
        if task_id in ended
    }
    yield from _named("I5: not one delivery", {one for one in wanted if len(deliveries[one]) != 1})
    yield from _named("I5: a delivery unasked", {one for one in deliveries.keys() - wanted if deliveries[one]})
    over = {"delivered", "exhausted"} if exhausts else {"delivered"}
    yield from _named("I5: not delivered", {one for one in wanted if {now for _, now in deliveries[one]} - over})
    ids: dict[str, set[str]] = defaultdict(set)
    bodies: dict[str, set[bytes]] = defaultdict(set)
    heard = set()
    for one in posts:
        ids[one.task_id].add(one.webhook_id)
        bodies[one.webhook_id].add(one.body)
        if one.answered is not None and 200 <= one.answered < 300:
            heard.add(one.task_id)
    given_up = {one for one in wanted if exhausts and {now for _, now in deliveries[one]} == {"exhausted"}}
    yield from _named("I5: told to nobody", wanted - given_up - ids.keys())
    yield from _named("I5: no POST was answered well", (wanted & ids.keys()) - given_up - heard)
    yield from _named("I5: told of unasked", ids.keys() - wanted)
    yield from _named("I5: several webhook ids", {one for one, found in ids.items() if len(found) > 1})
    strange = {one for one in wanted & ids.keys() if ids[one] - {webhook_id for webhook_id, _ in deliveries[one]}}
    yield from _named("I5: an id that its delivery does not have", strange)
    yield from _named("I5: an id with two bodies", {one for one, found in bodies.items() if len(found) > 1})
    untrue = {one.task_id for one in posts if one.task_id in rows and rows[one.task_id]["status"] != one.status}
    yield from _named("I5: told otherwise than it ended", untrue)


def _named(what: str, found: set[str] | Any) -> Iterator[str]:
    if found:
        examples = ", ".join(sorted(found)[:EXAMPLES])
        yield f"{what}: {len(found)} ({examples}{', …' if len(found) > EXAMPLES else ''})"

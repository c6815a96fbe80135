"""Whether a promise was broken: the invariants I1 to I7 over every row, every step, every run and every webhook.

I1: every acknowledged id has exactly one row. I2: every row ends. I3: a task
ends once, and its end never changes. I4: attempts only grow, and none is given
out twice. I5: whoever ends with a webhook is told of once or more often, under
one id and with one body. I6: a task runs again only after an attempt that was
released, failed, crashed or lost. I7: statuses follow legal steps only.

Pure: what was seen goes in, what is wrong with it comes out. The legal steps
stand here once more, in the words of the design, not in those of the code.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TERMINAL = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
LEGAL = frozenset(
    {
        (None, "PENDING"),
        *((waiting, after) for waiting in ("PENDING", "RETRY") for after in ("STARTED", "REVOKED", "FAILURE")),
        *(("STARTED", after) for after in ("SUCCESS", "FAILURE", "REVOKED", "RETRY", "PENDING")),
    }
)
EXAMPLES = 4

# Written by a trigger, in the transaction of the step: it can't be missed, and it is lost only with the step.
HISTORY = """
CREATE TABLE step (
    seq bigserial PRIMARY KEY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    task_id uuid NOT NULL, before text, status text NOT NULL, attempt int NOT NULL, token uuid, ended_before bool
);
CREATE FUNCTION note_step() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO step (task_id, status, attempt, token, ended_before)
        VALUES (NEW.id, NEW.status, NEW.attempt, NEW.token, false);
    ELSIF OLD.finished_at IS NOT NULL OR (OLD.status, OLD.attempt) IS DISTINCT FROM (NEW.status, NEW.attempt) THEN
        INSERT INTO step (task_id, before, status, attempt, token, ended_before)
        VALUES (NEW.id, OLD.status, NEW.status, NEW.attempt, NEW.token, OLD.finished_at IS NOT NULL);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER note_step AFTER INSERT OR UPDATE ON task FOR EACH ROW EXECUTE FUNCTION note_step();
"""
STEPS = """
SELECT extract(epoch FROM at)::float8 AS at, task_id::text AS task_id, before, status, attempt, token::text AS token,
       ended_before
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
    """One change of a row, as Postgres committed it."""

    at: float
    task_id: str
    before: str | None
    status: str
    attempt: int
    token: str | None
    ended_before: bool


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
    """A webhook that arrived."""

    webhook_id: str
    body: bytes
    task_id: str
    status: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was counted, and every sentence that is untrue."""

    ended: int
    lost: int
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


def post(webhook_id: str, body: bytes) -> Post:
    """A webhook from what arrived."""
    data = json.loads(body)["data"]
    return Post(webhook_id, body, data["task_id"], data["status"])


def compare(
    *,
    acknowledged: Mapping[str, str | None],
    rows: Iterable[Mapping[str, Any]],
    steps: Sequence[Step],
    effects: Sequence[Effect],
    posts: Sequence[Post],
    reclaims: bool,
) -> Found:
    """Lay everything that was seen side by side.

    Args:
        acknowledged: the ids that clients were given, with the webhook they asked for.
        rows: of `ROWS`.
        steps: of `STEPS`, in their order.
        effects: what the tasks noted.
        posts: what the receiver got.
        reclaims: whether claims may have been lost with Postgres, and given out again.
    """
    by_id = {row["id"]: row for row in rows}
    ended = {one for one, row in by_id.items() if row["status"] in TERMINAL}
    lost = acknowledged.keys() - ended
    runs = Counter(one.task_id for one in effects if one.what == "begin")
    breaches = [
        *_named("I1: acknowledged, and there is no row", acknowledged.keys() - by_id.keys()),
        *_named("I2: never ended", by_id.keys() - ended),
        *_steps(steps),
        *_runs(by_id, steps, effects, reclaims),
        *_webhooks(by_id, ended, posts),
    ]
    return Found(
        ended=len(acknowledged.keys() & ended),
        lost=len(lost),
        run_twice=sum(count > 1 for count in runs.values()),
        webhooks=len(posts),
        breaches=tuple(breaches),
    )


def _steps(steps: Sequence[Step]) -> Iterator[str]:
    """I3, I4 and I7."""
    yield from _named("I3: changed after its end", {one.task_id for one in steps if one.ended_before})
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


def _runs(
    rows: Mapping[str, Mapping[str, Any]], steps: Sequence[Step], effects: Sequence[Effect], reclaims: bool
) -> Iterator[str]:
    """I4 and I6, by what the tasks themselves saw."""
    begun = Counter((one.task_id, one.attempt, one.token) for one in effects if one.what == "begin")
    yield from _named("I6: one claim ran twice", {f"{key[0]} attempt {key[1]}" for key, n in begun.items() if n > 1})
    tokens: dict[tuple[str, int], set[str]] = defaultdict(set)
    for task_id, attempt, token in begun:
        tokens[task_id, attempt].add(token)
    twice = {f"{task_id} attempt {attempt}" for (task_id, attempt), found in tokens.items() if len(found) > 1}
    if not reclaims:
        yield from _named("I4: an attempt was given out twice", twice)
    over: set[tuple[str, int]] = {(one.task_id, one.attempt) for one in steps if one.before == "STARTED"}
    early = {
        f"{task_id} attempt {attempt}"
        for task_id, attempt in tokens
        if attempt > 1 and (task_id, attempt - 1) not in over
    }
    yield from _named("I6: ran again although the attempt before was not over", early)
    finished = {(one.task_id, one.attempt) for one in effects if one.what == "end"}
    ours = {one.task_id for one in effects}
    unfounded = {
        task_id
        for task_id in ours & rows.keys()
        if rows[task_id]["status"] == "SUCCESS" and (task_id, rows[task_id]["attempt"]) not in finished
    }
    yield from _named("I6: SUCCESS of an attempt that did not come to its end", unfounded)


def _webhooks(rows: Mapping[str, Mapping[str, Any]], ended: set[str], posts: Sequence[Post]) -> Iterator[str]:
    """I5."""
    wanted = {one for one in ended if rows[one]["webhook_url"] is not None}
    ids: dict[str, set[str]] = defaultdict(set)
    bodies: dict[str, set[bytes]] = defaultdict(set)
    for one in posts:
        ids[one.task_id].add(one.webhook_id)
        bodies[one.webhook_id].add(one.body)
    yield from _named("I5: not one delivery", {one for one in wanted if len(rows[one]["deliveries"]) != 1})
    yield from _named("I5: told to nobody", wanted - ids.keys())
    yield from _named("I5: told of unasked", ids.keys() - wanted)
    yield from _named("I5: several webhook ids", {one for one, found in ids.items() if len(found) > 1})
    yield from _named("I5: an id with two bodies", {one for one, found in bodies.items() if len(found) > 1})
    untrue = {one.task_id for one in posts if one.task_id in rows and rows[one.task_id]["status"] != one.status}
    yield from _named("I5: told otherwise than it ended", untrue)


def _named(what: str, found: set[str] | Any) -> Iterator[str]:
    if found:
        examples = ", ".join(sorted(found)[:EXAMPLES])
        yield f"{what}: {len(found)} ({examples}{', …' if len(found) > EXAMPLES else ''})"

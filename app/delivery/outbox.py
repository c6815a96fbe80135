"""The statements that move a delivery: claimed by a relay, settled by a receipt, handed back, or given up."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from app.db import Database, Record
from app.delivery.events import facts_of, outcome_of
from app.delivery.rules import Verdict
from app.utils.webhook import Outcome, Receipt

EXCERPT_BYTES = 4096
"""What is kept of an answer, as UTF-8."""
RECEIVERS_AT_ONCE = 500
"""Receivers that one claim looks at."""
CIRCUIT_OPEN = "circuit_open"
"""Why a delivery is given up that nobody was sent: beside the words of `Outcome`, which are of attempts."""
BEYOND = "i"
"""Behind every origin in any collation, for each begins with "http"."""
LAST_NUMBER = 32_767
"""What a SMALLINT holds: one row whose attempts were beyond it would fail the claim of all others."""


class Receiver(NamedTuple):
    """Whose webhooks, and where to: what may be slow or dead, without concerning anybody else.

    Attributes:
        owner: of the tasks; empty where nobody has to say who they are.
        origin: scheme, host and port; empty if an earlier release has written the delivery.
    """

    owner: str
    origin: str


BEGINNING = Receiver("", "")
"""Before the first receiver."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """A delivery that this relay may attempt until its lease runs out.

    Attributes:
        id: the `webhook-id`, the same for every attempt.
        owner: of the task.
        receiver: what the search knows it by.
        attempt: which attempt this is, 1 for the first.
        scheduled_attempt: which one since the schedule began, or began anew.
        age_seconds: since the schedule began, or began anew.
        token: fences `settle`.
        claimed_at: Postgres's clock, for the `webhook-timestamp`.
        traceparent: of the submit.
        facts: the JSON of the event without its outcome; `events.body` puts the two together.
    """

    id: UUID
    task_id: UUID
    url: str
    owner: str
    receiver: Receiver
    event: str
    sequence: int
    attempt: int
    scheduled_attempt: int
    age_seconds: float
    token: UUID
    claimed_at: datetime
    traceparent: str | None
    facts: str
    outcome: str | None


# An event of an earlier release has no words of its own. It is of a task that has ended, whose row says the same
# for ever.
FACTS = f"COALESCE(d.facts, {facts_of('t', 'd.event', 'd.sequence')})"
OUTCOME = f"CASE WHEN d.facts IS NOT NULL THEN d.outcome ELSE {outcome_of('t')} END"

# What is claimed while it is being delivered was lost with its relay. That is no attempt of the schedule, unless it
# goes on for so long that the delivery itself may be what relays die of.
# From receiver to receiver, as many of each as there is room for, until there are enough: what is due to a dead one
# is stepped over in one step, however much it is. Rows are locked as they are taken, not before, so the order
# of the receivers is the order of the search, and it goes on where the one before has ended. An owner that is passed
# over takes one step as well, to behind the last of its receivers. The rooms come as JSON, whose members Postgres finds
# by bisection: of an array, all would be compared with each receiver that is walked to.
_CLAIM_DUE = f"""
WITH RECURSIVE orphaned AS (
    SELECT id FROM webhook_delivery
     WHERE status = 'delivering' AND lease_until < now()
     ORDER BY lease_until LIMIT $1 FOR UPDATE SKIP LOCKED
), nameless AS (
    SELECT id FROM webhook_delivery
     WHERE status = 'pending' AND origin IS NULL AND next_at <= now()
     ORDER BY next_at LIMIT $1 FOR UPDATE SKIP LOCKED
), walk (owner, origin, steps) AS (
    SELECT first.owner, CASE WHEN first.owner = ANY ($9) THEN '{BEYOND}' ELSE first.origin END, 1
      FROM (
        SELECT owner, origin FROM webhook_delivery
         WHERE status = 'pending' AND origin IS NOT NULL AND (owner, origin) > ($3, $7)
         ORDER BY owner, origin LIMIT 1) AS first
    UNION ALL
    SELECT next.owner, CASE WHEN next.owner = ANY ($9) THEN '{BEYOND}' ELSE next.origin END, steps + 1
      FROM walk, LATERAL (
        SELECT owner, origin FROM webhook_delivery
         WHERE status = 'pending' AND origin IS NOT NULL AND (owner, origin) > (walk.owner, walk.origin)
         ORDER BY owner, origin LIMIT 1) AS next
     WHERE steps < $4
), due AS (
    SELECT one.id FROM walk, LATERAL (
        SELECT id FROM webhook_delivery
         WHERE status = 'pending' AND owner = walk.owner AND origin = walk.origin AND next_at <= now()
         ORDER BY next_at
         LIMIT COALESCE(($6::jsonb #>> ARRAY[walk.owner, walk.origin])::int, $5)
           FOR UPDATE SKIP LOCKED) AS one
     LIMIT $1
), chosen AS (
    SELECT id FROM orphaned UNION ALL SELECT id FROM nameless UNION ALL SELECT id FROM due LIMIT $1
), claimed AS (
    UPDATE webhook_delivery d
       SET status = 'delivering', attempt = LEAST(d.attempt + 1, {LAST_NUMBER}), token = gen_random_uuid(),
           earlier_attempts = LEAST({LAST_NUMBER}, d.earlier_attempts + (
               d.status = 'delivering' AND d.scheduled_at > now() - make_interval(secs => $8))::int),
           lease_until = now() + make_interval(secs => $2)
      FROM chosen, task t
     WHERE d.id = chosen.id AND t.id = d.task_id
    RETURNING d.id, d.task_id, d.url, t.owner, d.owner AS known_by, COALESCE(d.origin, '') AS origin,
              d.event, d.sequence, d.attempt,
              d.attempt - d.earlier_attempts AS scheduled_attempt,
              extract(epoch FROM now() - d.scheduled_at)::float8 AS age_seconds, d.token, now() AS claimed_at,
              t.traceparent, {FACTS} AS facts, {OUTCOME} AS outcome
)
SELECT w.walked, w.walked_owner, w.walked_origin, last.owner AS taken_owner, last.origin AS taken_origin, claimed.*
  FROM (SELECT count(*) AS walked,
               (array_agg(owner ORDER BY steps DESC))[1] AS walked_owner,
               (array_agg(origin ORDER BY steps DESC))[1] AS walked_origin FROM walk) AS w
  LEFT JOIN (SELECT known_by AS owner, origin FROM claimed ORDER BY known_by DESC, origin DESC LIMIT 1) AS last ON true
  LEFT JOIN claimed ON true
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """What was claimed.

    Attributes:
        claimed: the deliveries.
        walked_to: where the next search goes on; the beginning when all receivers were looked at.
    """

    claimed: list[Claimed]
    walked_to: Receiver


async def claim_by_receiver(
    db: Database,
    *,
    limit: int,
    lease_seconds: float,
    room: int,
    rooms: Mapping[Receiver, int] | None = None,
    after: Receiver = BEGINNING,
    patience_seconds: float = 0.0,
    without: Collection[str] = (),
) -> Due:
    """Claim deliveries that are due, and those whose relay let its lease run out, up to `limit`.

    Any number of relays may do so at once: none waits for another, none gets what
    another has. A lease must outlast the deadline of the POST.

    Args:
        db: where.
        limit: deliveries in all.
        lease_seconds: how long they are this relay's.
        room: deliveries to one receiver.
        rooms: the same for some receivers, where it is less.
        after: the receiver that the search before has come to.
        patience_seconds: since a schedule began, in which an attempt that a relay died with spends nothing of it.
        without: owners whose due deliveries are passed over.
    """
    narrow: dict[str, dict[str, int]] = {}
    for receiver, less in (rooms or {}).items():
        narrow.setdefault(receiver.owner, {})[receiver.origin] = less
    rows = await db.fetch(
        _CLAIM_DUE,
        limit,
        lease_seconds,
        after.owner,
        RECEIVERS_AT_ONCE,
        room,
        json.dumps(narrow),
        after.origin,
        patience_seconds,
        list(without),
    )
    claimed = [_claimed(row) for row in rows if row["id"] is not None]
    if len(claimed) == limit:
        # Stopped in the middle, it goes on behind the last receiver that it took something of.
        end = Receiver(rows[0]["taken_owner"], rows[0]["taken_origin"])
    elif rows[0]["walked"] == RECEIVERS_AT_ONCE:
        end = Receiver(rows[0]["walked_owner"], rows[0]["walked_origin"])
    else:
        end = BEGINNING
    return Due(claimed=claimed, walked_to=end)


async def claim_due(db: Database, *, limit: int, lease_seconds: float) -> list[Claimed]:
    """As `claim_by_receiver`, whoever the receivers are."""
    return (await claim_by_receiver(db, limit=limit, lease_seconds=lease_seconds, room=limit)).claimed


def _claimed(row: Record) -> Claimed:
    columns = dict(row)
    for of_the_search in ("walked", "walked_owner", "walked_origin", "taken_owner", "taken_origin"):
        del columns[of_the_search]
    return Claimed(receiver=Receiver(columns.pop("known_by"), columns.pop("origin")), **columns)


class Settling(NamedTuple):
    """What is to be written of one attempt."""

    claimed: Claimed
    receipt: Receipt
    verdict: Verdict


# The attempt is written by the statement that settles it: none is kept that did not count, none counts unseen.
# One that spends nothing is given back, as if it had not been claimed.
_SETTLE = """
WITH mine AS (
    SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::float8[], $5::int[], $6::text[], $7::timestamptz[],
                         $8::float8[], $9::text[], $10::bool[])
        AS m (id, token, status, wait_seconds, status_code, error, started_at, duration_seconds, excerpt, spends)
), settled AS (
    UPDATE webhook_delivery d
       SET status = m.status, lease_until = NULL, token = NULL,
           next_at = CASE WHEN m.status = 'pending' THEN now() + make_interval(secs => m.wait_seconds)
                          ELSE d.next_at END,
           delivered_at = CASE WHEN m.status = 'delivered' THEN now() END,
           last_status_code = m.status_code, last_error = m.error, attempt = d.attempt - (NOT m.spends)::int
      FROM mine m
     WHERE d.id = m.id AND d.token = m.token AND d.lease_until IS NOT NULL
    RETURNING d.id, d.attempt, m.started_at, m.duration_seconds, m.status_code, m.error, m.excerpt, m.spends,
              m.token AS held_with
), kept AS (
    INSERT INTO webhook_attempt (delivery_id, number, started_at, duration_seconds, status_code, error, excerpt)
    SELECT id, attempt, started_at, duration_seconds, status_code, error, excerpt FROM settled WHERE spends
)
SELECT held_with FROM settled
"""


async def settle(db: Database, claimed: Claimed, receipt: Receipt, verdict: Verdict) -> bool:
    """Write what became of an attempt, if it is still this relay's.

    Returns:
        False if it was superseded: its lease ran out and another relay has it or had it.
    """
    [settled] = await settle_batch(db, [Settling(claimed, receipt, verdict)])
    return settled


async def settle_batch(db: Database, some: Sequence[Settling]) -> list[bool]:
    """As `settle`, for several deliveries at once: all of them or, if one can't be stored, none.

    Returns:
        For each, in their order, whether it was still this relay's.
    """
    # Rows are locked in the order of their ids, so that no two statements wait for each other in a circle.
    in_order = sorted(some, key=lambda one: one.claimed.id)
    rows = await db.fetch(
        _SETTLE,
        [one.claimed.id for one in in_order],
        [one.claimed.token for one in in_order],
        [one.verdict.status.value for one in in_order],
        [one.verdict.wait_seconds for one in in_order],
        [one.receipt.status_code for one in in_order],
        [None if one.receipt.outcome is Outcome.SUCCESS else one.receipt.outcome.value for one in in_order],
        [one.claimed.claimed_at for one in in_order],
        [one.receipt.duration_seconds for one in in_order],
        [kept_excerpt(one.receipt.excerpt) for one in in_order],
        [one.verdict.spends for one in in_order],
    )
    settled = {row["held_with"] for row in rows}
    return [one.claimed.token in settled for one in some]


def kept_excerpt(excerpt: str) -> str:
    """An excerpt as Postgres can hold it: no NUL, no lone surrogate, and no more than its share of bytes."""
    raw = excerpt.replace("\x00", "").encode("utf-8", "replace")[:EXCERPT_BYTES]
    return raw.decode("utf-8", "ignore")


_RELEASE = """
UPDATE webhook_delivery d
   SET status = 'pending', attempt = d.attempt - 1, lease_until = NULL, token = NULL
  FROM unnest($1::uuid[], $2::uuid[]) AS held (id, token)
 WHERE d.id = held.id AND d.token = held.token AND d.lease_until IS NOT NULL
RETURNING d.id
"""


async def release(db: Database, claimed: Sequence[Claimed]) -> int:
    """Hand back what this relay claimed and has no receipt of, as when it stops: no attempt is spent.

    Returns:
        How many were still its own.
    """
    rows = await db.fetch(_RELEASE, [one.id for one in claimed], [one.token for one in claimed])
    return len(rows)


# Of each receiver those that were due first are looked at, and no more: it costs the same however much waits for it.
# What is behind them has its turn, since those before it grow old as well, and go.
# Were it said a second time that they are pending, all that are could be read in search of them.
_GIVE_UP = """
WITH first AS (
    SELECT one.id
      FROM unnest($1::text[], $2::text[]) AS receiver (owner, origin), LATERAL (
        SELECT id, scheduled_at FROM webhook_delivery d
         WHERE status = 'pending' AND d.owner = receiver.owner AND d.origin = receiver.origin AND next_at <= now()
         ORDER BY next_at LIMIT $3) AS one
     WHERE one.scheduled_at < now() - make_interval(secs => $4)
), held AS (
    SELECT d.id FROM webhook_delivery d JOIN first ON first.id = d.id
     WHERE d.status NOT IN ('delivering', 'delivered', 'exhausted')
       AND d.scheduled_at < now() - make_interval(secs => $4)
     ORDER BY d.id FOR UPDATE OF d SKIP LOCKED
)
UPDATE webhook_delivery d SET status = 'exhausted', last_error = $5 FROM held WHERE d.id = held.id
RETURNING d.id
"""


async def give_up(db: Database, receivers: Sequence[Receiver], *, older_than_seconds: float, limit: int) -> int:
    """End deliveries that are due, and that nobody sends: their receivers' circuits stay open.

    Args:
        db: where.
        receivers: whose circuits have been open for long.
        older_than_seconds: how long ago their schedule must have begun.
        limit: deliveries of each receiver that are looked at, those that were due first.

    Returns:
        How many were given up. `redeliver` begins their schedule anew.
    """
    owners, origins = [one.owner for one in receivers], [one.origin for one in receivers]
    rows = await db.fetch(_GIVE_UP, owners, origins, limit, older_than_seconds, CIRCUIT_OPEN)
    return len(rows)

"""Ten thousand webhooks to receivers that fail, sent by relays that are killed."""

import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from app.relay import DELIVERIES_AT_MOST, DELIVERY_LEASE_SECONDS
from tests.faults import audit
from tests.faults.audit import Figures
from tests.faults.stack import GRACE_SECONDS, Stack
from tests.support.crowd import MOST_FAILURES, Crowd, Heard
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

MANY = 10_000
RECEIVERS = 100
LEAST_GONE = 8
"""Relays that go at least, however fast the webhooks are sent."""
NEARLY = 0.98
WEARY_SECONDS = 15 + 60
"""What a receiver that says nothing costs a webhook: the deadline of the POST, and a rest."""

pytestmark = pytest.mark.timeout(420)

# Whoever inserts them has had them expire, so that relays end them, by the statement that they have for it. No worker
# ever gets one: it is due tomorrow.
EXPIRED = """
INSERT INTO task (id, name, queue, args, kwargs, webhook_url, run_at, expires_at)
SELECT gen_random_uuid(), 'faults.work', 'default', '[0.0]', '{}', ($1::text[])[1 + n % cardinality($1)] || '/hook',
       now() + interval '1 day', now()
  FROM generate_series(1, $2::int) AS n
RETURNING id::text AS id, webhook_url
"""
KEPT = """
SELECT d.id::text AS id, d.attempt, array_agg(a.number ORDER BY a.number) AS numbers,
       array_agg(a.error ORDER BY a.number) AS errors, array_agg(a.status_code ORDER BY a.number) AS codes
  FROM webhook_delivery d JOIN webhook_attempt a ON a.delivery_id = d.id
 GROUP BY d.id
"""


@pytest.mark.slow
def test_ten_thousand_webhooks_arrive_though_receivers_fail_and_relays_go(
    running: Stack, report: Report, tmp_path: Path
) -> None:
    with Crowd(RECEIVERS, running.seed, tmp_path) as crowd:
        for row in running.fetch(EXPIRED, crowd.urls, MANY):
            running.client.acknowledged[row["id"]] = row["webhook_url"]
        killed, stopped = 0, 0
        while killed + stopped < LEAST_GONE or delivered(running) < NEARLY * MANY:
            lasting(running.chance.uniform(1.0, 3.0))
            index = running.chance.randrange(len(running.relays))
            relay = running.relays[index]
            if running.chance.random() < 0.5:
                running.kill(relay)
                killed += 1
            else:
                running.expect_end(relay)
                relay.signal(signal.SIGTERM)
                assert relay.wait(GRACE_SECONDS + 2) == 0
                stopped += 1
            running.relays[index] = running.start_relay()
            running.wait_ready()
        last = time.time()
        wait_until(lambda: delivered(running) == MANY, 150, "the delivery of all")
        recovery = time.time() - last
        heard = crowd.posts()

    unsettled = consistent(running, heard, killed)
    well = sum(one.answered == 200 for one in heard)
    what = f"{killed} relays killed, {stopped} stopped; {len(heard) - well} POSTs failed"
    report(
        running.finish(
            f"{what}, {unsettled} unsettled, {well - MANY} twice",
            recovery_seconds=recovery,
            allowed_seconds=DELIVERY_LEASE_SECONDS + WEARY_SECONDS + 30,
            posts=[audit.post(one.webhook_id, one.body, one.answered) for one in heard],
        )
    )


def delivered(running: Stack) -> int:
    """How many webhooks were delivered, by their rows."""
    return int(running.fetch("SELECT count(*) AS n FROM webhook_delivery WHERE status = 'delivered'")[0]["n"])


def consistent(running: Stack, heard: Sequence[Heard], killed: int) -> int:
    """Assert that every event has an id of its own, and that what is kept of its attempts is what was heard.

    Returns:
        How many POSTs came whose attempt is not kept, since its relay went before it was settled.
    """
    [row] = running.fetch(
        "SELECT count(*) AS rows, count(DISTINCT id) AS ids, count(DISTINCT task_id) AS tasks FROM webhook_delivery"
    )
    assert set(dict(row).values()) == {MANY}
    answers: dict[str, list[int | None]] = defaultdict(list)
    for one in heard:
        answers[one.webhook_id].append(one.answered)
    kept = {row["id"]: row for row in running.fetch(KEPT)}
    assert kept.keys() == answers.keys()
    lost_claims = 0
    for webhook_id, row in kept.items():
        failed = [code for code in answers[webhook_id] if code != 200]
        assert answers[webhook_id][: len(failed)] == failed, "the receivers fail first"
        assert len(failed) <= MOST_FAILURES
        assert (row["errors"][-1], row["codes"][-1], row["numbers"][-1]) == (None, 200, row["attempt"])
        assert all(row["errors"][:-1]), "delivered once"
        assert len(set(row["numbers"])) == len(row["numbers"]) <= len(answers[webhook_id])
        lost_claims += row["attempt"] - len(row["numbers"])
    # An attempt that was claimed and is not kept died with its relay; one that was handed back is not counted.
    assert lost_claims <= killed * DELIVERIES_AT_MOST
    return len(heard) - sum(len(row["numbers"]) for row in kept.values())

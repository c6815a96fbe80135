"""The outbox against a real Postgres."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app import delivery, lifecycle
from app.core import errors
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.utils.webhook import Outcome, Receipt

OK = Receipt(outcome=Outcome.SUCCESS, status_code=200)
BROKEN = Receipt(outcome=Outcome.HTTP_5XX, status_code=503)
AGAIN = delivery.Verdict(DeliveryStatus.PENDING)
DELIVERED = delivery.Verdict(DeliveryStatus.DELIVERED)
EXHAUSTED = delivery.Verdict(DeliveryStatus.EXHAUSTED)

# What lifecycle does at the end of a task, as short as it can be.
END = f"""
WITH ended AS (
    UPDATE task SET status = $2, result = $3::json, error_type = $4, error_message = $5, attempt = 1,
                    finished_at = CASE WHEN $2 = 'RETRY' THEN NULL ELSE now() END,
                    event_sequence = event_sequence + {delivery.tells("$2")}
     WHERE id = ANY($1::uuid[]) RETURNING {delivery.told_columns()}
), hook AS ({delivery.intend("ended")})
SELECT id FROM ended
"""


def instant(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@pytest.fixture
async def db(postgres_url: str) -> AsyncIterator[Database]:
    database = Database(postgres_url, max_connections=8, application_name="test")
    yield database
    await database.close()


async def submit(db: Database, url: str | None = "https://example.com/hook") -> UUID:
    task_id = uuid4()
    await db.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, webhook_url, traceparent)"
        " VALUES ($1, 'long_task', 'default', '[]', '{}', $2, '00-a-b-01')",
        task_id,
        url,
    )
    return task_id


async def end(db: Database, *ids: UUID, status: str = "SUCCESS", result: str | None = '"done"') -> None:
    failed = status in {"FAILURE", "REVOKED"}
    await db.fetch(
        END,
        list(ids),
        status,
        None if status != "SUCCESS" else result,
        "Oops" if failed else None,
        "No" if failed else None,
    )


async def ended(db: Database, **how: Any) -> UUID:
    task_id = await submit(db)
    await end(db, task_id, **how)
    return task_id


async def row(db: Database, task_id: UUID) -> asyncpg.Record:
    found = await db.fetchrow("SELECT * FROM webhook_delivery WHERE task_id = $1", task_id)
    assert found is not None
    return found


async def claim_one(db: Database, lease_seconds: float = 30.0) -> delivery.Claimed:
    [claimed] = await delivery.claim_due(db, limit=10, lease_seconds=lease_seconds)
    return claimed


@pytest.mark.parametrize(
    ("status", "event"), [("SUCCESS", "task.succeeded"), ("FAILURE", "task.failed"), ("REVOKED", "task.revoked")]
)
async def test_a_task_that_ends_leaves_one_delivery_with_its_own_id(db: Database, status: str, event: str) -> None:
    task_id = await ended(db, status=status)
    found = await row(db, task_id)
    assert (found["event"], found["sequence"], found["url"]) == (event, 1, "https://example.com/hook")
    assert (found["status"], found["attempt"]) == ("pending", 0)
    assert found["id"] != task_id


async def test_every_row_of_a_statement_that_ends_many_is_told_of_once(db: Database) -> None:
    tasks = [await submit(db) for _ in range(5)]
    await end(db, *tasks)
    assert await db.fetchval("SELECT count(DISTINCT id) FROM webhook_delivery") == 5


async def test_a_task_without_a_webhook_or_not_at_its_end_leaves_none(db: Database) -> None:
    await end(db, await submit(db, url=None))
    await end(db, await submit(db), status="RETRY")
    assert await db.fetchval("SELECT count(*) FROM webhook_delivery") == 0
    assert await delivery.count_due(db) == 0


async def test_a_second_end_of_a_task_is_seen(db: Database) -> None:
    task_id = await ended(db)
    await db.execute("UPDATE task SET event_sequence = 0")
    with pytest.raises(errors.StatementRefused, match="UniqueViolationError"):
        await end(db, task_id, status="FAILURE")
    assert await db.fetchval("SELECT status FROM task WHERE id = $1", task_id) == "SUCCESS"


async def test_a_claim_has_everything_that_the_body_needs(db: Database) -> None:
    stored = '{"big": 123456789012345678901234567890, "f": 1.10}'
    task_id = await ended(db, result=stored)
    claimed = await claim_one(db)
    assert (claimed.task_id, claimed.attempt, claimed.traceparent) == (task_id, 1, "00-a-b-01")
    assert stored.encode() in delivery.body(claimed, "full")
    data = json.loads(delivery.body(claimed, "full"))["data"]
    assert (data["task"], data["status"], data["attempt"]) == ("long_task", "SUCCESS", 1)


async def test_the_body_of_a_failure_has_its_error(db: Database) -> None:
    await ended(db, status="FAILURE")
    sent = json.loads(delivery.body(await claim_one(db), "full"))
    assert sent["data"]["error"] == {"type": "Oops", "message": "No"}
    assert "result" not in sent["data"]
    assert sent["timestamp"] == sent["data"]["finished_at"]


async def test_the_body_of_a_success_is_the_contract(db: Database) -> None:
    task_id = await ended(db, result='{"b": 1.10, "a": null}')
    stored = await db.fetchrow("SELECT created_at, finished_at FROM task WHERE id = $1", task_id)
    assert stored is not None
    assert delivery.body(await claim_one(db), "full").decode() == (
        f'{{"type": "task.succeeded", "timestamp": "{instant(stored["finished_at"])}",'
        f' "data": {{"task_id": "{task_id}", "task": "long_task", "status": "SUCCESS", "attempt": 1, "sequence": 1,'
        f' "result": {{"b": 1.10, "a": null}}, "created_at": "{instant(stored["created_at"])}",'
        f' "finished_at": "{instant(stored["finished_at"])}"}}}}'
    )


@pytest.mark.parametrize("text", ['no "x" \u2028\n\t\\', "é😀</script>", "x" * 16_384, "\x7f\x01"])
async def test_any_error_and_name_arrives_as_it_is(db: Database, text: str) -> None:
    task_id = await submit(db)
    await db.execute("UPDATE task SET name = $1", text[:255])
    await db.fetch(END, [task_id], "FAILURE", None, "Oops", text)
    data = json.loads(delivery.body(await claim_one(db), "full"))["data"]
    assert (data["task"], data["error"]) == (text[:255], {"type": "Oops", "message": text})


async def test_a_large_result_is_a_link(db: Database) -> None:
    for length, linked in ((delivery.INLINE_BYTES, False), (delivery.INLINE_BYTES + 1, True)):
        task_id = await ended(db, result='"' + "x" * (length - 2) + '"')
        claimed = await claim_one(db)
        data = json.loads(delivery.body(claimed, "full"))["data"]
        assert ("result" not in data) is linked
        assert data.get("result_url") == (f"/api/tasks/{task_id}/result" if linked else None)
        assert "result_url" not in json.loads(delivery.body(claimed, "thin"))["data"]


async def test_what_happens_to_a_task_later_changes_no_byte(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    await delivery.settle(db, first, BROKEN, AGAIN)
    await db.execute("UPDATE task SET name = 'another', result = '2', attempt = 9 WHERE id = $1", task_id)
    assert delivery.body(await claim_one(db), "full") == delivery.body(first, "full")


@pytest.mark.parametrize("status", ["SUCCESS", "FAILURE", "REVOKED"])
async def test_an_event_of_the_release_before_says_the_same(db: Database, status: str) -> None:
    task_id = await ended(db, status=status)
    written = delivery.body(await claim_one(db), "full")
    await db.execute(
        "UPDATE webhook_delivery SET facts = NULL, outcome = NULL, lease_until = now() - interval '1 second'"
        " WHERE task_id = $1",
        task_id,
    )
    assert delivery.body(await claim_one(db), "full") == written


async def test_a_claimed_delivery_is_nobody_elses_until_its_lease_runs_out(db: Database) -> None:
    await ended(db)
    first = await claim_one(db)
    assert await delivery.claim_due(db, limit=10, lease_seconds=30.0) == []
    await db.execute("UPDATE webhook_delivery SET lease_until = now() - interval '1 second'")
    assert await delivery.count_due(db) == 1
    second = await claim_one(db)
    assert (second.id, second.attempt) == (first.id, 2)
    assert second.token != first.token


async def test_a_relay_whose_lease_ran_out_changes_nothing(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    await db.execute("UPDATE webhook_delivery SET lease_until = now() - interval '1 second'")
    second = await claim_one(db)
    assert await delivery.settle(db, first, BROKEN, EXHAUSTED) is False
    assert await delivery.release(db, [first]) == 0
    assert (await row(db, task_id))["status"] == "delivering"
    assert await delivery.settle(db, second, OK, DELIVERED) is True
    assert await delivery.settle(db, second, BROKEN, EXHAUSTED) is False
    assert (await row(db, task_id))["status"] == "delivered"


async def test_what_is_delivered_is_dated_and_not_claimed_again(db: Database) -> None:
    task_id = await ended(db)
    assert await delivery.settle(db, await claim_one(db), OK, DELIVERED)
    found = await row(db, task_id)
    assert found["delivered_at"] is not None
    assert await delivery.state_of(db, task_id) == delivery.State(
        id=found["id"],
        event="task.succeeded",
        sequence=1,
        status=DeliveryStatus.DELIVERED,
        attempt=1,
        next_at=None,
        delivered_at=found["delivered_at"],
        last_status_code=200,
        last_error=None,
    )
    assert await delivery.claim_due(db, limit=10, lease_seconds=30.0) == []


async def test_what_failed_waits_by_the_clock_of_postgres_and_keeps_its_id(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    assert await delivery.settle(db, first, BROKEN, delivery.Verdict(DeliveryStatus.PENDING, 3600.0))
    wait = await db.fetchval("SELECT extract(epoch FROM next_at - now()) FROM webhook_delivery")
    assert 3590 < wait <= 3600
    assert await delivery.count_due(db) == 0
    state = await delivery.state_of(db, task_id)
    assert state is not None
    assert state.next_at is not None
    assert (state.status, state.attempt, state.last_status_code, state.last_error) == ("pending", 1, 503, "http_5xx")
    await db.execute("UPDATE webhook_delivery SET next_at = now()")
    second = await claim_one(db)
    assert (second.id, second.attempt) == (first.id, 2)
    assert delivery.body(second, "full") == delivery.body(first, "full")


async def test_an_exhausted_delivery_says_why_and_leaves_its_task_alone(db: Database) -> None:
    task_id = await ended(db)
    before = await db.fetchrow("SELECT * FROM task WHERE id = $1", task_id)
    blocked = Receipt(outcome=Outcome.BLOCKED)
    assert await delivery.settle(db, await claim_one(db), blocked, EXHAUSTED)
    state = await delivery.state_of(db, task_id)
    assert state is not None
    assert (state.status, state.attempt, state.next_at) == ("exhausted", 1, None)
    assert (state.last_status_code, state.last_error) == (None, "blocked")
    assert await db.fetchrow("SELECT * FROM task WHERE id = $1", task_id) == before


async def test_each_attempt_is_kept_with_what_came_of_it(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    refused = Receipt(
        outcome=Outcome.HTTP_5XX, status_code=503, duration_seconds=0.25, excerpt="no\x00 \ud800 " + "é" * 9000
    )
    await delivery.settle(db, first, refused, delivery.Verdict(DeliveryStatus.PENDING))
    second = await claim_one(db)
    await delivery.settle(db, second, Receipt(outcome=Outcome.TIMEOUT, duration_seconds=15.0), AGAIN)
    third = await claim_one(db)
    await delivery.settle(db, third, OK, DELIVERED)

    kept = await delivery.attempts(db, task_id, limit=10)
    assert [(one.number, one.status_code, one.error) for one in kept] == [
        (1, 503, "http_5xx"),
        (2, None, "timeout"),
        (3, 200, None),
    ]
    assert {one.delivery_id for one in kept} == {first.id}
    assert [one.started_at for one in kept] == [first.claimed_at, second.claimed_at, third.claimed_at]
    assert [one.duration_seconds for one in kept] == [0.25, 15.0, 0.0]
    assert kept[0].excerpt.startswith("no ? éé")
    assert 4090 < len(kept[0].excerpt.encode()) <= delivery.EXCERPT_BYTES
    assert [one.number for one in await delivery.attempts(db, task_id, after=(1, 1), limit=1)] == [2]


async def test_an_attempt_that_was_superseded_or_handed_back_is_not_kept(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    await db.execute("UPDATE webhook_delivery SET lease_until = now() - interval '1 second'")
    second = await claim_one(db)
    assert await delivery.settle(db, first, BROKEN, EXHAUSTED) is False
    assert await delivery.release(db, [second]) == 1
    assert await delivery.attempts(db, task_id, limit=10) == []


async def test_a_fault_of_our_own_is_seen_and_gives_its_attempt_back(db: Database) -> None:
    task_id = await ended(db)
    first = await claim_one(db)
    ours = Receipt(outcome=Outcome.LOCAL_FAULT)
    assert await delivery.settle(db, first, ours, delivery.Verdict(DeliveryStatus.PENDING, spends=False))
    state = await delivery.state_of(db, task_id)
    assert state is not None
    assert (state.status, state.attempt, state.last_error) == ("pending", 0, "local_fault")
    assert await delivery.attempts(db, task_id, limit=10) == []
    second = await claim_one(db)
    assert (second.attempt, second.scheduled_attempt) == (1, 1)
    assert 0 < second.age_seconds < 60


async def test_attempts_go_with_their_task(db: Database) -> None:
    await ended(db)
    await delivery.settle(db, await claim_one(db), OK, DELIVERED)
    assert await db.fetchval("SELECT count(*) FROM webhook_attempt") == 1
    assert await lifecycle.prune(db, older_than_seconds=-1.0, limit=10) == 1
    assert await db.fetchval("SELECT count(*) FROM webhook_attempt") == 0


async def test_a_released_delivery_is_due_again_and_costs_no_attempt(db: Database) -> None:
    await ended(db)
    first = await claim_one(db)
    assert await delivery.release(db, [first]) == 1
    second = await claim_one(db)
    assert (second.id, second.attempt) == (first.id, 1)


async def test_orphans_and_due_rows_share_the_limit(db: Database) -> None:
    for _ in range(3):
        await ended(db)
    await delivery.claim_due(db, limit=10, lease_seconds=30.0)
    await db.execute("UPDATE webhook_delivery SET lease_until = now() - interval '1 second'")
    for _ in range(3):
        await ended(db)
    assert await delivery.count_due(db) == 6
    batches = [await delivery.claim_due(db, limit=4, lease_seconds=30.0) for _ in range(3)]
    assert [len(batch) for batch in batches] == [4, 2, 0]
    assert len({claimed.id for batch in batches for claimed in batch}) == 6


async def test_relays_that_claim_at_once_get_different_deliveries(db: Database) -> None:
    tasks = [await submit(db) for _ in range(60)]
    await end(db, *tasks)

    async def relay() -> list[UUID]:
        mine: list[UUID] = []
        while batch := await delivery.claim_due(db, limit=7, lease_seconds=30.0):
            mine += [claimed.id for claimed in batch]
        return mine

    shares = await asyncio.gather(*(relay() for _ in range(6)))
    claims = Counter(claimed for share in shares for claimed in share)
    assert set(claims.values()) == {1}
    # A relay skips what another has locked, so all may find nothing at the very end; the next sweep has it.
    rest = await delivery.claim_due(db, limit=60, lease_seconds=30.0)
    assert len(claims) + len(rest) == 60


async def test_a_task_without_a_delivery_has_no_state(db: Database) -> None:
    assert await delivery.state_of(db, await submit(db)) is None
    assert await delivery.state_of(db, uuid4()) is None

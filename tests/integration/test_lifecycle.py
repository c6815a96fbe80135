import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app import delivery, lifecycle
from app.broker import END_OF_LINE
from app.core import backoff, errors, ids
from app.core.config import Settings
from app.core.statuses import TaskStatus
from app.db import Database
from app.lifecycle import (
    Budgets,
    Claim,
    Crashed,
    Error,
    Failed,
    Interrupted,
    Lost,
    Outcome,
    RetryAsked,
    Settled,
    Succeeded,
    decide,
)
from tests.support.database import events, opened, row, started, submitted
from tests.support.waiting import until

HOOK = "https://example.com/hook"
BOOM = Error(type="ValueError", message="boom", traceback="Traceback …")


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def rival(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A session of somebody else, who holds rows locked."""
    connection = await asyncpg.connect(settings.postgres_dsn)
    yield connection
    await connection.close()


async def test_a_submitted_task_is_there_and_asks_for_its_message_to_be_pushed(db: Database) -> None:
    new = lifecycle.NewTask(
        id=ids.uuid7(),
        name="sample.echo",
        queue="default",
        args='[{"b": 1, "a": 12345678901234567890}]',
        tags=("x", "y"),
        webhook_url=HOOK,
        time_limit=1.5,
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    )

    bell = await lifecycle.submit(db, new)

    assert bell is not None
    assert (bell.task_id, bell.attempt, bell.overdue, bell.time_limit) == (new.id, 0, False, 1.5)
    stored = await row(db, new.id)
    assert (stored["status"], stored["position"]) == ("PENDING", bell.position)
    assert stored["args"] == new.args, "arguments are kept to the letter"
    assert stored["published_at"] is not None


async def test_a_task_with_a_countdown_is_not_pushed_before_it_is_due(db: Database) -> None:
    for delay in (
        {"delay_seconds": 60.0},
        {"due_at": datetime.now(UTC) + timedelta(minutes=1)},
    ):
        new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default", **delay)
        assert await lifecycle.submit(db, new) is None
    assert await lifecycle.take_due(db, "default", limit=10) == []


async def test_the_same_id_submitted_twice_is_one_task(db: Database) -> None:
    new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default")

    assert await lifecycle.submit(db, new) is not None
    assert await lifecycle.submit(db, replace(new, name="sample.fail")) is None
    assert (await row(db, new.id))["name"] == "sample.echo"


async def test_while_rows_are_held_back_new_ones_queue_up_behind_them(db: Database) -> None:
    first = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="default")
    second, other = replace(first, id=ids.uuid7()), replace(first, id=ids.uuid7(), queue="other")

    assert await lifecycle.submit(db, first, hold_back=True) is None
    assert await lifecycle.submit(db, second) is None, "it would overtake"
    assert await lifecycle.submit(db, other) is not None, "another queue is not concerned"

    bells = await lifecycle.take_due(db, "default", limit=10)
    assert [bell.task_id for bell in bells] == [first.id, second.id]
    assert bells[0].position < bells[1].position
    assert await lifecycle.submit(db, replace(first, id=ids.uuid7())) is not None


async def test_a_claim_starts_the_task_and_returns_what_to_run(db: Database) -> None:
    task_id = await submitted(db, args="[1]", kwargs='{"x": 2}')

    claimed = await started(db, task_id)

    assert (claimed.claim.attempt, claimed.args, claimed.kwargs) == (1, "[1]", '{"x": 2}')
    stored = await row(db, task_id)
    assert (stored["status"], stored["attempt"], stored["worker"]) == ("STARTED", 1, "test")
    assert stored["token"] == claimed.claim.token
    assert stored["lease_until"] > stored["started_at"]


async def test_only_one_of_two_claims_wins_and_the_winner_may_repeat_it(db: Database) -> None:
    task_id = await submitted(db)
    mine, theirs = Claim(task_id, 1, uuid4()), Claim(task_id, 1, uuid4())

    async def claim(wanted: Claim) -> lifecycle.Claimed | None:
        return await lifecycle.claim(db, wanted, name="sample.echo", worker="w", lease_seconds=30)

    assert sum(won is not None for won in await asyncio.gather(*map(claim, (mine, theirs)))) == 1
    winner = Claim(task_id, 1, (await row(db, task_id))["token"])
    assert await claim(winner) is not None, "a claim whose answer was lost is repeated"
    assert (await row(db, task_id))["attempt"] == 1


@pytest.mark.parametrize(
    ("attempt", "name"), [(2, "sample.echo"), (1, "sample.crash")], ids=["a stale attempt", "another task's name"]
)
async def test_a_message_that_does_not_fit_the_row_claims_nothing(db: Database, attempt: int, name: str) -> None:
    task_id = await submitted(db)

    wanted = Claim(task_id, attempt, uuid4())
    assert await lifecycle.claim(db, wanted, name=name, worker="w", lease_seconds=30) is None
    assert (await row(db, task_id))["status"] == "PENDING"


async def test_a_task_that_is_early_expired_or_cancelled_is_not_claimed(db: Database) -> None:
    early = await submitted(db, delay_seconds=60.0)
    expired = await submitted(db, expires_in_seconds=0.0)
    cancelled = await submitted(db)
    await lifecycle.cancel(db, cancelled)

    for task_id in (early, expired, cancelled, uuid4()):
        wanted = Claim(task_id, 1, uuid4())
        assert await lifecycle.claim(db, wanted, name="sample.echo", worker="w", lease_seconds=30) is None


async def test_success_is_written_with_its_result_and_its_event_at_once(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    claimed = await started(db, task_id)

    settled = await lifecycle.settle(db, claimed.claim, decide(Budgets(), Succeeded('{"b":1,"a":2}')))

    assert settled is not None
    assert settled.ended == lifecycle.Ended(
        task_id=task_id, status=TaskStatus.SUCCESS, result='{"b":1,"a":2}', error=None
    )
    stored = await row(db, task_id)
    assert (stored["status"], stored["result"], stored["lease_until"]) == ("SUCCESS", '{"b":1,"a":2}', None)
    assert await events(db, task_id) == ["task.succeeded"]


async def test_a_task_without_a_webhook_makes_no_event(db: Database) -> None:
    task_id = await submitted(db)
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, decide(Budgets(), Failed(BOOM)))

    assert (await row(db, task_id))["error_type"] == "ValueError"
    assert await events(db, task_id) == []


async def test_a_settle_repeated_after_a_lost_answer_says_the_same_and_writes_nothing(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    claimed = await started(db, task_id)
    transition = decide(Budgets(), Succeeded("1"))

    first = await lifecycle.settle(db, claimed.claim, transition)
    finished_at = (await row(db, task_id))["finished_at"]

    assert await lifecycle.settle(db, claimed.claim, transition) == first
    assert (await row(db, task_id))["finished_at"] == finished_at
    assert await events(db, task_id) == ["task.succeeded"]


HOW_AN_ATTEMPT_LEAVES = [Succeeded("1"), RetryAsked(BOOM, 0.0), Interrupted()]


@pytest.mark.parametrize("outcome", HOW_AN_ATTEMPT_LEAVES, ids=["success", "retry", "release"])
async def test_a_settle_that_waits_for_its_own_first_copy_says_the_same(
    db: Database, rival: asyncpg.Connection, outcome: Outcome
) -> None:
    claim = (await started(db, await submitted(db, webhook_url=HOOK))).claim
    transition = decide(Budgets(), outcome)

    async with rival.transaction():
        await _lock(rival, claim.task_id)
        first = asyncio.create_task(lifecycle.settle(db, claim, transition))
        await _waiting(db, 1)
        again = asyncio.create_task(lifecycle.settle(db, claim, transition))
        await _waiting(db, 2)

    settled = await first
    assert settled is not None
    assert await again == settled
    assert await events(db, claim.task_id) == (["task.succeeded"] if settled.ended else [])
    stored = await row(db, claim.task_id)
    assert stored["failures"] == isinstance(outcome, RetryAsked), "it is billed once"


@pytest.mark.parametrize("outcome", HOW_AN_ATTEMPT_LEAVES, ids=["success", "retry", "release"])
@pytest.mark.parametrize("other", [lifecycle.settle_for, lifecycle.reap])
async def test_what_a_claim_settled_itself_nobody_else_settles_for_it(
    db: Database, rival: asyncpg.Connection, other: Callable[..., Coroutine[Any, Any, Settled | None]], outcome: Outcome
) -> None:
    claim = (await started(db, await submitted(db), lease_seconds=0.0)).claim
    loss = decide(Budgets(), Lost())

    async with rival.transaction():
        await _lock(rival, claim.task_id)
        own = asyncio.create_task(lifecycle.settle(db, claim, decide(Budgets(), outcome)))
        await _waiting(db, 1)
        at_once = asyncio.create_task(other(db, claim, loss))
        await _waiting(db, 2)

    assert await own is not None
    assert await at_once is None
    assert await other(db, claim, loss) is None
    assert (await row(db, claim.task_id))["losses"] == 0


@pytest.mark.parametrize("forged", ["attempt", "token"])
async def test_a_settle_with_another_fence_is_superseded(db: Database, forged: str) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    claim = (await started(db, task_id)).claim
    fence = replace(claim, attempt=2) if forged == "attempt" else replace(claim, token=uuid4())

    assert await lifecycle.settle(db, fence, decide(Budgets(), Succeeded("1"))) is None
    assert (await row(db, task_id))["status"] == "STARTED"
    assert await events(db, task_id) == []


async def test_a_worker_that_was_presumed_dead_writes_nothing(db: Database) -> None:
    task_id = await submitted(db)
    zombie = (await started(db, task_id, lease_seconds=0.0)).claim
    assert await lifecycle.reap(db, zombie, decide(Budgets(), Lost())) is not None
    successor = (await started(db, task_id)).claim

    assert await lifecycle.settle(db, zombie, decide(Budgets(), Succeeded('"stale"'))) is None
    assert await lifecycle.settle(db, successor, decide(Budgets(), Succeeded('"fresh"'))) is not None
    assert (await row(db, task_id))["result"] == '"fresh"'


async def test_what_another_settled_for_a_claim_is_not_taken_for_its_own(db: Database) -> None:
    task_id = await submitted(db)
    claim = (await started(db, task_id)).claim

    await lifecycle.settle_for(db, claim, decide(Budgets(crashes=2), Crashed()))

    assert await lifecycle.settle(db, claim, decide(Budgets(), Succeeded("1"))) is None


async def test_a_terminal_row_never_changes(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    claim = (await started(db, task_id)).claim
    await lifecycle.settle(db, claim, decide(Budgets(), Failed(BOOM)))
    before = dict(await row(db, task_id))

    await lifecycle.settle(db, claim, decide(Budgets(), Succeeded("1")))
    await lifecycle.reap(db, claim, decide(Budgets(), Lost()))
    assert await lifecycle.cancel(db, task_id) is None
    assert await lifecycle.refuse(db, task_id, attempt=1, name="sample.echo", position=before["position"] or 0) is None
    assert await lifecycle.take_due(db, "default", limit=10) == []
    await lifecycle.expire(db, "default", limit=10)
    await lifecycle.record_progress(db, claim, 0.5, None)

    assert dict(await row(db, task_id)) == before
    assert await events(db, task_id) == ["task.failed"]


async def test_a_retry_spends_a_failure_gives_up_its_place_and_waits(db: Database) -> None:
    task_id = await submitted(db)
    claimed = await started(db, task_id)

    settled = await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, RetryAsked(BOOM, 60.0)))

    assert settled == lifecycle.Settled(status=TaskStatus.RETRY, ended=None)
    stored = await row(db, task_id)
    assert (stored["failures"], stored["position"], stored["published_at"]) == (1, None, None)
    assert timedelta(seconds=50) < stored["run_at"] - stored["started_at"] < timedelta(seconds=70)
    assert await lifecycle.take_due(db, "default", limit=10) == []


async def test_a_release_costs_nothing_and_goes_ahead_of_all_that_wait(db: Database) -> None:
    task_id = await submitted(db)
    place = (await row(db, task_id))["position"]
    claimed = await started(db, task_id)

    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Interrupted()))

    stored = await row(db, task_id)
    assert (stored["status"], stored["failures"], stored["crashes"], stored["losses"]) == ("PENDING", 0, 0, 0)
    [bell] = await lifecycle.take_due(db, "default", limit=10)
    assert (bell.position, bell.attempt, bell.overdue) == (place, 1, True)


@pytest.mark.parametrize("outcome", [RetryAsked(BOOM, 0.0), Interrupted()], ids=["retry", "release"])
async def test_a_task_whose_cancel_was_asked_for_does_not_go_on(
    db: Database, outcome: RetryAsked | Interrupted
) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    claimed = await started(db, task_id)
    assert await lifecycle.cancel(db, task_id) == lifecycle.Settled(status=TaskStatus.STARTED, ended=None)

    settled = await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, outcome))

    assert settled is not None
    assert settled.status is TaskStatus.REVOKED
    assert (await row(db, task_id))["error_type"] == "Cancelled"
    assert await events(db, task_id) == ["task.revoked"]


async def test_a_task_that_ends_before_it_hears_of_its_cancel_keeps_its_end(db: Database) -> None:
    task_id = await submitted(db)
    claimed = await started(db, task_id)
    await lifecycle.cancel(db, task_id)

    settled = await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Succeeded("1")))

    assert settled is not None
    assert settled.status is TaskStatus.SUCCESS


async def test_cancelling_a_waiting_task_ends_it_once(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK)

    cancelled = await lifecycle.cancel(db, task_id)

    assert cancelled is not None
    assert cancelled.ended is not None
    assert cancelled.ended.error == Error(type="Cancelled", message="The task was cancelled")
    assert await lifecycle.cancel(db, task_id) is None
    assert await lifecycle.cancel(db, uuid4()) is None
    assert await events(db, task_id) == ["task.revoked"]


async def test_a_renewal_writes_only_what_is_a_third_used_and_tells_what_is_not_held(db: Database) -> None:
    fresh, used, gone, cancelled = [(await started(db, await submitted(db))).claim for _ in range(4)]
    await db.execute("UPDATE task SET lease_until = now() + interval '5 s' WHERE id = $1", used.task_id)
    await lifecycle.settle(db, gone, decide(Budgets(), Succeeded("1")))
    await lifecycle.cancel(db, cancelled.task_id)
    before = (await row(db, fresh.task_id))["lease_until"]

    leases = await lifecycle.renew(db, [fresh, used, gone, cancelled], lease_seconds=30)

    assert {lease.claim: (lease.held, lease.cancel_requested) for lease in leases} == {
        fresh: (True, False),
        used: (True, False),
        gone: (False, False),
        cancelled: (True, True),
    }
    assert (await row(db, fresh.task_id))["lease_until"] == before
    renewed = (await row(db, used.task_id))["lease_until"]
    assert renewed - await lifecycle.clock(db) > timedelta(seconds=20)


async def test_a_renewal_does_not_wait_for_a_neighbour_whose_row_is_locked(
    db: Database, rival: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    """As by a settle whose commit waits for a standby that is silent."""
    neighbour, settling = [(await started(db, await submitted(db), lease_seconds=10)).claim for _ in range(2)]
    async with rival.transaction():
        await rival.execute("UPDATE task SET progress = 0.5 WHERE id = $1", settling.task_id)
        async with asyncio.timeout(5):
            leases = await lifecycle.renew(db, [neighbour, settling], lease_seconds=30)
    until_then = await lifecycle.clock(db) + timedelta(seconds=20)
    assert [lease.held for lease in leases] == [True, True]
    assert (await row(db, neighbour.task_id))["lease_until"] > until_then
    assert (await row(db, settling.task_id))["lease_until"] < until_then


async def test_a_lease_of_a_fraction_of_a_second_is_renewed_for_that_long(db: Database) -> None:
    held = (await started(db, await submitted(db), lease_seconds=0.1)).claim
    await lifecycle.renew(db, [held], lease_seconds=0.9)

    renewed = (await row(db, held.task_id))["lease_until"]
    assert renewed - await db.fetchval("SELECT now() - interval '10 s'") > timedelta(seconds=10)


async def test_only_an_expired_lease_is_reaped(db: Database) -> None:
    alive, dead = [(await started(db, await submitted(db))).claim for _ in range(2)]
    await db.execute("UPDATE task SET lease_until = now() - interval '1 ms' WHERE id = $1", dead.task_id)

    expired = await lifecycle.expired_leases(db, "default", lease_seconds=0.0, limit=10)
    assert [claim for claim, _ in expired] == [dead]
    assert await lifecycle.expired_leases(db, "other", lease_seconds=0.0, limit=10) == []
    assert await lifecycle.reap(db, alive, decide(Budgets(), Lost())) is None
    assert await lifecycle.reap(db, dead, decide(Budgets(), Lost())) is not None
    assert await lifecycle.reap(db, dead, decide(Budgets(), Lost())) is None
    assert (await row(db, dead.task_id))["losses"] == 1


async def test_nothing_is_reaped_within_a_lease_of_the_start_of_postgres(db: Database) -> None:
    await started(db, await submitted(db), lease_seconds=0.0)

    assert await lifecycle.expired_leases(db, "default", lease_seconds=10_000_000.0, limit=10) == []


async def test_a_task_that_no_worker_knows_is_tried_elsewhere_and_ends_after_a_cap(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK)
    refusals = 0
    while True:
        place = (await row(db, task_id))["position"]
        before = await lifecycle.clock(db)
        refused = await lifecycle.refuse(db, task_id, attempt=0, name="sample.echo", position=place)
        after = await lifecycle.clock(db)
        assert refused is not None
        refusals += 1
        if refused.ended is not None:
            break
        stored = await row(db, task_id)
        assert stored["published_at"] is None
        wait = timedelta(seconds=backoff.refusal_wait(refusals - 1))
        assert stored["run_at"] - after <= wait <= stored["run_at"] - before
        await db.execute("UPDATE task SET run_at = now() WHERE id = $1", task_id)
        assert len(await lifecycle.take_due(db, "default", limit=10)) == 1
        stale = await lifecycle.refuse(db, task_id, attempt=0, name="sample.echo", position=place)
        assert stale is None, "a copy of the old message does not count again"

    assert refusals == lifecycle.REFUSAL_BUDGET
    assert refused.ended.error is not None
    assert refused.ended.error.type == "UnknownTask"
    assert await events(db, task_id) == ["task.failed"]
    assert await lifecycle.refuse(db, task_id, attempt=0, name="sample.echo", position=place) is None


async def test_copies_of_a_refused_message_are_one_refusal(db: Database) -> None:
    task_id = await submitted(db)
    place = (await row(db, task_id))["position"]

    refused = await asyncio.gather(
        *(
            lifecycle.refuse(db, task_id, attempt=0, name="sample.echo", position=place)
            for _ in range(lifecycle.REFUSAL_BUDGET)
        )
    )

    assert sum(one is not None for one in refused) == 1
    stored = await row(db, task_id)
    assert (stored["refusals"], stored["status"], stored["position"]) == (1, "PENDING", None)


async def test_expired_tasks_of_one_queue_end_as_revoked(db: Database) -> None:
    late = await submitted(db, expires_in_seconds=0.0, webhook_url=HOOK)
    in_time = await submitted(db, expires_in_seconds=60.0)
    elsewhere = await submitted(db, expires_at=datetime.now(UTC) - timedelta(hours=1), queue="other")

    [ended] = await lifecycle.expire(db, "default", limit=10)

    assert (ended.task_id, ended.status) == (late, TaskStatus.REVOKED)
    assert ended.error is not None
    assert ended.error.type == "Expired"
    assert await events(db, late) == ["task.revoked"]
    assert {(await row(db, task_id))["status"] for task_id in (in_time, elsewhere)} == {"PENDING"}


async def test_what_expired_first_ends_first(db: Database) -> None:
    await db.execute(
        "INSERT INTO task (id, name, queue, args, kwargs, expires_at)"
        " SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}', now() - make_interval(secs => n * 7 % 50)"
        "   FROM generate_series(1, 50) AS n"
    )
    in_order = [found["id"] for found in await db.fetch("SELECT id FROM task ORDER BY expires_at")]

    for batch in (in_order[:20], in_order[20:40], in_order[40:]):
        ended = await lifecycle.expire(db, "default", limit=20)
        assert {one.task_id for one in ended} == set(batch)


async def test_two_relays_take_each_due_row_once_and_in_order(db: Database) -> None:
    tasks = [await submitted(db) for _ in range(20)]
    await lifecycle.unpublish(db, [_bell(task_id) for task_id in tasks])

    batches = await asyncio.gather(*(lifecycle.take_due(db, "default", limit=10) for _ in range(4)))

    taken = [bell for batch in batches for bell in batch]
    assert sorted(bell.task_id for bell in taken) == sorted(tasks)
    for batch in batches:
        assert [bell.position for bell in batch] == sorted(bell.position for bell in batch)


async def test_lost_is_what_lies_below_the_tail_and_was_pushed_before_it_was_noted(db: Database) -> None:
    lost, at_tail, behind = [await submitted(db) for _ in range(3)]
    noted = await lifecycle.clock(db)
    young = await submitted(db)
    tail = (await row(db, at_tail))["position"]

    bells = await lifecycle.take_lost(db, "default", below_position=tail, published_before=noted, limit=10)
    assert [(bell.task_id, bell.overdue) for bell in bells] == [(lost, True)]
    again = await lifecycle.take_lost(db, "default", below_position=tail, published_before=noted, limit=10)
    assert again == [], "it was pushed after the note"

    flushed = await lifecycle.take_lost(db, "default", below_position=END_OF_LINE, published_before=noted, limit=10)
    assert [bell.task_id for bell in flushed] == [at_tail, behind]
    assert (await row(db, young))["published_at"] > noted


async def test_a_stamp_is_not_taken_back_from_a_task_that_runs(db: Database) -> None:
    waiting, running = await submitted(db), await submitted(db)
    await started(db, running)

    await lifecycle.unpublish(db, [_bell(waiting), _bell(running)])

    assert (await row(db, waiting))["published_at"] is None
    assert (await row(db, running))["published_at"] is not None


async def test_progress_is_shown_while_the_attempt_holds(db: Database) -> None:
    claimed = await started(db, await submitted(db))
    await lifecycle.record_progress(db, claimed.claim, 0.4, "page 4 of 10")

    view = await lifecycle.view(db, claimed.claim.task_id)
    assert view is not None
    assert (view.progress, view.progress_message, view.status) == (0.4, "page 4 of 10", TaskStatus.STARTED)


async def test_an_unknown_id_is_unknown(db: Database) -> None:
    assert await lifecycle.view(db, uuid4()) is None
    assert await lifecycle.status(db, uuid4()) is None
    assert await lifecycle.result(db, uuid4()) is None
    assert await lifecycle.budgets(db, Claim(uuid4(), 1, uuid4())) is None


async def test_a_view_shows_an_end_and_its_webhook(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK, tags=("a",))
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Failed(BOOM)))

    view = await lifecycle.view(db, task_id)

    assert view is not None
    assert (view.status, view.error, view.tags) == (TaskStatus.FAILURE, BOOM, ("a",))
    assert (view.webhook_url, view.webhook_status, view.webhook_attempt) == (HOOK, "pending", 0)


async def test_the_error_of_an_earlier_attempt_is_not_the_end_of_a_task_that_succeeds(db: Database) -> None:
    task_id = await submitted(db)
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), RetryAsked(BOOM, 0.0)))
    await lifecycle.settle(db, (await started(db, task_id)).claim, decide(Budgets(), Succeeded("1")))

    view = await lifecycle.view(db, task_id)
    assert view is not None
    assert (view.status, view.error, view.failures) == (TaskStatus.SUCCESS, None, 1)


async def test_queues_are_counted(db: Database) -> None:
    await submitted(db)
    await started(db, await submitted(db))

    default, other = await lifecycle.queue_counts(db, ["default", "other"])

    assert (default.waiting, default.running) == (1, 1)
    assert (other.waiting, other.running) == (0, 0)


@pytest.mark.parametrize(
    ("change", "law"),
    [
        ("status = 'LIMBO'", "task_status_known"),
        ("status = 'STARTED', token = gen_random_uuid()", "task_leased_iff_started"),
        ("lease_until = now()", "task_leased_iff_started"),
        ("status = 'STARTED', lease_until = now()", "task_fenced_while_started"),
        ("status = 'FAILURE', error_type = 'E'", "task_finished_iff_terminal"),
        ("finished_at = now()", "task_finished_iff_terminal"),
        ("status = 'SUCCESS', finished_at = now()", "task_result_iff_success"),
        ("result = '1'", "task_result_iff_success"),
        ("status = 'FAILURE', finished_at = now()", "task_error_named"),
        ("status = 'REVOKED', finished_at = now()", "task_error_named"),
        ("failures = 5", "task_failures_in_budget"),
        ("failures = -1", "task_failures_in_budget"),
        ("max_retries = 101", "task_max_retries_range"),
        ("max_retries = -1", "task_max_retries_range"),
        ("attempt = -1", "task_counts_positive"),
        ("crashes = -1", "task_counts_positive"),
        ("losses = -1", "task_counts_positive"),
        ("refusals = -1", "task_counts_positive"),
        ("progress = 1.1", "task_progress_fraction"),
        ("progress = -0.1", "task_progress_fraction"),
        ("queue = ''", "task_queue_length"),
        ("queue = repeat('q', 65)", "task_queue_length"),
        ("name = ''", "task_name_length"),
        ("name = repeat('n', 256)", "task_name_length"),
        ("webhook_url = repeat('u', 2049)", "task_webhook_url_length"),
        ("traceparent = repeat('t', 65)", "task_traceparent_length"),
    ],
)
async def test_the_database_repeats_the_law(db: Database, change: str, law: str) -> None:
    task_id = await submitted(db)

    with pytest.raises(errors.StatementRefused, match="CheckViolationError") as refused:
        await db.execute(f"UPDATE task SET {change} WHERE id = $1", task_id)
    assert getattr(refused.value.__cause__, "constraint_name", None) == law


async def test_the_database_takes_all_that_the_law_allows(db: Database) -> None:
    task_id = await submitted(db)

    changed = await db.execute(
        "UPDATE task SET name = repeat('n', 255), queue = repeat('q', 64), webhook_url = repeat('u', 2048),"
        " traceparent = repeat('t', 64), max_retries = 100, failures = 101, progress = 1 WHERE id = $1",
        task_id,
    )
    assert changed == "UPDATE 1"


async def _lock(rival: asyncpg.Connection, task_id: UUID) -> None:
    await rival.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", task_id)


async def _waiting(db: Database, number: int) -> None:
    """Return once so many statements on this database wait for a lock."""

    async def reached() -> bool:
        waiting = await db.fetchval(
            "SELECT count(DISTINCT pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE NOT granted AND datname = current_database()"
        )
        return bool(waiting == number)

    await until(reached, what=f"the wait of {number} statements")


def _bell(task_id: UUID) -> lifecycle.Bell:
    return lifecycle.Bell(task_id=task_id, name="sample.echo", queue="default", attempt=0, position=1)


ALL_EVENTS = ("task.started", "task.retrying", "task.succeeded", "task.failed", "task.revoked")


async def told(db: Database, task_id: UUID) -> list[dict[str, Any]]:
    """What was written to be sent, in the order of its sequence."""
    rows = await db.fetch("SELECT * FROM webhook_delivery WHERE task_id = $1 ORDER BY sequence", task_id)
    bodies = [json.loads(delivery.body(_Told(row["facts"], row["outcome"]), "full")) for row in rows]
    assert [row["event"] for row in rows] == [body["type"] for body in bodies]
    assert [row["sequence"] for row in rows] == [body["data"]["sequence"] for body in bodies]
    return bodies


@dataclass(frozen=True)
class _Told:
    facts: str
    outcome: str | None


async def test_whoever_asks_hears_of_every_step_in_order(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK, webhook_events=ALL_EVENTS)
    first = await started(db, task_id)
    await lifecycle.settle(db, first.claim, decide(first.budgets, RetryAsked(BOOM, 0.0)))
    second = await started(db, task_id)
    await lifecycle.settle(db, second.claim, decide(second.budgets, Interrupted()))
    third = await started(db, task_id)
    await lifecycle.settle(db, third.claim, decide(third.budgets, Succeeded("[1]")))

    bodies = await told(db, task_id)
    assert [(one["type"], one["data"]["status"], one["data"]["attempt"]) for one in bodies] == [
        ("task.started", "STARTED", 1),
        ("task.retrying", "RETRY", 1),
        ("task.started", "STARTED", 2),
        ("task.started", "STARTED", 3),
        ("task.succeeded", "SUCCESS", 3),
    ]
    assert [one["data"]["sequence"] for one in bodies] == [1, 2, 3, 4, 5]
    assert bodies[0]["data"].keys() & {"result", "error"} == set()
    assert bodies[1]["data"]["error"] == {"type": "ValueError", "message": "boom"}
    assert bodies[4]["data"]["result"] == [1]
    assert [one["data"]["finished_at"] is None for one in bodies] == [True, True, True, True, False]
    assert await lifecycle.breaches(db, overdue_seconds=60.0) == []


@pytest.mark.parametrize(
    ("chosen", "heard"),
    [
        (None, ["task.failed"]),
        (("task.failed",), ["task.failed"]),
        (("task.succeeded", "task.revoked"), []),
        (("task.retrying",), ["task.retrying"]),
        (("task.started",), ["task.started", "task.started"]),
        (("task.failed", "task.retrying"), ["task.retrying", "task.failed"]),
    ],
)
async def test_only_what_was_chosen_is_told(db: Database, chosen: tuple[str, ...] | None, heard: list[str]) -> None:
    task_id = await submitted(db, webhook_url=HOOK, webhook_events=chosen)
    first = await started(db, task_id)
    await lifecycle.settle(db, first.claim, decide(first.budgets, RetryAsked(BOOM, 0.0)))
    second = await started(db, task_id)
    await lifecycle.settle(db, second.claim, decide(second.budgets, Failed(BOOM)))

    assert await events(db, task_id) == heard
    assert [one["data"]["sequence"] for one in await told(db, task_id)] == list(range(1, len(heard) + 1))
    assert await lifecycle.breaches(db, overdue_seconds=60.0) == []


async def test_without_a_url_nothing_is_told_or_counted(db: Database) -> None:
    task_id = await submitted(db, webhook_events=ALL_EVENTS)
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Succeeded("1")))
    assert await events(db, task_id) == []
    assert (await row(db, task_id))["event_sequence"] == 0


async def test_a_claim_that_is_repeated_is_told_of_once(db: Database) -> None:
    task_id = await submitted(db, webhook_url=HOOK, webhook_events=ALL_EVENTS)
    first = await started(db, task_id)
    again = await lifecycle.claim(db, first.claim, name="sample.echo", worker="test", lease_seconds=30.0)
    assert again is not None
    assert await events(db, task_id) == ["task.started"]


async def test_a_lost_worker_and_a_cancel_are_told_of(db: Database) -> None:
    lost = await submitted(db, webhook_url=HOOK, webhook_events=("task.retrying",))
    claimed = await started(db, lost, lease_seconds=0.0)
    await lifecycle.reap(db, claimed.claim, decide(claimed.budgets, Lost()))
    assert await events(db, lost) == ["task.retrying"]

    task_id = await submitted(db, webhook_url=HOOK, webhook_events=("task.started", "task.retrying", "task.revoked"))
    claimed = await started(db, task_id)
    await lifecycle.cancel(db, task_id)
    assert await events(db, task_id) == ["task.started"], "the wish to cancel is no event"
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, RetryAsked(BOOM, 0.0)))
    assert await events(db, task_id) == ["task.started", "task.revoked"]


async def test_a_cancel_that_waited_for_the_settle_before_it_counts_on(db: Database, rival: asyncpg.Connection) -> None:
    task_id = await submitted(db, webhook_url=HOOK, webhook_events=ALL_EVENTS)
    claimed = await started(db, task_id)
    async with rival.transaction():
        await rival.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", task_id)
        retry = decide(claimed.budgets, RetryAsked(BOOM, 0.0))
        settle = asyncio.create_task(lifecycle.settle(db, claimed.claim, retry))
        await until(lambda: waiting(db, 1), what="the settle at the lock")
        cancel = asyncio.create_task(lifecycle.cancel(db, task_id))
        await until(lambda: waiting(db, 2), what="the cancel at the lock")
    await asyncio.gather(settle, cancel)

    heard = await events(db, task_id)
    assert heard in (["task.started", "task.retrying", "task.revoked"], ["task.started", "task.revoked"])


async def waiting(db: Database, statements: int) -> bool:
    """Whether so many other sessions of this database wait for a lock."""
    found = await db.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    return bool(found == statements)


async def test_the_database_knows_the_events(db: Database) -> None:
    with pytest.raises(errors.StatementRefused):
        await submitted(db, webhook_url=HOOK, webhook_events=("task.paused",))

"""Pauses and limits, by their statements."""

import asyncio
import statistics
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app import lifecycle, publisher
from app.broker import Broker
from app.core import errors, ids
from app.core.config import Settings
from app.db import Database
from app.lifecycle import Claim, Claimed, Limits, Rate, Succeeded, Unclaimed, decide
from app.relay import Relay
from app.utils.webhook import Sender
from benchmarks.calls import Side
from benchmarks.calls import opened as opened_side
from tests.support.database import events, opened, row, submitted
from tests.support.waiting import until

QUEUE = "default"


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


async def claim(db: Database, task_id: UUID) -> Claimed | None:
    """The next attempt of a waiting task, or None if it was held."""
    attempt = await db.fetchval("SELECT attempt FROM task WHERE id = $1", task_id)
    wanted = Claim(task_id, attempt + 1, uuid4())
    return await lifecycle.claim(db, wanted, name="sample.echo", worker="test", lease_seconds=30.0)


async def end(db: Database, claimed: Claimed) -> None:
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Succeeded("1")))


async def held(db: Database, *tasks: UUID) -> list[str | None]:
    """Why each of these tasks is held; None for one that is not."""
    views = [await lifecycle.view(db, task_id) for task_id in tasks]
    return [None if view is None or view.held is None else str(view.held) for view in views]


async def test_a_claim_in_a_paused_queue_holds_its_row_and_running_tasks_go_on(db: Database) -> None:
    runs, waits, other = await submitted(db), await submitted(db), await submitted(db, queue="other")
    running = await claim(db, runs)
    assert running is not None

    await lifecycle.pause_queue(db, QUEUE)

    assert await claim(db, waits) is None
    assert await claim(db, other) is not None
    stored = await row(db, waits)
    assert (stored["status"], stored["attempt"], stored["position"]) == ("PENDING", 0, None)
    assert await held(db, runs, waits) == [None, "paused"]
    await end(db, running)
    assert await lifecycle.status(db, runs) == "SUCCESS"


async def test_a_claim_that_is_held_is_told_from_one_that_is_stale(db: Database) -> None:
    async def why(task_id: UUID, attempt: int = 1) -> Claimed | Unclaimed:
        wanted = lifecycle.Wanted(Claim(task_id, attempt, uuid4()), "sample.echo", "test")
        return await lifecycle.claim_or_hold(db, wanted, lease_seconds=30.0)

    waits, runs = await submitted(db), await submitted(db)
    assert isinstance(await why(runs), Claimed)
    assert await why(runs) is Unclaimed.STALE
    await lifecycle.pause_queue(db, QUEUE)
    assert await why(waits) is Unclaimed.HELD
    assert await why(waits) is Unclaimed.HELD, "its message may come twice"
    assert await why(waits, attempt=2) is Unclaimed.STALE
    assert await why(runs) is Unclaimed.STALE
    assert await why(uuid4()) is Unclaimed.STALE
    await lifecycle.resume_queue(db, QUEUE)
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1))
    assert await why(waits) is Unclaimed.HELD


async def test_what_is_held_is_left_alone_until_its_queue_is_resumed(db: Database) -> None:
    tasks = [await submitted(db) for _ in range(3)]
    await lifecycle.pause_queue(db, QUEUE)
    for task_id in reversed(tasks):
        assert await claim(db, task_id) is None

    now = await lifecycle.clock(db)
    assert await lifecycle.take_due(db, QUEUE, limit=10) == []
    assert await lifecycle.take_released(db, QUEUE, among=10) == []
    assert await lifecycle.take_lost(db, QUEUE, below_position=2**63 - 1, published_before=now, limit=10) == []
    assert await lifecycle.let_go(db, QUEUE, limit=10) == []

    await lifecycle.resume_queue(db, QUEUE)
    bells = await lifecycle.let_go(db, QUEUE, limit=2)
    assert [bell.task_id for bell in bells] == tasks[:2], "in the order in which they were due"
    assert bells[0].position < bells[1].position
    assert not any(bell.overdue for bell in bells)
    assert await held(db, *tasks) == [None, None, "paused"]
    assert await claim(db, tasks[0]) is not None
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=2)] == tasks[2:]


async def test_a_submit_to_a_paused_queue_is_held_at_once(db: Database) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue=QUEUE)

    assert await lifecycle.submit(db, new) is None
    assert await lifecycle.submit(db, new) is None, "twice is once"
    assert await held(db, new.id) == ["paused"]
    later = await submitted(db, delay_seconds=60.0)
    assert await held(db, later) == [None]
    assert await lifecycle.submit(db, lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue="other")) is not None

    await lifecycle.resume_queue(db, QUEUE)
    behind = await submitted(db)
    assert await held(db, behind) == ["paused"], "nobody overtakes"
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == [new.id, behind]
    assert await lifecycle.submit(db, lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue=QUEUE)) is not None


async def test_a_batch_is_held_as_its_tasks_would_be_one_by_one(db: Database) -> None:
    def new(queue: str, **fields: Any) -> lifecycle.NewTask:
        return lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue=queue, **fields)

    await lifecycle.limit_queue(db, "keyed", Limits(key_concurrency=1))
    first, second = [await submitted(db, queue="keyed", concurrency_key="a") for _ in range(2)]
    assert await claim(db, first) is not None
    assert await claim(db, second) is None
    await lifecycle.pause_queue(db, QUEUE)
    wanted = [
        new(QUEUE),
        new(QUEUE, delay_seconds=60.0),
        new("other"),
        new("keyed", concurrency_key="a"),
        new("keyed", concurrency_key="b"),
        new("keyed"),
    ]
    made = await lifecycle.submit_batch(db, wanted)
    assert made is not None
    assert [bell.task_id for bell in made.bells] == [wanted[2].id, wanted[4].id, wanted[5].id]
    assert await held(db, *made.task_ids) == ["paused", None, None, "key_concurrency", None, None]
    assert await lifecycle.breaches(db, overdue_seconds=60.0) == []


async def test_what_comes_due_in_a_paused_queue_is_held_without_a_message(db: Database) -> None:
    due = await submitted(db, delay_seconds=60.0)
    await db.execute("UPDATE task SET run_at = now() - interval '1 s'")
    assert await lifecycle.hold_due(db, QUEUE, limit=10) == 0, "it is not paused"

    await lifecycle.pause_queue(db, QUEUE)
    assert await lifecycle.hold_due(db, QUEUE, limit=10) == 1
    assert await held(db, due) == ["paused"]


async def test_no_more_run_at_once_than_may_and_the_next_comes_when_one_has_ended(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2))
    tasks = [await submitted(db) for _ in range(5)]

    claims = [await claim(db, task_id) for task_id in tasks]
    assert [one is not None for one in claims] == [True, True, False, False, False]
    assert await held(db, *tasks) == [None, None, *["concurrency"] * 3]
    assert await lifecycle.let_go(db, QUEUE, limit=10) == [], "there is no room"

    first = claims[0]
    assert first is not None
    assert first.limited_with == "", "others may wait for its end"
    await end(db, first)
    [bell] = await lifecycle.let_go(db, QUEUE, limit=10)
    assert bell.task_id == tasks[2]
    assert await lifecycle.let_go(db, QUEUE, limit=10) == [], "its room is taken already"
    newcomer = await submitted(db)
    assert await held(db, newcomer) == ["concurrency"], "nobody overtakes"
    assert await claim(db, newcomer) is None
    assert await claim(db, tasks[2]) is not None


async def test_claims_at_the_same_time_never_start_more_than_may(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=3))
    for _ in range(5):
        tasks = [await submitted(db) for _ in range(12)]
        await db.execute("DELETE FROM held_task")
        await db.execute("UPDATE task SET published_at = now() WHERE status = 'PENDING'")
        claims = [one for one in await asyncio.gather(*(claim(db, task_id) for task_id in tasks)) if one is not None]
        assert len(claims) <= 3
        assert await db.fetchval("SELECT count(*) FROM task WHERE status = 'STARTED'") == 3
        for one in claims:
            await end(db, one)


async def test_a_claim_that_is_repeated_with_its_own_token_holds_however_full_it_is(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1, rate=Rate(1, 60)))
    task_id = await submitted(db)
    wanted = Claim(task_id, 1, uuid4())

    async def ask() -> Claimed | None:
        return await lifecycle.claim(db, wanted, name="sample.echo", worker="test", lease_seconds=30.0)

    assert await ask() is not None
    await lifecycle.pause_queue(db, QUEUE)
    assert await ask() is not None
    assert (await row(db, task_id))["attempt"] == 1


async def test_each_key_has_its_own_room_and_tasks_without_one_are_not_concerned(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    a = [await submitted(db, concurrency_key="a") for _ in range(3)]
    b = [await submitted(db, concurrency_key="b") for _ in range(2)]
    free = [await submitted(db) for _ in range(2)]

    claims = {task_id: await claim(db, task_id) for task_id in (*a, *b, *free)}
    assert [task_id for task_id, one in claims.items() if one is not None] == [a[0], b[0], *free]
    assert await held(db, *a[1:], *b[1:]) == ["key_concurrency"] * 3
    assert await held(db, await submitted(db, concurrency_key="a")) == ["key_concurrency"]
    assert await held(db, await submitted(db, concurrency_key="c")) == [None]

    first = claims[a[0]]
    assert first is not None
    await end(db, first)
    key_a, key_b = first.limited_with or "", (claims[b[0]] or first).limited_with or ""
    assert await lifecycle.let_go(db, QUEUE, key=key_b, limit=10) == []
    assert await lifecycle.let_go_round(db, QUEUE, after=key_a, keys=1, limit=10) == ([], key_b)
    bells, walked_to = await lifecycle.let_go_round(db, QUEUE, after=key_b, keys=1, limit=10)
    assert [bell.task_id for bell in bells] == [a[1]], "behind the last key comes the first"
    assert walked_to == key_a
    assert await lifecycle.let_go_round(db, QUEUE, after="", keys=10, limit=10) == ([], key_b)
    assert await claim(db, a[1]) is not None


async def test_another_owner_s_key_is_another_s(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    owners = ("", "one", "other", "one")
    tasks = [await submitted(db, owner=owner, concurrency_key="a") for owner in owners]
    claims = [await claim(db, task_id) for task_id in tasks]
    assert [one is not None for one in claims] == [True, True, True, False]
    views = [await lifecycle.view(db, task_id, owner=owner) for task_id, owner in zip(tasks, owners, strict=True)]
    assert [view.concurrency_key for view in views if view is not None] == ["a"] * 4
    first = claims[1]
    assert first is not None
    await end(db, first)
    bells = await lifecycle.let_go(db, QUEUE, key=first.limited_with or "", limit=5)
    assert [bell.task_id for bell in bells] == tasks[3:]


async def test_a_key_can_t_be_made_up_to_be_another_owner_s(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    hers = await submitted(db, owner="ada", concurrency_key="build")
    forged = await submitted(db, owner="", concurrency_key="ada\x1fbuild")
    assert await claim(db, forged) is not None
    assert await claim(db, hers) is not None


async def test_of_all_that_may_start_the_oldest_goes_first_whatever_it_waits_for(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2, key_concurrency=1))
    order = ["zoe", "zoe", "bob", "bob", "", "zoe", "mia", "", "bob", "mia"]
    tasks = [await submitted(db, concurrency_key=key) for key in order]
    names = dict(zip(tasks, range(len(order)), strict=True))
    running = {task_id: one for task_id in tasks if (one := await claim(db, task_id)) is not None}
    began = [names[task_id] for task_id in running]
    while running:
        first = min(running, key=names.__getitem__)
        ended = running.pop(first)
        await end(db, ended)
        for bell in await lifecycle.let_go(db, QUEUE, key=ended.limited_with or "", limit=5):
            if (one := await claim(db, bell.task_id)) is not None:
                running[bell.task_id] = one
                began.append(names[bell.task_id])
    assert sorted(began) == list(range(len(order))), "all of them ran"
    for key in set(order):
        mine = [nth for nth in began if order[nth] == key]
        assert mine == sorted(mine), f"those with the key {key} ran in their order"
    assert max(abs(place - nth) for place, nth in enumerate(began)) <= 3, began


async def test_nobody_waits_for_ever_behind_others_with_keys_or_without(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2, key_concurrency=1))
    keyed = [await submitted(db, concurrency_key="k") for _ in range(4)]
    plain = [await submitted(db) for _ in range(30)]
    running = [one for task_id in (*keyed, *plain) if (one := await claim(db, task_id)) is not None]
    began = [one.claim.task_id for one in running]
    while running:
        ended = running.pop(0)
        await end(db, ended)
        for bell in await lifecycle.let_go(db, QUEUE, key=ended.limited_with or "", limit=5):
            if (one := await claim(db, bell.task_id)) is not None:
                running.append(one)
                began.append(bell.task_id)
    assert len(began) == 34
    assert max(began.index(task_id) for task_id in keyed) <= 8, "they were there first"


async def test_a_turn_in_the_line_of_a_queue_is_none_in_that_of_a_key(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1, key_concurrency=1))
    blocker, old = await submitted(db), await submitted(db, concurrency_key="k")
    new = await submitted(db, concurrency_key="k")
    running = await claim(db, blocker)
    assert running is not None
    assert [await claim(db, one) for one in (new, old)] == [None, None]
    # The older one waits in the line of its key, as it does whom the queue let go when its key was taken.
    await db.execute("UPDATE held_task SET line = concurrency_key WHERE task_id = $1", old)
    await db.execute("UPDATE held_task SET let_go_at = now() WHERE task_id = $1", new)
    await db.execute("UPDATE task SET published_at = now(), position = 1 WHERE id = $1", new)
    await end(db, running)
    assert await claim(db, new) is None
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == [old]


async def test_a_rate_that_is_raised_holds_at_once(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(rate=Rate(1, 3600), key_rate=Rate(1, 3600)))
    tasks = [await submitted(db, concurrency_key="a") for _ in range(3)]
    assert [await claim(db, task_id) is not None for task_id in tasks] == [True, False, False]
    await lifecycle.limit_queue(db, QUEUE, Limits())
    await lifecycle.limit_queue(db, QUEUE, Limits(rate=Rate(100, 1), key_rate=Rate(100, 1)))

    async def let_go() -> bool:
        return bool(await lifecycle.let_go(db, QUEUE, limit=5))

    await until(let_go, 5, "a start at the new rate")


async def test_what_comes_due_where_a_limit_holds_makes_no_way_through_redis(
    db: Database, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.relay.BATCH", 3)
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2))
    tasks = [await submitted(db, delay_seconds=60.0) for _ in range(7)]
    for seconds, task_id in enumerate(reversed(tasks)):
        await db.execute("UPDATE task SET run_at = now() - make_interval(secs => $1) WHERE id = $2", seconds, task_id)
    await relay.look_at_limits()
    while await relay.publish_due(QUEUE):
        pass
    assert await relay.broker.depth(QUEUE) == 0
    assert await held(db, *tasks) == ["concurrency"] * 7
    assert [await relay.let_go(QUEUE) for _ in range(2)] == [2, 0]
    assert [message.task_id for message in await relay.broker.tail(QUEUE) or ()] == tasks[:2]


async def test_what_a_key_concerns_is_held_when_it_comes_due_and_the_rest_is_fed(db: Database, relay: Relay) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    keyed = [await submitted(db, delay_seconds=60.0, concurrency_key="k") for _ in range(3)]
    plain = [await submitted(db, delay_seconds=60.0) for _ in range(3)]
    await db.execute("UPDATE task SET run_at = now()")
    await relay.look_at_limits()
    while await relay.publish_due(QUEUE):
        pass
    assert await held(db, *keyed, *plain) == ["key_concurrency"] * 3 + [None] * 3
    assert await relay.broker.depth(QUEUE) == 3
    assert await relay.let_go(QUEUE) == 1


async def test_what_is_held_and_stands_in_no_line_is_fed_again(db: Database) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    stranded, stands = await submitted(db), await submitted(db)
    await db.execute("DELETE FROM held_task WHERE task_id = $1", stranded)
    assert await lifecycle.mend(db, QUEUE, limit=10) == 1
    assert await lifecycle.mend(db, QUEUE, limit=10) == 0
    assert await held(db, stands) == ["paused"]
    assert [bell.task_id for bell in await lifecycle.take_due(db, QUEUE, limit=10)] == [stranded]


async def test_a_key_waits_for_its_queue_as_well(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1, key_concurrency=5))
    one, two = await submitted(db, concurrency_key="a"), await submitted(db, concurrency_key="b")
    running = await claim(db, one)
    assert running is not None
    assert await claim(db, two) is None
    assert await held(db, two) == ["concurrency"]
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2, key_concurrency=1))
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == [two]
    assert await claim(db, two) is not None


async def test_a_rate_spaces_starts_evenly_and_who_comes_too_early_is_held(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(rate=Rate(2, 60)))
    tasks = [await submitted(db) for _ in range(4)]

    first = await claim(db, tasks[0])
    assert first is not None
    await end(db, first)
    assert [await claim(db, task_id) for task_id in tasks[1:]] == [None] * 3
    assert await held(db, *tasks[1:]) == ["rate"] * 3
    assert await lifecycle.let_go(db, QUEUE, limit=5) == []

    await db.execute("UPDATE queue_rate SET next_at = next_at - interval '30 s'")
    [bell] = await lifecycle.let_go(db, QUEUE, limit=5)
    assert bell.task_id == tasks[1]
    assert await lifecycle.let_go(db, QUEUE, limit=5) == []
    assert await claim(db, tasks[1]) is not None
    assert await claim(db, tasks[2]) is None


async def test_a_rate_of_a_key_is_its_own(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(key_rate=Rate(1, 60)))
    a = [await submitted(db, concurrency_key="a") for _ in range(2)]
    b = await submitted(db, concurrency_key="b")

    assert [await claim(db, task_id) is not None for task_id in (*a, b)] == [True, False, True]
    assert await held(db, a[1]) == ["key_rate"]
    key = "\x1fa"  # nobody's
    assert await lifecycle.let_go(db, QUEUE, key=key, limit=5) == []
    await db.execute("UPDATE queue_rate SET next_at = now() WHERE key = $1", key)
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, key=key, limit=5)] == [a[1]]
    assert await lifecycle.forget_rates(db, limit=10) == 0
    await db.execute("UPDATE queue_rate SET next_at = now() - interval '2 h'")
    assert await lifecycle.forget_rates(db, limit=10) == 2


async def test_a_held_task_is_cancelled_and_expires_like_any_that_waits(db: Database) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    cancelled, expired = await submitted(db), await submitted(db, expires_in_seconds=0.0)

    assert await lifecycle.cancel(db, cancelled) is not None
    [ended] = await lifecycle.expire(db, QUEUE, limit=5)
    assert ended.task_id == expired
    assert [await lifecycle.status(db, one) for one in (cancelled, expired)] == ["REVOKED", "REVOKED"]
    assert await held(db, cancelled, expired) == [None, None]
    await lifecycle.resume_queue(db, QUEUE)
    assert await lifecycle.let_go(db, QUEUE, limit=5) == []


async def test_limits_that_are_taken_away_let_everything_go(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1, key_concurrency=1))
    keyed = [await submitted(db, concurrency_key="a") for _ in range(2)]
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    assert [await claim(db, one) is not None for one in keyed] == [True, False]
    await lifecycle.limit_queue(db, QUEUE, Limits())
    bells, _ = await lifecycle.let_go_round(db, QUEUE, after="", keys=10, limit=10)
    assert [bell.task_id for bell in bells] == keyed[1:]
    claimed = await claim(db, keyed[1])
    assert claimed is not None
    assert claimed.limited_with is None


async def test_two_relays_do_not_let_go_more_than_may_start(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2))
    tasks = [await submitted(db) for _ in range(10)]
    first = [await claim(db, task_id) for task_id in tasks]
    for one in first:
        if one is not None:
            await end(db, one)
    found = await asyncio.gather(*(lifecycle.let_go(db, QUEUE, limit=10) for _ in range(4)))
    assert sum(len(bells) for bells in found) == 2


async def test_the_stamp_of_a_held_row_is_not_taken_back(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1))
    one, two = await submitted(db), lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue=QUEUE)
    bell = await lifecycle.submit(db, two)
    assert bell is not None
    assert await claim(db, one) is not None
    assert await claim(db, two.id) is None
    await lifecycle.unpublish(db, [bell])
    assert await held(db, two.id) == ["concurrency"]


async def test_a_line_is_cleared_of_what_an_earlier_release_has_ended(db: Database) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    gone, waits = await submitted(db), await submitted(db)
    await db.execute(
        "UPDATE task SET status = 'REVOKED', finished_at = now(), error_type = 'Cancelled' WHERE id = $1", gone
    )
    await lifecycle.resume_queue(db, QUEUE)
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == [waits]
    assert await db.fetchval("SELECT count(*) FROM held_task") == 0


async def test_who_is_locked_is_left_for_the_next_time(db: Database, settings: Settings) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    tasks = [await submitted(db) for _ in range(2)]
    await lifecycle.resume_queue(db, QUEUE)
    rival = await asyncpg.connect(settings.postgres_dsn)
    transaction = rival.transaction()
    await transaction.start()
    await rival.execute("SELECT FROM task WHERE id = $1 FOR UPDATE", tasks[0])
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == tasks[1:]
    await transaction.rollback()
    await rival.close()
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == tasks[:1]


async def test_a_turn_that_came_to_no_claim_keeps_no_room_for_ever(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1))
    tasks = [await submitted(db) for _ in range(3)]
    first = await claim(db, tasks[0])
    assert first is not None
    for task_id in tasks[1:]:
        assert await claim(db, task_id) is None
    await end(db, first)
    assert [bell.task_id for bell in await lifecycle.let_go(db, QUEUE, limit=5)] == [tasks[1]]
    # As a worker of an earlier release ends it: it knows of no turn.
    await db.execute(
        "UPDATE task SET status = 'SUCCESS', result = '1', finished_at = now(), attempt = 1 WHERE id = $1", tasks[1]
    )
    assert await lifecycle.let_go(db, QUEUE, limit=5) == []
    assert await lifecycle.end_turns(db, older_than_seconds=60) == 0
    assert await lifecycle.end_turns(db, older_than_seconds=0) == 1
    [bell] = await lifecycle.let_go(db, QUEUE, limit=5)
    assert await lifecycle.end_turns(db, older_than_seconds=0) == 0, "it waits for a worker"
    assert await claim(db, bell.task_id) is not None


async def test_settings_that_say_nothing_are_forgotten_once_nobody_is_held(db: Database) -> None:
    await lifecycle.pause_queue(db, QUEUE)
    await submitted(db)
    assert await lifecycle.restricted_queues(db) == {QUEUE: True}
    assert await lifecycle.forget_settings(db, older_than_seconds=0) == 0
    await lifecycle.resume_queue(db, QUEUE)
    assert await lifecycle.restricted_queues(db) == {}
    assert await lifecycle.forget_settings(db, older_than_seconds=0) == 0, "somebody is held"
    await lifecycle.let_go(db, QUEUE, limit=5)
    assert await lifecycle.forget_settings(db, older_than_seconds=60) == 0
    assert await lifecycle.forget_settings(db, older_than_seconds=0) == 1
    await lifecycle.limit_queue(db, QUEUE, Limits(key_rate=Rate(1, 1)))
    assert await lifecycle.forget_settings(db, older_than_seconds=0) == 0


async def test_a_limited_claim_tells_that_it_has_begun_and_a_held_one_does_not(db: Database) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1))
    fields = {"webhook_url": "https://example.com/hook", "webhook_events": ("task.started",)}
    one, two = [await submitted(db, **fields) for _ in range(2)]
    assert await claim(db, one) is not None
    assert await claim(db, two) is None
    assert await events(db, one) == ["task.started"]
    assert await events(db, two) == []


@pytest.fixture
async def relay(db: Database, settings: Settings) -> AsyncIterator[Relay]:
    wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with Sender.from_settings(settings) as sender:
        yield Relay(settings, db, wire, sender)
    await wire.close()


async def test_a_relay_publishes_nothing_of_a_paused_queue_and_all_of_it_in_order_afterwards(
    db: Database, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.relay.BATCH", 3)
    await lifecycle.pause_queue(db, QUEUE)
    tasks = [await submitted(db) for _ in range(6)]
    tasks.append(await submitted(db, delay_seconds=60.0))
    await db.execute("UPDATE task SET run_at = now() WHERE published_at IS NULL")
    await relay.look_at_limits()
    assert await relay.publish_due(QUEUE) == 1
    assert await held(db, tasks[-1]) == ["paused"], "without a way through Redis"
    assert await relay.let_go(QUEUE) == 0
    assert await relay.broker.depth(QUEUE) == 0

    await lifecycle.resume_queue(db, QUEUE)
    await relay.look_at_limits()
    assert [await relay.let_go(QUEUE) for _ in range(4)] == [3, 3, 1, 0]
    tail = await relay.broker.tail(QUEUE)
    assert tail is not None
    assert [message.task_id for message in tail] == tasks
    assert sorted(message.position for message in tail) == [message.position for message in tail]


async def test_a_relay_lets_go_no_more_than_redis_has_room_for(
    db: Database, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.publisher.DEPTH_CAP", 2)
    await lifecycle.pause_queue(db, QUEUE)
    for _ in range(3):
        await submitted(db)
    await lifecycle.resume_queue(db, QUEUE)
    assert [await relay.let_go(QUEUE) for _ in range(2)] == [2, 0]


async def test_a_relay_walks_from_key_to_key(db: Database, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.relay.KEYS_AT_ONCE", 2)
    await lifecycle.limit_queue(db, QUEUE, Limits(key_concurrency=1))
    running = {}
    for key in "abc":
        first, second = await submitted(db, concurrency_key=key), await submitted(db, concurrency_key=key)
        running[key] = await claim(db, first)
        assert await claim(db, second) is None
    assert [await relay.let_go(QUEUE) for _ in range(2)] == [0, 0]
    one = running["c"]
    assert one is not None
    await end(db, one)
    assert sorted([await relay.let_go(QUEUE) for _ in range(2)]) == [0, 1]


async def test_what_could_not_be_pushed_is_fed_and_keeps_nobody_waiting(
    db: Database, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=1))
    one, two = await submitted(db), await submitted(db)
    running = await claim(db, one)
    assert running is not None
    assert await claim(db, two) is None
    await end(db, running)

    async def refuse(*_: object, **__: object) -> int:
        raise errors.BrokerUnavailable("Redis refuses")

    with monkeypatch.context() as away:
        away.setattr(relay.broker, "publish", refuse)
        with pytest.raises(errors.BrokerUnavailable):
            await relay.let_go(QUEUE)
    assert await relay.publish_due(QUEUE) == 1
    assert await relay.broker.depth(QUEUE) == 1
    assert await claim(db, two) is not None


async def test_the_end_of_a_limited_task_lets_the_next_go_at_once(db: Database, relay: Relay) -> None:
    await lifecycle.limit_queue(db, QUEUE, Limits(concurrency=2, key_concurrency=1))
    tasks = [await submitted(db, concurrency_key=key) for key in ("a", "a", "b", "c")]
    claims = [await claim(db, task_id) for task_id in tasks]
    assert await held(db, *tasks) == [None, "key_concurrency", None, "concurrency"]
    first = claims[0]
    assert first is not None
    await end(db, first)
    await publisher.let_go(db, relay.broker, QUEUE, first.limited_with or "")
    assert await held(db, *tasks) == [None, None, None, "concurrency"], "of those that may start, the oldest does"
    second = await claim(db, tasks[1])
    assert second is not None
    await end(db, second)
    await publisher.let_go(db, relay.broker, QUEUE, second.limited_with or "")
    assert await held(db, tasks[3]) == [None]
    assert [message.task_id for message in await relay.broker.tail(QUEUE) or ()] == [tasks[1], tasks[3]]


async def test_however_many_are_held_no_sweep_and_no_submit_touches_more_pages(settings: Settings) -> None:
    async with opened_side(settings.postgres_dsn) as side:
        few = await _pages_beside(side, 1_000)
        many = await _pages_beside(side, 7_000)
    assert {what: (few[what], many[what]) for what in few if many[what] > 1.5 * few[what] + 15} == {}


async def _pages_beside(side: Side, held: int) -> dict[str, float]:
    """Pages that each call touches, with so many more rows held for their queue, and each for a key of its own."""
    paused, keyed = "paused", "keyed"
    await lifecycle.pause_queue(side.db, paused)
    await lifecycle.limit_queue(side.db, keyed, Limits(concurrency=1_000, key_concurrency=1))
    # Those that were let go the last time would be looked at, and are not held.
    await side.db.execute("DELETE FROM task WHERE queue = $1", keyed)
    await side.db.execute("DELETE FROM held_task WHERE queue = $1", keyed)
    await side.db.execute("VACUUM task, held_task")
    await side.db.execute(
        """
        WITH made AS (
            INSERT INTO task (id, name, queue, args, kwargs, concurrency_key, published_at)
            SELECT gen_random_uuid(), 'sample.echo', queue, '[]', '{}', 'k' || n, 'infinity'
              FROM generate_series(1, $1::int) AS n, unnest(ARRAY['paused', 'keyed']) AS queue
            RETURNING id, queue, concurrency_key, run_at
        )
        INSERT INTO held_task (task_id, queue, concurrency_key, line, reason, run_at)
        SELECT id, queue, concurrency_key, CASE queue WHEN 'keyed' THEN concurrency_key ELSE '' END, 'paused', run_at
          FROM made
        """,
        held,
    )
    before = await lifecycle.clock(side.db) - timedelta(hours=1)
    new = lifecycle.NewTask(id=ids.uuid7(), name="sample.echo", queue=paused)
    known = {
        one: await side.db.fetchval("SELECT id FROM task WHERE queue = $1 AND published_at = 'infinity' LIMIT 1", one)
        for one in (paused, keyed)
    }
    calls = {
        "claim": lambda queue: claim(side.db, known[queue]),
        "cancel": lambda _: lifecycle.cancel(side.db, uuid4()),
        "submit": lambda queue: lifecycle.submit(side.db, replace(new, id=ids.uuid7(), queue=queue)),
        "take_due": lambda queue: lifecycle.take_due(side.db, queue, limit=500),
        "take_released": lambda queue: lifecycle.take_released(side.db, queue, among=500),
        "take_lost": lambda queue: lifecycle.take_lost(
            side.db, queue, below_position=2**63 - 1, published_before=before, limit=500
        ),
        "hold_due": lambda queue: lifecycle.hold_due(side.db, queue, limit=500),
        "let_go": lambda queue: lifecycle.let_go(side.db, queue, limit=10),
        "let_go_round": lambda queue: lifecycle.let_go_round(side.db, queue, after="", keys=10, limit=10),
        "end_turns": lambda _: lifecycle.end_turns(side.db, older_than_seconds=0.0),
        "expire": lambda queue: lifecycle.expire(side.db, queue, limit=500),
        "reap": lambda queue: lifecycle.expired_leases(side.db, queue, lease_seconds=0.0, limit=500),
        "strays": lambda _: lifecycle.unfinished_queues(side.db),
    }
    side.blocks.clear()
    for what, call in calls.items():
        for queue in (paused, keyed):
            for _ in range(3):
                await side.count_blocks(f"{what} in {queue}", partial(call, queue))
    return {what: statistics.median(counts) for what, counts in side.blocks.items()}

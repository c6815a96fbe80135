"""Servers that are gone for good, and others that take their place: with all that was promised, or with old data."""

import asyncio
import time
from collections.abc import Callable

import pytest
import redis

from app import db, doctor
from tests.faults.audit import TERMINAL, Figures
from tests.faults.replicas import replica_of, standby_of, wait_for_it
from tests.faults.stack import LEASE_SECONDS, QUEUE, Stack
from tests.faults.test_postgres import acknowledge, billed, load
from tests.faults.test_redis import waiting
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

FAILOVER_SECONDS = 15.0
"""How soon all that waits goes on after a failover: also what had a message, which nobody has any more."""

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]


def test_postgres_fails_over_to_its_synchronous_standby(running: Stack, report: Report) -> None:
    """The standby lags when the primary dies, so only what nobody was told of may be lost.

    For a while it is reached but not yet promoted, and takes no writes. Nobody can renew a lease for longer than a
    lease lasts.
    """
    with standby_of(running) as standby:
        assert "follow asynchronously" in durability(running)
        wait_for_it(running)
        assert durability(running) == ""
        through = running.submit_many(2, "faults.work", 20.0)
        running.running(2)
        with load(running):
            acknowledge(running, 40)
            running.submit_many(40, "faults.work", 0.3)
            standby.link.black_hole()
            lasting(running.chance.uniform(1.0, 3.0))
            settled = ends(running)
            running.kill_postgres()
            standby.link.cut()
            before = list(running.client.acknowledged)
            lasting(LEASE_SECONDS)
            running.fail_over("postgres", standby.server)
            lasting(running.chance.uniform(0.5, 2.0))
            refused = running.client.refused
            assert running.fetch("SELECT pg_promote()")[0][0]
            back = time.time()
            acknowledge(running, 40)
        recovery = running.recovered(before, back)
        figures = running.finish(
            "Postgres fails over to its synchronous standby",
            recovery_seconds=recovery,
            allowed_seconds=FAILOVER_SECONDS,
            workers="cut off",
            reclaims=True,
        )
        assert refused, "not one submit came while there was no primary"
        now = ends(running)
        assert len(settled) > 20
        assert {one: now.get(one) for one in settled} == settled
        assert not billed(running, through)
        report(figures)


def test_a_synchronous_standby_that_is_silent_for_a_while(running: Stack, report: Report) -> None:
    """No commit is answered, so settles wait, each with its row locked; their neighbours keep their leases."""
    silence = 2.5 * LEASE_SECONDS
    with standby_of(running) as standby:
        wait_for_it(running)
        through = running.submit_many(2, "faults.work", 20.0)
        running.running(2)
        with load(running):
            acknowledge(running, 20)
            running.submit_many(40, "faults.work", 0.3)
            standby.link.black_hole()
            lasting(silence)
            held = running.fetch(
                "SELECT 1 FROM task WHERE lease_until > now() AND id = ANY($1::uuid[])",
                through,
            )
            before = list(running.client.acknowledged)
            standby.link.restore()
            back = time.time()
            acknowledge(running, 20)
        recovery = running.recovered(before, back)
        figures = running.finish(
            f"its synchronous standby is silent for {silence:g} s",
            recovery_seconds=recovery,
            allowed_seconds=FAILOVER_SECONDS,
        )
        assert len(held) == len(through), "leases ran out because others' rows were locked"
        assert not billed(running, through)
        assert figures.run_twice == 0
        report(figures)


def test_redis_fails_over_to_a_replica_that_lags(running: Stack, report: Report) -> None:
    """It holds messages of tasks that have ended since, and none of those that wait."""
    with replica_of(running) as replica:
        running.submit_many(4, "faults.work", 3.0)
        running.running(4)
        stale = running.submit_many(40, "faults.work", 0.1)
        with redis.Redis.from_url(replica.server.url) as client:
            wait_until(lambda: client.llen(QUEUE) == len(stale), 5, "all messages on the replica")
            replica.link.black_hole()
            running.reach(stale, *TERMINAL)
            running.submit_many(4, "faults.work", 4.0)
            running.running(4)
            running.submit_many(60, "faults.work", 0.1)
            running.redis.kill()
            replica.link.cut()
            client.replicaof("NO", "ONE")
            assert client.llen(QUEUE) == len(stale)
        running.fail_over("redis", replica.server)
        missing = waiting(running)
        assert len(missing) == 60
        wait_until(lambda: running.depth() == 0, 30, "the end of the stale messages")
        at = time.time()
        recovery = running.messages_again(missing, at)
        figures = running.finish(
            f"Redis fails over, {len(stale)} messages stale, {len(missing)} missing",
            recovery_seconds=recovery,
            allowed_seconds=FAILOVER_SECONDS,
        )
        report(figures)
        assert figures.run_twice == 0
        # Those that were popped but not yet claimed are the only ones whose message was not lost.
        assert len(missing) - 8 <= running.pushed_again() <= len(missing)
        assert running.client.refused == 0


def ends(running: Stack) -> dict[str, tuple[object, ...]]:
    """How each of the ended tasks ended, and when."""
    rows = running.fetch(
        "SELECT id::text AS id, status, attempt, result::text AS result, finished_at FROM task"
        " WHERE finished_at IS NOT NULL"
    )
    return {row["id"]: tuple(row) for row in rows}


def durability(running: Stack) -> str:
    """What `taskqueue doctor` has to say about commits of the stack's Postgres."""

    async def facts() -> dict[str, str]:
        database = db.Database(running.postgres.url, max_connections=1, application_name="doctor")
        try:
            return await db.facts(database)
        finally:
            await database.close()

    return "; ".join(one.sentence for one in doctor.judge_durability(asyncio.run(facts())))

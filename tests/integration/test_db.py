import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from app import db
from app.core import errors
from app.core.config import Settings
from app.db import PLANNER, Database, insist
from tests.support.database import submitted
from tests.support.network import closed_port
from tests.support.proxy import proxied
from tests.support.waiting import until

BACKEND = "SELECT pg_backend_pid()"


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    """A pool of one connection."""
    one = Database(settings.postgres_dsn, max_connections=1, application_name="test")
    yield one
    await one.close()


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    """A session of somebody else, who holds transactions open."""
    connection = await asyncpg.connect(settings.postgres_dsn)
    yield connection
    await connection.close()


@pytest.fixture
async def third(settings: Settings) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(settings.postgres_dsn)
    yield connection
    await connection.close()


async def waits(watcher: asyncpg.Connection, pid: int) -> None:
    """Return once a session waits for a lock."""

    async def asked() -> bool:
        return bool(await watcher.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $1 AND NOT granted)", pid))

    await until(asked, what="the wait for a lock")


@pytest.mark.parametrize("how", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_a_statement_that_somebody_ends_may_be_tried_again(
    database: Database, other: asyncpg.Connection, how: str
) -> None:
    before = await database.fetchval(BACKEND)
    await other.execute("SELECT pg_advisory_lock(1)")
    statement = asyncio.create_task(database.fetchval("SELECT pg_advisory_lock(1)"))
    await waits(other, before)

    assert await other.fetchval(f"SELECT {how}($1)", before)

    with pytest.raises(errors.DatabaseUnavailable):
        await statement
    assert await database.fetchval(BACKEND) != before, "nobody gets a connection that failed"


async def test_the_victim_of_a_deadlock_may_try_again(
    database: Database, other: asyncpg.Connection, third: asyncpg.Connection
) -> None:
    pid = await database.fetchval(BACKEND)
    await database.execute("SET deadlock_timeout = '10ms'")
    await other.execute("SET deadlock_timeout = '1min'")
    await other.execute("SELECT pg_advisory_lock(2)")
    await third.execute("SELECT pg_advisory_lock(3)")
    victim = asyncio.create_task(
        database.execute("SELECT pg_advisory_xact_lock(1), pg_advisory_xact_lock(3), pg_advisory_xact_lock(2)")
    )
    await waits(third, pid)
    winner = asyncio.create_task(other.execute("SELECT pg_advisory_lock(1)"))
    await waits(third, other.get_server_pid())

    await third.execute("SELECT pg_advisory_unlock(3)")

    with pytest.raises(errors.DatabaseUnavailable, match="DeadlockDetectedError"):
        await victim
    await winner


async def test_a_serialization_failure_may_be_tried_again(database: Database, other: asyncpg.Connection) -> None:
    task_id = await submitted(database)
    pid = await database.fetchval(BACKEND)
    await database.execute("SET default_transaction_isolation = 'repeatable read'")
    change = "UPDATE task SET progress_message = 'x' WHERE id = $1"
    async with other.transaction():
        await other.execute(change, task_id)
        statement = asyncio.create_task(database.execute(change, task_id))
        await waits(other, pid)

    with pytest.raises(errors.DatabaseUnavailable, match="SerializationError"):
        await statement


async def test_a_statement_that_takes_too_long_is_given_up(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    before = await database.fetchval(BACKEND)
    monkeypatch.setattr(db, "STATEMENT_TIMEOUT_SECONDS", 0.2)

    with pytest.raises(errors.DatabaseUnavailable):
        await database.execute("SELECT pg_sleep(60)")
    monkeypatch.undo()
    assert await database.fetchval(BACKEND) != before


async def test_a_postgres_that_is_not_there_is_unavailable() -> None:
    nowhere = Database(f"postgresql://nobody@127.0.0.1:{closed_port()}/x", max_connections=1, application_name="test")

    with pytest.raises(errors.DatabaseUnavailable):
        await nowhere.ping()
    await nowhere.close()


async def test_before_the_tables_are_there_postgres_is_unavailable(empty_postgres_url: str) -> None:
    database = Database(empty_postgres_url, max_connections=1, application_name="test")

    with pytest.raises(errors.DatabaseUnavailable, match="UndefinedTableError"):
        await database.fetchval("SELECT count(*) FROM task")
    await database.close()


@pytest.mark.parametrize(
    ("sql", "arguments"),
    [
        ("INSERT INTO task (id, name, queue, args, kwargs) SELECT id, name, queue, args, kwargs FROM task", ()),
        ("UPDATE task SET name = NULL", ()),
        ("UPDATE task SET progress = 2", ()),
        ("UPDATE task SET worker = $1", ("a\x00b",)),
        ("UPDATE task SET worker = $1", ("\ud800",)),
        ("UPDATE task SET result = $1::json", ("{",)),
        ("UPDATE task SET attempt = $1", (2**31,)),
        ("UPDATE task SET position = $1", (2**63,)),
        ("UPDATE task SET failures = failures + 40000", ()),
        ("UPDATE task SET run_at = now() + make_interval(secs => $1)", (1e18,)),
        ("UPDATE task SET nonsense", ()),
    ],
    ids=[
        "a key twice",
        "nothing where something must be",
        "a check",
        "NUL in a text",
        "a lone surrogate",
        "broken JSON",
        "a number beyond int4",
        "a number beyond int8",
        "a sum beyond int2",
        "a time beyond the end of time",
        "no SQL",
    ],
)
async def test_what_postgres_can_not_hold_is_refused_and_the_connection_stays(
    database: Database, sql: str, arguments: tuple[object, ...]
) -> None:
    await submitted(database)
    before = await database.fetchval(BACKEND)

    with pytest.raises(errors.StatementRefused):
        await database.execute(sql, *arguments)
    assert await database.fetchval(BACKEND) == before


async def test_a_statement_that_nobody_waits_for_any_more_ends_in_postgres_too(
    settings: Settings, other: asyncpg.Connection
) -> None:
    short = Database(settings.postgres_dsn, max_connections=1, application_name="short", patience_seconds=0.5)

    async def nothing_works() -> bool:
        sql = "SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'short' AND state = 'active'"
        return bool(await other.fetchval(sql))

    for _ in range(3):
        with pytest.raises(errors.DatabaseUnavailable):
            await short.fetchval("SELECT pg_sleep(60)")
    async with other.transaction():
        await other.execute("LOCK TABLE task")
        for _ in range(3):
            with pytest.raises(errors.DatabaseUnavailable):
                await short.fetchval("SELECT count(*) FROM task")
        await until(nothing_works, what="the end of all that was tried")
    await short.close()


async def test_a_lock_that_is_not_to_be_had_in_time_costs_no_connection(
    database: Database, other: asyncpg.Connection
) -> None:
    before = await database.fetchval(BACKEND)
    await other.execute("SELECT pg_advisory_lock(1)")
    with pytest.raises(errors.Locked):
        await database.fetchval(
            "WITH patience AS (SELECT set_config('lock_timeout', '10ms', true))"
            " SELECT pg_advisory_lock(1) FROM patience"
        )
    assert await database.fetchval(BACKEND) == before


async def test_insisting_repeats_what_was_interrupted_until_it_works(database: Database) -> None:
    tries = 0

    async def operation() -> int:
        nonlocal tries
        tries += 1
        if tries <= 2:
            await database.execute(
                "SELECT CASE WHEN $1 THEN pg_cancel_backend(pg_backend_pid())"
                " ELSE pg_terminate_backend(pg_backend_pid()) END, pg_sleep(60)",
                tries == 1,
            )
        return int(await database.fetchval("SELECT 42"))

    assert await insist(operation, what="the answer") == 42
    assert tries == 3


async def test_insisting_does_not_repeat_what_was_refused(database: Database) -> None:
    task_id = await submitted(database)
    tries = 0

    async def operation() -> str:
        nonlocal tries
        tries += 1
        return await database.execute("UPDATE task SET progress = 2 WHERE id = $1", task_id)

    with pytest.raises(errors.StatementRefused):
        await insist(operation, what="the impossible")
    assert tries == 1


async def test_nothing_is_sent_between_two_statements(database: Database) -> None:
    await database.fetchval("SELECT set_config('statement_timeout', '12345ms', false)")

    assert await database.fetchval("SHOW statement_timeout") == "12345ms", "a reset would be a round trip more"


async def test_a_session_is_set_up_for_statements_that_have_their_indexes(database: Database) -> None:
    for setting, value in {**PLANNER, "application_name": "test"}.items():
        assert await database.fetchval(f"SHOW {setting}") == value


async def test_connections_that_were_forgotten_on_their_way_cost_one_timeout_in_all(settings: Settings) -> None:
    with proxied(settings.postgres_dsn) as network:
        database = Database(network.url, max_connections=4, application_name="test", patience_seconds=1.0)
        try:
            await asyncio.gather(*(database.fetchval("SELECT pg_sleep(0.2)") for _ in range(4)))
            network.black_hole()
            network.restore(revive=False)
            with pytest.raises(errors.DatabaseUnavailable):
                await database.ping()
            for _ in range(4):
                await database.ping()
        finally:
            await database.close()


async def test_who_waits_for_a_connection_gets_it_in_turn(database: Database, other: asyncpg.Connection) -> None:
    pid = await database.fetchval(BACKEND)
    await other.execute("SELECT pg_advisory_lock(1)")
    order: list[int] = []

    async def ask(number: int, sql: str) -> None:
        await database.fetchval(sql)
        order.append(number)

    asked = [asyncio.create_task(ask(0, "SELECT pg_advisory_xact_lock(1)"))]
    await waits(other, pid)
    asked += [asyncio.create_task(ask(number, BACKEND)) for number in (1, 2, 3)]
    await until(lambda: len(database._waiting) == 3, what="three that wait")
    assert database.connections() == (1, 0)
    asked[2].cancel()
    await other.execute("SELECT pg_advisory_unlock(1)")

    await asyncio.gather(*asked, return_exceptions=True)
    assert order == [0, 1, 3]
    assert database.connections() == (0, 1)
    assert await database.fetchval(BACKEND) == pid


async def test_a_connection_given_to_somebody_who_has_left_goes_to_the_next(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = await database.fetchval(BACKEND)
    hand_over = database._hand_over
    first = asyncio.create_task(database.fetchval("SELECT pg_sleep(0.1)"))
    await until(lambda: database.connections() == (1, 0), what="a statement")
    leaves = asyncio.create_task(database.fetchval(BACKEND))
    stays = asyncio.create_task(database.fetchval(BACKEND))
    await until(lambda: len(database._waiting) == 2, what="two that wait")

    def hand_over_and_cancel(connection: Any) -> bool:
        monkeypatch.undo()
        given = hand_over(connection)
        leaves.cancel()  # before it has heard of it
        return given

    monkeypatch.setattr(database, "_hand_over", hand_over_and_cancel)
    await first

    assert await stays == pid
    assert leaves.cancelled()
    assert database.connections() == (0, 1)


async def test_a_connection_whose_statement_was_left_is_not_used_again(database: Database) -> None:
    pid = await database.fetchval(BACKEND)
    left = asyncio.create_task(database.fetchval("SELECT pg_sleep(60)"))
    await until(lambda: database.connections() == (1, 0), what="a statement")
    waiting = asyncio.create_task(database.fetchval(BACKEND))
    await until(lambda: bool(database._waiting), what="one that waits")

    left.cancel()

    assert await waiting != pid
    assert database.connections() == (0, 1)


async def test_who_waits_too_long_for_a_connection_is_told_and_leaves_no_trace(settings: Settings) -> None:
    patient = Database(settings.postgres_dsn, max_connections=1, application_name="test")
    try:
        await patient.ping()
        holds = asyncio.create_task(patient.fetchval("SELECT pg_sleep(0.5)"))
        await until(lambda: patient.connections() == (1, 0), what="a statement")
        patient._patience = 0.05
        with pytest.raises(errors.DatabaseUnavailable, match="free in time"):
            await patient.ping()
        assert not patient._waiting
        await holds
        patient._patience = 10.0
        await patient.ping()
        assert patient.connections() == (0, 1)
    finally:
        await patient.close()

"""The fixtures keep their word: a test has its servers to itself."""

import asyncio

import asyncpg
import pytest
import redis

from app.core.config import Settings


async def _tables(url: str) -> list[str]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        await connection.execute("CREATE TABLE left_by_a_test ()")
    finally:
        await connection.close()
    return [row["tablename"] for row in rows]


@pytest.mark.parametrize("_turn", [1, 2])
async def test_a_database_is_migrated_and_has_nothing_of_another_test(postgres_url: str, _turn: int) -> None:
    tables = await _tables(postgres_url)
    assert "task" in tables
    assert "left_by_a_test" not in tables


@pytest.mark.parametrize("_turn", [1, 2])
def test_an_empty_database_is_empty(empty_postgres_url: str, _turn: int) -> None:
    assert asyncio.run(_tables(empty_postgres_url)) == []


@pytest.mark.parametrize("turn", range(10))
def test_a_redis_database_is_empty(settings: Settings, turn: int) -> None:
    with redis.Redis.from_url(settings.redis_url.get_secret_value()) as client:
        assert client.dbsize() == 0
        client.set("left-by-a-test", turn)

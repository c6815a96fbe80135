"""Keys in the table, and who an API process thinks holds them."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from pydantic import SecretStr

from app import keys
from app.core import errors
from app.core.config import Settings
from app.core.scopes import Scope
from app.db import Database, Record
from app.keys import ring, store
from tests.conftest import settings_for
from tests.support.database import Counting, counting, opened
from tests.support.waiting import until

NEW, OLD = SecretStr("n" * 32), SecretStr("o" * 32)


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Counting]:
    async with counting(settings) as database:
        yield database


async def kept(
    db: Database, *, owner: str = "ada", expires_in_seconds: float | None = None, master: SecretStr = NEW
) -> str:
    key = keys.made()
    masters = keys.Masters.of([master])
    new = keys.NewKey(
        id=keys.id_of(key) or "",
        digest=masters.digest(key),
        master=masters.newest,
        owner=owner,
        scopes=frozenset({Scope.TASKS_READ}),
        name="test",
        expires_in_seconds=expires_in_seconds,
    )
    assert await keys.add(db, new) is not None
    return key


def ring_of(db: Database, *masters: SecretStr) -> keys.Keyring:
    return keys.Keyring(db, keys.Masters.of(masters or [NEW]))


async def row(db: Database, key: str) -> Record:
    found = await db.fetchrow("SELECT * FROM api_key WHERE id = $1", keys.id_of(key))
    assert found is not None
    return found


async def test_the_holder_of_a_key_is_known_and_the_key_is_not_in_the_table(db: Counting) -> None:
    key = await kept(db)
    holder = await ring_of(db).holder(key)
    assert holder == keys.Holder(keys.id_of(key) or "", "ada", frozenset({Scope.TASKS_READ}))
    text = str(dict(await row(db, key)))
    assert key not in text
    assert key[19:50] not in text


async def test_a_key_is_asked_for_once_and_what_is_no_key_never(db: Counting) -> None:
    key, keyring = await kept(db), ring_of(db)
    before = db.asked
    for _ in range(50):
        assert await keyring.holder(key) is not None
    for text in ("", "x", key[:-1], key[:-8] + "0" * 8, key + "\n", "é" * 70, "tq_live_" + "\0" * 62):
        assert await keyring.holder(text) is None
    assert db.asked == before + 1


async def test_a_wrong_key_of_a_known_id_and_an_unknown_one_are_nobody_s(db: Counting) -> None:
    key, keyring = await kept(db), ring_of(db)
    forged = key[:20] + keys.made()[20:62]
    forged += keys.text.checksum(forged)
    assert keys.id_of(forged) == keys.id_of(key)
    assert await keyring.holder(forged) is None
    unknown, before = keys.made(), db.asked
    for _ in range(50):
        assert await keyring.holder(unknown) is None
    assert db.asked == before + 1, "that there is none is remembered, too"


async def test_a_revoked_key_is_nobody_s_within_seconds(db: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 0.1)
    monkeypatch.setattr(ring, "STALE_SECONDS", 0.3)
    key, keyring = await kept(db), ring_of(db)
    assert await keyring.holder(key) is not None
    revoked = await keys.revoke(db, keys.id_of(key) or "")
    assert revoked is not None
    assert revoked.state == "revoked"
    async with asyncio.timeout(3):
        await until(lambda: _gone(keyring, key), 3, "the end of the key")
    again = await keys.revoke(db, keys.id_of(key) or "")
    assert again == revoked, "asking twice is asking once"
    assert await keys.revoke(db, "nothing") is None


async def _gone(keyring: keys.Keyring, key: str) -> bool:
    return await keyring.holder(key) is None


async def test_a_new_key_opens_within_seconds_where_it_was_tried_before(
    db: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "STALE_SECONDS", 0.2)
    key, keyring = keys.made(), ring_of(db)
    assert await keyring.holder(key) is None
    masters = keys.Masters.of([NEW])
    new = keys.NewKey(
        id=keys.id_of(key) or "", digest=masters.digest(key), master=masters.newest, owner="", name="",
        scopes=frozenset({Scope.ADMIN}),
    )  # fmt: skip
    await keys.add(db, new)
    await until(lambda: keyring.holder(key), 3, "the key")


async def test_an_expired_key_is_nobody_s_at_once(db: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 60.0)
    monkeypatch.setattr(ring, "STALE_SECONDS", 60.0)
    key, keyring = await kept(db, expires_in_seconds=0.5), ring_of(db)
    assert await keyring.holder(key) is not None
    # No question is asked in between: what was found says until when it holds.
    before = db.asked
    await until(lambda: _gone(keyring, key), 5, "the end of the key")
    assert db.asked == before
    [shown] = await keys.kept(db)
    await until(lambda: _expired(db), 2, "the end of the key in the table")
    assert shown.expires_at is not None
    assert shown.expires_at - shown.created_at == timedelta(seconds=0.5)


async def _expired(db: Database) -> bool:
    return [one.state for one in await keys.kept(db)] == ["expired"]


async def test_a_key_that_is_used_all_the_time_never_waits(db: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "FRESH_SECONDS", 0.0)
    key, keyring = await kept(db), ring_of(db)
    await keyring.holder(key)
    asked_at = keyring._found[keys.id_of(key) or ""].asked_at

    async def asked_again() -> bool:
        # It answers before the question that it asks beside has one.
        answer = keyring.holder(key)
        with pytest.raises(StopIteration):
            answer.send(None)
        await asyncio.sleep(0)
        return keyring._found[keys.id_of(key) or ""].asked_at > asked_at

    await until(asked_again, 5, "another question")


async def test_questions_of_many_go_together_and_keep_one_connection_busy(db: Counting) -> None:
    keyring = ring_of(db)
    true = await kept(db)
    before = db.asked
    made_up = [keys.made() for _ in range(1500)]
    answers = await asyncio.gather(*(keyring.holder(key) for key in [*made_up, true]))
    assert [answer is not None for answer in answers] == [False] * 1500 + [True]
    assert db.asked - before <= 5


async def test_made_up_ids_are_forgotten_and_put_no_true_one_out(db: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "REMEMBERED", 20)
    key, keyring = await kept(db), ring_of(db)
    await keyring.holder(key)
    await asyncio.gather(*(keyring.holder(keys.made()) for _ in range(200)))
    assert len(keyring._missed) == 20
    before = db.asked
    assert await keyring.holder(key) is not None
    assert db.asked == before


async def test_with_postgres_away_a_known_key_opens_until_it_is_stale(
    db: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await kept(db)
    away = settings_for("postgresql://nobody@127.0.0.1:1/none", "redis://127.0.0.1:1/0")
    async with opened(away) as nowhere:
        with pytest.raises(errors.DatabaseUnavailable):
            await ring_of(nowhere).holder(key)
        keyring = ring_of(db)
        await keyring.holder(key)
        monkeypatch.setattr(keyring, "_db", nowhere)
        monkeypatch.setattr(ring, "FRESH_SECONDS", 0.0)
        assert await keyring.holder(key) is not None
        monkeypatch.setattr(ring, "STALE_SECONDS", 0.0)
        with pytest.raises(errors.DatabaseUnavailable):
            await keyring.holder(key)
    monkeypatch.setattr(keyring, "_db", db)
    assert await keyring.holder(key) is not None, "a failed question leaves nothing behind"


async def test_a_use_is_written_down_but_not_each_time(db: Counting) -> None:
    key, unused, keyring = await kept(db), await kept(db), ring_of(db)
    await keyring.holder(key)
    await keyring.holder(keys.made())
    await keyring.note()
    first = (await row(db, key))["last_used_at"]
    assert first is not None
    assert (await row(db, unused))["last_used_at"] is None
    await keyring.holder(key)
    await keyring.note()
    assert (await row(db, key))["last_used_at"] == first, "within a minute"
    await db.execute("UPDATE api_key SET last_used_at = now() - interval '61 s'")
    await keyring.holder(key)
    await keyring.note()
    assert (await row(db, key))["last_used_at"] > first


async def test_a_wrong_key_does_not_count_as_a_use(db: Counting) -> None:
    key, keyring = await kept(db), ring_of(db)
    forged = key[:20] + keys.made()[20:62]
    await keyring.holder(forged + keys.text.checksum(forged))
    await keyring.note()
    assert (await row(db, key))["last_used_at"] is None


async def test_a_used_key_is_kept_by_the_newest_secret_once_the_old_processes_are_gone(
    db: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = await kept(db, master=OLD)
    assert await ring_of(db, NEW).holder(key) is None
    rolling = ring_of(db, NEW, OLD)
    assert await rolling.holder(key) is not None
    await rolling.note()
    assert (await row(db, key))["master"] == keys.Masters.of([OLD]).newest, "an API before this one may still run"

    monkeypatch.setattr(ring, "ROLLED_SECONDS", 0.0)
    await rolling.note()
    assert (await row(db, key))["master"] == keys.Masters.of([NEW]).newest
    assert await ring_of(db, NEW).holder(key) is not None
    assert await ring_of(db, OLD).holder(key) is None


async def test_an_id_that_is_there_is_not_taken_over(db: Counting) -> None:
    key = await kept(db, owner="ada")
    other = keys.NewKey(
        id=keys.id_of(key) or "", digest=bytes(32), master="x", owner="eve", name="",
        scopes=frozenset({Scope.ADMIN}),
    )  # fmt: skip
    assert await keys.add(db, other) is None
    assert (await row(db, key))["owner"] == "ada"


async def test_a_scope_of_a_later_release_opens_nothing(db: Counting) -> None:
    key = await kept(db)
    await db.execute("ALTER TABLE api_key DROP CONSTRAINT api_key_scopes_known")
    await db.execute("UPDATE api_key SET scopes = '{schedules,tasks:write}'")
    found = await store.find(db, [keys.id_of(key) or ""])
    assert [one.scopes for one in found.values()] == [{Scope.TASKS_WRITE}]


async def test_whether_any_key_opens_anything(db: Counting) -> None:
    assert not await keys.usable(db)
    key = await kept(db)
    await kept(db, expires_in_seconds=-1.0)
    assert await keys.usable(db)
    await keys.revoke(db, keys.id_of(key) or "")
    assert not await keys.usable(db)

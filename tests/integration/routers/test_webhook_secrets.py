"""The secrets of a caller: made, rotated and revoked; shown once, and stored so that nobody reads them."""

import asyncio
import hashlib
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app import delivery
from app.core.config import Settings
from app.core.ids import uuid7
from app.db import Database
from app.utils import signing
from tests.conftest import settings_for
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import assert_problem

SECRETS = "/api/webhooks/secrets"
BROUGHT = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PRIVATE = "whsk_6Xb/dCcHpPea21PS1N9VY/NZW723CEc77N4rJCubMbfVKIDij2HKpMKkioLlX0dRqSKJp4AJ6p9lMicMFs6Kvg=="
PUBLIC = "whpk_1SiA4o9hyqTCpIqC5V9HUakiiaeACeqfZTInDBbOir4="


@pytest.fixture
def api_settings(postgres_url: str, redis_url: str) -> Settings:
    return settings_for(postgres_url, redis_url, TASKQUEUE_METRICS_PORT=0, TASKQUEUE_SECRET_KEY="k" * 32)


async def made(api: httpx.AsyncClient, path: str = "", **fields: Any) -> dict[str, Any]:
    answer = await api.post(SECRETS + path, json=fields)
    assert answer.status_code == 201, answer.text
    assert answer.headers["cache-control"] == "no-store"
    new: dict[str, Any] = answer.json()
    return new


async def listed(api: httpx.AsyncClient) -> list[dict[str, Any]]:
    answer = await api.get(SECRETS)
    assert answer.status_code == 200
    assert answer.json()["next_cursor"] is None
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


async def stored(db: Database) -> str:
    """All that the table holds, as text."""
    rows = await db.fetch("SELECT w::text AS row, encode(sealed, 'escape') AS sealed FROM webhook_secret w")
    return " ".join(str(dict(row)) for row in rows)


async def test_a_secret_is_shown_once_and_stored_so_that_nobody_reads_it(api: httpx.AsyncClient, db: Database) -> None:
    new = await made(api)
    secret = new.pop("secret")
    signing.key(secret)
    assert new["fingerprint"] == hashlib.sha256(secret.encode()).hexdigest()[:12]
    assert (new["kind"], new["public_key"], new["expires_at"]) == ("hmac", None, None)
    assert await listed(api) == [new]
    for text in (secret, secret[6:], secret[6:20], signing.key(secret)):
        assert str(text) not in await stored(db)
        assert str(text) not in (await api.get(SECRETS)).text


async def test_a_secret_may_be_brought_and_is_not_repeated(api: httpx.AsyncClient, db: Database) -> None:
    assert (await made(api, secret=BROUGHT))["secret"] is None
    assert BROUGHT[6:] not in await stored(db)
    problem = assert_problem(await api.post(SECRETS, json={"secret": BROUGHT}), 409)
    assert problem["type"] == "/problems/secret-not-stored"
    assert len(await listed(api)) == 1


async def test_a_pair_shows_its_public_half_as_often_as_it_is_asked_for(api: httpx.AsyncClient) -> None:
    new = await made(api, kind="ed25519")
    assert new["secret"].startswith("whsk_")
    assert signing.public_key(new["secret"]) == new["public_key"]
    assert (await made(api, secret=PRIVATE))["public_key"] == PUBLIC
    assert [one["public_key"] for one in await listed(api)] == [PUBLIC, new["public_key"]]


async def test_rotation_gives_what_signed_before_a_grace(api: httpx.AsyncClient) -> None:
    first, second = await made(api, "/rotate"), await made(api)
    assert first["default_signs_until"] is not None, "that was the service's own"
    third = await made(api, "/rotate", grace_seconds=3600)
    now = {one["id"]: one for one in await listed(api)}
    assert list(now) == [third["id"], second["id"], first["id"]]
    assert now[third["id"]]["expires_at"] is None
    assert now[first["id"]]["expires_at"] == now[second["id"]]["expires_at"] is not None
    assert now[first["id"]]["default_signs_until"] == now[first["id"]]["expires_at"], "not longer than the new grace"

    longer = await made(api, "/rotate", grace_seconds=604_800)
    assert {one["id"]: one["expires_at"] for one in await listed(api)}[first["id"]] == now[first["id"]]["expires_at"]
    without = await made(api, "/rotate", grace_seconds=0)
    assert [one["id"] for one in await listed(api)] == [without["id"]]
    assert without["default_signs_until"] is None
    assert longer["default_signs_until"] is None


async def test_a_secret_is_gone_at_once_when_it_is_revoked_or_its_grace_has_ended(
    api: httpx.AsyncClient, db: Database
) -> None:
    first, second = await made(api), await made(api)
    assert (await api.delete(f"{SECRETS}/{first['id']}")).status_code == 204
    assert_problem(await api.delete(f"{SECRETS}/{first['id']}"), 404)
    assert [one["id"] for one in await listed(api)] == [second["id"]]
    await db.execute("UPDATE webhook_secret SET expires_at = now()")
    assert await listed(api) == []
    assert_problem(await api.delete(f"{SECRETS}/{second['id']}"), 404)


async def test_there_are_five_at_most_however_many_are_made_at_once(api: httpx.AsyncClient, db: Database) -> None:
    answers = await asyncio.gather(*(api.post(SECRETS) for _ in range(12)))
    assert sorted(one.status_code for one in answers) == [201] * 5 + [409] * 7
    problem = assert_problem(await api.post(f"{SECRETS}/rotate"), 409)
    assert "revoke one" in problem["detail"]
    assert [one["expires_at"] for one in await listed(api)] == [None] * 5, "nothing goes without a successor"

    await db.execute("UPDATE webhook_secret SET expires_at = now() - interval '1 s' WHERE slot = 3")
    await made(api, "/rotate")
    assert len(await listed(api)) == 5
    await made(api, "/rotate", grace_seconds=0)
    assert len(await listed(api)) == 1


async def test_rotations_at_once_leave_one_that_goes_on_and_lose_none(api: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(api.post(f"{SECRETS}/rotate", json={"grace_seconds": 60}) for _ in range(4)))
    assert [one.status_code for one in answers] == [201] * 4
    found = await listed(api)
    assert {one["id"] for one in found} == {one.json()["id"] for one in answers}
    assert sum(one["expires_at"] is None for one in found) == 1


async def test_nobody_else_s_secret_is_seen_revoked_or_counted(api: httpx.AsyncClient, db: Database) -> None:
    theirs = [uuid7() for _ in range(5)]
    for secret_id in theirs:
        new = delivery.NewSecret(
            id=secret_id, owner="them", sealed=b"x", kind="hmac", fingerprint=secret_id.hex, public_key=None
        )
        assert isinstance(await delivery.place_secret(db, new), delivery.Secret)
    assert await listed(api) == []
    assert_problem(await api.delete(f"{SECRETS}/{theirs[0]}"), 404)
    await made(api, "/rotate", grace_seconds=0)
    assert [one.id for one in await delivery.secrets(db, "them")] == theirs[::-1]


async def test_without_a_key_nothing_is_stored_and_the_setting_is_named(
    api_settings: Settings, serve: Serve, db: Database
) -> None:
    async with serve(api_settings.model_copy(update={"secret_keys": ()})) as api:
        for path in ("", "/rotate"):
            problem = assert_problem(await api.post(SECRETS + path, json={"secret": BROUGHT}), 409)
            assert "TASKQUEUE_SECRET_KEY" in problem["detail"]
        assert await listed(api) == []
    assert await stored(db) == ""


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("", {"secret": "hunter2"}, "/secret"),
    ("", {"secret": "whsec_" + "x" * 200}, "/secret"),
    ("", {"secret": "whsec_c2hvcnQ="}, "/secret"),
    ("", {"secret": "whsec_üüüü"}, "/secret"),
    ("", {"secret": PUBLIC}, "/secret"),
    ("", {"secret": BROUGHT, "kind": "hmac"}, "/secret"),
    ("", {"secret": 5}, "/secret"),
    ("", {"secret": "whsec_\x00"}, "/secret"),
    ("", {"kind": "rsa"}, "/kind"),
    ("", {"grace_seconds": 5}, "/grace_seconds"),
    ("/rotate", {"grace_seconds": -1}, "/grace_seconds"),
    ("/rotate", {"grace_seconds": 604_801}, "/grace_seconds"),
    ("/rotate", {"grace_seconds": 1.5}, "/grace_seconds"),
    ("/rotate", {"grace_seconds": True}, "/grace_seconds"),
    ("/rotate", {"grace_seconds": 10**400}, "/grace_seconds"),
]


async def test_a_wrong_wish_names_its_field_and_repeats_no_secret(api: httpx.AsyncClient) -> None:
    for path, fields, pointer in WRONG:
        answer = await api.post(SECRETS + path, json=fields)
        assert_problem(answer, 422, pointer)
        assert str(fields.get("secret")) not in answer.text
    assert await listed(api) == []


async def test_an_id_that_is_none_or_nobody_s_is_named_or_not_found(api: httpx.AsyncClient) -> None:
    assert_problem(await api.delete(f"{SECRETS}/hunter2"), 422, "/id")
    assert_problem(await api.delete(f"{SECRETS}/{uuid4()}"), 404)


async def test_openapi_says_what_the_new_routes_answer(api: httpx.AsyncClient) -> None:
    schema = (await api.get("/openapi.json")).json()
    made_with = schema["paths"][f"{SECRETS}/rotate"]["post"]
    assert set(made_with["responses"]) == {"201", "400", "401", "403", "409", "413", "415", "422", "429", "503"}
    assert "RotateRequest" in str(made_with["requestBody"])
    assert "grace_seconds" in schema["components"]["schemas"]["RotateRequest"]["properties"]
    revoked = schema["paths"][SECRETS + "/{id}"]["delete"]
    assert set(revoked["responses"]) == {"204", "401", "403", "404", "422", "429", "503"}
    test = schema["paths"]["/api/webhooks/test"]["post"]["responses"]
    assert "Retry-After" in test["429"]["headers"]

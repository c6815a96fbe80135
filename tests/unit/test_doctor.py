from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr

from app import doctor, keys
from app.utils.sealing import Seal
from app.worker import keeper
from tests.conftest import settings_for

POSTGRES = {
    "server_version": "16.1",
    "server_version_num": "160001",
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "synchronous_standby_names": "ANY 1 (a)",
    "max_connections": "100",
    "in_recovery": "off",
    "followers": "1",
    "revision": "0002",
}
NOW = datetime(2030, 1, 31, tzinfo=UTC)
GUARDED = settings_for("postgresql://h/d", "redis://h/0", TASKQUEUE_AUTH_MODE="api-key", TASKQUEUE_SECRET_KEY="k" * 32)
REDIS = {"redis_version": "7.2.1", "maxmemory-policy": "noeviction", "appendonly": "yes", "maxmemory": "0"}


def levels(found: list[doctor.Finding]) -> list[str]:
    return [one.level for one in found]


def of_postgres(**changes: str) -> list[doctor.Finding]:
    return doctor.judge_postgres({**POSTGRES, **changes}, needed_revision="0002", concurrency=4)


def test_a_sound_postgres_and_a_sound_redis_are_ok() -> None:
    assert levels(of_postgres()) == ["ok"]
    assert levels(doctor.judge_redis(REDIS)) == ["ok"]


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("server_version_num", "140011", "bad"),
        ("fsync", "off", "bad"),
        ("full_page_writes", "off", "bad"),
        ("synchronous_commit", "off", "bad"),
        ("synchronous_commit", "local", "risk"),
        ("synchronous_standby_names", "", "risk"),
        ("followers", "0", "bad"),
        ("max_connections", "22", "bad"),
        ("in_recovery", "on", "bad"),
        ("revision", "0001", "bad"),
        ("revision", "", "bad"),
    ],
)
def test_what_would_break_a_promise_of_postgres_is_named(name: str, value: str, level: str) -> None:
    found = of_postgres(**{name: value})

    assert level in levels(found)
    assert all(one.sentence for one in found)


def test_a_failover_is_a_risk_to_what_an_asynchronous_standby_did_not_get() -> None:
    followed = of_postgres(synchronous_standby_names="")
    alone = of_postgres(synchronous_standby_names="", followers="0")

    assert levels(followed) == levels(alone) == ["ok", "risk"]
    assert "asynchronously" in followed[-1].sentence
    assert "no standby" in alone[-1].sentence
    assert levels(of_postgres(synchronous_commit="local", followers="0")) == ["ok", "risk"], "nobody waits"


@pytest.mark.parametrize(
    ("name", "value", "level"),
    [
        ("redis_version", "6.0.9", "bad"),
        ("maxmemory-policy", "allkeys-lru", "risk"),
        ("appendonly", "no", "risk"),
    ],
)
def test_what_would_break_a_promise_of_redis_is_named(name: str, value: str, level: str) -> None:
    assert level in levels(doctor.judge_redis({**REDIS, name: value}))


def test_a_redis_that_is_nearly_full_or_does_not_tell_is_a_risk() -> None:
    assert "risk" in levels(doctor.judge_redis({**REDIS, "maxmemory": "100", "used_memory": "61"}))
    assert "risk" in levels(doctor.judge_redis({"redis_version": "7.2.1"}))


def test_settings_that_open_doors_are_risks() -> None:
    closed = settings_for(
        "postgresql://h/d",
        "redis://h/0",
        TASKQUEUE_AUTH_MODE="api-key",
        TASKQUEUE_SECRET_KEY="k" * 32,
        TASKQUEUE_SAMPLE_TASKS=False,
        TASKQUEUE_WEBHOOK_SECRET="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        TASKQUEUE_WEBHOOK_BLOCKED_CIDRS="10.0.0.0/8",
    )
    assert doctor.judge_settings(closed) == []
    opened = closed.model_copy(
        update={"auth_mode": "none", "webhook_secrets": (), "webhook_allow_private": True, "sample_tasks": True}
    )
    assert levels(doctor.judge_settings(opened)) == ["risk"] * 4


def test_tasks_in_queues_that_nobody_looks_after_are_bad() -> None:
    assert doctor.judge_queues({"a", "b"}, ("a", "b", "c")) == []
    [found] = doctor.judge_queues({"a", "z", "b"}, ("a",))
    assert found.level == "bad"
    assert found.sentence.endswith(": b, z")


def test_secrets_that_nobody_can_read_are_bad_and_those_of_an_older_key_a_risk() -> None:
    old, new = Seal(["o" * 32]), Seal(["n" * 32, "o" * 32])
    assert doctor.judge_secrets({}, None) == []
    assert doctor.judge_secrets({new.mark: 3}, new) == []
    assert levels(doctor.judge_secrets({new.mark: 3, old.mark: 2}, new)) == ["risk"]
    assert levels(doctor.judge_secrets({old.mark: 2}, Seal(["x" * 32]))) == ["bad"]
    [found] = doctor.judge_secrets({old.mark: 2, new.mark: 1}, None)
    assert "opens 3 webhook secrets" in found.sentence


def a_key(**changes: Any) -> keys.Kept:
    usual = {
        "id": "i", "name": "", "owner": "", "scopes": ("admin",), "state": "live",
        "master": keys.Masters.of(GUARDED.secret_keys).newest, "created_at": NOW, "expires_at": None,
        "revoked_at": None, "last_used_at": None,
    }  # fmt: skip
    return keys.Kept(**{**usual, **changes})


def test_a_door_that_no_key_opens_is_bad() -> None:
    assert doctor.judge_keys(GUARDED, [a_key(), a_key(state="revoked", master="other")]) == []
    assert levels(doctor.judge_keys(GUARDED, [])) == ["bad"]
    assert levels(doctor.judge_keys(GUARDED, [a_key(state="expired")])) == ["bad"]
    assert levels(doctor.judge_keys(GUARDED, [a_key(), a_key(master="other")])) == ["bad"]
    assert levels(doctor.judge_keys(GUARDED.model_copy(update={"secret_keys": ()}), [a_key()])) == ["bad"]
    assert doctor.judge_keys(GUARDED.model_copy(update={"auth_mode": "none"}), []) == []


def test_a_secret_that_keys_still_need_is_named() -> None:
    rotating = GUARDED.model_copy(update={"secret_keys": (SecretStr("n" * 32), *GUARDED.secret_keys)})
    [found] = doctor.judge_keys(rotating, [a_key()])
    assert (found.level, "older TASKQUEUE_SECRET_KEY" in found.sentence) == ("ok", True)


def test_a_keeper_has_as_many_connections_as_it_opens() -> None:
    assert doctor.CONNECTIONS_OF_ONE["keeper"] == keeper.CONNECTIONS

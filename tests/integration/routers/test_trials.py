"""Test events: sent by a real relay to real receivers, and told exactly as they went."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
import standardwebhooks

from app import delivery
from app import relay as relays
from app.broker import Broker
from app.core import stopping
from app.core.config import Settings
from app.core.ids import uuid7
from app.db import Database
from app.delivery import trial
from app.relay import Relay
from app.routers import trials
from app.utils import signing
from app.utils.webhook import Outcome, Receipt, Sender
from tests.conftest import settings_for
from tests.integration.routers.conftest import Serve
from tests.integration.routers.test_tasks import assert_problem
from tests.support.network import closed_port
from tests.support.receiver import Answer, Receiver
from tests.support.waiting import POLL_SECONDS, until

TEST = "/api/webhooks/test"
SECRETS = "/api/webhooks/secrets"
DEFAULT = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.fixture
def api_settings(postgres_url: str, redis_url: str) -> Settings:
    return settings_for(
        postgres_url,
        redis_url,
        TASKQUEUE_METRICS_PORT=0,
        TASKQUEUE_SECRET_KEY="k" * 32,
        TASKQUEUE_WEBHOOK_SECRET=DEFAULT,
        TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True,
        TASKQUEUE_WEBHOOK_BLOCKED_CIDRS="127.0.0.66/32",
    )


@contextlib.asynccontextmanager
async def relaying(settings: Settings, db: Database, *, deadline_seconds: float = 15.0) -> AsyncIterator[Relay]:
    """A relay that sends test events as soon as it sees them."""
    wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with Sender.from_settings(settings) as sender:
        sender._deadline_seconds = deadline_seconds
        relay = Relay(settings, db, wire, sender)

        async def send() -> None:
            while True:
                await relay.trials.send()
                await asyncio.sleep(POLL_SECONDS)

        loop = asyncio.create_task(send())
        yield relay
        await stopping.stop(loop, *relay.trials.sending)
    await wire.close()


@pytest.fixture
async def relay(api_settings: Settings, db: Database) -> AsyncIterator[Relay]:
    async with relaying(api_settings, db) as one:
        yield one


async def tried(api: httpx.AsyncClient, url: str, **fields: Any) -> dict[str, Any]:
    answer = await api.post(TEST, json={"url": url, **fields})
    assert answer.status_code == 200, answer.text
    came: dict[str, Any] = answer.json()
    return came


async def left(db: Database) -> int:
    return int(await db.fetchval("SELECT count(*) FROM webhook_test"))


@pytest.mark.usefixtures("relay")
async def test_a_test_event_arrives_signed_and_is_told_as_it_was_sent(api: httpx.AsyncClient, db: Database) -> None:
    with Receiver([204]) as receiver:
        came = await tried(api, f"{receiver.url}/hook?token=hunter2")
        [one] = receiver.requests
    event = standardwebhooks.Webhook(DEFAULT).verify(one.body.decode(), dict(one.headers))
    assert (event["type"], event["data"]["test"]) == ("webhook.test", True)
    assert (came["outcome"], came["status_code"], came["excerpt"]) == ("success", 204, "")
    assert 0 < came["duration_seconds"] < 5
    assert came["webhook_id"] == one.headers["webhook-id"]
    assert came["request"] == {"headers": dict(one.headers), "body": one.body.decode()}
    assert UUID(came["webhook_id"]).version == 7
    assert "hunter2" not in json.dumps(came)
    assert (await left(db), await db.fetchval("SELECT count(*) FROM webhook_delivery")) == (0, 0)


@pytest.mark.usefixtures("relay")
async def test_it_is_signed_with_the_caller_s_own_secrets(api: httpx.AsyncClient) -> None:
    made = (await api.post(SECRETS, json={"kind": "ed25519"})).json()
    with Receiver() as receiver:
        came = await tried(api, receiver.url, event="task.failed")
        [one] = receiver.requests
    signing.verify([made["public_key"]], one.headers, one.body, time.time())
    [signature] = one.headers["webhook-signature"].split()
    assert signature.startswith("v1a,"), "and not with the service's"
    assert json.loads(one.body)["type"] == "task.failed"
    assert made["secret"][6:] not in json.dumps(came)


@pytest.mark.usefixtures("relay")
async def test_what_goes_wrong_is_told_with_what_to_do_about_it(api: httpx.AsyncClient) -> None:
    answers = [
        Answer(status=302, headers={"location": "http://127.0.0.1:1/"}, body=b"go"),
        Answer(status=404, body=b"no such path"),
        Answer(status=429, headers={"retry-after": "7"}, body=b"slow\x00 down"),
        Answer(status=500, body=b"x" * 10_000),
    ]
    with Receiver(answers) as receiver:
        found = [await tried(api, receiver.url) for _ in answers]
    assert [one["outcome"] for one in found] == ["http_3xx", "http_4xx", "http_429", "http_5xx"]
    assert [one["status_code"] for one in found] == [302, 404, 429, 500]
    assert [one["excerpt"][:12] for one in found] == ["go", "no such path", "slow down", "x" * 12]
    assert (found[2]["retry_after_seconds"], len(found[3]["excerpt"])) == (7.0, 4096)
    assert len({one["advice"] for one in found}) == 4

    refused = await tried(api, f"http://127.0.0.1:{closed_port()}/")
    assert (refused["outcome"], refused["status_code"]) == ("connect_error", None)
    assert refused["request"]["headers"]["host"].startswith("127.0.0.1:"), "it is shown what would have been sent"


async def test_a_slow_receiver_is_given_up_at_the_deadline(
    api: httpx.AsyncClient, api_settings: Settings, db: Database
) -> None:
    async with relaying(api_settings, db, deadline_seconds=0.3):
        with Receiver([Answer(delay_seconds=30)]) as receiver:
            came = await tried(api, receiver.url)
    assert (came["outcome"], came["status_code"]) == ("timeout", None)
    assert 0.3 <= came["duration_seconds"] < 2
    assert "15 seconds" in came["advice"]


async def test_an_address_that_only_the_relay_refuses_is_blocked_and_gets_no_packet(
    api_settings: Settings, serve: Serve, db: Database
) -> None:
    stricter = api_settings.model_copy(update={"webhook_blocked_cidrs": ("127.0.0.0/8",)})
    with Receiver() as receiver:
        async with serve(api_settings) as api, relaying(stricter, db):
            came = await tried(api, receiver.url)
        assert receiver.requests == []
    assert (came["outcome"], came["request"]) == ("blocked", None)


async def test_a_secret_that_can_t_be_read_is_told_and_nothing_is_sent(
    api: httpx.AsyncClient, api_settings: Settings, db: Database
) -> None:
    await api.post(SECRETS)
    async with relaying(api_settings.model_copy(update={"secret_keys": ()}), db):
        with Receiver() as receiver:
            came = await tried(api, receiver.url)
            assert receiver.requests == []
    assert (came["outcome"], came["request"]) == ("secret_unreadable", None)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "/url"),
    ({"url": ""}, "/url"),
    ({"url": "ftp://example.com/"}, "/url"),
    ({"url": "http://127.0.0.66:9000/hunter2"}, "/url"),
    ({"url": "http://0177.0.0.66:9000/hunter2"}, "/url"),
    ({"url": "http://u:hunter2@example.com/"}, "/url"),
    ({"url": "http://example.com/#hunter2"}, "/url"),
    ({"url": "http://example.com/" + "hunter2" * 400}, "/url"),
    ({"url": 5}, "/url"),
    ({"url": "http://example.com/\x00"}, "/url"),
    ({"url": "http://example.com/", "event": "task.hunter2"}, "/event"),
    ({"url": "http://example.com/", "secret": "hunter2"}, "/secret"),
]


async def test_a_url_that_is_refused_is_named_and_nothing_is_asked_of_a_relay(
    api: httpx.AsyncClient, db: Database
) -> None:
    for body, pointer in REFUSED:
        answer = await api.post(TEST, json=body)
        assert_problem(answer, 422, pointer)
        assert "hunter2" not in answer.text
    assert await left(db) == 0


async def test_without_a_relay_the_wish_is_void_and_never_sent_later(
    api: httpx.AsyncClient, api_settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PICKUP_SECONDS", 0.2)
    with Receiver() as receiver:
        answer = await api.post(TEST, json={"url": receiver.url})
        problem = assert_problem(answer, 503)
        assert "relay" in problem["detail"]
        assert int(answer.headers["retry-after"]) > 0
        assert await left(db) == 0

        await delivery.ask_trial(db, uuid7(), owner="", url=receiver.url, event="webhook.test", traceparent=None)
        await db.execute("UPDATE webhook_test SET created_at = now() - interval '6 s'")
        async with relaying(api_settings, db) as relay:
            assert await relay.trials.send() == 0
            await db.execute("UPDATE webhook_test SET created_at = now() - interval '61 s'")
            assert await relay.trials.prune() == 1
        assert receiver.requests == []


async def test_a_relay_that_dies_in_the_middle_is_not_waited_for_longer_than_its_deadline(
    api: httpx.AsyncClient, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PICKUP_SECONDS", 0.3)
    monkeypatch.setattr(trials, "PATIENCE_SECONDS", 0.3)
    asked = asyncio.create_task(api.post(TEST, json={"url": "http://127.0.0.1:1/"}))
    await until(lambda: delivery.claim_trials(db, limit=1), what="the wish")
    assert "may have arrived" in assert_problem(await asked, 503)["detail"]


async def test_a_test_that_one_relay_is_about_to_take_is_passed_over_by_the_others(
    api_settings: Settings, db: Database
) -> None:
    for _ in range(2):
        await delivery.ask_trial(
            db, uuid7(), owner="", url="http://127.0.0.1:1/", event=delivery.TEST, traceparent=None
        )
    other = await asyncpg.connect(api_settings.postgres_dsn)
    transaction = other.transaction()
    await transaction.start()
    [theirs] = await other.fetch(trial._CLAIM, 1, delivery.PICKUP_SECONDS, [])
    async with asyncio.timeout(5):
        [ours] = await delivery.claim_trials(db, limit=10)
    await transaction.commit()
    await other.close()
    assert ours.id != theirs["id"]
    assert await delivery.claim_trials(db, limit=10) == []

    late = dataclasses.replace(ours, token=theirs["token"])
    await delivery.end_trial(db, late, Receipt(outcome=Outcome.SUCCESS), b"")
    assert await delivery.hear_trial(db, ours.id) is None, "it is not theirs to end"


@pytest.mark.usefixtures("relay")
async def test_few_tests_wait_at_once_and_the_others_hear_when_to_come_again(api: httpx.AsyncClient) -> None:
    with Receiver([Answer(delay_seconds=0.5)] * trials.OWNER_WAITS) as receiver:
        answers = await asyncio.gather(*(api.post(TEST, json={"url": receiver.url}) for _ in range(6)))
        refused = [one for one in answers if one.status_code == 429]
        assert len(refused) == 6 - trials.OWNER_WAITS
        for one in refused:
            assert assert_problem(one, 429)["type"] == "/problems/too-many-at-once"
            assert one.headers["retry-after"] == "1"
        assert (await tried(api, receiver.url))["outcome"] == "success", "a turn ends with its answer"


async def test_a_relay_that_serves_looks_for_tests(
    api: httpx.AsyncClient, api_settings: Settings, db: Database, tmp_path: Path
) -> None:
    settings = api_settings.model_copy(update={"data_dir": tmp_path})
    async with Sender.from_settings(settings) as sender:
        wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
        loops = [asyncio.create_task(one) for one in relays._loops(Relay(settings, db, wire, sender))]
        with Receiver() as receiver:
            assert (await tried(api, receiver.url))["outcome"] == "success"
        await stopping.stop(*loops)
        await wire.close()


async def test_an_owner_whose_receivers_never_answer_leaves_room_for_the_others(
    api_settings: Settings, db: Database
) -> None:
    with Receiver([Answer(delay_seconds=30)] * 9) as receiver:
        async with relaying(api_settings, db) as relay:

            async def ask(owner: str) -> None:
                await delivery.ask_trial(
                    db, uuid7(), owner=owner, url=receiver.url, event=delivery.TEST, traceparent=None
                )

            for _ in range(delivery.OWNER_AT_ONCE + 2):
                await ask("greedy")
            await until(lambda: len(relay.trials.sending) == delivery.OWNER_AT_ONCE, what="its share")
            await ask("patient")
            await until(lambda: "patient" in relay.trials.sending.values(), what="the other owner's")
            assert Counter(relay.trials.sending.values()) == {"greedy": delivery.OWNER_AT_ONCE, "patient": 1}

            for task in list(relay.trials.sending):
                task.cancel()

            async def all_taken() -> bool:
                return not await db.fetchval("SELECT count(*) FROM webhook_test WHERE token IS NULL")

            await until(all_taken, what="the rest, once the first have ended")

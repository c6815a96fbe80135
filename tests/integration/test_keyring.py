"""Real relays sign for real receivers with what an owner has stored, while it is rotated, expires and can't be read."""

import base64
import contextlib
import logging
from collections.abc import AsyncIterator
from uuid import UUID

import pytest
import standardwebhooks
import svix.webhooks

from app import circuits, delivery, keyring, lifecycle
from app.broker import Broker
from app.core import errors
from app.core.config import Settings
from app.core.ids import uuid7
from app.db import Database
from app.lifecycle import Succeeded, decide
from app.relay import Relay
from app.utils import sealing, signing
from app.utils.webhook import Sender
from tests.conftest import settings_for
from tests.support.database import opened, started, submitted
from tests.support.receiver import Received, Receiver
from tests.support.waiting import until

DEFAULT = "whsec_" + base64.b64encode(b"d" * 32).decode()
MASTER, NEXT_MASTER = "master-1" * 4, "master-2" * 4


@pytest.fixture
def settings(postgres_url: str, redis_url: str) -> Settings:
    return settings_for(
        postgres_url,
        redis_url,
        TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True,
        TASKQUEUE_WEBHOOK_SECRET=DEFAULT,
        TASKQUEUE_SECRET_KEY=MASTER,
        TASKQUEUE_WEBHOOK_SCHEDULE="0 0 0",
    )


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@contextlib.asynccontextmanager
async def relaying(settings: Settings, db: Database) -> AsyncIterator[Relay]:
    wire = Broker(settings.redis_url.get_secret_value(), client_name="test")
    async with Sender.from_settings(settings) as sender:
        yield Relay(settings, db, wire, sender)
    await wire.close()


@pytest.fixture(autouse=True)
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that remembers nothing, so that no test waits for it to forget."""
    monkeypatch.setattr(keyring, "STALE_SECONDS", 0.0)


async def placed(
    db: Database,
    owner: str = "us",
    *,
    grace_seconds: float | None = None,
    master: str = MASTER,
    secret: str | None = None,
) -> tuple[str, UUID]:
    """A stored secret, as the API stores it, and its id."""
    secret, secret_id = secret or signing.new_secret("hmac"), uuid7()
    new = delivery.NewSecret(
        id=secret_id,
        owner=owner,
        sealed=sealing.Seal([master]).seal(secret, delivery.belongs_to(owner, secret_id)),
        kind=signing.kind_of(secret),
        fingerprint=signing.fingerprint(secret),
        public_key=None,
    )
    assert isinstance(await delivery.place_secret(db, new, grace_seconds=grace_seconds), delivery.Secret)
    return secret, secret_id


async def ended(db: Database, url: str, owner: str = "us") -> UUID:
    """A task that has ended, and whose webhook is due."""
    task_id = await submitted(db, webhook_url=url, owner=owner)
    claimed = await started(db, task_id)
    await lifecycle.settle(db, claimed.claim, decide(claimed.budgets, Succeeded("1")))
    return task_id


async def sent(relay: Relay, receiver: Receiver, owner: str = "us") -> Received:
    """The webhook of a task that ends now."""
    before = len(receiver.requests)
    await ended(relay.db, receiver.url, owner)
    assert await relay.deliver() == 1
    await until(lambda: not relay.sending, what="the end of the delivery")
    [one] = receiver.requests[before:]
    return one


def known_by(secrets: dict[str, str], one: Received) -> set[str]:
    """Whose receivers accept it, by both of the published libraries, which must agree."""
    known = set()
    for name, secret in secrets.items():
        by_standard = by_svix = True
        try:
            standardwebhooks.Webhook(secret).verify(one.body.decode(), dict(one.headers))
        except standardwebhooks.WebhookVerificationError:
            by_standard = False
        try:
            svix.webhooks.Webhook(secret).verify(one.body, dict(one.headers))
        except svix.webhooks.WebhookVerificationError:
            by_svix = False
        assert by_standard == by_svix
        known |= {name} if by_svix else set()
    return known


async def test_receivers_verify_with_the_old_and_the_new_secret_until_the_grace_ends(
    settings: Settings, db: Database
) -> None:
    async with relaying(settings, db) as relay:
        with Receiver() as receiver:
            secrets = {"default": DEFAULT}
            assert known_by(secrets, await sent(relay, receiver)) == {"default"}

            secrets["first"], _ = await placed(db, grace_seconds=3600)
            assert known_by(secrets, await sent(relay, receiver)) == {"default", "first"}
            await db.execute("UPDATE webhook_secret SET default_until = now()")
            assert known_by(secrets, await sent(relay, receiver)) == {"first"}

            secrets["second"], _ = await placed(db, grace_seconds=3600)
            both = await sent(relay, receiver)
            assert known_by(secrets, both) == {"first", "second"}
            newest = signing.key(secrets["second"])
            assert isinstance(newest, bytes)
            own = signing.sign([newest], both.headers["webhook-id"], int(both.headers["webhook-timestamp"]), both.body)
            assert both.headers["webhook-signature"].split()[0] == own

            await db.execute("UPDATE webhook_secret SET expires_at = now() WHERE expires_at IS NOT NULL")
            assert known_by(secrets, await sent(relay, receiver)) == {"second"}
            assert await relay.prune() == 1

            secrets["third"], third_id = await placed(db, grace_seconds=0)
            assert known_by(secrets, await sent(relay, receiver)) == {"third"}
            assert await delivery.revoke_secret(db, "us", third_id)
            assert known_by(secrets, await sent(relay, receiver)) == {"default"}


async def test_a_grace_ends_exactly_for_a_relay_that_remembers(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "STALE_SECONDS", 3600.0)
    async with relaying(settings, db) as relay:
        with Receiver() as receiver:
            old, _ = await placed(db)
            new, _ = await placed(db, grace_seconds=1.0)
            secrets = {"old": old, "new": new, "default": DEFAULT}
            assert known_by(secrets, await sent(relay, receiver)) == {"old", "new"}
            ends_at = await db.fetchval("SELECT max(expires_at) FROM webhook_secret")
            await until(lambda: db.fetchval("SELECT now() >= $1", ends_at), what="the end of the grace")
            assert known_by(secrets, await sent(relay, receiver)) == {"new"}


async def test_each_owner_is_signed_for_with_its_own_and_asked_about_once(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "STALE_SECONDS", 3600.0)
    asked: list[list[str]] = []
    ask = delivery.sealed_secrets

    async def counted(database: Database, owners: list[str]) -> list[delivery.Sealed]:
        asked.append(sorted(owners))
        return await ask(database, owners)

    monkeypatch.setattr(delivery, "sealed_secrets", counted)
    ours, _ = await placed(db, "us")
    theirs, _ = await placed(db, "them")
    secrets = {"us": ours, "them": theirs, "default": DEFAULT}
    async with relaying(settings, db) as relay:
        with Receiver() as receiver:
            tasks = {str(await ended(db, receiver.url, owner)): owner for owner in ("us", "them", "", "us")}
            assert await relay.deliver() == 4
            await until(lambda: len(receiver.requests) == 4 and not relay.sending, what="all four")
            for one in receiver.requests:
                owner = next(owner for task, owner in tasks.items() if task in one.body.decode())
                assert known_by(secrets, one) == {owner or "default"}
            await sent(relay, receiver)
            await sent(relay, receiver, "them")
    assert asked == [["", "them", "us"]]


async def test_a_pair_signs_beside_a_shared_secret(settings: Settings, db: Database) -> None:
    shared, _ = await placed(db)
    private, _ = await placed(db, secret=signing.new_secret("ed25519"))
    public = signing.public_key(private)
    assert public is not None
    async with relaying(settings, db) as relay:
        with Receiver() as receiver:
            one = await sent(relay, receiver)
    for known in (shared, public):
        signing.verify([known], one.headers, one.body, one.at)
    assert known_by({"shared": shared}, one) == {"shared"}


async def test_what_can_t_be_signed_waits_spends_nothing_and_is_never_sent_otherwise(
    settings: Settings, db: Database, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuits, "UNREADABLE_SECONDS", 0.0)
    secret, secret_id = await placed(db)
    changed = settings_for(
        settings.database_url.get_secret_value(),
        settings.redis_url.get_secret_value(),
        TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True,
        TASKQUEUE_WEBHOOK_SECRET=DEFAULT,
        TASKQUEUE_WEBHOOK_SCHEDULE="0",
        TASKQUEUE_SECRET_KEY=NEXT_MASTER,
    )
    without = changed.model_copy(update={"secret_keys": ()})
    with Receiver() as receiver:
        task_id = await ended(db, receiver.url)
        for wrong in (changed, without):
            async with relaying(wrong, db) as relay:
                for _ in range(2):
                    assert await relay.deliver() == 1
                    await until(lambda: not relay.sending, what="its end")  # awaited in this turn
                    state = await delivery.state_of(db, task_id, owner="us")
                    assert state is not None
                    assert (state.status, state.attempt, state.last_error) == ("pending", 0, "secret_unreadable")
                    assert state.next_at is not None
                    assert await db.fetchval("SELECT next_at > now() + interval '30 s' FROM webhook_delivery")
                    await db.execute("UPDATE webhook_delivery SET next_at = now(), created_at = '2020-01-01'")
        assert receiver.requests == []
        assert await delivery.attempts(db, task_id, owner="us", limit=10) == []
        said = [one for one in caplog.records if one.levelno == logging.ERROR]
        assert [str(secret_id) in one.getMessage() for one in said] == [True, True], "once for each relay"
        assert secret not in caplog.text

        async with relaying(changed.model_copy(update={"secret_keys": settings.secret_keys}), db) as relay:
            assert await relay.deliver() == 1
            await until(lambda: not relay.sending, what="its end")
        assert known_by({"own": secret, "default": DEFAULT}, receiver.requests[0]) == {"own"}


async def test_one_unreadable_secret_holds_up_its_owner_and_nobody_else(settings: Settings, db: Database) -> None:
    await placed(db, "us", master=NEXT_MASTER)
    await placed(db, "us")
    await placed(db, "them")
    with Receiver() as receiver:
        for owner in ("us", "them", ""):
            await ended(db, receiver.url, owner)
        async with relaying(settings, db) as relay:
            assert await relay.deliver() == 3
            await until(lambda: not relay.sending, what="their end")
        assert len(receiver.requests) == 2
    assert await db.fetchval("SELECT owner FROM webhook_delivery WHERE status = 'pending'") == "us"


async def test_nothing_is_claimed_for_an_owner_that_nobody_can_sign_for_until_it_is_probed_again(
    settings: Settings, db: Database
) -> None:
    await placed(db, "us", master=NEXT_MASTER)
    with Receiver() as receiver:
        await ended(db, receiver.url, "us")
        async with relaying(settings, db) as relay:
            assert await relay.deliver() == 1
            await until(lambda: not relay.sending, what="its end")
            for owner in ("a", "us", "us", "we"):
                await ended(db, receiver.url, owner)
            assert await relay.deliver() == 2, "what is before and behind it is not passed over"
            await until(lambda: not relay.sending, what="their end")
            assert len(receiver.requests) == 2
            assert await relay.deliver() == 0
            relay.circuits._unreadable_until["us"] = 0.0  # Its minute is over.
            assert await relay.deliver() == 2, "the probe"
            await until(lambda: not relay.sending, what="its end")
    assert await db.fetchval("SELECT count(*) FROM webhook_delivery WHERE last_error = 'secret_unreadable'") == 3


async def test_a_secret_that_was_moved_to_another_owner_does_not_open(settings: Settings, db: Database) -> None:
    await placed(db, "them")
    await db.execute("UPDATE webhook_secret SET owner = 'us'")
    async with relaying(settings, db) as relay:
        with Receiver() as receiver:
            await ended(db, receiver.url)
            await relay.deliver()
            await until(lambda: not relay.sending, what="its end")
            assert receiver.requests == []


async def test_the_master_key_is_rotated_while_webhooks_go_on(settings: Settings, db: Database) -> None:
    secret, _ = await placed(db)
    steps = (f"{MASTER} {NEXT_MASTER}", f"{NEXT_MASTER} {MASTER}", NEXT_MASTER)
    resealed = []
    with Receiver() as receiver:
        for keys in steps:
            now = settings_for(
                settings.database_url.get_secret_value(),
                settings.redis_url.get_secret_value(),
                TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True,
                TASKQUEUE_WEBHOOK_SECRET=DEFAULT,
                TASKQUEUE_SECRET_KEY=keys,
            )
            async with relaying(now, db) as relay:
                assert known_by({"own": secret}, await sent(relay, receiver)) == {"own"}
                resealed.append([await relay.keyring.reseal(), await relay.keyring.reseal()])
                assert known_by({"own": secret}, await sent(relay, receiver)) == {"own"}
    assert resealed == [[0, 0], [1, 0], [0, 0]]
    assert await delivery.marks(db) == {sealing.Seal([NEXT_MASTER]).mark: 1}


async def test_what_was_claimed_is_handed_back_if_nobody_can_say_what_signs_it(
    settings: Settings, db: Database
) -> None:
    async with relaying(settings, db) as relay:
        await ended(db, "http://127.0.0.1:1/")
        away = Database("postgresql://127.0.0.1:1/x", max_connections=1, application_name="test")
        relay.keyring = keyring.Keyring(away, settings)
        with pytest.raises(errors.DatabaseUnavailable):
            await relay.deliver()
        assert not relay.sending
    row = await db.fetchrow("SELECT status, attempt FROM webhook_delivery")
    assert row is not None
    assert tuple(row) == ("pending", 0)


async def test_a_memory_of_many_owners_is_bounded(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "REMEMBERED_OWNERS", 10)
    ring = keyring.Keyring(db, settings)
    for number in range(50):
        await ring.rings({f"owner-{number}"})
    assert len(ring._rings) <= 12

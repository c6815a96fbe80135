"""No receiver suffers from another: a black hole with thousands of webhooks due, and hundreds of healthy ones."""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest

from app import circuits, delivery, lifecycle
from app import relay as relays
from app.broker import Broker
from app.core import errors, repeating, stopping
from app.core.config import Settings
from app.core.statuses import DeliveryStatus
from app.db import Database
from app.exporter import Exporter
from app.relay import Relay
from app.utils import guard, pinned
from app.utils.webhook import Sender
from tests.conftest import settings_for
from tests.support.database import opened
from tests.support.receiver import Received, Receiver
from tests.support.scraping import sampled
from tests.support.waiting import until

HEALTHY = 300
DEAD = 3000
DEADLINE_SECONDS = 15.0

# Older by an hour, so that whoever goes by age alone takes them first.
_DUE = """
WITH t AS (
    INSERT INTO task (id, name, queue, args, kwargs) SELECT gen_random_uuid(), 'sample.echo', 'default', '[]', '{}'
      FROM generate_series(1, $1::int) RETURNING id
)
INSERT INTO webhook_delivery (id, task_id, owner, event, sequence, url, origin, facts, next_at)
SELECT gen_random_uuid(), id, $4, 'task.started', 1, origin || '/hook', origin, '{}',
       now() - $3::float8 * interval '1 s'
  FROM (SELECT id, replace($2, '#', (row_number() OVER ())::text) AS origin FROM t) AS one
"""


@pytest.fixture
async def db(settings: Settings) -> AsyncIterator[Database]:
    async with opened(settings) as database:
        yield database


@pytest.fixture
async def relay(db: Database, postgres_url: str, redis_url: str) -> AsyncIterator[Relay]:
    """Every name leads to loopback."""
    settings = settings_for(postgres_url, redis_url, TASKQUEUE_WEBHOOK_ALLOW_PRIVATE=True)
    wire = Broker(redis_url, client_name="test")

    def lookup(*_: Any) -> list[str]:
        return ["127.0.0.1"]

    sender = Sender(
        guard.EgressRules.from_settings(settings),
        deadline_seconds=DEADLINE_SECONDS,
        resolver=pinned.Resolver(lookup),
    )
    async with sender:
        one = Relay(settings, db, wire, sender)
        yield one
        await stopping.stop(*one.sending)
    await wire.close()


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """Takes connections, and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        yield int(listening.getsockname()[1])


async def due(db: Database, count: int, origin: str, *, since_seconds: float = 0.0, owner: str = "") -> None:
    await db.execute(_DUE, count, origin, since_seconds, owner)


async def statuses(db: Database, like: str) -> Counter[str]:
    rows = await db.fetch(
        "SELECT status, count(*) AS n FROM webhook_delivery WHERE origin LIKE $1 GROUP BY status", like
    )
    return Counter({row["status"]: row["n"] for row in rows})


async def test_a_black_hole_does_not_keep_healthy_receivers_waiting(relay: Relay, db: Database) -> None:
    with Receiver() as receiver, black_hole() as port:
        await due(db, DEAD, f"http://dead.test:{port}", since_seconds=3600.0)
        await due(db, HEALTHY, f"http://healthy-#.test:{receiver.port}")
        began = time.monotonic()
        loop = asyncio.create_task(repeating.every(relays.TICK_SECONDS, lambda: relays._deliver(relay), "delivering"))

        async def all_delivered() -> bool:
            return (await statuses(db, "http://healthy%"))["delivered"] == HEALTHY

        await until(all_delivered, DEADLINE_SECONDS - 1.0, "the healthy ones, before a single dead one has timed out")
        took = time.monotonic() - began
        dead = await statuses(db, "http://dead%")
        await stopping.stop(loop)
    assert dead == {"delivering": circuits.CAP, "pending": DEAD - circuits.CAP}, took


async def test_a_receiver_that_fails_is_left_alone_and_then_probed(
    relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuits, "OPEN_SECONDS", 0.3)
    answers = iter([500] * circuits.CAP)
    with Receiver(lambda _: next(answers, 200)) as receiver:
        await due(db, 3 * circuits.CAP, receiver.url)
        assert await relay.deliver() == circuits.CAP
        await until(lambda: not relay.sending, what="the failures")
        assert relay.circuits.opened() == 1
        assert await relay.deliver() == 0
        assert sampled("taskqueue_webhook_circuits_open") == 1
        assert (await statuses(db, "%"))["pending"] == 3 * circuits.CAP
        assert await db.fetchval("SELECT sum(attempt) FROM webhook_delivery") == circuits.CAP

        assert await until(relay.deliver, what="the probe") == 1
        await until(lambda: not relay.sending, what="the end of the probe")
        assert await relay.deliver() == circuits.CAP


async def test_many_black_holes_take_no_place_from_a_healthy_receiver(
    relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "SLOW_SECONDS", 0.2)
    holes = relays.DELIVERIES_AT_ONCE // circuits.CAP + 3
    with Receiver() as receiver, black_hole() as port:
        for number in range(holes):
            await due(db, circuits.CAP, f"http://dead-{number}.test:{port}", since_seconds=3600.0)
        loop = asyncio.create_task(repeating.every(relays.TICK_SECONDS, lambda: relays._deliver(relay), "delivering"))
        await until(
            lambda: len(relay.sending) == holes * circuits.CAP, what="a POST to each, on all that they may have"
        )
        await due(db, HEALTHY, f"http://healthy-#.test:{receiver.port}")

        async def all_delivered() -> bool:
            return (await statuses(db, "http://healthy%"))["delivered"] == HEALTHY

        await until(all_delivered, DEADLINE_SECONDS - 3.0, "the healthy ones, before a single dead one has timed out")
        assert len(relay.sending) == holes * circuits.CAP
        await stopping.stop(loop)


async def test_owners_with_many_black_holes_leave_places_for_all_others(
    relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(relays, "DELIVERIES_AT_MOST", 40)
    with Receiver() as receiver, black_hole() as port:
        for owner in ("ann", "bob"):
            await due(db, 60, f"http://dead-#.test:{port}", since_seconds=3600.0, owner=owner)
            while await relay.deliver() or relay.walked_to != delivery.BEGINNING:
                pass
        held = Counter(one.claimed.receiver.owner for one in relay.sending.values())
        assert (held["ann"], held["bob"]) == (20, 10)
        await due(db, 20, f"http://healthy-#.test:{receiver.port}", owner="cid")
        loop = asyncio.create_task(repeating.every(relays.TICK_SECONDS, lambda: relays._deliver(relay), "delivering"))

        async def all_delivered() -> bool:
            return (await statuses(db, "http://healthy%"))["delivered"] == 20

        await until(all_delivered, DEADLINE_SECONDS - 3.0, "those of a third owner, while all others wait")
        await stopping.stop(loop)


def test_what_is_slow_has_places_of_its_own_and_not_without_end(relay: Relay) -> None:
    def sending(quick: int, slow: int) -> int:
        keys: Any = iter(range(quick + slow))
        claimed: Any = None
        times = [100.0 - relays.SLOW_SECONDS] * slow + [99.9] * quick
        relay.sending = {next(keys): relays.Sending(claimed, since) for since in times}
        return relay.room(100.0)

    most = relays.DELIVERIES_AT_MOST
    table = [sending(0, 0), sending(30, 0), sending(100, 0), sending(30, 300), sending(0, most - 5), sending(5, most)]
    assert table == [100, 70, 0, 70, 5, -5]
    relay.sending = {}


async def test_a_search_among_many_receivers_waits_for_no_black_hole(
    relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.outbox, "RECEIVERS_AT_ONCE", 2)
    monkeypatch.setattr(relays, "TICK_SECONDS", 5.0)
    with black_hole() as port:
        await due(db, 1, f"http://a.test:{port}")
        await due(db, 40, "http://later-#.test", since_seconds=-3600.0)
        await due(db, 1, f"http://z.test:{port}")
        loop = asyncio.create_task(relays._deliver(relay))
        await until(lambda: len(relay.sending) == 2, 3.0, "both, within one walk")
        await stopping.stop(loop)


async def test_the_webhooks_that_are_due_are_exported_as_long_as_they_can_be_counted(
    relay: Relay, db: Database
) -> None:
    def exported() -> float | None:
        return sampled("taskqueue_webhook_due")

    await due(db, 3, "https://example.com")
    await due(db, 4, "https://example.com", since_seconds=-60.0)
    exporter = Exporter(relay.settings, db, relay.broker, relay.circuits)
    await exporter.counts()
    assert exported() == 3
    closed = Database("postgresql://127.0.0.1:1/none", max_connections=1, application_name="test")
    with pytest.raises(errors.DatabaseUnavailable):
        await Exporter(relay.settings, closed, relay.broker, relay.circuits).counts()
    assert exported() is None
    await closed.close()


async def test_a_relay_that_stops_hands_back_what_is_on_its_way(relay: Relay, db: Database) -> None:
    with black_hole() as port:
        await due(db, 7, f"http://dead.test:{port}")
        assert await relay.deliver() == 7
        assert await relay.hand_back() == 7
    assert relay.sending == {}
    rows = await db.fetch("SELECT status, attempt, token, lease_until FROM webhook_delivery")
    assert {tuple(row) for row in rows} == {("pending", 0, None, None)}
    assert len(await delivery.claim_due(db, limit=10, lease_seconds=30.0)) == 7


async def test_who_stops_a_relay_can_wait_for_its_claim(relay: Relay, db: Database) -> None:
    await due(db, 1, "http://healthy.test")
    async with relay.claiming:
        delivering = asyncio.create_task(relay.deliver())
        await asyncio.wait({delivering}, timeout=0.3)
        await stopping.stop(delivering)
    assert await statuses(db, "%") == {"pending": 1}


async def test_what_waits_too_long_for_a_dead_receiver_is_given_up_and_can_be_sent_again(
    relay: Relay, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relays, "GIVE_UP_BATCH", 3)
    patience = delivery.patience_seconds(relay.settings.webhook_schedule)
    dead, other = "https://dead.example", "https://other.example"
    for origin in (dead, other):
        await due(db, 5, origin, since_seconds=patience + 60.0)
    await due(db, 2, dead, since_seconds=60.0)
    await due(db, 1, dead, since_seconds=-60.0)
    await db.execute("UPDATE webhook_delivery SET scheduled_at = next_at")
    # It is old, but its next attempt is yet to come.
    await db.execute("UPDATE webhook_delivery SET scheduled_at = now() - interval '1 year' WHERE next_at > now()")

    assert await relay.give_up() == 0, "no circuit is open"
    known = circuits.Circuit(failures=40, open_until=0.0, open_seconds=120.0, changed_at=0.0, open_since=0.0)
    relay.circuits._known[delivery.Receiver("", dead)] = known
    relay.circuits._known[delivery.Receiver("ann", other)] = known
    monkeypatch.setattr(circuits, "HOPELESS_SECONDS", 0.0)
    assert [await relay.give_up() for _ in range(3)] == [3, 2, 0]

    assert await statuses(db, dead) == {"exhausted": 5, "pending": 3}
    assert await statuses(db, other) == {"pending": 5}
    rows = await db.fetch("SELECT task_id, attempt, last_error FROM webhook_delivery WHERE status = 'exhausted'")
    assert {(row["attempt"], row["last_error"]) for row in rows} == {(0, delivery.CIRCUIT_OPEN)}

    assert await delivery.redeliver(db, rows[0]["task_id"]) is delivery.Redelivery.DUE
    assert await relay.give_up() == 0, "its schedule has begun anew"
    assert await statuses(db, dead) == {"exhausted": 4, "pending": 4}


async def test_the_age_of_a_delivery_is_that_of_its_schedule(db: Database) -> None:
    await due(db, 1, "https://example.com")
    await db.execute(
        "UPDATE webhook_delivery SET (created_at, scheduled_at, status) = (now() - interval '9 days',"
        " now() - interval '9 days', 'exhausted')"
    )
    [row] = await db.fetch("SELECT task_id FROM webhook_delivery")
    await delivery.redeliver(db, row["task_id"])
    [claimed] = await delivery.claim_due(db, limit=1, lease_seconds=30.0)
    assert 0 <= claimed.age_seconds < 60


async def test_the_search_goes_from_receiver_to_receiver_and_begins_again(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.outbox, "RECEIVERS_AT_ONCE", 4)
    for name in "abcdefghij":
        await due(db, 5, f"https://{name}.example")
    await due(db, 3, "https://blocked.example")
    rooms = {delivery.Receiver("", "https://blocked.example"): 0}

    seen: list[list[str]] = []
    after = delivery.BEGINNING
    for _ in range(5):
        found = await delivery.claim_by_receiver(db, limit=6, lease_seconds=30.0, room=2, rooms=rooms, after=after)
        seen.append(sorted({one.receiver.origin.removeprefix("https://")[0] for one in found.claimed}))
        after = found.walked_to
    # Two of each: of the first three; `b` again would be `blocked`, which has no room.
    assert seen[0] == ["a", "b", "c"]
    assert [name for names in seen[:4] for name in names] == list("abcdefghij")
    assert seen[4] == ["a", "b", "c"]


async def test_rows_of_an_earlier_release_have_no_origin_and_are_sent(db: Database) -> None:
    await due(db, 2, "https://example.com")
    await db.execute("UPDATE webhook_delivery SET origin = NULL")
    found = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=1)
    assert [one.receiver for one in found.claimed] == [delivery.BEGINNING] * 2


async def test_the_receiver_of_one_owner_is_not_that_of_another(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery.outbox, "RECEIVERS_AT_ONCE", 2)
    for owner in ("", "ann", "bob", "cid"):
        await due(db, 3, "https://example.com", owner=owner)
    rooms = {delivery.Receiver("ann", "https://example.com"): 0}

    first = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, rooms=rooms)
    second = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, after=first.walked_to)
    assert Counter(one.receiver.owner for one in first.claimed) == {"": 2}
    assert Counter(one.receiver.owner for one in second.claimed) == {"bob": 2, "cid": 2}
    # That `owner` of a delivery is what its receiver is known by; whose secrets sign it, its task says.
    assert {one.owner for one in first.claimed + second.claimed} == {""}


async def test_an_owner_is_passed_over_in_one_step_however_many_receivers_it_has(
    db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.outbox, "RECEIVERS_AT_ONCE", 3)
    for owner, receivers in (("ann", 1), ("bob", 50), ("cid", 1)):
        await due(db, receivers, "https://#.example", owner=owner)
    found = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, without=["bob"])
    assert [one.receiver.owner for one in found.claimed] == ["ann", "cid"]
    first = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, without=["", "bob"])
    assert (first.claimed, first.walked_to) == ([], delivery.BEGINNING)
    await due(db, 50, "https://#.example", owner="a")
    monkeypatch.setattr(delivery.outbox, "RECEIVERS_AT_ONCE", 1)
    passed = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, without=["a", "bob"])
    assert (passed.claimed, passed.walked_to.owner) == ([], "a")
    after = passed.walked_to
    found = await delivery.claim_by_receiver(db, limit=10, lease_seconds=30.0, room=2, without=["a"], after=after)
    assert {one.receiver.owner for one in found.claimed} == {"bob"}


async def test_a_claim_takes_no_longer_for_the_thousands_of_receivers_that_have_no_room(db: Database) -> None:
    await due(db, delivery.outbox.RECEIVERS_AT_ONCE, "https://#.example", since_seconds=-3600.0)
    shut = {delivery.Receiver("", f"https://{number}.example"): 0 for number in range(30_000)}

    async def quickest(rooms: dict[delivery.Receiver, int]) -> float:
        took = []
        for _ in range(3):
            began = time.monotonic()
            assert (
                await delivery.claim_by_receiver(db, limit=1, lease_seconds=30.0, room=1, rooms=rooms)
            ).claimed == []
            took.append(time.monotonic() - began)
        return min(took)

    with_none, with_many = await quickest({}), await quickest(shut)
    # Compared one by one they would take two seconds; to tell of them takes a tenth of one.
    assert with_many < 10 * with_none, (with_none, with_many)


async def test_after_a_week_s_outage_one_call_and_the_line_of_events_bring_everything(
    relay: Relay, db: Database
) -> None:
    """The clock is the rows': what was due at a time is made due by setting their times back."""
    week = 7 * 86_400
    answers = {"down": 503}
    heard: list[str] = []

    def answer(received: Received) -> int:
        if answers["down"] == 200:
            heard.append(received.headers["webhook-id"])
        return answers["down"]

    with Receiver(answer) as receiver:
        tasks = 40
        await due(db, tasks, receiver.url)
        began = await lifecycle.clock(db)
        for _ in range(len(relay.settings.webhook_schedule)):
            relay.circuits = circuits.Circuits()  # A probe came through whenever it was time.
            while await relay.deliver():
                await until(lambda: not relay.sending, what="the refusals")
                relay.circuits = circuits.Circuits()
            await db.execute("UPDATE webhook_delivery SET next_at = now() WHERE status = 'pending'")
        assert await statuses(db, "%") == {"exhausted": tasks}
        await db.execute("UPDATE webhook_delivery SET created_at = created_at - $1 * interval '1 s'", float(week))

        answers["down"] = 200
        step = await delivery.redeliver_batch(
            db,
            since=began - timedelta(seconds=week + 60),
            until=None,
            statuses=(DeliveryStatus.EXHAUSTED, DeliveryStatus.PENDING),
            after=None,
            limit=1000,
        )
        assert (step.redelivered, step.end) == (tasks, None)
        while await relay.deliver():
            await until(lambda: not relay.sending, what="the deliveries")
    assert await statuses(db, "%") == {"delivered": tasks}
    ids = {str(row["id"]) for row in await db.fetch("SELECT id FROM webhook_delivery")}
    assert Counter(heard) == dict.fromkeys(ids, 1), "each once, under the id that it had a week ago"

    await delivery.number(db, limit=1000)
    assert {str(one.id) for one in await delivery.events(db, after=0, limit=1000)} == ids

"""Relays that race, receivers that don't answer, and relays that go in the middle of a POST."""

import signal
import time
from collections import Counter
from collections.abc import Callable

import psutil
import pytest

from app import broker
from app.circuits import CAP
from app.relay import DELIVERY_LEASE_SECONDS
from tests.faults.audit import Figures
from tests.faults.stack import GRACE_SECONDS, LEASE_SECONDS, QUEUE, Stack
from tests.support.proxy import proxied
from tests.support.receiver import Answer
from tests.support.service import Process
from tests.support.waiting import lasting, wait_until

Report = Callable[[Figures], None]

LOST_SECONDS = 15.0
MANY = 300

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_a_receiver_that_is_down_then_fails_then_is_slow(running: Stack, report: Report) -> None:
    with proxied(running.receiver.url) as network:
        network.cut()
        tasks = running.submit_many(6, "faults.work", 0.0, webhook=False, webhook_url=f"{network.url}/hook")
        running.reach(tasks, "SUCCESS")
        wait_until(lambda: attempts(running) >= 12, 20, "two attempts for each")
        running.answer = 500
        network.restore()
        wait_until(lambda: len(running.receiver.requests) >= 6, 20, "a POST for each")
        assert set(running.statuses(tasks).values()) == {"SUCCESS"}
        running.answer = Answer(status=200, delay_seconds=3.0)
        began = time.time()
        wait_until(lambda: delivered(running) == 6, 40, "the delivery of each")
        running.answer = 200
        recovery = time.time() - began
        # 5 s stand in the schedule between two attempts, 3 s take the receiver, and 20 % is jitter.
        report(running.finish("receiver down, then 500, then slow", recovery_seconds=recovery, allowed_seconds=15))


@pytest.mark.slow
def test_relays_that_go_in_the_middle_of_a_post(running: Stack, report: Report) -> None:
    running.answer = Answer(status=200, delay_seconds=14.0)
    tasks = running.submit_many(2 * CAP, "faults.work", 0.0)
    wait_until(lambda: len(running.receiver.requests) == 2 * CAP, 20, "a POST for each")
    killed, stopped = running.relays
    assert posting(running, killed)
    assert posting(running, stopped), "one relay had all of them"
    running.kill(killed)
    running.expect_end(stopped)
    stopped.signal(signal.SIGTERM)
    stopped.wait(GRACE_SECONDS)
    gone = time.time()
    running.answer = 200
    running.relays = [running.start_relay(), running.start_relay()]
    running.wait_ready()
    assert set(running.statuses(tasks).values()) == {"SUCCESS"}
    wait_until(lambda: delivered(running) == 2 * CAP, DELIVERY_LEASE_SECONDS + 20, "the delivery of each")
    recovery = time.time() - gone
    posts = Counter(one.webhook_id for one in running.posts())
    assert len(posts) == 2 * CAP
    assert set(posts.values()) == {2}
    report(
        running.finish(
            "relays killed and stopped during their POSTs",
            recovery_seconds=recovery,
            allowed_seconds=DELIVERY_LEASE_SECONDS + 5,
        )
    )


def test_a_relay_that_is_stopped_finishes_its_posts(running: Stack, report: Report) -> None:
    running.answer = Answer(status=200, delay_seconds=1.5)
    running.submit_many(20, "faults.work", 0.0)
    wait_until(lambda: len(running.receiver.requests) == 20, 20, "a POST for each")
    began = time.time()
    for relay in running.relays:
        running.expect_end(relay)
        relay.signal(signal.SIGTERM)
    for relay in running.relays:
        assert relay.wait(GRACE_SECONDS) == 0
    recovery = time.time() - began
    assert delivered(running) == 20
    running.answer = 200
    running.relays = [running.start_relay()]
    running.wait_ready()
    assert len(running.receiver.requests) == 20
    report(
        running.finish("relays stopped during their POSTs", recovery_seconds=recovery, allowed_seconds=GRACE_SECONDS)
    )


@pytest.mark.slow
def test_two_relays_do_everything_once(running: Stack, report: Report) -> None:
    for worker in running.workers:
        running.kill(worker)
    # Due at the same moment: each is pushed once.
    eta = time.time() + 12
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(eta))
    tasks = running.submit_many(MANY, "faults.work", 0.0, eta=moment)
    wait_until(lambda: running.depth() >= MANY, 40, "a message for each")
    lasting(3)
    assert pushed(running) == Counter(tasks), "due rows were not pushed once each"
    # Every message lost: each is pushed once more.
    with running.bell() as client:
        client.flushall()
    lost = time.time()
    wait_until(lambda: running.depth() >= MANY, 30, "the messages again")
    recovery = time.time() - lost
    lasting(3)
    assert pushed(running) == Counter(tasks), "lost messages were not pushed once each"
    # Every lease expired: each is reaped once.
    with running.bell() as client:
        client.flushall()
    running.execute(
        "UPDATE task SET status = 'STARTED', attempt = 1, token = gen_random_uuid(), started_at = now(),"
        f" lease_until = now() + interval '{LEASE_SECONDS} s', worker = 'nobody/1'"
    )
    running.reach(tasks, "RETRY")
    wait_until(lambda: running.depth() >= MANY, 30, "the messages of the second attempts")
    lasting(3)
    assert pushed(running) == Counter(tasks), "reaped rows were not pushed once each"
    assert Counter(one.status for one in running.steps()) == {"PENDING": MANY, "STARTED": MANY, "RETRY": MANY}
    [row] = running.fetch("SELECT count(*) AS n FROM task WHERE (losses, crashes) = (1, 0)")
    assert row["n"] == MANY
    # Every task ended: each is told of once.
    running.workers = [running.start_worker(), running.start_worker()]
    running.reach(tasks, "SUCCESS", seconds=60)
    wait_until(lambda: delivered(running) == MANY, 30, "the delivery of each")
    assert set(Counter(one.webhook_id for one in running.posts()).values()) == {1}
    assert len(running.receiver.requests) == MANY
    report(
        running.finish(
            f"two relays race over {MANY} rows, four times",
            recovery_seconds=recovery,
            allowed_seconds=LOST_SECONDS,
            workers="killed",
        )
    )


def attempts(running: Stack) -> int:
    """How many POSTs were tried so far."""
    return int(running.fetch("SELECT COALESCE(sum(attempt), 0) AS n FROM webhook_delivery")[0]["n"])


def delivered(running: Stack) -> int:
    """How many webhooks were delivered, by their rows."""
    return int(running.fetch("SELECT count(*) AS n FROM webhook_delivery WHERE status = 'delivered'")[0]["n"])


def posting(running: Stack, relay: Process) -> int:
    """How many connections a relay has to the receiver."""
    connections = psutil.Process(relay.pid).net_connections("tcp")
    return sum(one.status == "ESTABLISHED" and one.raddr.port == running.receiver.port for one in connections)


def pushed(running: Stack) -> Counter[str]:
    """The tasks that the messages in the queue name."""
    with running.bell() as client:
        return Counter(str(broker.decode(raw).task_id) for raw in client.lrange(QUEUE, 0, -1))

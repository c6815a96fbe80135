"""The transport against a real Redis: what is taken at once, in which order, and what is put back."""

import time
from collections.abc import Callable, Iterator
from queue import Empty
from uuid import UUID

import pytest
import redis
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer

from app import broker
from app.broker import Received
from app.worker import bundles
from app.worker.bundles import Bundle
from app.worker.transport import Channel, Message
from tests.support.waiting import lasting

MOST = 10


def message(queue: str, number: int, name: str = "sample.echo") -> bytes:
    return broker.encode(Received(task_id=UUID(int=number), name=name, attempt=0, position=number), queue)


class Worker:
    """What kombu does in a worker's main process."""

    def __init__(self, url: str, queues: tuple[str, ...]) -> None:
        options = {"ack_emulation": False, "priority_steps": [0]}
        self.connection = Connection(url, transport="app.worker.transport:Transport", transport_options=options)
        self.channel: Channel = self.connection.channel()
        self.channel.basic_qos(0, 100, False)
        self.bundles: list[Bundle] = []
        consumer = Consumer(
            self.channel, [Queue(name, no_declare=True) for name in queues], auto_declare=False, on_message=self._take
        )
        consumer.consume()
        # As if that many tasks had taken no time.
        self.channel.pace.ended(MOST // 2, 0.0, time.monotonic())

    def _take(self, one: Message) -> None:
        self.bundles.append(one.bundle)

    def take(self) -> list[list[int]]:
        """What is taken at once: the positions in each bundle."""
        self.bundles.clear()
        self.connection.drain_events(timeout=5)
        return [[one.received.position for one in bundle.messages] for bundle in self.bundles]


@pytest.fixture
def plain(redis_url: str) -> Iterator["redis.Redis"]:
    """The server, empty."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def worker(redis_url: str, plain: "redis.Redis", monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Worker]]:
    """Make a worker that takes up to `MOST` messages at once."""
    del plain
    monkeypatch.setattr(Channel, "together", frozenset({"sample.echo"}))
    bundles.share()
    made: list[Worker] = []

    def make(*queues: str) -> Worker:
        made.append(Worker(redis_url, queues))
        return made[-1]

    yield make
    for one in made:
        one.connection.close()
    bundles._cells = None


def test_messages_are_taken_in_their_order_and_in_turns_from_their_queues(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    for number in range(30):
        plain.lpush("a", message("a", number))
        plain.lpush("b", message("b", 100 + number))
    plain.lpush("c", message("c", 200))

    [taken] = worker("a", "b", "c").take()
    of_a, of_b = [one for one in taken if one < 100], [one for one in taken if 100 <= one < 200]
    assert of_a == list(range(len(of_a)))
    assert of_b == list(range(100, 100 + len(of_b)))
    assert abs(len(of_a) - len(of_b)) <= 1
    assert 200 in taken
    assert len(taken) == len(of_a) + len(of_b) + 1 <= MOST
    assert (plain.llen("a"), plain.llen("b"), plain.llen("c")) == (30 - len(of_a), 30 - len(of_b), 0)
    assert taken[:3] in ([0, 100, 200], [100, 200, 0], [200, 0, 100]), "in turns"


def test_a_queue_alone_is_taken_from_as_long_as_there_is_something(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    for number in range(MOST + 3):
        plain.lpush("a", message("a", number))
    one = worker("a")

    assert one.take() == [list(range(MOST))]
    assert one.take() == [[MOST, MOST + 1, MOST + 2]]


def test_a_queue_that_had_no_other_is_not_asked_for_more_each_time(
    worker: Callable[..., Worker], plain: "redis.Redis", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "EMPTY_SECONDS", 60.0)
    one = worker("a")
    plain.config_resetstat()
    for number in range(5):
        plain.lpush("a", message("a", number))
        assert one.take() == [[number]]

    asked = plain.info("commandstats")["cmdstat_rpop"]
    assert asked["calls"] == 1


def test_tasks_that_took_long_are_taken_one_by_one(worker: Callable[..., Worker], plain: "redis.Redis") -> None:
    for number in range(4):
        plain.lpush("a", message("a", number))
    one = worker("a")
    one.channel.pace.ended(1, bundles.AHEAD_SECONDS, time.monotonic())

    assert (one.take(), one.take(), plain.llen("a")) == ([[0]], [[1]], 2)


def test_what_is_not_ours_and_what_may_not_go_along_leaves_the_others_together(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    pushed = [
        message("a", 0),
        b"[]",
        message("a", 1, name="somebody.elses"),
        b'{"headers": {}}',
        message("a", 2),
        b"\xff\x00",
        message("a", 3).replace(b'"version":1', b'"version":99'),
        message("a", 4),
    ]
    for raw in pushed:
        plain.lpush("a", raw)

    assert worker("a").take() == [[1], [0, 2, 4]]
    assert plain.llen("a") == 0


def test_a_key_that_is_no_list_does_not_keep_the_others_from_being_taken(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    plain.set("b", "a text")
    for number in range(8):
        plain.lpush("a", message("a", number))
    one = worker("a", "b")

    assert one.take() == [[0, 1, 2, 3, 4]]
    plain.delete("b")
    plain.lpush("b", message("b", 100))
    seen: set[int] = set()
    while len(seen) < 4:
        with_others = [each for bundle in one.take() for each in bundle]
        seen |= set(with_others)
    assert seen == {5, 6, 7, 100}


def test_what_no_child_has_begun_goes_back_as_it_was_to_where_it_was(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    for number in range(MOST + 2):
        plain.lpush("a", message("a", number))
        plain.lpush("b", message("b", 100 + number))
    before = {queue: plain.lrange(queue, 0, -1) for queue in ("a", "b")}
    one = worker("a", "b")
    one.take()
    cell, offers = one.bundles[0].job()
    assert cell is not None
    assert bundles.begin(cell, 1)

    assert one.bundles[0].withdraw() == MOST - 1
    begun = offers[0].queue
    assert plain.lrange(begun, 0, -1) == before[begun][:-1]
    [other] = {"a", "b"} - {begun}
    assert plain.lrange(other, 0, -1) == before[other]
    assert not bundles.begin(cell, 2)


def test_a_channel_that_closes_puts_back_what_waits_and_nothing_that_runs(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    for number in range(4):
        plain.lpush("a", message("a", number))
    before = plain.lrange("a", 0, -1)
    one = worker("a")
    one.channel.pace.hold(time.monotonic(), 60.0)
    one.take()
    [running] = one.bundles
    running.accepted = True
    one.channel.pace = type(one.channel.pace)()
    one.channel.pace.ended(MOST, 0.0, time.monotonic())
    one.take()
    assert plain.llen("a") == 0

    one.connection.close()
    assert plain.lrange("a", 0, -1) == before[:-1]


def message_of(worker: Worker) -> bytes:
    """The one message that a worker was given."""
    [bundle] = worker.bundles
    [taken] = bundle.messages
    return taken.raw


def test_a_message_that_arrives_while_the_channel_closes_is_put_back(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    one = worker("a")
    with pytest.raises((Empty, TimeoutError)):
        one.connection.drain_events(timeout=0.05)  # now it asks
    for number in range(3):
        plain.lpush("a", message("a", number))
    waiting = plain.lrange("a", 0, -1)
    lasting(0.05)
    one.connection.close()

    assert plain.lrange("a", 0, -1) == [*waiting, message_of(one)]


def test_a_connection_lost_between_the_first_and_the_others_costs_none(
    worker: Callable[..., Worker], plain: "redis.Redis"
) -> None:
    one = worker("a")
    with pytest.raises((Empty, TimeoutError)):
        one.connection.drain_events(timeout=0.05)
    plain.lpush("a", message("a", 0), message("a", 1))
    lasting(0.05)
    plain.client_kill_filter(_type="normal", skipme=True)

    assert one.take() == [[0]]
    assert plain.llen("a") == 1

"""Kombu's Redis transport, with a door: what is not a message of ours is dropped before Celery sees it.

Whoever writes to Redis writes to workers. Stock kombu ends the worker on a JSON
list, reconnects on an object without properties, and follows whatever a message
says: callbacks, ETAs, other bodies. Here a message is read, only what it is
believed for is kept (`broker.decode`), and Celery gets an envelope made anew.

While tasks are short, several messages are taken at once (`worker.bundles`).
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from queue import Empty
from typing import Any, ClassVar

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis, virtual

from app import broker
from app.core import errors
from app.worker import bundles
from app.worker.bundles import Bundle, Pace, Taken

PAUSE_SECONDS = 1.0
"""How long Redis is left alone after it refused to hand out messages."""

RECONNECT_SECONDS = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}
"""The waits between attempts to connect. Celery's own grow to half a minute, which an outage would cost once more."""

log = logging.getLogger(__name__)


class Message(virtual.Message):
    """A bundle, as Celery sees it: a message like its first."""

    def __init__(self, payload: Bundle, channel: Any = None, **options: Any) -> None:
        super().__init__(payload.envelope(), channel, **options)
        self.bundle = payload


class Channel(redis.Channel):
    """A channel that survives what is not JSON, and a Redis that refuses.

    It asks for messages and puts some back, and writes nothing else: a Redis that is full refuses every write.
    """

    Message = Message
    refused = False
    resumes_at = 0.0
    together: ClassVar[AbstractSet[str]] = frozenset()
    """The names of tasks whose messages may go to a child together with others."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.pace = Pace()
        super().__init__(*args, **options)

    def pause(self, seconds: float) -> None:
        """Ask for no message for so long, so that others are served first."""
        now = time.monotonic()
        self.resumes_at = now + seconds
        self.pace.hold(now, bundles.HOLD_SECONDS)

    def _brpop_start(self, timeout: float | None = None) -> None:
        if time.monotonic() >= self.resumes_at:
            super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> bool:
        """Take a popped message as it is. Kombu's reader makes objects of it, which any message can have fail."""
        try:
            popped = self.client.parse_response(self.client.connection, "BRPOP", **options)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise
        except self.ResponseError as refusal:
            # A key of another type, a replica, a rule: stock Celery ends the worker, and with it what runs.
            if not self.refused:
                log.error("Redis hands out no messages: %s", refusal)  # noqa: TRY400  # what it says is all there is
            self.refused = True
            self.pause(PAUSE_SECONDS)
            # Behind the same name there may be another server by now, as after a failover.
            self.client.connection.disconnect()
            return True
        finally:
            self._in_poll = False
            self._flush_brpop_reauth()
        if self.refused:
            log.info("Redis hands out messages again")
            self.refused = False
        if not popped:
            raise Empty
        queue, raw = popped
        self._queue_cycle.rotate(queue.decode())
        self._take([(queue.decode(), raw), *self._more()])
        return True

    def _more(self) -> Sequence[tuple[str, bytes]]:
        """What may go along with a message that was popped."""
        now = time.monotonic()
        # While the channel closes, a message is put back as it comes.
        count = 0 if self._closing or not bundles.possible() else self.pace.most(now) - 1
        if not count:
            return ()
        more = list(self._pop(count))
        if not more:
            # To ask each time would cost where there is little to do.
            self.pace.hold(now, bundles.EMPTY_SECONDS)
        return more

    def _pop(self, count: int) -> Iterable[tuple[str, bytes]]:
        """So many messages that are there already, as many of each queue and in turns."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        shares = [(queue, (count - place + len(queues) - 1) // len(queues)) for place, queue in enumerate(queues)]
        wanted = [(queue, share) for queue, share in shares if share]
        found: list[Sequence[bytes]] = []
        try:
            for queue, share in wanted:
                self.client.connection.send_command("RPOP", queue, share)
            found.extend(self._popped() for _ in wanted)
        except self.connection_errors:
            # What was popped is run all the same. The next to be sent finds that the connection is gone.
            self.client.connection.disconnect()
        popped = [[(queue, raw) for raw in raws] for (queue, _), raws in zip(wanted, found, strict=False)]
        for turn in itertools.zip_longest(*popped):
            for one in turn:
                if one is not None:
                    self._queue_cycle.rotate(one[0])
                    yield one

    def _popped(self) -> Sequence[bytes]:
        found: Sequence[bytes] | None = None
        # A key of another type, or a refusal. Asked for as the first, the queue is spoken of.
        with contextlib.suppress(self.ResponseError):
            found = self.client.parse_response(self.client.connection, "RPOP")
        return found or ()

    def _take(self, popped: Iterable[tuple[str, bytes]]) -> None:
        """Hand on what is a message of ours: as one bundle what may go into one, and the rest alone."""
        together: list[Taken] = []
        for queue, raw in popped:
            try:
                taken = Taken(queue, raw, broker.decode(raw))
            except errors.EnvelopeError as unread:
                # Nothing is lost: if there is a row behind it, the search for lost messages finds that.
                log.warning("dropped a message on %s: %s", queue, unread)
                continue
            if taken.received.name in self.together:
                together.append(taken)
            else:
                self._hand_on([taken])
        if together:
            self._hand_on(together)

    def _hand_on(self, messages: Sequence[Taken]) -> None:
        bundle = Bundle(messages, self.pace, self._put_back)
        self.connection._deliver(bundle, messages[0].queue)  # noqa: SLF001  # as kombu's own channel does

    def _put_back(self, messages: Sequence[Taken]) -> None:
        """Put messages back where they were taken from, as they were, the first of them to be taken first."""
        try:
            with self.conn_or_acquire() as client:
                for queue in dict.fromkeys(one.queue for one in messages):
                    client.rpush(queue, *[one.raw for one in reversed(messages) if one.queue == queue])
        except (*self.connection_errors, self.ResponseError):
            log.info("%d messages were not put back; the search for lost messages finds their tasks", len(messages))

    def _size(self, queue: str) -> int:
        """Not asked: Celery wants it at its start only, and does nothing with it."""
        del queue
        return 0

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Not written: messages are pushed to a queue by its name, and put back so."""

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """Put back what no child has begun. Kombu would write all of it anew, and what runs once more."""
        del leftmost
        message.bundle.withdraw()


class Transport(redis.Transport):
    """Redis, for messages of this service alone."""

    Channel = Channel


class EagerConnection(Connection):
    """A connection that is back soon after Redis is."""

    meanwhile: ClassVar[list[Callable[[], None]]] = []
    """What the consumer does each second or two while Redis is away: Celery's timer stands still then."""

    def ensure_connection(self, *args: Any, callback: Callable[[], None] | None = None, **options: Any) -> Any:
        """As kombu's, with shorter waits between attempts. The consumer is who gives a callback."""
        if callback is not None:
            options["callback"] = lambda: [each() for each in (*self.meanwhile, callback)]
        return super().ensure_connection(*args, **{**RECONNECT_SECONDS, **options})


class Wire(AMQP):  # type: ignore[misc]  # Celery ships no types
    """How this Celery app connects."""

    Connection = EagerConnection

"""Kombu's Redis transport, with a door: what is not a message of ours is dropped before Celery sees it.

Whoever writes to Redis writes to workers. Stock kombu ends the worker on a JSON
list, reconnects on an object without properties, and follows whatever a message
says: callbacks, ETAs, other bodies. Here a message is read, only what it is
believed for is kept (`broker.decode`), and Celery gets an envelope made anew.
"""

import logging
import time
from collections.abc import Callable
from queue import Empty
from typing import Any, ClassVar

from celery.app.amqp import AMQP
from kombu.connection import Connection
from kombu.transport import redis

from app import broker
from app.core import errors

PAUSE_SECONDS = 1.0
"""How long Redis is left alone after it refused to hand out messages."""

RECONNECT_SECONDS = {"interval_start": 0.5, "interval_step": 0.5, "interval_max": 2.0}
"""The waits between attempts to connect. Celery's own grow to half a minute, which an outage would cost once more."""

log = logging.getLogger(__name__)


class Channel(redis.Channel):
    """A channel that survives what is not JSON, and a Redis that refuses.

    It asks for messages and puts some back, and writes nothing else: a Redis that is full refuses every write.
    """

    refused = False
    resumes_at = 0.0

    def pause(self, seconds: float) -> None:
        """Ask for no message for so long, so that others are served first."""
        self.resumes_at = time.monotonic() + seconds

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
        self.connection._deliver(raw, queue.decode())  # noqa: SLF001  # as kombu's own channel does
        return True

    def _size(self, queue: str) -> int:
        """Not asked: Celery wants it at its start only, and does nothing with it."""
        del queue
        return 0

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """Not written: messages are pushed to a queue by its name, and put back so."""

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """Put back a message that no child took. If Redis is away, kombu would write it to a file and leave it."""
        try:
            super()._restore(message, leftmost)
        except (*self.connection_errors, self.ResponseError):
            log.info("a message was not put back; its task is found by the search for lost messages")


class Transport(redis.Transport):
    """Redis, for messages of this service alone."""

    Channel = Channel

    def _deliver(self, message: bytes, queue: str) -> None:
        try:
            received = broker.decode(message)
        except errors.EnvelopeError as unread:
            # Nothing is lost: if there is a row behind it, the search for lost messages finds that.
            log.warning("dropped a message on %s: %s", queue, unread)
            return
        super()._deliver(broker.envelope(received, queue), queue)


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

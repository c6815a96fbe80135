"""Kombu's Redis transport, with a door: what is not a message of ours is dropped before Celery sees it.

Whoever writes to Redis writes to workers. Stock kombu ends the worker on a JSON
list, reconnects on an object without properties, and follows whatever a message
says: callbacks, ETAs, other bodies. Here a message is read, only what it is
believed for is kept (`broker.read`), and Celery gets an envelope made anew.
"""

import logging
from typing import Any

from kombu.transport import redis

from app import broker
from app.core import errors

log = logging.getLogger(__name__)


class Channel(redis.Channel):
    """A channel that survives what is not JSON."""

    def _brpop_read(self, **options: Any) -> Any:
        self.connection.parsed = False
        try:
            return super()._brpop_read(**options)
        except (ValueError, RecursionError):
            if self.connection.parsed:
                raise
            log.warning("dropped a message that is not JSON")
            return True

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """Put back a message that no child took. If Redis is away, kombu would write it to a file and leave it."""
        try:
            super()._restore(message, leftmost)
        except self.connection_errors:
            log.info("a message was not put back; its task is found by the search for lost messages")


class Transport(redis.Transport):
    """Redis, for messages of this service alone."""

    Channel = Channel
    parsed = False

    def _deliver(self, message: Any, queue: str) -> None:
        self.parsed = True
        try:
            received = broker.read(message)
        except errors.EnvelopeError as unread:
            # Nothing is lost: if there is a row behind it, the search for lost messages finds that.
            log.warning("dropped a message on %s: %s", queue, unread)
            return
        super()._deliver(broker.envelope(received, queue), queue)

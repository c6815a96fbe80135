"""The wire to Redis: the envelope, one push, and what a queue looks like from outside.

A queue is a Redis list whose key is the queue's name: LPUSH at the head, BRPOP
at the tail, as Celery's Redis transport does with one priority step. A message
is a hint: it names a task, the attempt it is for and its place in line, and
never carries arguments. Any of them may be lost, repeated or forged.

The commands here are sent once. redis-py would repeat an LPUSH whose answer was
lost up to ten times; we push again by position instead, when a message is missed.
"""

import asyncio
import base64
import builtins
import contextlib
import functools
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, NoReturn, Protocol
from uuid import UUID, uuid4

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from app.core import errors, ids
from app.core.config import TASK_NAME
from app.core.stopping import stop

COMMAND_TIMEOUT_SECONDS = 2.0
ENVELOPE_VERSION = 1
"""The newest envelope that is understood here, and the one that is written (docs/upgrading.md)."""
TAIL_DEPTH = 10
"""How many messages at the tail are looked at for one that can be read."""
MOST_ATTEMPTS = 2**31 - 2
"""Attempts that a task's row can count."""
END_OF_LINE = 2**63 - 1
"""The position of the tail of an empty queue: everything that has a message lies below it."""
RESULT_TTL_SECONDS = 3600
META_KEY = "celery-task-meta-"
"""What Celery puts before a task's id: the key of its result, and the channel where its end is told."""
LOG_CHANNEL = "taskqueue-log-"
"""What stands before a task's id in the channel where the lines that it logs are told (see `loglines`)."""
WEBHOOK_CHANNEL = "taskqueue-webhooks"
"""Where relays are told that there are webhooks to send; what is told says no more than that."""
TELL_SECONDS = 0.005
"""How often one process tells them at most: whatever was written in the meantime is told of once."""
ALIVE_CHANNEL = "taskqueue-api"
"""Where nothing is ever told: a subscription that is always there."""
SILENCE_SECONDS = 10.0
"""How long a subscription may be silent before Redis is asked whether it is there."""
RAW_JSON_MARKER = "taskqueue.json"
"""Kombu type of a JSON text that must reach a client as it is (see `worker.results`)."""

_PUT_RESULTS = """
for place, key in ipairs(KEYS) do
    redis.call('SET', key, ARGV[place], 'EX', ARGV[#ARGV])
    redis.call('PUBLISH', key, ARGV[place])
end
"""
"""A script, since redis-py takes as long for each command of a pipeline as for all of this."""

NOT_OURS = "The message is not one that this service wrote"

_TRACEPARENT = 64
_GAP = uuid4().hex
"""Stands in no name."""
_NO_ARGUMENTS = base64.b64encode(b"[[], {}, {}]").decode()


class Message(Protocol):
    """What a message says. `lifecycle.Bell` is one."""

    @property
    def task_id(self) -> UUID: ...  # noqa: D102  # a field, described by the class that has it
    @property
    def name(self) -> str: ...  # noqa: D102  # as above
    @property
    def attempt(self) -> int: ...  # noqa: D102  # as above
    @property
    def position(self) -> int: ...  # noqa: D102  # as above
    @property
    def time_limit(self) -> float | None: ...  # noqa: D102  # as above
    @property
    def traceparent(self) -> str | None: ...  # noqa: D102  # as above


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A message as it was read from a queue. `attempt` is how many the task had when it was pushed."""

    task_id: UUID
    name: str
    attempt: int
    position: int
    time_limit: float | None = None
    traceparent: str | None = None


def encode(message: Message, queue: str) -> bytes:
    """The bytes that are pushed for a message: its envelope, as JSON."""
    traceparent = message.traceparent
    text = _frame(message.name, queue, message.time_limit, traced=traceparent is not None) % {
        "id": str(message.task_id),
        "attempt": message.attempt,
        "position": message.position,
        "traceparent": encode_basestring_ascii(traceparent or ""),
        "tag": ids.random_bytes().hex(),
    }
    return text.encode()


@functools.lru_cache(maxsize=1000)
def _frame(name: str, queue: str, time_limit: float | None, *, traced: bool) -> str:
    """The envelope of a task's messages, with gaps to fill by `%` for what differs between two of them.

    Most of an envelope is the same for all, and to encode all of it for each message takes several times as long.
    """
    blank = envelope(Received(task_id=UUID(int=0), name=name, attempt=0, position=0, time_limit=time_limit), queue)
    blank["headers"] |= dict.fromkeys(("id", "root_id"), f"{_GAP}id")
    blank["headers"] |= dict.fromkeys(("retries", "attempt"), f"{_GAP}attempt")
    blank["headers"] |= {"position": f"{_GAP}position"} | ({"traceparent": f"{_GAP}traceparent"} if traced else {})
    blank["properties"] |= {"correlation_id": f"{_GAP}id", "delivery_tag": f"{_GAP}tag"}
    text = json.dumps(blank, separators=(",", ":")).replace("%", "%%")
    for gap in ("attempt", "position", "traceparent"):  # These are no texts, or bring their quotes.
        text = text.replace(f'"{_GAP}{gap}"', f"%({gap})s")
    for gap in ("id", "tag"):
        text = text.replace(f"{_GAP}{gap}", f"%({gap})s")
    return text


def envelope(message: Message, queue: str) -> dict[str, Any]:
    """A message as Celery's protocol 2 inside kombu's virtual transport, without arguments.

    Source: Celery, "Message Protocol"; kombu, `transport/virtual/base.py`.
    """
    task_id = str(message.task_id)
    headers: dict[str, Any] = {
        "lang": "py",
        "task": message.name,
        "id": task_id,
        "root_id": task_id,
        "retries": message.attempt,
        # Celery's own limits stay off: they would also run while a finished task waits for Postgres.
        "timelimit": [None, None],
        "time_limit": message.time_limit,
        # Celery's tracer must store nothing: it would report what one attempt did as the task's end.
        "ignore_result": True,
        "version": ENVELOPE_VERSION,
        "attempt": message.attempt,
        "position": message.position,
    }
    if message.traceparent is not None:
        headers["traceparent"] = message.traceparent
    properties = {
        "correlation_id": task_id,
        "delivery_mode": 2,
        "priority": 0,
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": queue},
        "delivery_tag": str(uuid4()),
    }
    return {
        "body": _NO_ARGUMENTS,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": properties,
    }


def decode(raw: bytes | str) -> Received:
    """Read what was pushed.

    Raises:
        EnvelopeError: if it is not one of ours.
    """
    try:
        return read(json.loads(raw))
    except (ValueError, RecursionError) as bad:
        raise errors.EnvelopeError(NOT_OURS) from bad


def read(found: object) -> Received:
    """Read an envelope that was parsed already. Of all that it says, only this is believed.

    What a release does not know, it ignores; an envelope without a version is of the first.

    Raises:
        EnvelopeError: if it is not one of ours, or of a version that is not known here.
    """
    try:
        headers = found["headers"]  # type: ignore[index]  # whatever it is, it fails here or is a mapping
        if _count(headers.get("version", 1), END_OF_LINE) > ENVELOPE_VERSION:
            raise errors.EnvelopeError("The message is of a later release")
        traceparent = headers.get("traceparent")
        return Received(
            task_id=UUID(headers["id"]),
            name=_name(headers["task"]),
            attempt=_count(headers["attempt"], MOST_ATTEMPTS),
            position=_count(headers["position"], END_OF_LINE),
            time_limit=_limit(headers.get("time_limit")),
            traceparent=traceparent if isinstance(traceparent, str) and len(traceparent) <= _TRACEPARENT else None,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as bad:
        raise errors.EnvelopeError(NOT_OURS) from bad


def _name(value: object) -> str:
    if not isinstance(value, str) or not TASK_NAME.fullmatch(value):
        raise ValueError
    return value


def _count(value: object, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError
    return value


def _limit(seconds: object) -> float | None:
    if isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0:
        return float(seconds)
    return None


class Broker:
    """One Redis. Connections are made on demand; no command is ever repeated behind the caller's back."""

    def __init__(self, url: str, *, client_name: str, max_connections: int = 4) -> None:
        pool = redis.asyncio.BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=COMMAND_TIMEOUT_SECONDS,
            socket_timeout=COMMAND_TIMEOUT_SECONDS,
            socket_connect_timeout=COMMAND_TIMEOUT_SECONDS,
            socket_keepalive=True,
            retry=Retry(NoBackoff(), 0),
            client_name=client_name,
            protocol=2,
        )
        self._redis = redis.asyncio.Redis(connection_pool=pool)
        self._has_webhooks = False
        self._telling: asyncio.Task[None] | None = None

    async def publish(self, queue: str, messages: Sequence[Message], *, at_tail: bool = False) -> int:
        """Push messages with one command, so that the first of them is consumed first.

        Args:
            queue: where to.
            messages: in the order in which they are to run.
            at_tail: push where consumers pop, ahead of everything that waits.

        Returns:
            How many messages the queue holds now.

        Raises:
            BrokerUnavailable: if Redis can't be reached or refuses; the messages may be there all the same.
        """
        envelopes = [encode(message, queue) for message in messages]
        async with _translated():
            if at_tail:
                return int(await self._redis.rpush(queue, *reversed(envelopes)))
            return int(await self._redis.lpush(queue, *envelopes))

    async def depth(self, queue: str) -> int:
        """How many messages wait in a queue. Raises as `publish`."""
        async with _translated():
            return int(await self._redis.llen(queue))

    async def tail(self, queue: str) -> list[Received] | None:
        """The messages that will be consumed next, as far as they can be read.

        Returns:
            The readable ones of the last `TAIL_DEPTH`, the next one first; None if the queue is empty.
            Raises as `publish`.
        """
        async with _translated():
            last = await self._redis.lrange(queue, -TAIL_DEPTH, -1)
        if not last:
            return None
        readable = []
        for raw in reversed(last):
            with contextlib.suppress(errors.EnvelopeError):
                readable.append(decode(raw))
        return readable

    async def put_results(self, metas: Mapping[UUID, bytes]) -> None:
        """Put copies of tasks' ends (`encode_meta`) where Celery's `AsyncResult` looks, and wake who waits there.

        Raises:
            BrokerUnavailable: as `publish`.
        """
        keys = [f"{META_KEY}{task_id}" for task_id in metas]
        async with _translated():
            await self._redis.eval(_PUT_RESULTS, len(keys), *keys, *metas.values(), RESULT_TTL_SECONDS)

    async def log_listeners(self, task_id: UUID) -> int:
        """How many processes hear what a task logs. Raises as `publish`."""
        async with _translated():
            [(_, count)] = await self._redis.pubsub_numsub(f"{LOG_CHANNEL}{task_id}")
        return int(count)

    async def tell_log(self, task_id: UUID, told: bytes) -> None:
        """Tell who listens what a task has logged (`loglines.encode`). Nothing is stored. Raises as `publish`."""
        async with _translated():
            await self._redis.publish(f"{LOG_CHANNEL}{task_id}", told)

    def tell_of_webhooks(self) -> None:
        """Tell relays soon that webhooks were written which are due now. Never waits, never fails.

        It is told after the call, so a relay that looks then sees what was committed before it; and once every
        `TELL_SECONDS` at most, however many there are.
        """
        self._has_webhooks = True
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_of_webhooks())

    async def _tell_of_webhooks(self) -> None:
        try:
            while self._has_webhooks:
                self._has_webhooks = False
                with contextlib.suppress(errors.BrokerUnavailable):
                    async with _translated():
                        await self._redis.publish(WEBHOOK_CHANNEL, b"")
                await asyncio.sleep(TELL_SECONDS)
        finally:
            self._telling = None

    async def hear_of_webhooks(self, told: Callable[[], None]) -> NoReturn:
        """Hear of webhooks that are due (`tell_of_webhooks`), over one connection, for as long as Redis answers.

        Args:
            told: called for each time that it is told, and once when it can be heard from now on: what was told just
                before was not.

        Raises:
            BrokerUnavailable: as `publish`.
        """
        async with _translated(), self._connection() as line, contextlib.aclosing(_read(line)) as messages:
            await line.send_command("SUBSCRIBE", WEBHOOK_CHANNEL)
            async for message in messages:
                if message and message[0] in {b"message", b"subscribe"}:
                    told()
        raise AssertionError  # pragma: no cover - it goes on until it raises

    async def hear(
        self,
        ends: AbstractSet[UUID],
        logs: AbstractSet[UUID],
        changed: asyncio.Event,
        *,
        ended: Callable[[UUID], None],
        logged: Callable[[UUID, bytes], None],
    ) -> NoReturn:
        """Hear of the ends of tasks (`put_result`), and what they log (`tell_log`), over one connection.

        Args:
            ends: whose ends; a set that may change.
            logs: whose log lines; as well.
            changed: set by whoever changes one of them.
            ended: called for each end, and once for each task when its end can be heard from now on: it may have come
                just before.
            logged: called with what was told, whoever told it.

        It goes on for as long as Redis answers.

        Raises:
            BrokerUnavailable: as `publish`.
        """
        # Not redis-py's PubSub: whoever reads from its connection and whoever writes to it would both make another
        # where it is lost, and one of the two would never be closed.
        async with _translated(), self._connection() as line, contextlib.aclosing(_read(line)) as messages:
            await line.send_command("SUBSCRIBE", ALIVE_CHANNEL)
            changed.set()
            subscribing = asyncio.create_task(_keep_subscribed(line, {META_KEY: ends, LOG_CHANNEL: logs}, changed))
            try:
                async for told in messages:
                    if subscribing.done():
                        subscribing.result()
                    if told and told[0] in {b"message", b"subscribe"}:
                        channel = told[1].decode()
                        if channel.startswith(META_KEY):
                            ended(UUID(channel.removeprefix(META_KEY)))
                        elif channel.startswith(LOG_CHANNEL) and told[0] == b"message":
                            logged(UUID(channel.removeprefix(LOG_CHANNEL)), told[2])
            finally:
                await stop(subscribing)
        raise AssertionError  # pragma: no cover - it goes on until it raises

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[redis.asyncio.Connection]:
        """A connection for one purpose, closed at the end."""
        pool = self._redis.connection_pool
        line: redis.asyncio.Connection = await pool.get_connection()  # type: ignore[no-untyped-call]  # redis-py's pool has no types
        try:
            yield line
        finally:
            await line.disconnect(nowait=True)
            await pool.release(line)

    async def facts(self) -> dict[str, str]:
        """What the server says of itself: version, memory, and its configuration if it tells. Raises as `publish`."""
        async with _translated():
            info = await self._redis.info()
            try:
                # One pattern a command: several are an error before Redis 7.
                told = await self._redis.config_get("maxmemory*") | await self._redis.config_get("appendonly")
            except redis.exceptions.ResponseError:  # many hosted servers forbid CONFIG
                told = {}
        found = {name: info[name] for name in ("redis_version", "used_memory") if name in info}
        return {str(name): str(value) for name, value in [*found.items(), *told.items()]}

    async def ping(self) -> None:
        """One round trip. Raises as `publish`."""
        async with _translated():
            await self._redis.ping()

    async def close(self) -> None:
        """Close every connection."""
        if self._telling is not None:
            await stop(self._telling)
        with contextlib.suppress(redis.exceptions.RedisError, OSError):
            await self._redis.aclose(close_connection_pool=True)


async def _read(line: redis.asyncio.Connection) -> AsyncGenerator[Sequence[Any], None]:
    """What comes over a connection that subscribes: nothing after each silence, in which Redis is asked for an answer.

    Raises:
        BrokerUnavailable: if it gives none.
    """
    asked = False
    while True:
        told = await line.read_response(timeout=SILENCE_SECONDS, disconnect_on_error=False)
        if told is None and asked:
            raise errors.BrokerUnavailable("Redis is silent")
        asked = told is None
        if told is None:
            await _send(line, "PING")
        yield told or ()


async def _keep_subscribed(
    line: redis.asyncio.Connection, channels: Mapping[str, AbstractSet[UUID]], changed: asyncio.Event
) -> NoReturn:
    """Subscribe to what is wanted on each kind of channel, and to nothing else, whenever that has changed."""
    subscribed: dict[str, set[UUID]] = {channel: set() for channel in channels}
    while True:
        await changed.wait()
        changed.clear()
        for channel, wanted in channels.items():
            new, gone = wanted - subscribed[channel], subscribed[channel] - wanted
            if new:
                await _send(line, "SUBSCRIBE", *(f"{channel}{one}" for one in new))
            if gone:
                await _send(line, "UNSUBSCRIBE", *(f"{channel}{one}" for one in gone))
            subscribed[channel] = (subscribed[channel] | new) - gone


async def _send(line: redis.asyncio.Connection, *command: str) -> None:
    """Send a command over a connection that is there: redis-py would make it anew, without its subscriptions."""
    if not line.is_connected:
        raise errors.BrokerUnavailable("the connection to Redis is lost")
    await line.send_command(*command, check_health=False)


def encode_meta(task_id: UUID, status: str, *, result: str | None, error_type: str, error_message: str) -> bytes:
    """What Celery's Redis backend stores about an ended task (Celery, `backends/base.py`)."""
    if status == "SUCCESS":
        value = result or "null"
        if '"__type__"' in value:
            # Kombu would take such an object for one of its own types and fail, or change it.
            value = json.dumps({"__type__": RAW_JSON_MARKER, "__value__": value})
    elif status == "REVOKED":
        value = _exception("TaskRevokedError", "celery.exceptions", error_message or error_type)
    else:
        # Only an ordinary exception of Python's may be raised as itself at the waiter: no SystemExit.
        known = getattr(builtins, error_type, None)
        ordinary = isinstance(known, type) and issubclass(known, Exception)
        value = _exception(error_type, "builtins" if ordinary else None, error_message)
    head = json.dumps({"task_id": str(task_id), "status": status, "traceback": None, "children": []})
    return f'{head[:-1]}, "result": {value}}}'.encode()


def _exception(name: str, module: str | None, message: str) -> str:
    return json.dumps({"exc_type": name, "exc_message": [message], "exc_module": module})


@contextlib.asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    try:
        yield
    except (TimeoutError, redis.exceptions.RedisError, OSError) as away:
        raise errors.BrokerUnavailable(f"Redis is unreachable or refuses ({type(away).__name__})") from away

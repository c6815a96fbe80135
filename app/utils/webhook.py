"""One request to somebody else's server: a signed webhook, or the call of an `http_request` task.

What happened comes back as a value. `Sender.post` never raises for anything that
a receiver or the network between does: it returns a `Receipt`, and whoever
keeps the deliveries decides what it means. Nothing here knows a database.
"""

import asyncio
import re
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from types import TracebackType
from typing import Self

import httpcore
import httpx

from app.core import config, errors
from app.utils import exchange, guard, guarded, pinned, signing
from app.utils.exchange import Outcome
from app.utils.signing import sign

__all__ = [
    "METHODS", "Outcome", "Receipt", "RequestFailed", "Response", "Sender", "request", "retry_after", "sign",
]  # fmt: skip

DEADLINE_SECONDS = 15.0
"""From the look-up of the name to the last byte of the answer (Standard Webhooks: 15 to 30 s)."""
KEEP_SECONDS = 30.0
"""How old a connection may be that carries another webhook: so long may an address be out of date."""
EXCERPT_BYTES = 4096
RETRY_AFTER_LIMIT_SECONDS = 86_400.0
"""A receiver can ask for a day of rest, not for more."""
RESPONSE_BYTES = 256 * 1024
"""What `request` reads of a body."""
HEADER_VALUE_LIMIT = 1024
USER_AGENT = "taskqueue/1"

_HEADERS: Mapping[str, str] = {
    "accept": "*/*",
    "accept-encoding": "identity",
    "connection": "keep-alive",
    "user-agent": USER_AGENT,
    "content-type": "application/json",
}
"""Of every webhook."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
RESPONSE_HEADERS = frozenset(
    {
        "cache-control", "content-encoding", "content-language", "content-length", "content-type", "date",
        "etag", "last-modified", "link", "location", "retry-after", "x-request-id",
    }
)  # fmt: skip
"""Headers that `request` repeats; cookies and challenges stay where they came from."""
FORBIDDEN_HEADERS = frozenset(
    {
        "accept-encoding", "connection", "content-length", "expect", "host", "keep-alive", "te", "trailer",
        "transfer-encoding", "upgrade",
    }
)  # fmt: skip
FORBIDDEN_PREFIXES = ("proxy-", "webhook-")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e]*")
_DELAY_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one POST came to.

    Attributes:
        outcome: the word for it.
        status_code: of the answer, if there was one.
        retry_after_seconds: how long the receiver wants to be left alone, at most a day.
        duration_seconds: from the call to the end, whatever the end.
        excerpt: the beginning of the body of an answer other than 2xx, as text that Postgres can hold: at most
            4 KiB of it, also in UTF-8.
        request_headers: what was sent, or was about to be; none if there was nothing that could be.
    """

    outcome: Outcome
    status_code: int | None = None
    retry_after_seconds: float | None = None
    duration_seconds: float = 0.0
    excerpt: str = ""
    request_headers: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """The answer to `request`.

    Attributes:
        status_code: any, also 4xx and 5xx: what they mean is the caller's to say.
        headers: those of `RESPONSE_HEADERS` that came, in lower case.
        body: as UTF-8; what is not UTF-8, or is a control character, is U+FFFD.
        truncated: whether the body was longer than `RESPONSE_BYTES`.
    """

    status_code: int
    headers: Mapping[str, str]
    body: str
    truncated: bool


class RequestFailed(errors.TaskQueueError):
    """No complete answer came. `outcome` is the word for why."""

    def __init__(self, sentence: str, outcome: Outcome = Outcome.CONNECT_ERROR) -> None:
        super().__init__(sentence)
        self.outcome = outcome


def retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds that a `Retry-After` header asks for, at most a day (RFC 9110 section 10.2.3).

    Args:
        value: the header, a number of seconds or an HTTP date.
        now: what a date is counted from.

    Returns:
        None if there is no header, it lies in the past, or makes no sense.
    """
    text = (value or "").strip()
    if _DELAY_SECONDS.fullmatch(text):
        return min(float(text), RETRY_AFTER_LIMIT_SECONDS)
    date = _http_date(text)
    if date is None or date <= now:
        return None
    return min((date - now).total_seconds(), RETRY_AFTER_LIMIT_SECONDS)


def _http_date(text: str | None) -> datetime | None:
    if not text or len(text) > 64:  # noqa: PLR2004  # the longest form of a date has 33 characters
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


class Sender:
    """Sends webhooks: one client for the whole process, closed with `aclose()` or `async with`.

    Args:
        rules: where it may connect to.
        keys: sign every body for which a POST names no others; without any, such bodies go unsigned.
        deadline_seconds: for one POST in all: name, connection, TLS, request, answer.
        resolver: names to addresses; the system's unless given.
        ssl_context: which certificates are trusted; the public ones unless given.
    """

    def __init__(
        self,
        rules: guard.EgressRules,
        keys: Sequence[signing.Key] = (),
        *,
        deadline_seconds: float = DEADLINE_SECONDS,
        resolver: pinned.Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        # One URL has many webhooks. The size bounds what strangers can make us remember.
        self._target = lru_cache(maxsize=1024)(partial(_Target.of, rules=rules))
        self._keys = tuple(keys)
        self._deadline_seconds = deadline_seconds
        self._transport = guarded.transport(
            rules, resolver=resolver, ssl_context=ssl_context, keep_seconds=KEEP_SECONDS
        )

    @classmethod
    def from_settings(cls, settings: config.Settings) -> Self:
        """A sender with the rules and keys of the settings."""
        return cls(guard.EgressRules.from_settings(settings), signing.keys(settings))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. POSTs still under way end as `connect_error`."""
        await self._transport.aclose()

    async def post(
        self,
        url: str,
        *,
        webhook_id: str,
        body: bytes,
        traceparent: str | None,
        timestamp_seconds: int,
        owner: str = "",
        keys: Sequence[signing.Key] | None = None,
    ) -> Receipt:
        """POST a webhook once, and say what happened. Only cancellation is raised.

        Args:
            url: where to; judged again here, since the rules may have changed since it was stored.
            webhook_id: the same for every attempt of a delivery.
            body: the JSON to sign and send, byte for byte.
            traceparent: W3C trace context to hand on, if there is one.
            timestamp_seconds: Unix time of this attempt, which is signed with it.
            owner: on whose behalf; no two owners share a connection.
            keys: sign it instead of those of the sender.
        """
        started = time.monotonic()
        answer = exchange.Answer(EXCERPT_BYTES)
        failure: Exception | None = None
        sent: Mapping[str, str] = {}
        try:
            async with asyncio.timeout(self._deadline_seconds):
                target = self._target(url)
                sent = {
                    "host": target.host,
                    **_HEADERS,
                    **self._signed(webhook_id, timestamp_seconds, body, self._keys if keys is None else keys),
                    **({} if traceparent is None else {"traceparent": traceparent}),
                    "content-length": str(len(body)),
                }
                # A whole request, made here: httpx would add nothing to it, and takes as long again as to send it.
                request = httpcore.Request(
                    "POST",
                    target.url,
                    headers=[(name.encode(), value.encode("ascii")) for name, value in sent.items()],
                    content=body,
                    extensions={"timeout": {"connect": pinned.CONNECT_SECONDS}},
                )
                await answer.receive(
                    self._transport.send(request, owner=owner), wanted=lambda status: not exchange.is_success(status)
                )
        except Exception as error:  # noqa: BLE001  # libraries raise more kinds than they list; none may escape
            failure = error
        return _receipt(answer, failure, time.monotonic() - started, sent)

    @staticmethod
    def _signed(webhook_id: str, timestamp_seconds: int, body: bytes, keys: Sequence[signing.Key]) -> dict[str, str]:
        headers = {"webhook-id": webhook_id, "webhook-timestamp": str(timestamp_seconds)}
        if keys:
            headers["webhook-signature"] = sign(keys, webhook_id, timestamp_seconds, body)
        return headers


@dataclass(frozen=True, slots=True)
class _Target:
    """Where webhooks of a URL go.

    Attributes:
        url: as httpcore takes it.
        host: the header.
    """

    url: httpcore.URL
    host: str

    @classmethod
    def of(cls, text: str, rules: guard.EgressRules) -> Self:
        """Read a URL. Raises as `guard.admit_url`."""
        url = httpx.URL(guard.admit_url(text, rules))
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        return cls(target, url.netloc.decode("ascii"))


def _receipt(
    answer: exchange.Answer, failure: Exception | None, duration_seconds: float, sent: Mapping[str, str]
) -> Receipt:
    """Once a status has come, it is the outcome: how the rest of the answer ended changes nothing."""
    if answer.status_code is None:
        return Receipt(outcome=exchange.outcome_of(failure), duration_seconds=duration_seconds, request_headers=sent)
    if exchange.is_success(answer.status_code):
        return Receipt(
            outcome=Outcome.SUCCESS,
            status_code=answer.status_code,
            duration_seconds=duration_seconds,
            request_headers=sent,
        )
    # A date is counted from the receiver's own clock where it tells it, so that ours may differ.
    now = _http_date(answer.headers.get("date")) or datetime.now(UTC)
    return Receipt(
        outcome=exchange.outcome_of_status(answer.status_code),
        status_code=answer.status_code,
        retry_after_seconds=retry_after(answer.headers.get("retry-after"), now),
        duration_seconds=duration_seconds,
        excerpt=exchange.excerpt(bytes(answer.body), EXCERPT_BYTES),
        request_headers=sent,
    )


def _response(answer: exchange.Answer) -> Response:
    shown = {name: value[:HEADER_VALUE_LIMIT] for name, value in answer.headers.items() if name in RESPONSE_HEADERS}
    return Response(
        status_code=answer.status_code or 0,
        headers={name: exchange.readable(value.encode()) for name, value in shown.items()},
        body=exchange.readable(bytes(answer.body)),
        truncated=answer.truncated,
    )


async def request(
    method: str,
    url: str,
    headers: Mapping[str, str] | None = None,
    body: bytes = b"",
    timeout_seconds: float = DEADLINE_SECONDS,
    *,
    rules: guard.EgressRules,
    resolver: pinned.Resolver | None = None,
    ssl_context: ssl.SSLContext | None = None,
) -> Response:
    """Call a URL through the same guard as webhooks, and read up to 256 KiB of its answer.

    Args:
        method: one of `METHODS`, in any case.
        url: any that `guard.admit_url` admits.
        headers: sent besides our own; framing and `webhook-…` headers are refused.
        body: sent as it is.
        timeout_seconds: for everything: name, connection, TLS, request, answer.
        rules: where it may connect to.
        resolver: names to addresses; the system's unless given.
        ssl_context: which certificates are trusted; the public ones unless given.

    Raises:
        ValueError: if the method, a header or the URL is refused; the message names which.
        RequestFailed: if no complete answer came, with the outcome that says why.
    """
    verb = method.upper()
    if verb not in METHODS:
        raise ValueError(f"method must be one of {', '.join(sorted(METHODS))}")
    sent = {"user-agent": USER_AGENT} | _checked(headers or {})
    try:
        admitted = guard.admit_url(url, rules)
    except ValueError as refused:
        raise ValueError(f"url {refused}") from None
    answer = exchange.Answer(RESPONSE_BYTES)
    client = guarded.client(rules, resolver=resolver, ssl_context=ssl_context)
    try:
        async with aclosing(client), asyncio.timeout(timeout_seconds):
            await answer.receive(
                client.send(client.build_request(verb, admitted, headers=sent, content=body), stream=True),
                wanted=lambda _: True,
            )
    except Exception as failure:
        outcome = exchange.outcome_of(failure)
        raise RequestFailed(f"The request got no complete answer: {outcome}", outcome) from failure
    return _response(answer)


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        shown = name[: errors.FIELD_NAME_LIMIT]
        if not _TOKEN.fullmatch(name):
            raise ValueError("a header's name must be made of letters, digits and - (RFC 9110)")
        if name.lower() in FORBIDDEN_HEADERS or name.lower().startswith(FORBIDDEN_PREFIXES):
            raise ValueError(f"header {shown} must not be set")
        if not _FIELD_VALUE.fullmatch(value):
            raise ValueError(f"header {shown} must have a value of printable ASCII")
    return {name.lower(): value for name, value in headers.items()}

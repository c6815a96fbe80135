"""One HTTP exchange with a stranger: what came of it, whatever went wrong in its middle."""

import asyncio
import contextlib
import errno
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import httpcore
import httpx

from app.utils import guard, pinned

DRAINED_BYTES = 16 * 1024
DRAIN_SECONDS = 0.1
"""How much is read of a body that nobody wants: most have a few bytes, and come with the status."""
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r"} | {0: ""}


class Outcome(StrEnum):
    """What became of one request, in one word."""

    SUCCESS = "success"
    HTTP_3XX = "http_3xx"
    HTTP_4XX = "http_4xx"
    HTTP_429 = "http_429"
    HTTP_5XX = "http_5xx"
    """Also a status that HTTP does not define."""
    TIMEOUT = "timeout"
    CONNECT_ERROR = "connect_error"
    """No connection, or one that broke or spoke no HTTP."""
    TLS_ERROR = "tls_error"
    DNS_ERROR = "dns_error"
    DNS_UNANSWERED = "dns_unanswered"
    """No name server answered for the host. Its own may be dead, or those that we ask."""
    BLOCKED = "blocked"
    """The rules refuse the URL or an address of its host; nothing was sent."""
    INVALID_URL = "invalid_url"
    LOCAL_FAULT = "local_fault"
    """Our own side failed: no route, no socket left. It says nothing about the receiver."""
    SECRET_UNREADABLE = "secret_unreadable"  # noqa: S105  # a word, and no password
    """A secret that should sign it can't be read; nothing was sent."""


def readable(raw: bytes) -> str:
    """Foreign bytes as text: no NUL (Postgres has none), no control characters (terminals obey them)."""
    return raw.decode("utf-8", "replace").translate(_CONTROLS)


def excerpt(raw: bytes, limit_bytes: int) -> str:
    """The beginning of foreign bytes as `readable` text that takes at most so many bytes in UTF-8."""
    # What is not UTF-8 becomes U+FFFD, which takes three.
    return readable(raw[:limit_bytes]).encode()[:limit_bytes].decode("utf-8", "ignore")


class Reply(Protocol):
    """An answer that has begun. An `httpx.Response` that streams is one."""

    @property
    def status_code(self) -> int: ...  # noqa: D102  # as HTTP has it
    @property
    def headers(self) -> httpx.Headers: ...  # noqa: D102  # as above
    def aiter_raw(self) -> AsyncIterator[bytes]: ...  # noqa: D102  # as above
    async def aclose(self) -> None: ...  # noqa: D102  # as above


@dataclass(slots=True)
class Answer:
    """What has come of an answer so far, so that a deadline in its middle does not lose its status."""

    limit_bytes: int
    status_code: int | None = None
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    body: bytearray = field(default_factory=bytearray)
    truncated: bool = False

    async def receive(self, answered: Awaitable[Reply], *, wanted: Callable[[int], bool]) -> None:
        """Read an answer: headers and body only if its status is wanted, and not beyond the limit."""
        reply = await answered
        try:
            self.status_code = reply.status_code
            if wanted(reply.status_code):
                self.headers = reply.headers
                await self._read(reply)
            else:
                await _drain(reply)
        finally:
            await reply.aclose()

    async def _read(self, reply: Reply) -> None:
        # Raw: what is compressed unasked stays so, and can't grow in our memory.
        async for chunk in reply.aiter_raw():
            room = self.limit_bytes - len(self.body)
            self.body += chunk[:room]
            if len(chunk) > room:
                self.truncated = True
                return


async def _drain(reply: Reply) -> None:
    """Take what is left of a short answer, so that its connection may carry another request."""
    left = DRAINED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            async for chunk in reply.aiter_raw():
                left -= len(chunk)
                if left < 0:
                    return


def is_success(status_code: int) -> bool:
    """Whether it is a 2xx."""
    return 200 <= status_code < 300  # noqa: PLR2004


def outcome_of_status(status_code: int) -> Outcome:
    """The word for the status of an answer."""
    if status_code == httpx.codes.TOO_MANY_REQUESTS:
        return Outcome.HTTP_429
    words = {2: Outcome.SUCCESS, 3: Outcome.HTTP_3XX, 4: Outcome.HTTP_4XX}
    return words.get(status_code // 100, Outcome.HTTP_5XX)


_OUR_FAULTS = frozenset(
    {
        errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENETDOWN, errno.ENETUNREACH, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM,
    }
)  # fmt: skip
"""What the kernel says when it can't even try. A host that can't be reached may be down itself, and is not here."""

_WORDS: tuple[tuple[tuple[type[BaseException], ...], Outcome], ...] = (
    ((pinned.Blocked, guard.ForbiddenUrlError), Outcome.BLOCKED),
    ((pinned.Unanswered,), Outcome.DNS_UNANSWERED),
    ((pinned.Unresolvable,), Outcome.DNS_ERROR),
    ((ssl.SSLError,), Outcome.TLS_ERROR),
    ((TimeoutError, httpx.TimeoutException, httpcore.TimeoutException), Outcome.TIMEOUT),
    ((ValueError, httpx.InvalidURL, httpx.UnsupportedProtocol), Outcome.INVALID_URL),
)
"""Which error means what, the most telling first."""


def outcome_of(failure: Exception | None) -> Outcome:
    """The word for a failure before any answer.

    httpcore holds what it caught as its argument, and who passes an error on
    names it as the cause. The context says nothing: in the middle of TLS it is
    always an `SSLWantReadError`.
    """
    chain: list[BaseException] = []
    error: object = failure
    while isinstance(error, BaseException) and error not in chain:
        chain.append(error)
        error = error.__cause__ or next(iter(error.args), None)
    if any(_is_ours(known) for known in chain):
        return Outcome.LOCAL_FAULT
    for kinds, word in _WORDS:
        if any(isinstance(known, kinds) for known in chain):
            return word
    return Outcome.CONNECT_ERROR


def _is_ours(error: BaseException) -> bool:
    if isinstance(error, pinned.ResolverAway):
        return True
    return isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.errno in _OUR_FAULTS

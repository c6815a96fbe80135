"""An HTTP client over pinned connections, and how long a connection may be used again.

A connection that has just carried a webhook carries the next one of the same
owner to the same origin, so that a busy receiver is not asked for a handshake
each time. Its address was judged when it was made, so it is never older than the
client allows, however busy it is: what a name means is looked up again by then.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from http.cookiejar import CookieJar
from typing import Any, NamedTuple

import httpcore
import httpx

from app.utils import guard, pinned

KEPT_AT_MOST = 256
"""Idle connections of one client; the oldest is closed for one more."""
OWNER = "owner"
"""The request extension that says on whose behalf it is."""

_DIED_IDLE = (httpcore.ReadError, httpcore.WriteError, httpcore.RemoteProtocolError)


class _Key(NamedTuple):
    """Who may use a connection, and for what: nobody else's bytes ever travel on it."""

    owner: str
    scheme: bytes
    host: bytes
    port: int | None


@dataclass(eq=False, slots=True)
class _Connection:
    """A connection, and until when (of the loop's clock) another request may begin on it."""

    key: _Key
    http: httpcore.AsyncHTTPConnection
    until: float


def _is_silent(http: httpcore.AsyncHTTPConnection) -> bool:
    """Whether nothing came after the answer: what is said unasked would pass for the answer to the next webhook.

    What comes later is seen by `has_expired`. httpcore does not show what h11 has
    read already, so we look inside, and a connection that hides it is not kept.
    """
    state = getattr(getattr(http, "_connection", None), "_h11_state", None)
    return state is not None and not state.trailing_data[0]


class _Idle:
    """Connections that wait for their next request."""

    def __init__(self) -> None:
        self._by_key: dict[_Key, list[_Connection]] = {}
        self._by_age: dict[_Connection, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def take(self, key: _Key) -> _Connection | None:
        """The one that was used last, if one is young enough and its peer has not hung up."""
        now = asyncio.get_running_loop().time()
        while waiting := self._by_key.get(key):
            found = waiting[-1]
            self._forget(found)
            if found.until > now and not found.http.has_expired():
                return found
            self._close(found)
        return None

    def give(self, connection: _Connection) -> None:
        """Keep it for the next request, or close it if it is too old or in the middle of something."""
        loop = asyncio.get_running_loop()
        if not connection.http.is_idle():
            return  # httpcore has closed it
        if connection.until <= loop.time() or not _is_silent(connection.http):
            self._close(connection)
            return
        self._by_key.setdefault(connection.key, []).append(connection)
        self._by_age[connection] = None
        if len(self._by_age) > KEPT_AT_MOST:
            self._drop(next(iter(self._by_age)))
        if self._timer is None:
            self._timer = loop.call_at(connection.until, self._sweep)

    def _sweep(self) -> None:
        """Close what is too old also when nobody asks for it again."""
        loop = asyncio.get_running_loop()
        self._timer = None
        for connection in [one for one in self._by_age if one.until <= loop.time()]:
            self._drop(connection)
        if self._by_age:
            self._timer = loop.call_at(min(one.until for one in self._by_age), self._sweep)

    def _drop(self, connection: _Connection) -> None:
        self._forget(connection)
        self._close(connection)

    def _forget(self, connection: _Connection) -> None:
        del self._by_age[connection]
        waiting = self._by_key[connection.key]
        waiting.remove(connection)
        if not waiting:
            del self._by_key[connection.key]

    def _close(self, connection: _Connection) -> None:
        task = asyncio.create_task(connection.http.aclose())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Close them all."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._by_age):
            self._drop(connection)
        await asyncio.gather(*self._closing, return_exceptions=True)


class Reply:
    """An answer whose body is still to be read. When it is closed, which is done once, its connection is free."""

    def __init__(self, answer: httpcore.Response, freed: Callable[[], None]) -> None:
        self._answer = answer
        self._freed = freed

    @property
    def status_code(self) -> int:
        """Any that HTTP can carry."""
        return self._answer.status

    @property
    def headers(self) -> httpx.Headers:
        """As they came."""
        return httpx.Headers(self._answer.headers)

    @property
    def extensions(self) -> dict[str, Any]:
        """What httpcore says besides."""
        return dict(self._answer.extensions)

    async def aiter_raw(self) -> AsyncIterator[bytes]:
        """The body, as it comes."""
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        """Read no more of it."""
        await self._stream.aclose()
        self._freed()

    @property
    def _stream(self) -> Any:
        return self._answer.stream


class _Body(httpx.AsyncByteStream):
    """The body of an answer, for httpx."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._reply.aiter_raw()

    async def aclose(self) -> None:
        await self._reply.aclose()


class GuardedTransport(httpx.AsyncBaseTransport):
    """HTTP/1.1 over a `PinnedBackend`.

    Args:
        backend: opens every connection.
        ssl_context: which certificates are trusted.
        keep_seconds: how old a connection may be when a request begins on it; 0 makes one for each request.

    Raises:
        RuntimeError: if connections would not use the backend, as after an update of
            httpcore that changed its insides.
    """

    def __init__(self, backend: pinned.PinnedBackend, ssl_context: ssl.SSLContext, keep_seconds: float = 0.0) -> None:
        self._backend = backend
        self._ssl_context = ssl_context
        self._keep_seconds = keep_seconds
        self._idle = _Idle()
        self._in_use: set[_Connection] = set()
        self._closed = False
        probe = self._connection_to(httpcore.Origin(b"https", b"example.com", 443))
        if getattr(probe, "_network_backend", None) is not backend:
            raise RuntimeError("httpcore does not use the guarded network backend")

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """As `send`, for httpx."""
        url = request.url
        sent = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        reply = await self.send(sent, owner=str(request.extensions.get(OWNER, "")))
        return httpx.Response(
            status_code=reply.status_code, headers=reply.headers, stream=_Body(reply), extensions=reply.extensions
        )

    async def send(self, sent: httpcore.Request, *, owner: str = "") -> Reply:
        """Send it, on a connection that is there or on a new one, and return as soon as there is a status.

        Args:
            sent: the request, as it is to be: nothing is added to it.
            owner: on whose behalf.
        """
        url = sent.url
        key = _Key(owner, url.scheme, url.host, url.port)
        kept = self._idle.take(key)
        if kept is not None:
            try:
                return await self._exchange(kept, sent)
            except _DIED_IDLE:
                pass  # The peer hung up as we began: that is no answer, and a webhook may come twice.
        if self._closed:
            raise httpcore.ConnectError("the client is closed")
        until = asyncio.get_running_loop().time() + self._keep_seconds
        return await self._exchange(_Connection(key, self._connection_to(url.origin), until), sent)

    def _connection_to(self, origin: httpcore.Origin) -> httpcore.AsyncHTTPConnection:
        return httpcore.AsyncHTTPConnection(
            origin, ssl_context=self._ssl_context, http1=True, http2=False, retries=0, network_backend=self._backend
        )

    async def _exchange(self, connection: _Connection, sent: httpcore.Request) -> Reply:
        self._in_use.add(connection)
        try:
            answer = await connection.http.handle_async_request(sent)
        except BaseException:
            self._in_use.discard(connection)
            raise
        return Reply(answer, lambda: self._free(connection))

    def _free(self, connection: _Connection) -> None:
        self._in_use.discard(connection)
        self._idle.give(connection)

    async def aclose(self) -> None:
        """Close every connection, and the resolver. Requests under way fail."""
        self._closed = True
        self._backend.resolver.close()
        await asyncio.gather(*(one.http.aclose() for one in self._in_use), return_exceptions=True)
        await self._idle.aclose()


class _NoCookies(CookieJar):
    """Forgets at once: a cookie of one receiver would travel to every other under the same domain."""

    def extract_cookies(self, response: Any, request: Any) -> None:
        """Keep nothing."""


@cache
def _trusted() -> ssl.SSLContext:
    """Certificates are checked against httpx's bundle and the system's store; `SSL_CERT_FILE` adds to it."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


def transport(
    rules: guard.EgressRules,
    *,
    resolver: pinned.Resolver | None = None,
    ssl_context: ssl.SSLContext | None = None,
    network: httpcore.AsyncNetworkBackend | None = None,
    keep_seconds: float = 0.0,
) -> GuardedTransport:
    """What `client` sends with, for who makes whole requests. It has no deadline but those that they name."""
    backend = pinned.PinnedBackend(rules, resolver or pinned.Resolver(), network)
    return GuardedTransport(backend, ssl_context or _trusted(), keep_seconds)


def client(
    rules: guard.EgressRules,
    *,
    resolver: pinned.Resolver | None = None,
    ssl_context: ssl.SSLContext | None = None,
    network: httpcore.AsyncNetworkBackend | None = None,
    keep_seconds: float = 0.0,
) -> httpx.AsyncClient:
    """An HTTP client that can't leave the rules. The caller closes it with `aclose()`.

    It follows no redirect, keeps no cookie, asks for no compression and ignores
    proxies of the environment. It has no deadline of its own but for connecting
    (`pinned.CONNECT_SECONDS`): use `asyncio.timeout`.

    Args:
        rules: what the operator allows.
        resolver: names to addresses; the system's unless given. It is closed with the client.
        ssl_context: which certificates are trusted; the public ones unless given.
        network: opens the connections; asyncio's unless given.
        keep_seconds: how old a connection may be that is used again, as `GuardedTransport` says.
    """
    return httpx.AsyncClient(
        transport=transport(
            rules, resolver=resolver, ssl_context=ssl_context, network=network, keep_seconds=keep_seconds
        ),
        headers={"accept-encoding": "identity", "connection": "keep-alive" if keep_seconds else "close"},
        cookies=_NoCookies(),
        timeout=httpx.Timeout(None, connect=pinned.CONNECT_SECONDS),
        trust_env=False,
        follow_redirects=False,
    )

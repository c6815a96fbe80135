"""The only way out: HTTP connections pinned to addresses that the rules allow.

`PinnedBackend` asks the resolver once, refuses the name if any answer is bad, and
connects to one of the answers it judged, so a name that changes its address
between the check and the use gains nothing. Only the destination of the TCP
connection is replaced: the URL, the `Host` header, SNI and the certificate's
check keep the name.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any, NoReturn

import httpcore

from app.utils import guard

CONNECT_SECONDS = 5.0
"""Seconds for a TCP connection, and as many for the TLS handshake after it."""
RESOLVE_SECONDS = 5.0
RESOLVE_THREADS = 16


class Blocked(httpcore.ConnectError):
    """The connection leads where this service does not go; nothing was sent."""


class Unresolvable(httpcore.ConnectError):
    """The host has no address, or the resolver did not name one in time."""


class ResolverAway(Unresolvable):
    """The resolver gave no answer: nothing is known about the host."""


_NO_ANSWER = frozenset({socket.EAI_AGAIN, socket.EAI_SYSTEM})

Lookup = Callable[[str, int], Sequence[str]]
"""A blocking look-up: host and port to address texts. `OSError` if there are none."""


def system_lookup(host: str, port: int) -> Sequence[str]:
    """The addresses of a host as the system's resolver orders them (RFC 6724)."""
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class Resolver:
    """Names to addresses, on a few threads of its own and with a deadline.

    A look-up can't be interrupted. On the loop's default executor a dead name
    server would hold up everything else there, and `asyncio.run` at its end.
    """

    def __init__(
        self,
        lookup: Lookup = system_lookup,
        *,
        timeout_seconds: float = RESOLVE_SECONDS,
        threads: int = RESOLVE_THREADS,
    ) -> None:
        self._lookup = lookup
        self._timeout_seconds = timeout_seconds
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="resolver")

    async def resolve(self, host: str, port: int) -> tuple[guard.IPAddress, ...]:
        """Every address of the host, from one look-up.

        Raises:
            ResolverAway: if the resolver does not answer, or not in time.
            Unresolvable: if there is none.
        """
        job = asyncio.get_running_loop().run_in_executor(self._executor, self._lookup, host, port)
        try:
            found = await asyncio.wait_for(job, self._timeout_seconds)
            addresses = tuple(dict.fromkeys(ip_address(text) for text in found))
        except TimeoutError:
            raise ResolverAway("the resolver did not answer in time") from None
        except (OSError, ValueError) as error:
            if isinstance(error, socket.gaierror) and error.errno in _NO_ANSWER:
                raise ResolverAway("the resolver did not answer") from error
            raise Unresolvable("the host has no address") from error
        if not addresses:
            raise Unresolvable("the host has no address")
        return addresses

    def close(self) -> None:
        """Take no more names. Look-ups under way end by themselves; nobody waits for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the rules allow, and to nothing else.

    Args:
        rules: what the operator allows.
        resolver: asked once for each connection.
        network: opens the connections; it is only ever given addresses, never names.
    """

    def __init__(
        self, rules: guard.EgressRules, resolver: Resolver, network: httpcore.AsyncNetworkBackend | None = None
    ) -> None:
        self.resolver = resolver
        self._rules = rules
        self._network = network or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's own signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to one of the host's addresses, tried in turn within `timeout` seconds in all.

        Raises:
            Blocked: if the port or any address of the host is refused.
            Unresolvable: if the host has no address.
            httpcore.ConnectError: if none of its addresses takes the connection.
            httpcore.ConnectTimeout: if none does in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (CONNECT_SECONDS if timeout is None else timeout)
        addresses = await self._judged(host, port)
        failure: Exception = httpcore.ConnectTimeout("no time was left to connect")
        for tried, address in enumerate(addresses):
            # An equal share each, so that a first address that swallows packets leaves time for the next.
            share = (deadline - loop.time()) / (len(addresses) - tried)
            if share <= 0:
                break
            try:
                stream = await self._network.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            return await _verified(stream, address)
        raise failure

    async def _judged(self, host: str, port: int) -> tuple[guard.IPAddress, ...]:
        exempt = (host, port) in self._rules.exempt_peers
        if not (exempt or self._rules.allow_private or port in guard.PORTS):
            raise Blocked("the port is not one of those allowed")
        literal = guard.literal(host)
        if literal is not None:
            addresses: tuple[guard.IPAddress, ...] = (literal,)
        else:
            addresses = await self.resolver.resolve(self._name(host, exempt=exempt), port)
        if not exempt:
            # One bad record condemns the name: whoever controls it chose to point inside.
            for address in addresses:
                if (reason := self._rules.refusal(address)) is not None:
                    raise Blocked(f"an address of the host is refused: {reason}")
        return addresses

    def _name(self, host: str, *, exempt: bool) -> str:
        """The name to look up: with a final dot, so that the cluster's search domains are never tried.

        What the operator named himself is looked up as it stands, since
        `receiver.namespace.svc` lives on the search domains and a name of
        `/etc/hosts` has no final dot.
        """
        if exempt or self._rules.allow_private or "." not in host:
            return host
        return host.removesuffix(".") + "."

    async def connect_unix_socket(
        self,
        path: str,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ARG002, ASYNC109
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> NoReturn:
        """Refused: no URL leads to a Unix socket.

        Raises:
            Blocked: always.
        """
        raise Blocked("a Unix socket is not reached through a URL")

    async def sleep(self, seconds: float) -> None:
        """Wait, as httpcore asks for between connection attempts; it makes only one here."""
        await asyncio.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is closed when its TLS handshake does not end well.

    httpcore closes it after an error, but not when the handshake is cancelled, as
    by a deadline: the loop would keep the socket for as long as the peer stalls.
    """

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        try:
            return await self._inner.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            await self._inner.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


async def _verified(stream: httpcore.AsyncNetworkStream, address: guard.IPAddress) -> httpcore.AsyncNetworkStream:
    """The stream, if it really leads to the address that was judged."""
    peer = stream.get_extra_info("server_addr")
    if peer is None or guard.literal(str(peer[0])) != address:
        await stream.aclose()
        raise Blocked("the connection does not lead to the address that was judged")
    return _Stream(stream)

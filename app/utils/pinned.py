"""The only way out: HTTP connections pinned to addresses that the rules allow.

`PinnedBackend` asks the resolver once, refuses the name if any answer is bad, and
connects to one of the answers it judged, so a name that changes its address
between the check and the use gains nothing. Only the destination of the TCP
connection is replaced: the URL, the `Host` header, SNI and the certificate's
check keep the name.
"""

import asyncio
import contextlib
import select
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
HELD_BACK_BYTES = 64 * 1024
"""A request that is no larger is sent in one piece."""
RESOLVE_SECONDS = 5.0
RESOLVE_THREADS = 64
"""Look-ups at once. A thread that waits costs some kilobytes, and one whose name servers are dead waits for 10 s and
more, whatever our own deadline: few dead hosts must not take them all."""


class Blocked(httpcore.ConnectError):
    """The connection leads where this service does not go; nothing was sent."""


class Unresolvable(httpcore.ConnectError):
    """The host has no address, or the resolver did not name one in time."""


class Unanswered(Unresolvable):
    """No name server answered for the host: its own may be dead, or ours."""


class ResolverAway(Unresolvable):
    """Nobody could be asked: nothing is known about the host."""


Lookup = Callable[[str, int], Sequence[str]]
"""A blocking look-up: host and port to address texts. `OSError` if there are none."""


def system_lookup(host: str, port: int) -> Sequence[str]:
    """The addresses of a host as the system's resolver orders them (RFC 6724)."""
    found = socket.getaddrinfo(host.encode("ascii"), port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(sockaddr[0]) for *_, sockaddr in found]


class _Asked:
    """A look-up under way, for all that want the same name at once."""

    def __init__(self, executor: ThreadPoolExecutor, lookup: Lookup, host: str, port: int) -> None:
        self.began = False
        self.waiting = 0
        self._job = executor.submit(self._run, lookup, host, port)
        self.answer = asyncio.wrap_future(self._job)

    def _run(self, lookup: Lookup, host: str, port: int) -> Sequence[str]:
        self.began = True
        return lookup(host, port)

    async def wait(self, timeout_seconds: float) -> None:
        """Return once there is an answer, or none in time. What nobody waits for any more does not begin."""
        self.waiting += 1
        try:
            await asyncio.wait({self.answer}, timeout=timeout_seconds)
        finally:
            self.waiting -= 1
            if not self.waiting:
                self._job.cancel()

    def leave(self) -> None:
        """Let those that wait go, unless their loop has ended, and they with it."""
        if not self.answer.get_loop().is_closed():
            self.answer.cancel()


class Resolver:
    """Names to addresses, on threads of its own and with a deadline.

    A look-up can't be interrupted. On the loop's default executor a dead name
    server would hold up everything else there, and `asyncio.run` at its end. So
    that it does not hold up everything here, all that want one host share one
    look-up, and with it one thread, however long that takes.

    It belongs to the event loop that it is first used on.
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
        self._asked: dict[tuple[str, int], _Asked] = {}

    async def resolve(self, host: str, port: int) -> tuple[guard.IPAddress, ...]:
        """Every address of the host, from one look-up.

        Raises:
            ResolverAway: if the name could not be asked for: every thread is taken, or the system fails.
            Unanswered: if no name server answers, or not in time.
            Unresolvable: if there is none.
        """
        asked = self._ask(host, port)
        await asked.wait(self._timeout_seconds)
        if not asked.began or asked.answer.cancelled():
            raise ResolverAway("the resolver has too much to do")
        if not asked.answer.done():
            raise Unanswered("no name server answered in time")
        try:
            addresses = tuple(dict.fromkeys(ip_address(text) for text in asked.answer.result()))
        except (OSError, ValueError) as error:
            raise _meaning(error) from error
        if not addresses:
            raise Unresolvable("the host has no address")
        return addresses

    def _ask(self, host: str, port: int) -> _Asked:
        """The look-up of this name that is under way, or a new one."""
        asked = self._asked.get((host, port))
        if asked is None:
            asked = self._asked[host, port] = _Asked(self._executor, self._lookup, host, port)
            asked.answer.add_done_callback(lambda answer: self._forget(host, port, answer))
        return asked

    def _forget(self, host: str, port: int, answer: asyncio.Future[Sequence[str]]) -> None:
        self._asked.pop((host, port), None)
        if not answer.cancelled():
            answer.exception()  # Nobody may be waiting for it any more, and asyncio would complain.

    def close(self) -> None:
        """Take no more names. Look-ups under way end by themselves; nobody waits for them."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for asked in self._asked.values():
            asked.leave()


def _meaning(error: Exception) -> Unresolvable:
    """What the failure of a look-up says of the host."""
    number = error.errno if isinstance(error, socket.gaierror) else None
    if number == socket.EAI_SYSTEM:
        return ResolverAway("the system can't ask for names")
    if number == socket.EAI_AGAIN or isinstance(error, TimeoutError):
        return Unanswered("no name server answered")
    return Unresolvable("the host has no address")


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
    """A connection that sends a request in one piece, and is closed when its TLS handshake does not end well.

    httpcore writes the head of a request and then its body, each of which would be a
    system call and a packet of its own, and reads as soon as it has written all of it.
    So what is small is held back until then.

    It closes a connection after an error, but not when the handshake is cancelled, as
    by a deadline: the loop would keep the socket for as long as the peer stalls.
    """

    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner
        self._unsent = b""
        self._socket: Any = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self._unsent:
            # As httpcore does with an error of its own writes: who hangs up before it has heard all may have answered.
            with contextlib.suppress(httpcore.WriteError):
                await self._flush(timeout)
        return await self._inner.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        self._unsent += buffer
        if len(self._unsent) > HELD_BACK_BYTES:
            await self._flush(timeout)

    async def _flush(self, timeout: float | None) -> None:  # noqa: ASYNC109
        unsent, self._unsent = self._unsent, b""
        await self._inner.write(unsent, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))
        except BaseException:
            await self._inner.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        if info != "is_readable":
            return self._inner.get_extra_info(info)
        # Asked before each request on a connection that is kept: to find the socket costs more than to look at it.
        if self._socket is None:
            self._socket = self._inner.get_extra_info("socket")
        return _is_readable(self._socket)


def _is_readable(one: Any) -> bool:
    """Whether a socket has something to read, as its end; also if it is closed."""
    if one is None or one.fileno() < 0:
        return True
    polled = select.poll()
    polled.register(one.fileno(), select.POLLIN)
    return bool(polled.poll(0))


async def _verified(stream: httpcore.AsyncNetworkStream, address: guard.IPAddress) -> httpcore.AsyncNetworkStream:
    """The stream, if it really leads to the address that was judged."""
    peer = stream.get_extra_info("server_addr")
    if peer is None or guard.literal(str(peer[0])) != address:
        await stream.aclose()
        raise Blocked("the connection does not lead to the address that was judged")
    return _Stream(stream)

"""A network between a client and a server on loopback, which a test can cut.

    with proxied(postgres_url) as network:
        client = connect(network.url)
        network.cut()
        network.restore()

It knows nothing of what it carries, so it stands in front of Postgres and Redis alike.
"""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from app.dev import ports

CHUNK_BYTES = 65_536
DEADLINE_SECONDS = 10.0

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Trap:
    """What waits for bytes on their way, and keeps them from arriving.

    Attributes:
        wanted: the bytes, as they stand in one packet.
        sender: whose packets are looked at.
        then: what becomes of the connection that carried them: `cut` closes it, `silence` keeps it and carries
            nothing more that way.
        sprung: set once it has done so; it does so once.
        caught: the bytes that did not arrive, once it has.
    """

    wanted: bytes
    sender: Literal["client", "server"]
    then: Literal["cut", "silence"]
    sprung: threading.Event = field(default_factory=threading.Event)
    caught: bytes = b""

    def catches(self, data: bytes, sender: str) -> bool:
        """Whether these bytes are the ones, for the first time."""
        if sender != self.sender or self.wanted not in data or self.sprung.is_set():
            return False
        self.caught = data
        self.sprung.set()
        return True


class Proxy:
    """A TCP proxy with an event loop and a thread of its own. Every method may be called from any thread.

    Attributes:
        port: where clients connect; the same over cuts.
        url: the server's URL, by way of the proxy.
    """

    def __init__(self, url: str) -> None:
        """Stand in front of the server that `url` names, which need not run yet."""
        parts = urlsplit(url)
        self._target = _address(url)
        [self.port] = ports.free_ports(1)
        credentials, at, _ = parts.netloc.rpartition("@")
        self.url = urlunsplit(parts._replace(netloc=f"{credentials}{at}{ports.ADDRESS}:{self.port}"))
        self._door = self._bound()
        self._accepting: asyncio.Task[None] | None = None
        self._carried: set[asyncio.Task[None]] = set()
        self._forgotten: set[asyncio.Task[None]] = set()
        self._traps: list[Trap] = []
        self._flows = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.restore()

    def cut(self) -> None:
        """Close every connection, and refuse new ones, as when the server's machine has no such process."""
        self._run(self._cut())

    def black_hole(self) -> None:
        """Keep every connection and accept new ones, but forward nothing, as when packets are dropped on the way."""
        self._run(self._stop_the_flow())

    def restore(self, *, revive: bool = True) -> None:
        """Be a network again.

        Args:
            revive: after a black hole, deliver what was held, as TCP does when packets get through again.
                If false, the connections that were in it stay silent for ever, as when a middlebox has
                forgotten them; only new ones work.
        """
        self._run(self._restore(revive))

    def bury(self) -> None:
        """Close the connections that a black hole left silent, as both ends do after a quarter of an hour."""
        self._run(self._bury())

    def retarget(self, url: str) -> None:
        """Lead new connections to another server, which takes the same credentials, as when a name is given a new
        address. Those that are there stay where they are."""
        self._target = _address(url)

    def trap(self, wanted: bytes, *, sender: Literal["client", "server"], then: Literal["cut", "silence"]) -> Trap:
        """Lose the first packet from now on that holds these bytes, and the connection that carries it."""
        trap = Trap(wanted, sender, then)
        self._traps.append(trap)
        return trap

    def close(self) -> None:
        """End it. Repeating it does nothing."""
        if self._loop.is_closed():
            return
        self.cut()
        self._door.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_SECONDS)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_SECONDS)

    def _bound(self) -> socket.socket:
        """A socket that has the port, so that nobody else gets it, and does not listen: connections are refused."""
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.setblocking(False)
        door.bind((ports.ADDRESS, self.port))
        return door

    async def _cut(self) -> None:
        if self._accepting is not None:
            await _cancelled(self._accepting)
            self._accepting = None
            self._door.close()
            self._door = self._bound()
        await _cancelled(*self._carried)

    async def _stop_the_flow(self) -> None:
        self._flows.clear()

    async def _bury(self) -> None:
        forgotten, self._forgotten = self._forgotten, set()
        await _cancelled(*forgotten)

    async def _restore(self, revive: bool) -> None:
        if revive:
            self._flows.set()
        else:
            # Those in the old hole go on waiting for an event that nobody sets any more.
            self._forgotten |= self._carried
            self._flows = asyncio.Event()
            self._flows.set()
        if self._accepting is None:
            self._door.listen(128)
            self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._door)
            task = asyncio.create_task(self._carry(client, self._flows))
            self._carried.add(task)
            task.add_done_callback(self._carried.discard)
            # A task that is cancelled before its first step never gets to close what it was given.
            task.add_done_callback(partial(_close, client))

    async def _carry(self, client: socket.socket, flows: asyncio.Event) -> None:
        with client, socket.socket() as server, contextlib.suppress(OSError):
            for end in (client, server):
                end.setblocking(False)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await flows.wait()
            await self._loop.sock_connect(server, self._target)
            pumps = [
                asyncio.create_task(self._pump(client, server, flows, "client")),
                asyncio.create_task(self._pump(server, client, flows, "server")),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await _cancelled(*pumps)

    async def _pump(self, source: socket.socket, sink: socket.socket, flows: asyncio.Event, sender: str) -> None:
        """Carry bytes one way until that way ends; in a black hole not even its end is heard of."""
        data = b"more"
        while data:
            data = await self._loop.sock_recv(source, CHUNK_BYTES)
            await flows.wait()
            for trap in self._traps:
                if trap.catches(data, sender):
                    if trap.then == "cut":
                        return
                    await asyncio.Event().wait()  # for ever: until the connection is cut
            await self._loop.sock_sendall(sink, data)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or ports.ADDRESS, parts.port or 0


def _close(client: socket.socket, _: asyncio.Task[None]) -> None:
    client.close()


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    """A proxy in front of the server that `url` names, for as long as the block runs."""
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()

"""Peers that misbehave, on loopback."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class BlackHole:
    """What a peer that never answers has taken."""

    port: int
    received: bytes = b""
    connections: int = 0


@contextlib.contextmanager
def black_hole() -> Iterator[BlackHole]:
    """A peer that accepts connections, reads everything and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, selectors.DefaultSelector() as ready:
        hole = BlackHole(server.getsockname()[1])
        stopping, stop = socket.socketpair()
        ready.register(server, selectors.EVENT_READ)
        ready.register(stopping, selectors.EVENT_READ)
        thread = threading.Thread(target=_swallow, args=(hole, server, stopping, ready))
        thread.start()
        try:
            yield hole
        finally:
            stop.close()
            thread.join(10)
            stopping.close()


def _swallow(hole: BlackHole, server: socket.socket, stopping: socket.socket, ready: selectors.BaseSelector) -> None:
    taken: list[socket.socket] = []
    while True:
        for key, _ in ready.select():
            if key.fileobj is stopping:
                for one in taken:
                    one.close()
                return
            if key.fileobj is server:
                connection, _ = server.accept()
                taken.append(connection)
                ready.register(connection, selectors.EVENT_READ)
                hole.connections += 1
                continue
            connection = next(one for one in taken if one is key.fileobj)
            data = connection.recv(65536)
            hole.received += data
            if not data:
                ready.unregister(connection)

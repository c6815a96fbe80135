"""TCP ports of this machine's loopback."""

import errno
import itertools
import random
import socket
from pathlib import Path

from app.core import errors
from app.dev import directory

ADDRESS = "127.0.0.1"
PORTS = range(20_000, 30_000)
"""Below the ports that systems give to outgoing connections: a client that retries against a
server that is away could otherwise be given the server's own port, and keep it from coming back."""


def free_ports(count: int) -> list[int]:
    """Different TCP ports of the loopback that nobody listens on.

    Raises:
        SettingsError: if there are not so many.
    """
    found = list(itertools.islice(filter(is_free, random.sample(PORTS, 500)), count))
    if len(found) == count:
        return found
    raise errors.SettingsError("PORT can't be chosen: no TCP port of the loopback is free")


def is_free(port: int) -> bool:
    """Whether a server could listen on this TCP port of the loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError:
            return False
        return True


def remembered_port(path: Path) -> int:
    """The port that the file holds if it is still free, else a free one, which the file then holds."""
    port = int(directory.remembered(path, lambda: str(free_ports(1)[0])))
    if is_free(port):
        return port
    path.unlink()
    return int(directory.remembered(path, lambda: str(free_ports(1)[0])))


def listening_address(host: str, port: int) -> tuple[str, int]:
    """Make sure that a server can listen on HOST and PORT, and say where it will be reached from here.

    Raises:
        SettingsError: if the port is taken, or the host is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as failed:
        if failed.errno == errno.EADDRINUSE:
            raise errors.SettingsError(f"PORT {port} is in use: stop what listens there, or set PORT") from None
        if failed.errno == errno.EACCES:
            raise errors.SettingsError(f"PORT {port} is not allowed to this user: set PORT") from None
        raise errors.SettingsError(f"HOST is wrong: this machine has no such address ({failed.strerror})") from None
    return {"0.0.0.0": ADDRESS, "::": "::1"}.get(str(address[0]), str(address[0])), port  # noqa: S104

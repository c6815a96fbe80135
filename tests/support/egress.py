"""A world of its own, in which every address of the internet is this machine's.

    unshare --user --map-root-user --net --mount python -m tests.support.egress FILE

Inside, `lo` is the only interface and all addresses are local to it, so no packet
can leave. A name server answers the C library's real questions, and a receiver
listens on port 443 of every address and notes each connection before TLS begins.
FILE holds the cases (`Case`) as JSON; the results (`Result`) are printed as JSON.
"""

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path

from app.utils import guard, webhook

TLS_PORT = 443
DNS_PORT = 53
A, AAAA = 1, 28


@dataclass(frozen=True, kw_only=True)
class Case:
    """Webhooks to one URL, one after another.

    Attributes:
        answers: what the name server says to the first look-up of the host, to the next, …; the last one stays.
        guarded: False lets everything through, to show that the receiver would have seen it.
    """

    name: str
    url: str
    answers: Sequence[Sequence[str]] = ()
    posts: int = 1
    guarded: bool = True


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of each POST of a case, and the addresses at which connections arrived."""

    name: str
    outcomes: Sequence[str]
    reached: Sequence[str]


class NameServer:
    """Answers A and AAAA questions from a table, and counts them."""

    def __init__(self) -> None:
        self.table: dict[str, Sequence[Sequence[str]]] = {}
        self._asked: Counter[tuple[str, int]] = Counter()

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
            port.bind(("127.0.0.1", DNS_PORT))
            port.setblocking(False)
            while True:
                question, asker = await loop.sock_recvfrom(port, 4096)
                await loop.sock_sendto(port, self._reply(question), asker)

    def _reply(self, question: bytes) -> bytes:
        labels, place = [], 12
        while size := question[place]:
            labels.append(question[place + 1 : place + 1 + size].decode())
            place += 1 + size
        (kind,) = struct.unpack_from("!H", question, place + 1)
        records = [_record(text) for text in self._answer(".".join(labels), kind)]
        header = question[:2] + struct.pack("!HHHHH", 0x8180, 1, len(records), 0, 0)
        return header + question[12 : place + 5] + b"".join(records)

    def _answer(self, name: str, kind: int) -> list[str]:
        turns = self.table.get(name, [[]])
        turn = turns[min(self._asked[name, kind], len(turns) - 1)]
        self._asked[name, kind] += 1
        return [text for text in turn if (ip_address(text).version == 4) == (kind == A)]


def _record(text: str) -> bytes:
    address = ip_address(text)
    kind = A if isinstance(address, IPv4Address) else AAAA
    return b"\xc0\x0c" + struct.pack("!HHIH", kind, 1, 0, len(address.packed)) + address.packed


class Sink:
    """Accepts on port 443 of every address, notes which one was meant, and answers 204 inside TLS."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.reached: list[str] = []
        self._context = context
        self._answers: set[asyncio.Task[None]] = set()

    async def accept(self, family: socket.AddressFamily, anywhere: str) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server((anywhere, TLS_PORT), family=family, backlog=64) as listening:
            listening.setblocking(False)
            while True:
                connection, _ = await loop.sock_accept(listening)
                self.reached.append(connection.getsockname()[0])
                task = asyncio.create_task(self._answer(connection))
                self._answers.add(task)
                task.add_done_callback(self._answers.discard)

    async def _answer(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            transport, protocol = await loop.connect_accepted_socket(
                lambda: asyncio.StreamReaderProtocol(reader), connection, ssl=self._context
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, loop)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
            writer.close()
            await writer.wait_closed()


def _become_the_internet() -> None:
    """Every address is local to `lo`, and the C library asks the name server on 127.0.0.1."""
    directory = Path(tempfile.mkdtemp())
    for name, text in (
        ("resolv.conf", "nameserver 127.0.0.1\noptions timeout:2 attempts:2\nsearch wrong.example\n"),
        ("nsswitch.conf", "hosts: dns\n"),
    ):
        (directory / name).write_text(text)
        subprocess.run(["mount", "--bind", str(directory / name), f"/etc/{name}"], check=True)
    for command in ("link set lo up", "route add local 0.0.0.0/0 dev lo", "-6 route add local ::/0 dev lo"):
        subprocess.run(["ip", *command.split()], check=True)


async def results(cases: Sequence[Case], crt: str, key: str) -> list[Result]:
    """What became of each case; also those that want the receiver are over when this returns."""
    names = NameServer()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(crt, key)
    sink = Sink(context)
    serving = [
        asyncio.create_task(names.serve()),
        asyncio.create_task(sink.accept(socket.AF_INET, "0.0.0.0")),  # noqa: S104  # every address is the point
        asyncio.create_task(sink.accept(socket.AF_INET6, "::")),
    ]
    trusted = ssl.create_default_context(cafile=crt)
    found = []
    for case in cases:
        names.table = {case.url.split("/")[2]: case.answers}
        sink.reached.clear()
        rules = guard.EgressRules(allow_private=not case.guarded)
        outcomes = []
        async with webhook.Sender(rules, ssl_context=trusted, deadline_seconds=5.0 if case.guarded else 1.0) as sender:
            for _ in range(case.posts):
                receipt = await sender.post(
                    case.url, webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1
                )
                outcomes.append(str(receipt.outcome))
        found.append(Result(name=case.name, outcomes=outcomes, reached=list(sink.reached)))
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)
    return found


def main() -> None:
    """Run the cases of a file, and print their results."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    _become_the_internet()
    cases = [Case(**one) for one in asked["cases"]]
    found = asyncio.run(results(cases, asked["crt"], asked["key"]))
    sys.stdout.write(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()

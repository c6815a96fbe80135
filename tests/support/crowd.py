"""Many receivers of webhooks, each a port of loopback, in a process of their own.

    with Crowd(100, seed, directory) as crowd:
        crowd.urls ...
        crowd.posts()

What they make of a webhook is decided by the seed and its id alone: they fail it
up to three times, in one way or another, and take it from then on. So it is known
beforehand however its POSTs are lost, repeated or cut off. Every POST that came
whole is written down before it is answered.
"""

import asyncio
import json
import random
import socket
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MOST_FAILURES = 3
_TIMES = (55, 20, 15, 10)
"""Of a hundred webhooks, how many are failed never, once, twice and three times."""
_QUICK = ("500", "503", "404", "reset", "half")
_WEARY = ("429", "silence")
"""After these a webhook rests for a minute at least, so no more than a few have one, and none has two."""
_WEARY_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Heard:
    """A POST that came. `answered` is the status that was said; None if none was."""

    webhook_id: str
    body: bytes
    answered: int | None


def failures(seed: str, webhook_id: str) -> list[str]:
    """How the first POSTs of a webhook are failed, one after another."""
    chance = random.Random(f"{seed} {webhook_id}")
    [times] = chance.choices(range(MOST_FAILURES + 1), _TIMES)
    found = [chance.choice(_QUICK) for _ in range(times)]
    if found and chance.random() < _WEARY_SHARE:
        found[chance.randrange(times)] = chance.choice(_WEARY)
    return found


class Crowd:
    """So many receivers, that serve until the block ends."""

    def __init__(self, count: int, seed: str, directory: Path) -> None:
        self._ledger = directory / "heard"
        self._ledger.touch()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crowd", str(count), seed, str(self._ledger)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.urls: list[str] = [f"http://127.0.0.1:{port}" for port in json.loads(self._process.stdout.readline())]

    def posts(self) -> list[Heard]:
        """What came so far, in its order."""
        lines = self._ledger.read_text().splitlines()
        return [Heard(one["id"], one["body"].encode(), one["answered"]) for one in map(json.loads, lines)]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Receiver(asyncio.Protocol):
    """One connection, whose requests come one by one and name their length."""

    def __init__(self, seed: str, ledger: Any, seen: Counter[str]) -> None:
        self._seed = seed
        self._ledger = ledger
        self._seen = seen
        self._came = b""
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._came += data
        head, blank, body = self._came.partition(b"\r\n\r\n")
        if not blank:
            return
        lines = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
        headers = {name.strip().lower(): value.strip().decode() for name, _, value in lines}
        if len(body) < int(headers[b"content-length"]):
            return
        self._came = b""
        self._take(headers[b"webhook-id"], body)

    def _take(self, webhook_id: str, body: bytes) -> None:
        planned = failures(self._seed, webhook_id)
        nth = self._seen[webhook_id]
        self._seen[webhook_id] += 1
        said = planned[nth] if nth < len(planned) else "200"
        status = int(said) if said.isdigit() else None
        self._ledger.write(json.dumps({"id": webhook_id, "body": body.decode(), "answered": status}) + "\n")
        self._ledger.flush()
        if status is not None:
            self._transport.write(f"HTTP/1.1 {status} Said\r\ncontent-length: 4\r\n\r\nsaid".encode())
        elif said == "half":
            self._transport.write(b"HTTP/1.1 20")
            self._transport.close()
        elif said == "reset":
            # Nothing lingers: the peer gets an RST, not an end.
            accepted = self._transport.get_extra_info("socket")
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()


async def _serve(count: int, seed: str, ledger: Path) -> None:
    loop = asyncio.get_running_loop()
    seen: Counter[str] = Counter()
    with ledger.open("a") as lines:
        servers = [
            await loop.create_server(lambda: _Receiver(seed, lines, seen), "127.0.0.1", 0, backlog=256)
            for _ in range(count)
        ]
        print(json.dumps([one.sockets[0].getsockname()[1] for one in servers]), flush=True)  # noqa: T201  # to `Crowd`
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))

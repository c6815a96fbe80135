"""How a pool child talks to the keeper: it asks for claims, and says when it has put a report into the spool.

A child makes a pair of sockets for itself and passes one of them through the
door, a socket that the whole worker inherits. A keeper that dies takes its end
along, so that the child notices and asks the next one; what waits in the door
meanwhile stays there. Asking again is safe: a claim that is repeated with its
own token succeeds.

A frame is its length (4 bytes, little-endian), its kind (1 byte) and what it says.
"""

import contextlib
import json
import logging
import socket
import struct
import time
from typing import Any
from uuid import UUID

from app import lifecycle
from app.core.statuses import TaskStatus
from app.lifecycle import Budgets, Claim, Claimed, Unclaimed, Wanted
from app.worker.spool import Place, Report, Spool

CLAIM, CLAIMED = b"c", b"C"
"""Asks for a claim (JSON), and answers (JSON)."""
SPOOLED, SETTLED = b"s", b"S"
"""Says where a report is and whether an answer is wanted, and answers with the status of the task, or nothing."""
UNKNOWN = b"?"
"""In place of a status: the report was written, and what came of it is not known any more."""
HEAD = struct.Struct("<Ic")
WHERE = struct.Struct("<HB?")  # slot, cell, whether the child waits for an answer
AGAIN_SECONDS = 0.001
"""After which a child that has lost the keeper asks again, first; then less and less often."""
AGAIN_SECONDS_AT_MOST = 0.5
ROOM_SECONDS = 0.001
"""After which a child looks for room in its spool again, first; then less and less often."""
ROOM_SECONDS_AT_MOST = 0.05

log = logging.getLogger(__name__)


def frame(kind: bytes, said: bytes) -> bytes:
    """What goes over the line."""
    return HEAD.pack(len(said), kind) + said


def taken_from(buffer: bytearray) -> tuple[bytes, bytes] | None:
    """Take the first frame, its kind and what it says, out of what has come; None if it is not whole yet."""
    if len(buffer) < HEAD.size:
        return None
    length, kind = HEAD.unpack_from(buffer)
    end = HEAD.size + length
    if len(buffer) < end:
        return None
    said = bytes(buffer[HEAD.size : end])
    del buffer[:end]
    return kind, said


def encode_wanted(wanted: Wanted, slot: int) -> bytes:
    """A claim that the child in this slot asks for."""
    claim = wanted.claim
    return json.dumps((claim.task_id.hex, claim.attempt, claim.token.hex, wanted.name, wanted.worker, slot)).encode()


def decode_wanted(said: bytes) -> tuple[Wanted, int]:
    """What is asked for, and by the child in which slot."""
    task_id, attempt, token, name, worker, slot = json.loads(said)
    return Wanted(Claim(UUID(hex=task_id), attempt, UUID(hex=token)), name, worker), slot


def encode_found(found: Claimed | Unclaimed) -> bytes:
    """What a claim has found."""
    if isinstance(found, Unclaimed):
        return json.dumps(found.name).encode()
    spent = found.budgets
    said = (
        found.queue,
        found.args,
        found.kwargs,
        (spent.failures, spent.crashes, spent.losses, spent.refusals, spent.max_retries),
        found.time_limit,
        found.traceparent,
        found.waited_seconds,
        found.limited_with,
    )
    return json.dumps(said, ensure_ascii=False).encode()


def decode_found(said: bytes, wanted: Wanted) -> Claimed | Unclaimed:
    """The same, for who has asked for it."""
    found: Any = json.loads(said)
    if isinstance(found, str):
        return Unclaimed[found]
    queue, args, kwargs, spent, time_limit, traceparent, waited_seconds, limited_with = found
    failures, crashes, losses, refusals, max_retries = spent
    return Claimed(
        claim=wanted.claim,
        name=wanted.name,
        queue=queue,
        args=args,
        kwargs=kwargs,
        budgets=Budgets(failures=failures, crashes=crashes, losses=losses, refusals=refusals, max_retries=max_retries),
        time_limit=time_limit,
        traceparent=traceparent,
        waited_seconds=waited_seconds,
        limited_with=limited_with,
    )


class Door:
    """Where children pass the ends of their lines through: made by the main process, inherited by all."""

    def __init__(self, outside: socket.socket, inside: socket.socket) -> None:
        self._outside = outside
        self.inside = inside
        """The keeper's side."""

    @classmethod
    def create(cls) -> "Door":
        """A door without anybody behind it yet."""
        return cls(*socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))

    def close(self) -> None:
        """Close both sides, as far as this process has them."""
        self._outside.close()
        self.inside.close()

    def line(self) -> socket.socket:
        """A new line to the keeper, or to the next one if there is none."""
        mine, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._outside, [b"!"], [theirs.fileno()])
        return mine


class Line:
    """The child's end. One thread uses it."""

    def __init__(self, door: Door, spool: Spool, slot: int) -> None:
        self._door = door
        self._spool = spool
        self._slot = slot
        self._socket: socket.socket | None = None
        self._buffer = bytearray()

    def claim(self, wanted: Wanted) -> lifecycle.Claimed | Unclaimed:
        """Claim an attempt, however long it takes until Postgres answers (see `lifecycle.claim_or_hold`)."""
        asked = frame(CLAIM, encode_wanted(wanted, self._slot))
        seconds = AGAIN_SECONDS
        while True:
            try:
                self._send(asked)
                return decode_found(self._answer(CLAIMED), wanted)
            except OSError as failed:
                log.log(logging.WARNING if seconds == AGAIN_SECONDS else logging.DEBUG, "no keeper: %s", failed)
            self.hang_up()
            time.sleep(seconds)
            seconds = min(2 * seconds, AGAIN_SECONDS_AT_MOST)

    def report(self, report: Report, *, wait: bool) -> TaskStatus | None:
        """Have the keeper write what became of an attempt. Once this returns, the report is safe.

        Args:
            report: what became of it.
            wait: until it is written.

        Returns:
            With `wait`, where the task went; None if the attempt was superseded, and without `wait`.

        Raises:
            TypeError, ValueError: if it can't be written down (`Report.encode`, `Spool.put`): then it is not reported.
        """
        place = self._put(report.encode())
        try:
            self._send(frame(SPOOLED, WHERE.pack(*place, wait)))
            said = self._answer(SETTLED) if wait else b""
        except OSError:
            # The next keeper finds it. What it will make of it, this process can only suppose.
            self.hang_up()
            said = UNKNOWN if wait else b""
        if said == UNKNOWN:
            return lifecycle.decide(report.budgets, report.outcome).status
        return TaskStatus(said.decode()) if said else None

    def _put(self, raw: bytes) -> Place:
        seconds = ROOM_SECONDS
        while (place := self._spool.put(self._slot, raw)) is None:
            # Postgres has not taken the last ones yet.
            time.sleep(seconds)
            seconds = min(2 * seconds, ROOM_SECONDS_AT_MOST)
        return place

    def _send(self, raw: bytes) -> None:
        if self._socket is None:
            self._socket = self._door.line()
        self._socket.sendall(raw)

    def _answer(self, kind: bytes) -> bytes:
        """What the keeper says. Raises OSError if it is gone."""
        assert self._socket is not None  # noqa: S101  # it was asked just now
        while True:
            while (found := taken_from(self._buffer)) is not None:
                if found[0] == kind:
                    return found[1]
            got = self._socket.recv(65_536)
            if not got:
                raise ConnectionResetError
            self._buffer += got

    def hang_up(self) -> None:
        """End this line; the next question makes another."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # a task's own code may have closed it
                self._socket.close()
        self._socket = None
        self._buffer.clear()

"""What became of attempts, until Postgres has it: in memory that the children of a pool share with the keeper.

A child that has run a task puts a report here and takes the next message; the
keeper writes what was reported (`recorder`). A report is safe from the death of
any process from then on: the next keeper finds what the one before it has left,
and what a child has reported does not die with it.

Each child has a few cells for what is small, and one for what is large. It
writes to a free one, the keeper frees it. A cell is marked last, and carries a
checksum: one that was written half way is none.
"""

import contextlib
import json
import mmap
import os
import struct
import tempfile
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

from app import lifecycle
from app.lifecycle import Budgets, Claim, Error, Log, Outcome

SMALL_CELLS = 16
"""Reports of one child that may wait for Postgres, unless they are large: as many tasks as it can be ahead."""
SMALL_BYTES = 16 * 1024
LARGE_BYTES = 2 * 1024 * 1024
"""More than a report can have: a result has one MiB, and what else there is has its own limits."""
_CELLS = SMALL_CELLS + 1
_LARGE = SMALL_CELLS
_PAGE = mmap.ALLOCATIONGRANULARITY
_OF_ONE = SMALL_CELLS * SMALL_BYTES + LARGE_BYTES
_HEAD = struct.Struct("<II")  # length, checksum
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a child has to say of an attempt that it ran.

    Attributes:
        name: of the task.
        queue: where it waited.
        budgets: what the task had spent when it was claimed.
        traceparent: of its submit.
        limited_with: see `lifecycle.Claimed`.
        outcome: what happened.
        log: what the task's code has logged, if anything.
        run_seconds: how long that ran.
    """

    claim: Claim
    name: str
    queue: str
    budgets: Budgets
    traceparent: str | None
    limited_with: str | None
    outcome: Outcome
    log: Log | None
    run_seconds: float

    def encode(self) -> bytes:
        """As bytes: the result stands behind the rest, as it is.

        Raises:
            TypeError: if something in it is no JSON.
            ValueError: if it is a number of too many digits.
        """
        claim, budgets = self.claim, self.budgets
        kind, said, result = _said(self.outcome)
        head = json.dumps(
            (
                (claim.task_id.hex, claim.attempt, claim.token.hex),
                self.name,
                self.queue,
                (budgets.failures, budgets.crashes, budgets.losses, budgets.refusals, budgets.max_retries),
                self.traceparent,
                self.limited_with,
                kind,
                said,
                self.log and (self.log.lines, self.log.dropped),
                self.run_seconds,
            )
        ).encode()
        return _LENGTH.pack(len(head)) + head + result

    @staticmethod
    def decode(raw: bytes) -> "Report":
        """What `encode` has made of one."""
        [length] = _LENGTH.unpack_from(raw)
        end = _LENGTH.size + length
        (task_id, attempt, token), name, queue, spent, traceparent, limited_with, kind, said, log, run_seconds = (
            json.loads(raw[_LENGTH.size : end])
        )
        failures, crashes, losses, refusals, max_retries = spent
        return Report(
            claim=Claim(UUID(hex=task_id), attempt, UUID(hex=token)),
            name=name,
            queue=queue,
            budgets=Budgets(
                failures=failures, crashes=crashes, losses=losses, refusals=refusals, max_retries=max_retries
            ),
            traceparent=traceparent,
            limited_with=limited_with,
            outcome=_outcome(kind, said, raw[end:]),
            log=Log(*log) if log else None,
            run_seconds=run_seconds,
        )


def _said(outcome: Outcome) -> tuple[str, list[Any], bytes]:
    """The name of an outcome, what belongs to it, and its result."""
    kind = type(outcome).__name__
    match outcome:
        case lifecycle.Succeeded(result):
            return kind, [], result.encode()
        case lifecycle.Failed(error) | lifecycle.Misfit(error):
            return kind, [error.type, error.message, error.traceback], b""
        case lifecycle.RetryAsked(error, delay_seconds, max_retries):
            return kind, [error.type, error.message, error.traceback, delay_seconds, max_retries], b""
        case lifecycle.Interrupted() | lifecycle.Cancelled():
            return kind, [], b""
        case _:
            raise TypeError(f"a child does not report that it was {kind}")


def _outcome(kind: str, said: list[Any], result: bytes) -> Outcome:
    match kind:
        case "Succeeded":
            return lifecycle.Succeeded(result.decode())
        case "Failed":
            return lifecycle.Failed(_error(said))
        case "Misfit":
            return lifecycle.Misfit(_error(said))
        case "RetryAsked":
            return lifecycle.RetryAsked(_error(said), said[3], said[4])
        case "Interrupted":
            return lifecycle.Interrupted()
        case "Cancelled":
            return lifecycle.Cancelled()
        case _:
            raise ValueError(f"no child reports {kind}")


def _error(said: list[Any]) -> Error:
    return Error(type=said[0], message=said[1], traceback=said[2])


class Place(NamedTuple):
    """A cell: of which slot, and which of its cells."""

    slot: int
    cell: int


class Spool:
    """The shared memory: made by the worker's main process, inherited by children and keeper."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, 0)
        self._slots = next(n for n in range(len(self._memory)) if _size(n) >= len(self._memory))

    @classmethod
    def create(cls, slots: int) -> "Spool":
        """Room for what the children in so many slots report. Memory is taken where something was written."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("taskqueue-spool")
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.truncate(fd, _size(slots))
        return cls(fd)

    def put(self, slot: int, raw: bytes) -> Place | None:
        """Keep a report of the child in this slot.

        Returns:
            Where it is; None if there is no room until some are freed.

        Raises:
            ValueError: if it is larger than any report can be.
        """
        if len(raw) > LARGE_BYTES - _HEAD.size:
            raise ValueError(f"a report of {len(raw)} bytes")
        cells = range(SMALL_CELLS) if len(raw) <= SMALL_BYTES - _HEAD.size else range(_LARGE, _CELLS)
        first = slot * _CELLS
        for cell in cells:
            if not self._memory[first + cell]:
                offset = self._offset(slot, cell)
                begin = offset + _HEAD.size
                self._memory[begin : begin + len(raw)] = raw
                self._memory[offset:begin] = _HEAD.pack(len(raw), zlib.crc32(raw))
                self._memory[first + cell] = 1
                return Place(slot, cell)
        return None

    def get(self, place: Place) -> bytes | None:
        """A report; None if there is none, or it can't be read (yet)."""
        if not self._memory[place.slot * _CELLS + place.cell]:
            return None
        offset = self._offset(*place)
        length, checksum = _HEAD.unpack_from(self._memory, offset)
        begin = offset + _HEAD.size
        if length > LARGE_BYTES:
            return None
        raw = self._memory[begin : begin + length]
        return raw if zlib.crc32(raw) == checksum else None

    def free(self, place: Place) -> None:
        """Forget a report that Postgres has."""
        if place.cell == _LARGE:
            self._give_back(self._offset(*place), LARGE_BYTES)
        self._memory[place.slot * _CELLS + place.cell] = 0

    def places(self) -> list[Place]:
        """Where reports wait."""
        marks = self._memory[: self._slots * _CELLS]
        found, at = [], marks.find(b"\x01")
        while at >= 0:
            found.append(Place(*divmod(at, _CELLS)))
            at = marks.find(b"\x01", at + 1)
        return found

    def _offset(self, slot: int, cell: int) -> int:
        return _marks(self._slots) + slot * _OF_ONE + cell * SMALL_BYTES

    def _give_back(self, offset: int, length: int) -> None:
        """Let the system have the memory of what was large."""
        if hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):  # where the file is on a disk that can't
                self._memory.madvise(mmap.MADV_REMOVE, offset, length)


def _marks(slots: int) -> int:
    return -(-slots * _CELLS // _PAGE) * _PAGE


def _size(slots: int) -> int:
    return _marks(slots) + slots * _OF_ONE

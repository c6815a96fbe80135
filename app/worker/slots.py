"""What the children of a pool run right now, in memory that they share with the keeper.

A child writes its slot before it claims and clears it after it settles, so the
keeper never misses an attempt, whatever kills the child in between. Each slot
carries a checksum: a reader that meets a write half way reads again.

The keeper may order the death of one attempt, its cancel, or that it hears of its
soft time limit, but nothing of a process. It writes the order, then looks whether
the slot still shows that attempt; the child clears its slot, then looks whether
there is an order for what it just ran. One of the two sees the other, so a kill
can't hit the task that comes next.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from app.lifecycle import Claim

_HEADER = 64
_SLOT = 144
_DEATH_OFFSET = 96
_CANCEL_OFFSET = 112
_SOFT_LIMIT_OFFSET = 128
_RECORD = struct.Struct("<qq16sq16sddd")  # pid, born, task id, attempt, token, started, limit, soft limit
_BEAT = struct.Struct("<d")
_BEAT_OFFSET = 8
_HAS_PROC = Path("/proc/self/stat").exists()
_SUM = struct.Struct("<I")
_NOBODY = bytes(16)


@dataclass(frozen=True, slots=True)
class Running:
    """One attempt that a child shows.

    Attributes:
        claim: which.
        started: when, on the machine's monotonic clock (seconds), which all its processes share;
            0 while its claim is still on the wire.
        limit_seconds: how long it may take; 0 is for ever.
        soft_limit_seconds: after how long it is told to come to an end; 0 is never.
    """

    claim: Claim
    started: float
    limit_seconds: float
    soft_limit_seconds: float = 0.0

    def overdue(self) -> bool:
        """Whether it has taken longer than it may."""
        return self._past(self.limit_seconds)

    def softly_overdue(self) -> bool:
        """Whether it has taken so long that it is to be told."""
        return self._past(self.soft_limit_seconds)

    def _past(self, seconds: float) -> bool:
        return bool(seconds) and time.monotonic() - self.started > seconds


@dataclass(frozen=True, slots=True)
class Slot:
    """A slot as it was read.

    Attributes:
        index: which.
        pid: of the child that has it.
        born: when that child was started, in the kernel's own units: a pid alone may be somebody else's by now.
        running: what runs there; None: the child is idle.
    """

    index: int
    pid: int
    born: int
    running: Running | None

    def lives(self) -> bool:
        """Whether the child runs. One that is dead but not yet waited for does not."""
        if not _HAS_PROC:
            return _answers(self.pid)
        state, born = _look_up(self.pid)
        return state not in {"", "Z", "X"} and born == self.born


def _look_up(pid: int) -> tuple[str, int]:
    """A process's state and start time (proc(5), `/proc/pid/stat`); ("", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return "", 0


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Slots:
    """The shared memory: made by the worker's main process, inherited by children and keeper."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, 0)
        self._who = 0, 0
        self.count = (len(self._memory) - _HEADER) // _SLOT

    @classmethod
    def create(cls, concurrency: int) -> "Slots":
        """Room for `concurrency` children and for their successors before the dead are cleared away."""
        with tempfile.TemporaryFile() as file:
            file.truncate(_HEADER + _SLOT * (concurrency * 4 + 16))
            return cls(os.dup(file.fileno()))

    @property
    def stopping(self) -> bool:
        """Whether the worker is shutting down, so that a dead child's task is handed back, not billed."""
        return self._memory[0] == 1

    def announce_stop(self) -> None:
        """Say that the worker is shutting down."""
        self._memory[0] = 1

    @property
    def keeper_beat(self) -> float:
        """When the keeper last looked, on the monotonic clock (seconds)."""
        found: float = _BEAT.unpack_from(self._memory, _BEAT_OFFSET)[0]
        return found

    def beat(self) -> None:
        """Say that the keeper looks."""
        _BEAT.pack_into(self._memory, _BEAT_OFFSET, time.monotonic())

    def occupy(self) -> int:
        """Take a free slot for this process; returns its index.

        Raises:
            RuntimeError: if there is none, because nobody has cleared away the dead for long.
        """
        with self._locked():
            for index in range(self.count):
                if self.read(index) is None:
                    self._write(index, None)
                    return index
        raise RuntimeError("no free slot: the keeper is not clearing the dead away")

    def show(self, index: int, running: Running) -> None:
        """Show what this process runs."""
        self._write(index, running)

    def clear(self, index: int) -> None:
        """Show that this process is idle."""
        self._write(index, None)

    def free(self, index: int) -> None:
        """Give a dead child's slot to whoever comes next."""
        with self._locked():
            offset = _HEADER + index * _SLOT
            self._memory[offset : offset + _SLOT] = bytes(_SLOT)

    def read(self, index: int) -> Slot | None:
        """A slot; None if it is free, or was being written for the whole of a hundred looks."""
        offset = _HEADER + index * _SLOT
        for _ in range(100):
            raw = bytes(self._memory[offset : offset + _RECORD.size + _SUM.size])
            record = raw[: _RECORD.size]
            pid, born, task_id, attempt, token, started, limit, soft_limit = _RECORD.unpack(record)
            if pid == 0 and not any(raw):
                return None
            if _SUM.unpack(raw[_RECORD.size :])[0] == zlib.crc32(record):
                if task_id == _NOBODY:
                    return Slot(index, pid, born, None)
                claim = Claim(UUID(bytes=task_id), attempt, UUID(bytes=token))
                return Slot(index, pid, born, Running(claim, started, limit, soft_limit))
        return None

    def all(self) -> list[Slot]:
        """Every slot that is taken."""
        return [slot for slot in map(self.read, range(self.count)) if slot is not None]

    def order_death(self, index: int, claim: Claim) -> bool:
        """Order the death of an attempt.

        Returns:
            Whether the child still shows it: then, and only then, the child may be killed.
        """
        return self._order(index, claim, _DEATH_OFFSET)

    def ordered_to_die(self, index: int, claim: Claim) -> bool:
        """Whether the keeper ordered the death of this attempt, which has just been cleared."""
        return self._ordered(index, claim, _DEATH_OFFSET)

    def order_cancel(self, index: int, claim: Claim) -> bool:
        """Order an attempt to stop. Returns whether the child still shows it, and may be told by a signal."""
        return self._order(index, claim, _CANCEL_OFFSET)

    def ordered_to_cancel(self, index: int, claim: Claim) -> bool:
        """Whether the keeper ordered this attempt to stop."""
        return self._ordered(index, claim, _CANCEL_OFFSET)

    def order_soft_limit(self, index: int, claim: Claim) -> bool:
        """Say that an attempt has passed its soft limit. Returns whether the child still shows it, as above."""
        return self._order(index, claim, _SOFT_LIMIT_OFFSET)

    def ordered_by_soft_limit(self, index: int, claim: Claim) -> bool:
        """Whether the keeper said that this attempt has passed its soft limit."""
        return self._ordered(index, claim, _SOFT_LIMIT_OFFSET)

    def _order(self, index: int, claim: Claim, cell: int) -> bool:
        offset = _HEADER + index * _SLOT + cell
        self._memory[offset : offset + 16] = claim.token.bytes
        slot = self.read(index)
        return slot is not None and slot.running is not None and slot.running.claim == claim

    def _ordered(self, index: int, claim: Claim, cell: int) -> bool:
        offset = _HEADER + index * _SLOT + cell
        return bytes(self._memory[offset : offset + 16]) == claim.token.bytes

    def _write(self, index: int, running: Running | None) -> None:
        who = os.getpid(), self._born()
        if running is None:
            record = _RECORD.pack(*who, _NOBODY, 0, _NOBODY, 0.0, 0.0, 0.0)
        else:
            claim = running.claim
            times = running.started, running.limit_seconds, running.soft_limit_seconds
            record = _RECORD.pack(*who, claim.task_id.bytes, claim.attempt, claim.token.bytes, *times)
        offset = _HEADER + index * _SLOT
        self._memory[offset : offset + _RECORD.size + _SUM.size] = record + _SUM.pack(zlib.crc32(record))

    def _born(self) -> int:
        pid = os.getpid()
        if self._who[0] != pid:
            self._who = pid, _look_up(pid)[1]
        return self._who[1]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self.fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)

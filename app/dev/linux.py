"""What a parent may ask of Linux for its children: to end with it, to run as another user, to be adopted.

Everything here is looked up before a fork, because after one a child may only
make plain system calls. On another system each function does what is left of
its duty without Linux, which may be nothing.
"""

import ctypes
import os
import pwd
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

IS_LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_SECUREBITS = 28
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION_3 = 0x20080522
_CAP_DAC_OVERRIDE = 1
_CAP_DAC_READ_SEARCH = 2
_PROC = Path("/proc")

_libc = ctypes.CDLL(None, use_errno=True)
if IS_LINUX:
    _libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


_Capabilities = _CapabilityData * 2


@dataclass(frozen=True, kw_only=True, slots=True)
class User:
    """Whom a child runs as: numeric user and group."""

    uid: int
    gid: int


def unprivileged_user() -> User | None:
    """`nobody`, when this process is root and a server refuses to be; None when it may run as we do."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return User(uid=nobody.pw_uid, gid=nobody.pw_gid)


def before_exec(*, parent_death_signal: signal.Signals, user: User | None = None) -> Callable[[], None]:
    """What a child does between fork and exec: become `user`, and ask to end with its parent.

    The user keeps the right to pass through directories that are closed to it:
    a clone may live under `/root`, whose mode is not ours to change. The death
    signal is asked for last, because changing the user clears it.

    Args:
        parent_death_signal: sent to the child when the thread that started it ends.
        user: whom to become; None stays who we are.

    Returns:
        A function for `subprocess.Popen(preexec_fn=…)`.
    """
    parent = os.getpid()
    become = _becoming(user) if user is not None else None
    prctl = _libc.prctl if IS_LINUX else None
    number = int(parent_death_signal)

    def preexec() -> None:
        if become is not None:
            become()
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
            if os.getppid() != parent:  # it died before we asked
                os._exit(1)

    return preexec


def _becoming(user: User) -> Callable[[], None]:
    if not IS_LINUX:
        return lambda: _set_ids(user)
    prctl, capset = _libc.prctl, _libc.capset
    kept = [bit for bit in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH) if _permitted() & (1 << bit)]
    mask = sum(1 << bit for bit in kept)
    header = ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION_3, 0))
    data = ctypes.byref(_Capabilities(_CapabilityData(mask, mask, mask), _CapabilityData(0, 0, 0)))

    def become() -> None:
        prctl(_PR_SET_KEEPCAPS, 1, 0, 0, 0)
        prctl(_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)  # access(2) would not count what is kept
        _set_ids(user)
        capset(header, data)
        for bit in kept:
            prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, bit, 0, 0)

    return become


def _set_ids(user: User) -> None:
    os.setgroups([])
    os.setgid(user.gid)
    os.setuid(user.uid)


def _permitted() -> int:
    """The capabilities that this process may hand on; a container may have taken some away."""
    header = _CapabilityHeader(_CAPABILITY_VERSION_3, 0)
    data = _Capabilities()
    _libc.capget(ctypes.byref(header), ctypes.byref(data))
    return int(data[0].permitted)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies, so that none gets away."""
    if IS_LINUX:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> list[int]:
    """The ids of this process's children, adopted ones included; empty where there is no `/proc`."""
    found: list[int] = []
    for stat in _PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has gone meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def processes_in(directory: Path, program: str) -> Iterator[int]:
    """The ids of the processes that run `program` in `directory`; none where there is no `/proc`."""
    for process in _PROC.glob("[0-9]*"):
        try:
            named = (process / "exe").readlink().name.removesuffix(" (deleted)") == program
            if named and (process / "cwd").readlink() == directory:
                yield int(process.name)
        except OSError:  # it has gone meanwhile, or is not ours to look at
            continue

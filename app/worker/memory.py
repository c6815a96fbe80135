"""How much memory a task may take, and whether the kernel killed a process for taking too much.

Where a container runs out of memory, the kernel kills one of its processes or, as
kubelet sets it up (`memory.oom.group`), all of them. So a task gets an allowance
of its own if the operator says so, and a `MemoryError` beyond it, long before that.
"""

import contextlib
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path

MEBIBYTE = 1024 * 1024
CGROUPS = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")
KILL_FRESH_SECONDS = 5.0
"""How long a kill may precede the death that it explains: a large process takes its time to go."""


@contextlib.contextmanager
def allowance(mebibytes: int | None) -> Iterator[None]:
    """Inside this block the process may take `mebibytes` more than it holds already; beyond that, `MemoryError`.

    None lets it take any. Behind the block there is no limit, so that what the task
    did can be written down whatever it still holds.
    """
    held = _status_bytes("VmData") if mebibytes is not None else None
    if mebibytes is None or held is None:
        yield
        return
    # RLIMIT_DATA counts what a process can write to and shares with nobody: heaps, anonymous mappings, stacks.
    # RLIMIT_AS would also count mapped libraries and files, and what is reserved and never touched, such as the
    # 64 MiB of address space that glibc's malloc sets aside for each thread. Linux does not enforce RLIMIT_RSS.
    before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = held + mebibytes * MEBIBYTE
    limit = min([wanted, *(known for known in before if known != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def most_of_a_child(mebibytes: int) -> int | None:
    """The KiB beyond which a child, forked from this process, is replaced after its task.

    What a task leaves behind is not taken from the next one's allowance; so it must not add up either.
    None where the kernel does not say what a process holds.
    """
    held = _status_bytes("VmRSS")
    return None if held is None else (held + mebibytes * MEBIBYTE // 2) // 1024


def _status_bytes(field: str) -> int | None:
    """A field of proc(5), `/proc/self/status`; None on a system that has none."""
    with contextlib.suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


class OomKills:
    """The kernel's count of processes that it killed in this process's cgroup for want of memory.

    Each kill explains one death. Of two deaths at once, one of them by another cause, either may get it.
    """

    def __init__(self, counter: Path | None) -> None:
        """Count from now on in `counter`; None, and a counter that can't be read, count nothing."""
        self._counter = counter
        self._seen = self._read()
        self._unexplained: list[float] = []

    def look(self) -> None:
        """Note when the count went up, and forget what has explained no death for long."""
        now, count = time.monotonic(), self._read()
        self._unexplained += [now] * (count - self._seen)
        self._unexplained = [when for when in self._unexplained if now - when <= KILL_FRESH_SECONDS]
        self._seen = count

    def explain_a_death(self) -> bool:
        """Whether a death that was just seen was such a kill."""
        self.look()
        if not self._unexplained:
            return False
        self._unexplained.pop(0)
        return True

    def _read(self) -> int:
        if self._counter is not None:
            with contextlib.suppress(OSError):
                return parse_oom_kills(self._counter.read_text())
        return 0


def find_oom_counter(cgroups: Path = CGROUPS) -> Path | None:
    """The file that holds the count for this process; None where there are no memory cgroups."""
    with contextlib.suppress(OSError):
        own = Path("/proc/self/cgroup").read_text()
        return next((path for path in oom_counters(own, cgroups) if path.is_file()), None)
    return None


def oom_counters(own: str, cgroups: Path = CGROUPS) -> Iterator[Path]:
    """Where the counter may be, likeliest first.

    Args:
        own: `/proc/self/cgroup`, see cgroups(7): `4:memory:/path` in version 1, `0::/path` in version 2.
        cgroups: where cgroups are mounted.
    """
    named = [line.split(":", 2) for line in own.splitlines() if line.count(":") > 1]
    places = [(cgroups / "memory", path, "memory.oom_control") for _, has, path in named if "memory" in has.split(",")]
    places += [(cgroups, path, "memory.events") for number, has, path in named if (number, has) == ("0", "")]
    for mount, path, name in places:
        yield mount / path.lstrip("/") / name
        # In a container without a cgroup namespace the path is the host's, and the mount is the container's own.
        yield mount / name


def parse_oom_kills(text: str) -> int:
    """The kills in `memory.events` (version 2) or `memory.oom_control` (version 1); 0 if an old kernel counts none."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0

"""How much processor time others have taken, told finely enough for a round of a few tasks."""

import platform
import time

import psutil

_OF_A_PROCESS = 2
"""CPUCLOCK_SCHED of Linux: the clock of all threads of a process, those that have ended included."""


def cpu_seconds(*processes: psutil.Process) -> float:
    """Processor time that these have taken since they began.

    In nanoseconds on Linux (clock_getcpuclockid(3)), where psutil counts ticks of 10 ms; elsewhere as psutil has it.

    Raises:
        OSError, psutil.NoSuchProcess: if one of them has ended.
    """
    if platform.system() == "Linux":
        return sum(time.clock_gettime((~one.pid << 3) | _OF_A_PROCESS) for one in processes)
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def turns(names: list[str], rounds: int) -> list[list[str]]:
    """In which order to measure, round by round: each comes first, last and in between as often as the others."""
    one_after_the_other = [names[first:] + names[:first] for first in range(len(names))]
    both_ways = [order[:: -1 if back else 1] for order in one_after_the_other for back in (False, True)]
    return [both_ways[number % len(both_ways)] for number in range(rounds)]

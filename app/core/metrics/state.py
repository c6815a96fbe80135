"""What is now: the state of the cluster, which the relay alone exports, and that of a worker's pool."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from app.core.metrics.catalogue import SOURCES
from app.core.metrics.instruments import COUNTS, DISTRIBUTIONS, GAUGES, Labels

Source = Literal["postgres", "redis"]
Show = Callable[..., None]
"""Shows a value: the name of the metric, the value, its labels."""

_DURATION = DISTRIBUTIONS["taskqueue_state_exporter_collect_duration_seconds"]
_ERRORS = COUNTS["taskqueue_state_exporter_errors_total"]
_answered: dict[str, float] = {}


@contextlib.contextmanager
def collecting(source: Source, group: str) -> Iterator[Show]:
    """Show what is read within the block, all at once; if it fails, nothing of it.

    Args:
        source: where it is read from.
        group: what is read together.

    Returns:
        What shows a value, once the block has ended.
    """
    found: dict[tuple[str, Labels], float] = {}

    def show(name: str, value: float, *labels: str) -> None:
        found[name, labels] = value

    began = time.perf_counter()
    _ERRORS.count(source, by=0.0)
    try:
        yield show
    except Exception:
        GAUGES.hide_group(group)
        _ERRORS.count(source)
        raise
    else:
        GAUGES.show_group(group, found)
        _answered[source] = time.time()
        if len(_answered) == len(SOURCES):
            GAUGES.show("taskqueue_state_exporter_last_success_timestamp_seconds", (), min(_answered.values()))
    finally:
        _DURATION.observe(time.perf_counter() - began, source)


def show_circuits(count: int) -> None:
    """Show how many receivers get nothing but probes."""
    GAUGES.show("taskqueue_webhook_circuits_open", (), count)


def show_heartbeat() -> None:
    """Show that the relay reaches Postgres now."""
    GAUGES.show("taskqueue_relay_heartbeat_timestamp_seconds", (), time.time())


def show_pool(queues: Sequence[str], *, slots: int, busy: int) -> None:
    """Show how much of a worker's pool is in use, and what it consumes."""
    pool = pool_name(queues)
    GAUGES.show("taskqueue_worker_slots", (pool,), slots)
    GAUGES.show("taskqueue_worker_busy_slots", (pool,), busy)
    for queue in queues:
        GAUGES.show("taskqueue_worker_queue_info", (pool, queue), 1.0)


def pool_name(queues: Sequence[str]) -> str:
    """What a pool of workers is called by."""
    return ",".join(queues)


def watch_pool(connections: Callable[[], tuple[int, int]]) -> Callable[[], None]:
    """Ask for the connections to Postgres, in use and idle, whenever somebody looks. Returns what ends it."""

    def asked() -> dict[tuple[str, Labels], float]:
        in_use, idle = connections()
        name = "taskqueue_db_pool_connections"
        return {(name, ("in_use",)): in_use, (name, ("idle",)): idle}

    return GAUGES.ask("connections", asked)


def watch_line(kind: str, waiting: Callable[[], int]) -> Callable[[], None]:
    """Ask how many calls of a kind stand in line for Postgres, whenever somebody looks. Returns what ends it."""

    def asked() -> dict[tuple[str, Labels], float]:
        return {("taskqueue_db_waiting_calls", (kind,)): waiting()}

    return GAUGES.ask(f"line of {kind}", asked)

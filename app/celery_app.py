"""The worker process: the Celery app with its Redis configuration, its pool, and the keeper beside it.

Stock Celery consumes the queues and runs the pool. What it is not asked for:
acknowledgements, visibility timeouts, remote control, task events, ETA messages
and results. The row and its fence do all of that, and each of these has lost or
repeated somebody's tasks.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from billiard.util import get_logger as get_pool_logger
from celery import bootsteps, signals
from celery.apps import worker as worker_command
from celery.exceptions import SecurityWarning
from celery.worker import state
from celery.worker.consumer import consumer
from kombu.transport import TRANSPORT_ALIASES

from app import catalog
from app.core import config, metrics, telemetry
from app.core.config import Settings
from app.worker import bridge, bundles, execution, memory, submission, transport
from app.worker.desk import Desk

SOCKET_TIMEOUT_SECONDS = 10
BEAT_SECONDS = 2.0
KEEPER_SILENCE_SECONDS = 10.0
"""How long a keeper that has looked may not look again before it is replaced."""
KEEPER_START_SECONDS = 60.0
"""How long a keeper may take to look for the first time. It takes one or two on a machine that has time for it; killed
too early on one that has none, it would never come to look, nor would those after it."""
KEEPER_ENDS = 5
"""Ends of keepers within `KEEPER_START_SECONDS` by which a worker is taken for broken: its probe fails then."""
LAST_REPORTS_SECONDS = 0.01
"""How often a worker that stops looks whether its keeper has written all that was reported."""
REFUSAL_PAUSE_SECONDS = 0.25
"""How long a worker takes no message after one that it did not know, so that others are served first."""

log = logging.getLogger(__name__)


def configuration(settings: Settings) -> dict[str, Any]:
    """Celery's settings on this Redis. The reason stands beside each that is not obvious."""
    redis_url = settings.redis_url.get_secret_value()
    return {
        "broker_url": redis_url,
        "result_backend": redis_url,
        "result_expires": 3600,
        "task_default_queue": settings.queues[0],
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "result_accept_content": ["json"],
        # A slot takes one message of Celery's at a time, so that none waits inside a worker, where nobody could see it.
        # While tasks are short, that is several of Redis's, for a moment (`worker.bundles`).
        "task_acks_late": True,
        "worker_prefetch_multiplier": 1,
        # A lost worker's task is brought back by its row, within its budget; Celery would repeat it without end.
        "task_reject_on_worker_lost": False,
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        # With remote control on, a Redis outage ends the main process, and whoever writes to Redis commands it.
        "worker_enable_remote_control": False,
        "worker_send_task_events": False,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # What a full or demoted Redis answers ends with it, not with the worker.
        "broker_channel_error_retry": True,
        "broker_pool_acquire_timeout": 5,
        "broker_transport_options": {
            # Messages are hints: without the `unacked` hash there is nothing to leak, restore or block on.
            "ack_emulation": False,
            "priority_steps": [0],
            # Without timeouts one dropped connection hangs the main process for ever.
            "socket_timeout": SOCKET_TIMEOUT_SECONDS,
            "socket_connect_timeout": 3,
            "socket_keepalive": True,
            "health_check_interval": SOCKET_TIMEOUT_SECONDS,
        },
        "redis_socket_timeout": SOCKET_TIMEOUT_SECONDS,
        "redis_socket_connect_timeout": 3,
        "redis_retry_on_timeout": False,
    }


class KeeperStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Starts the keeper with the worker, and again whenever it dies."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self._starts = 0
        self._timer: Any = None
        self._ends: deque[float] = deque(maxlen=KEEPER_ENDS)
        _keepers.append(self)

    def works(self) -> bool:
        """Whether the keeper lasts: without one, children wait for their claims."""
        return len(self._ends) < KEEPER_ENDS or time.monotonic() - self._ends[0] > KEEPER_START_SECONDS

    def start(self, worker: Any) -> None:
        """Start the keeper and look after it, while Redis is away, too."""
        self.ensure()
        self._timer = worker.timer.call_repeatedly(1.0, self.ensure)
        transport.EagerConnection.meanwhile.append(self.ensure)

    def stop(self, worker: Any) -> None:
        """Leave the keeper alone: it ends by itself, once it has settled what this worker leaves behind."""
        del worker
        if self._timer is not None:
            self._timer.cancel()

    def refuse(self, headers: Mapping[str, Any]) -> None:
        """Have a task handed back that this worker does not know. A lost line costs one search for lost messages."""
        named = {key: headers[key] for key in ("id", "attempt", "position")} | {"name": headers["task"]}
        line = json.dumps({"refuse": named}) + "\n"
        taken = None
        if self._process is not None and self._process.stdin is not None:
            # Shorter than PIPE_BUF, so it goes whole or not at all.
            with contextlib.suppress(BrokenPipeError):
                taken = self._process.stdin.write(line.encode())
        if taken is None:
            log.warning("the keeper did not take a refusal; the search for lost messages finds its task")

    def ensure(self) -> None:
        """Start the keeper, or another if it is not there or does not look any more."""
        if self._process is not None and self._process.poll() is None:
            looked = _desk().slots.keeper_beat
            patience = KEEPER_SILENCE_SECONDS if looked > self._begun else KEEPER_START_SECONDS
            if time.monotonic() - looked > max(patience, _settings().lease_seconds / 3):
                log.error("the keeper has not looked for long and is killed")
                self._process.kill()
            return
        if self._process is not None:
            log.error("the keeper ended with code %s and is started again", self._process.returncode)
            self._ends.append(time.monotonic())
            if self._process.stdin is not None:
                self._process.stdin.close()
        desk = _desk()
        desk.slots.beat()
        self._begun = desk.slots.keeper_beat
        self._starts += 1
        metrics.keeper_started(metrics.pool_name(_settings().queues), self._starts)
        inherited = [*desk.descriptors, _told().reader]
        if _spans is not None:
            inherited.append(_spans.out.fileno())
        command = [sys.executable, "-m", "app.worker.keeper", *map(str, (os.getpid(), *inherited))]
        # In a session of its own, so that what is sent to the worker's group leaves it to settle what is left.
        self._process = subprocess.Popen(
            command, pass_fds=inherited, stdin=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdin is not None  # noqa: S101  # stdin=PIPE
        os.set_blocking(self._process.stdin.fileno(), False)
        _expect_runs(_settings())


class BeatStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Touches a file while the main loop turns and can consume: what a probe looks at.

    The main loop can turn while nothing is consumed any more, so a worker that
    could take messages, has none, and does not, shows no beat. One that waits for
    Redis shows none either, but touches another file: to start it again would
    help nobody, and cost what it runs.
    """

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._timer: Any = None

    def start(self, worker: Any) -> None:
        """Beat every two seconds."""
        self._timer = worker.timer.call_repeatedly(BEAT_SECONDS, self._beat, (worker,))
        transport.EagerConnection.meanwhile.append(wait_file(_settings()).touch)

    def stop(self, worker: Any) -> None:
        """Stop beating."""
        del worker
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self, worker: Any) -> None:
        consumer = getattr(worker, "consumer", None)
        task_consumer = getattr(consumer, "task_consumer", None)
        if task_consumer is None or not getattr(consumer, "connection", None):
            return
        idle = not state.active_requests and not state.reserved_requests
        if idle and not task_consumer.channel.qos.can_consume():
            log.error("nothing runs and nothing can be consumed")
            return
        if not all(keeper.works() for keeper in _keepers):
            log.error("no keeper lasts, and so no task begins")
            return
        beat_file(_settings()).touch()


class WatchAnewStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Has the pool watch each child again when the connection to Redis is back.

    A child that died while the connection broke may be in the pool still, and no
    longer watched. Celery then registers a file that is not there, and the worker
    ends with an unrecoverable error instead of replacing the child.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, consumer: Any) -> None:
        """Forget who is not watched: the event loop, which starts next, then watches and replaces them."""
        for child in consumer.pool._pool._pool:  # noqa: SLF001  # Celery shows them nowhere else
            if getattr(child, "_sentinel_poll", 0) is None:
                del child._sentinel_poll  # noqa: SLF001  # as above


def beat_file(settings: Settings) -> Path:
    """The file whose time tells that the worker works."""
    return settings.data_dir / "run" / "worker.beat"


def wait_file(settings: Settings) -> Path:
    """The file whose time tells that the worker waits for Redis."""
    return settings.data_dir / "run" / "worker.wait"


app = submission.celery
app.steps["worker"].update({KeeperStep, BeatStep})
app.steps["consumer"].add(WatchAnewStep)
app.add_defaults(lambda: configuration(_settings()))
TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), "app.worker.transport:Transport"))
app.loader.override_backends = dict.fromkeys(("redis", "rediss"), "app.worker.results:RowBackend")


@dataclass(frozen=True, slots=True)
class _Line:
    """Where the children put their spans in, and where the keeper takes them out."""

    into: socket.socket
    out: socket.socket


_loaded: Settings | None = None
_keepers: list[KeeperStep] = []
_shared: Desk | None = None
_pipe: metrics.Pipe | None = None
_spans: _Line | None = None


def _settings() -> Settings:
    """The settings of this process, read at first use: importing this module needs none."""
    global _loaded  # noqa: PLW0603  # one per process
    if _loaded is None:
        _loaded = config.load()
    return _loaded


def _desk() -> Desk:
    assert _shared is not None  # noqa: S101  # made by run_worker before the pool starts
    return _shared


def _told() -> metrics.Pipe:
    assert _pipe is not None  # noqa: S101  # as above
    return _pipe


def _expect_runs(settings: Settings) -> None:
    """Tell a new keeper, which does not load them, which tasks run here."""
    for entry in catalog.entries():
        queue = entry.queue or settings.queues[0]
        if queue in settings.queues:
            metrics.expect_runs(entry.name, queue, entry.time_limit)


def _register_tasks(**_: Any) -> None:
    catalog.load_modules(_settings())


def run_worker(settings: Settings) -> None:
    """Consume `settings.queues` until told to stop. The first SIGTERM is warm; see `_turn_cold`."""
    global _loaded, _shared, _pipe, _spans  # noqa: PLW0603  # one per process
    _loaded = settings
    if settings.otlp_endpoint is not None:
        # Loaded before the fork: the children share what it takes.
        from app.core import collector  # noqa: F401, PLC0415  # without a collector nobody pays for the SDK
        from app.worker import spans  # noqa: PLC0415  # as above

        _spans = _Line(*spans.pair())
    _shared = Desk.create(settings.concurrency)
    _pipe = metrics.Pipe()
    if settings.metrics_port == 0:
        metrics.silence()
    else:
        _pipe.forward()
    execution.attach(_shared)
    beat_file(settings).parent.mkdir(parents=True, exist_ok=True)
    telemetry.configure_logging(settings, "worker")
    _quieten()
    catalog.load_modules(settings)
    bundles.share()
    transport.Channel.together = {entry.name for entry in catalog.entries()}
    try:
        _consume(settings)
    finally:
        _await_the_last_reports()
        if _spans is not None:
            spans.flush(_spans.into, telemetry.FLUSH_SECONDS)


def _await_the_last_reports() -> None:
    """Where this process is the first of its container, its end is that of the keeper, too.

    At the end of the grace this process ends whatever it waits for (`_turn_cold`).
    """
    while _desk().spool.places():
        for keeper in _keepers:
            keeper.ensure()
        time.sleep(LAST_REPORTS_SECONDS)


def _consume(settings: Settings) -> None:
    app.worker_main(
        [
            "--quiet",
            "worker",
            "--pool=prefork",
            f"--concurrency={settings.concurrency}",
            f"--queues={','.join(settings.queues)}",
            f"--loglevel={settings.log_level}",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            *_replacing_children(settings),
        ]
    )


def _replacing_children(settings: Settings) -> list[str]:
    """What has Celery replace a child whose tasks leave much behind: the allowance is what each may take anew."""
    if settings.task_memory_mebibytes is None:
        return []
    most = memory.most_of_a_child(settings.task_memory_mebibytes)
    if most is None:
        log.warning("TASKQUEUE_TASK_MEMORY_MEBIBYTES has no effect here: the system has no /proc/self/status")
        return []
    return [f"--max-memory-per-child={most}"]


def _quieten() -> None:
    """One line per attempt is ours; Celery's own tell what it believes, not what the row says."""
    for name in ("celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("celery.worker.request").setLevel(logging.CRITICAL)
    # A page and a traceback for each unknown task; `_refuse` says it in one line.
    logging.getLogger("celery.worker.consumer.consumer").addFilter(
        lambda record: record.msg is not consumer.UNKNOWN_TASK_ERROR
    )
    # What it says in signal handlers goes past all loggers, which may be in the middle of a line.
    worker_command.safe_say = lambda text, *_: telemetry.say("celery.apps.worker", text)
    # Running as root is for the image to rule out; nothing here unpickles what comes from outside.
    warnings.filterwarnings("ignore", category=SecurityWarning)


def _keep_logging(**_: Any) -> None:
    """Being connected is enough: Celery then leaves the logging of this process alone, but for the pool's."""
    # Made anew just before, and by itself it writes past all handlers.
    pool = get_pool_logger()
    pool.propagate = True
    pool.setLevel(max(logging.getLogger().level, logging.WARNING))


def _start_child(**_: Any) -> None:
    try:
        execution.occupy()
    except RuntimeError:
        # Nobody would renew what runs here. Celery swallows what a signal's receiver raises.
        log.exception("this child has no slot and ends")
        time.sleep(BEAT_SECONDS)
        os._exit(1)
    metrics.child_started(metrics.pool_name(_settings().queues))
    if _spans is not None:
        from app.worker import spans  # noqa: PLC0415  # as in run_worker

        telemetry.configure(_settings(), "worker", hand_to=spans.Sender(_spans.into))


def _stop_child(**_: Any) -> None:
    bridge.close()


def _refuse(sender: Any = None, message: Any = None, name: str = "", **_: Any) -> None:
    """A rolling deploy: this worker is older or newer than the submit. Another may know the task.

    Refusing is quicker than running, so a worker that only refuses would empty the queue alone.
    """
    log.warning("task %s is not known here, and is handed back", name)
    sender.task_consumer.channel.pause(REFUSAL_PAUSE_SECONDS)
    for step in sender.controller.steps:
        if isinstance(step, KeeperStep):
            step.refuse(message.headers)


def _turn_cold(how: str = "", **_: Any) -> None:
    """A warm shutdown lets running tasks end; near the end of the grace it hands back those that still run.

    At the end of the grace the worker is gone, whatever holds it.
    """
    _desk().slots.announce_stop()
    bundles.stop()
    later: list[tuple[float, Callable[..., object], tuple[int, ...]]] = [
        # Where even that does not end it (a child waits for Postgres), its children die with it and the
        # keeper hands back what they ran.
        (_settings().grace_seconds, os._exit, (1,)),
    ]
    if how == "Warm":
        later.append((_settings().cold_after_seconds, os.kill, (os.getpid(), signal.SIGQUIT)))
    for seconds, work, args in later:
        timer = threading.Timer(seconds, work, args)
        timer.daemon = True
        timer.start()


def _end_cold(worker: Any) -> None:
    """Celery says that it shuts down cold when it has ended the children; they are to know why they are ended."""
    _desk().slots.announce_stop()
    worker_command.on_cold_shutdown(worker)


worker_command.install_worker_term_hard_handler = functools.partial(
    worker_command.install_worker_term_hard_handler, callback=_end_cold
)
app.on_after_configure.connect(_register_tasks)
signals.setup_logging.connect(_keep_logging)
signals.worker_process_init.connect(_start_child)
signals.worker_process_shutdown.connect(_stop_child)
signals.task_unknown.connect(_refuse)
signals.worker_shutting_down.connect(_turn_cold)

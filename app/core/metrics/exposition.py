"""What a process shows of its metrics, on a port of its own."""

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import ThreadingWSGIServer, choose_encoder

import app
from app.core import errors
from app.core.metrics.catalogue import METRICS, Process
from app.core.metrics.instruments import GAUGES, escaped, lines_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

OPENMETRICS = "application/openmetrics-text"


def exposition(process: Process, *, openmetrics: bool) -> str:
    """The metrics of a process that have anything to say, in Prometheus's text format or as OpenMetrics."""
    texts: list[str] = []
    for metric, lines in lines_of(metric for metric in METRICS if process in metric.exported_by):
        # In OpenMetrics a counter is called without the suffix that its samples have.
        family = metric.name.removesuffix("_total") if openmetrics and metric.kind == "counter" else metric.name
        texts.append(f"# HELP {family} {escaped(metric.says)}\n# TYPE {family} {metric.kind}\n")
        if openmetrics:
            texts += [f"{name} {value!r}{example}\n" for name, value, example in lines]
        else:
            texts += [f"{name} {value!r}\n" for name, value, _ in lines]
    return "".join(texts)


class _Quiet(WSGIRequestHandler):
    """Logs no requests: there is one every few seconds, for ever."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # its name in the base class
        del format, args


def serve(port: int, process: Process, *, revision: str | None = None, pid: int | None = None) -> Callable[[], None]:
    """Serve the metrics of a process on all addresses, in a thread of their own.

    Args:
        port: TCP port; 0 serves none.
        process: what this is.
        revision: of the source, for `taskqueue_build_info`.
        pid: of the process whose CPU, memory and files are shown; this one unless given.

    Returns:
        What ends it.

    Raises:
        SettingsError: if the port can't be had.
    """
    if port == 0:
        return lambda: None
    of_python = CollectorRegistry()
    ProcessCollector(pid=lambda: "self" if pid is None else pid, registry=of_python)
    if pid is None:
        PlatformCollector(registry=of_python)
        GCCollector(registry=of_python)
    GAUGES.show("taskqueue_build_info", (app.__version__, revision or ""), 1.0)

    def answer(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
        encode, media_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
        ours = exposition(process, openmetrics=media_type.startswith(OPENMETRICS))
        start("200 OK", [("Content-Type", media_type)])
        # The client's own come last: they end with the end of OpenMetrics. Nothing is compressed, which would take
        # longer than all the rest.
        return [ours.encode(), encode(of_python)]

    try:
        server = make_server("0.0.0.0", port, answer, ThreadingWSGIServer, _Quiet)  # noqa: S104  # for the monitoring, on a port of its own
    except (OSError, OverflowError) as taken:
        reason = getattr(taken, "strerror", None) or "no such port"
        raise errors.SettingsError(f"TASKQUEUE_METRICS_PORT is wrong: {reason}") from taken
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return close

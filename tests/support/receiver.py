"""A real HTTP server on loopback that remembers what it was sent, for webhooks and `http_request`."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """One request. Header names are in lower case; `at` is `time.time()`, in seconds.

    `answered` is the status that was said; None while none was, or if nobody was left to hear it.
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float
    answered: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the receiver says, after `delay_seconds`."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    delay_seconds: float = 0.0


Script = Sequence[Answer | int] | Callable[[Received], Answer | int]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about; nothing is printed."""


class Receiver:
    """Answers on an ephemeral port of 127.0.0.1 and records every request, from any thread.

    Args:
        script: the answers, one for each request in turn and 200 once they are used up;
            or a function that makes the answer to a request.

    Use it as a context manager, or call `close()`.
    """

    def __init__(self, script: Script = ()) -> None:
        self._script = script
        self._lock = threading.Lock()
        self._requests: list[Received] = []
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, name="receiver", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Without a final slash; every path is answered."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def requests(self) -> list[Received]:
        """What came so far, in the order of its arrival."""
        with self._lock:
            return list(self._requests)

    def close(self) -> None:
        """Stop. Answers that are being delayed are given at once."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self, received: Received) -> tuple[int, Answer]:
        """Remember a request; returns its number, from 1, and what to say."""
        with self._lock:
            self._requests.append(received)
            number = len(self._requests)
        if callable(self._script):
            answer = self._script(received)
        else:
            answer = self._script[number - 1] if number <= len(self._script) else Answer()
        return number, Answer(status=answer) if isinstance(answer, int) else answer

    def _said(self, number: int, status: int) -> None:
        with self._lock:
            self._requests[number - 1] = replace(self._requests[number - 1], answered=status)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def _answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # whoever was sending died in the middle: nothing has arrived
                    self.close_connection = True
                    return
                number, answer = receiver._take(
                    Received(
                        method=self.command,
                        path=self.path,
                        headers={name.lower(): value for name, value in self.headers.items()},
                        body=body,
                        at=time.time(),
                    )
                )
                receiver._closing.wait(answer.delay_seconds)
                self._say(answer)
                receiver._said(number, answer.status)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _answer  # noqa: N815

            def _say(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("connection", "close")
                if answer.status >= 200 and answer.status != 204:
                    self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                if self.command != "HEAD" and answer.status != 204:
                    self.wfile.write(answer.body)
                self.close_connection = True

            def log_message(self, *_: Any) -> None:
                """The requests are the log."""

        return Handler

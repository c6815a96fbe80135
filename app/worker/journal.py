"""The last lines that a task's own code logs during an attempt.

One handler on the root logger, in each process that runs tasks, keeps what is
logged while an attempt runs, whoever logs it in whatever thread: but the
bridge's, which is ours. A task that logs nothing pays nothing. The lines are
written with the attempt's end; those of a process that is killed go with it.
"""

import json
import logging
import time
from collections import deque
from dataclasses import dataclass

from app.lifecycle import Log
from app.worker import bridge

LINES = 50
"""Lines of an attempt that are kept."""
MESSAGE_LIMIT = 2_000
"""Characters of a line, a traceback included."""
SIZE_LIMIT_BYTES = 16_384
"""Of an attempt's lines, as JSON."""
_NAME_LIMIT = 100


@dataclass(frozen=True, slots=True)
class _Line:
    after: float
    level: str
    logger: str
    message: str

    def as_json(self) -> str:
        line = {"after": self.after, "level": self.level, "logger": self.logger, "message": self.message}
        return json.dumps(line, ensure_ascii=False)


class Journal(logging.Handler):
    """Keeps what is logged between `begin` and `end`."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: deque[_Line] | None = None
        self._seen = 0
        self._began = 0.0

    def begin(self) -> None:
        """Keep lines from here on."""
        root = logging.getLogger()
        # Code that configures the logging of its own may have taken it away.
        if self not in root.handlers:
            root.addHandler(self)
        self._began, self._seen, self._lines = time.monotonic(), 0, deque(maxlen=LINES)

    def end(self) -> Log | None:
        """Keep no more; returns the lines since `begin`, if there are any."""
        lines, self._lines = self._lines, None
        if not lines:
            return None
        texts: deque[str] = deque()
        left = SIZE_LIMIT_BYTES
        for line in reversed(lines):
            text = line.as_json()
            left -= len(text.encode()) + 2
            if left < 0:
                break
            texts.appendleft(text)
        return Log(f"[{', '.join(texts)}]", dropped=self._seen - len(texts))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line. Never raises, whatever was logged."""
        lines = self._lines
        if lines is None or record.threadName == bridge.THREAD_NAME:
            return
        self._seen += 1
        after = round(max(0.0, time.monotonic() - self._began), 3)
        lines.append(_Line(after, record.levelname[:_NAME_LIMIT], _clean(record.name)[:_NAME_LIMIT], _text(record)))


def _text(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            text = f"{text}\n{_FORMATTER.formatException(record.exc_info)}"
    except Exception:  # noqa: BLE001  # arguments that don't fit, or that can't say what they are
        return "(could not be formatted)"
    return _clean(text)


_FORMATTER = logging.Formatter()


def _clean(text: str) -> str:
    """As Postgres can keep it: no NUL, no lone surrogate, and not endless."""
    cut = text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"
    return cut.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")

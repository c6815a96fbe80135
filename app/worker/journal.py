"""The last lines that a task's own code logs during an attempt.

One handler on the root logger, in each process that runs tasks, keeps what is
logged while an attempt runs, whoever logs it in whatever thread: but the
bridge's, which is ours. A task that logs nothing pays nothing. The lines are
written with the attempt's end; those of a process that is killed go with it.

Until then they are told to those who follow the task, within half a second if
they are new: by the bridge's thread, so that the task does not wait for Redis.
Where nobody follows, Redis is asked whether somebody does, and told nothing.
"""

import asyncio
import json
import logging
import math
import os
import time
from collections import deque
from dataclasses import dataclass, field

from app import loglines
from app.broker import Broker
from app.core import errors
from app.lifecycle import Claim, Log
from app.worker import bridge

LINES = 50
"""Lines of an attempt that are kept."""
MESSAGE_LIMIT = 2_000
"""Characters of a line, a traceback included."""
SIZE_LIMIT_BYTES = 16_384
"""Of an attempt's lines, as JSON."""
TELL_SECONDS = 0.5
"""How often those who follow a task are told what is new."""
REPEAT_SECONDS = 1.0
"""After which they are told again what is not: one of them may have come meanwhile, or come again."""
_NAME_LIMIT = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    after: float
    level: str
    logger: str
    message: str

    def as_json(self) -> str:
        line = {"after": self.after, "level": self.level, "logger": self.logger, "message": self.message}
        return json.dumps(line, ensure_ascii=False)


@dataclass(slots=True, eq=False)
class _Page:
    """What one attempt has logged.

    The task's threads write to it, under the handler's lock. The bridge's reads it without one: a lock may be held
    for as long as it takes to format whatever was logged. Each use of the list is one that no thread comes between.
    """

    claim: Claim | None
    here: bridge.Bridge | None
    began: float = field(default_factory=time.monotonic)
    lines: list[_Line] = field(default_factory=list)

    def add(self, record: logging.LogRecord) -> None:
        after = round(max(0.0, time.monotonic() - self.began), 3)
        level, logger, text = record.levelname[:_NAME_LIMIT], _clean(record.name)[:_NAME_LIMIT], _text(record)
        number = self.lines[-1].number + 1 if self.lines else 1
        self.lines.append(_Line(number, after, level, logger, text))
        if len(self.lines) > 2 * LINES:
            del self.lines[:-LINES]

    def last(self) -> Log:
        """As much as is kept of the lines so far, of which there are some."""
        lines = self.lines[-LINES:]
        texts: deque[str] = deque()
        left = SIZE_LIMIT_BYTES
        for line in reversed(lines):
            text = line.as_json()
            left -= len(text.encode()) + 2
            if left < 0:
                break
            texts.appendleft(text)
        return Log(f"[{', '.join(texts)}]", dropped=lines[-1].number - len(texts))


@dataclass(frozen=True, slots=True)
class _Told:
    """What was told last, and when: up to which line of which page."""

    page: _Page | None = None
    number: int = 0
    when: float = -math.inf


class Journal(logging.Handler):
    """Keeps what is logged between `begin` and `end`, and tells it as it comes."""

    def __init__(self) -> None:
        super().__init__()
        self._page: _Page | None = None
        self._telling = False
        os.register_at_fork(after_in_child=self._forget)

    def begin(self, claim: Claim | None = None) -> None:
        """Keep lines from here on, and tell them to those who follow the task of `claim`; without one, to nobody."""
        root = logging.getLogger()
        # Code that configures the logging of its own may have taken it away.
        if self not in root.handlers:
            root.addHandler(self)
        # The bridge is looked up here: a task that logs may be interrupted anywhere, and must not take a lock along.
        self._page = _Page(claim, None if claim is None else bridge.current())

    def end(self) -> Log | None:
        """Keep no more; returns the lines since `begin`, if there are any."""
        page, self._page = self._page, None
        return page.last() if page is not None and page.lines else None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line. Never raises, whatever was logged."""
        page = self._page
        if page is None or record.threadName == bridge.THREAD_NAME:
            return
        page.add(record)
        if page.here is not None and not self._telling:
            page.here.start(self._tell(page.here.broker))

    def _forget(self) -> None:
        """A process that a task forks has no bridge, and what it logs is lost with it."""
        self._page, self._telling = None, False

    async def _tell(self, broker: Broker) -> None:
        """Tell what is new, of this attempt and of those after it, for as long as something is logged."""
        if self._telling:
            return
        told = _Told()
        try:
            while True:
                self._telling = True
                await asyncio.sleep(TELL_SECONDS)
                told = await _tell_news(broker, self._page, told)
                self._telling = False
                # Looked at behind that: who logs a line before it finds that somebody tells.
                if self._page is None or not self._page.lines:
                    return
        finally:
            self._telling = False


async def _tell_news(broker: Broker, page: _Page | None, told: _Told) -> _Told:
    """Tell the last lines of a page to those who listen, if some are new or they were not told for a while."""
    if page is None or page.claim is None or not page.lines:
        return told
    now, newest = time.monotonic(), page.lines[-1].number
    if (page, newest) == (told.page, told.number) and now - told.when < REPEAT_SECONDS:
        return told
    try:
        if await broker.log_listeners(page.claim.task_id):
            await broker.tell_log(page.claim.task_id, loglines.encode(page.claim, page.last()))
    except errors.BrokerUnavailable as away:
        _log.debug("nobody hears what a task logs: %s", away)
    return _Told(page, newest, now)


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

"""Who holds a key, as one API process knows it.

What was asked once is remembered for `STALE_SECONDS`, so that a poller costs no
question; a key that is used all the time is asked for again before that, beside
the requests. All that is to be asked goes into one statement at a time: whoever
makes up keys keeps one connection busy at most, and nobody with a true one waits
for more than two round trips.
"""

import asyncio
import contextlib
import hmac
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass

from app.core import errors
from app.core.scopes import Scope
from app.db import Database
from app.keys import store
from app.keys.text import ID_PLACE, Masters, id_of

FRESH_SECONDS = 2.0
"""After that, a key that is used is asked for again, beside the request."""
STALE_SECONDS = 5.0
"""After that, a request waits for the answer. A revocation takes effect within this time."""
REMEMBERED = 10_000
"""Keys that are remembered; and ids besides that are none."""
BATCH = 500
NOTE_SECONDS = 10.0
"""How often uses are written down."""
ROLLED_SECONDS = 600.0
"""How long this process must have run before it keeps keys by the newest secret: those that are being replaced don't
know that one, and would refuse them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holder:
    """Whoever holds a key.

    Attributes:
        key_id: of the key.
        owner: whose tasks they submit and see.
        scopes: what they may do.
    """

    key_id: str
    owner: str
    scopes: frozenset[Scope]


@dataclass(slots=True)
class _Entry:
    """What was found of an id, and when.

    Attributes:
        known: None if there is no such key.
        asked_at: monotonic time.
        expires_at: monotonic time from which on it opens nothing.
        opened_by: the key that was found to be the right one. It need not be found to be so again.
    """

    known: store.Known | None
    holder: Holder | None
    asked_at: float
    expires_at: float
    opened_by: bytes | None = None


class Keyring:
    """Answers who holds a key."""

    def __init__(self, database: Database, masters: Masters) -> None:
        self._db = database
        self._masters = masters
        # Apart, so that ids which somebody makes up put no true one out.
        self._found: OrderedDict[str, _Entry] = OrderedDict()
        self._missed: OrderedDict[str, _Entry] = OrderedDict()
        self._wanted: dict[str, asyncio.Future[_Entry]] = {}
        self._asking: asyncio.Task[None] | None = None
        self._used: set[str] = set()
        self._outdated: dict[str, bytes] = {}
        self._began_at = time.monotonic()

    async def holder(self, text: str) -> Holder | None:
        """Who holds this key; None if it is none, or is revoked or expired: which of these, nobody is told.

        Raises:
            DatabaseUnavailable: if nobody knows now.
        """
        now = time.monotonic()
        entry = self._found.get(text[ID_PLACE])
        # Almost every request comes this way.
        if (
            entry is not None
            and entry.opened_by is not None
            and now - entry.asked_at <= FRESH_SECONDS
            and now < entry.expires_at
            and hmac.compare_digest(entry.opened_by, text.encode())
        ):
            self._used.add(text[ID_PLACE])
            return entry.holder
        key_id = id_of(text)
        if key_id is None:
            return None
        entry = self._found.get(key_id) or self._missed.get(key_id)
        if entry is None or now - entry.asked_at > STALE_SECONDS:
            entry = await self._ask(key_id)
        elif now - entry.asked_at > FRESH_SECONDS and key_id in self._found and key_id not in self._wanted:
            self._ask(key_id).add_done_callback(asyncio.Future.exception)  # nobody waits for it
        return self._admitted(text, entry)

    def _admitted(self, text: str, entry: _Entry) -> Holder | None:
        known = entry.known
        # An id that nobody has costs the same work as a wrong key.
        right = self._masters.know(text, known.digest if known is not None else bytes(32))
        if not right or known is None or not known.usable or time.monotonic() >= entry.expires_at:
            return None
        self._used.add(known.id)
        entry.opened_by = text.encode()
        if known.master != self._masters.newest:
            self._outdated[known.id] = self._masters.digest(text)
        return entry.holder

    def _ask(self, key_id: str) -> "asyncio.Future[_Entry]":
        """What the database says of an id, once it says so. One question at a time goes out."""
        if key_id not in self._wanted:
            self._wanted[key_id] = asyncio.get_running_loop().create_future()
            if self._asking is None:
                self._asking = asyncio.create_task(self._ask_all())
        # One who stops waiting must not take the answer from the others.
        return asyncio.shield(self._wanted[key_id])

    async def _ask_all(self) -> None:
        try:
            while self._wanted:
                ids = list(self._wanted)[:BATCH]
                asked_at = time.monotonic()
                try:
                    found = await store.find(self._db, ids)
                except Exception as failed:  # noqa: BLE001  # whatever it is, it is for those who wait
                    for key_id in ids:
                        self._wanted.pop(key_id).set_exception(failed)
                    continue
                for key_id in ids:
                    self._wanted.pop(key_id).set_result(self._remember(key_id, found.get(key_id), asked_at))
        finally:
            self._asking = None

    def _remember(self, key_id: str, known: store.Known | None, asked_at: float) -> _Entry:
        holder = None if known is None else Holder(known.id, known.owner, known.scopes)
        left = float("inf") if known is None or known.seconds_left is None else known.seconds_left
        entry = _Entry(known, holder, asked_at, asked_at + left)
        kept, other = (self._missed, self._found) if known is None else (self._found, self._missed)
        other.pop(key_id, None)
        kept[key_id] = entry
        kept.move_to_end(key_id)
        if len(kept) > REMEMBERED:
            kept.popitem(last=False)
        return entry

    async def run(self) -> None:
        """Until cancelled: write down which keys were used, and keep those by the newest secret."""
        told = False
        while True:
            with contextlib.suppress(errors.TaskQueueError):
                if not told and not await store.usable(self._db):
                    log.warning(
                        "there is no API key yet, so nobody can call: taskqueue keys create --owner NAME makes one"
                    )
                told = True
                await self.note()
            await asyncio.sleep(NOTE_SECONDS)

    async def note(self) -> None:
        """Write down what `run` does, once. Raises DatabaseUnavailable; what was to be written is tried again."""
        rolled = time.monotonic() - self._began_at > ROLLED_SECONDS
        used, outdated = set(self._used), dict(self._outdated) if rolled else {}
        if used:
            await store.used(self._db, used)
            self._used -= used
        if outdated:
            await store.digest_anew(self._db, list(outdated.items()), master=self._masters.newest)
            for key_id in outdated:
                self._outdated.pop(key_id, None)
            log.info("%d API keys are kept by the newest TASKQUEUE_SECRET_KEY now", len(outdated))

"""Which keys sign an owner's webhooks: its own, or where it has none those of the settings.

A relay asks once for all owners of what it has claimed, and remembers the answer
for a few seconds: so long may a secret that was revoked go on signing, and one
that was made be missing. Graces end exactly: they are held against the time of the attempt.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from app import delivery
from app.core.config import Settings
from app.db import Database
from app.utils import sealing, signing
from app.utils.sealing import Seal

STALE_SECONDS = 3.0
REMEMBERED_OWNERS = 1000
"""Beyond so many, those that are stale are forgotten."""
RESEALED_AT_ONCE = 100

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    """One secret of an owner; without a key, it could not be read."""

    id: UUID
    key: signing.Key | None
    expires_at: datetime | None
    default_until: datetime | None


@dataclass(frozen=True, slots=True)
class Ring:
    """What an owner's webhooks are signed with.

    Attributes:
        held: the owner's own, the newest first.
        defaults: those of the settings.
        read_at: monotonic time of the question.
    """

    held: Sequence[_Held]
    defaults: Sequence[signing.Key]
    read_at: float

    def keys(self, at: datetime) -> Sequence[signing.Key]:
        """All that sign a webhook which is sent at this time.

        Raises:
            Unreadable: if one of them can't be read. Its holder may know no other, so nothing is sent without it.
        """
        live = [one for one in self.held if one.expires_at is None or at < one.expires_at]
        if not live:
            return self.defaults
        unreadable = [one.id for one in live if one.key is None]
        if unreadable:
            raise sealing.Unreadable(f"secret {unreadable[0]} can't be read")
        own = [one.key for one in live if one.key is not None]
        if any(one.default_until is not None and at < one.default_until for one in live):
            return [*own, *self.defaults]
        return own


class Keyring:
    """The keys of all owners that a relay has met.

    Args:
        db: where their secrets are, sealed.
        settings: what opens them, and the secrets of everybody else.
    """

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._defaults = signing.keys(settings)
        self._seal = Seal.from_settings(settings)
        self._rings: dict[str, Ring] = {}
        self._unreadable: set[UUID] = set()

    async def rings(self, owners: Collection[str]) -> Mapping[str, Ring]:
        """What signs for each of these owners, at most `STALE_SECONDS` old.

        Raises:
            DatabaseUnavailable: if it had to be asked.
        """
        now = time.monotonic()
        stale = [owner for owner in owners if owner not in self._rings or not self._is_fresh(self._rings[owner], now)]
        if stale:
            held: dict[str, list[_Held]] = {owner: [] for owner in stale}
            for one in await delivery.sealed_secrets(self._db, stale):
                held[one.owner].append(self._opened(one))
            if len(self._rings) > REMEMBERED_OWNERS:
                self._rings = {owner: ring for owner, ring in self._rings.items() if self._is_fresh(ring, now)}
            self._rings |= {owner: Ring(found, self._defaults, now) for owner, found in held.items()}
        return {owner: self._rings[owner] for owner in owners}

    @staticmethod
    def _is_fresh(ring: Ring, now: float) -> bool:
        return now - ring.read_at < STALE_SECONDS

    def _opened(self, one: delivery.Sealed) -> _Held:
        key = None
        try:
            key = signing.key(self._plain(one))
            self._unreadable.discard(one.id)
        except (sealing.Unreadable, ValueError) as failed:
            # Said once: what waits for it asks again and again.
            if one.id not in self._unreadable:
                log.error("webhooks wait: secret %s can't be read: %s", one.id, failed)  # noqa: TRY400  # no traceback: it is no bug
            self._unreadable.add(one.id)
        return _Held(one.id, key, one.expires_at, one.default_until)

    def _plain(self, one: delivery.Sealed) -> str:
        if self._seal is None:
            raise sealing.Unreadable("TASKQUEUE_SECRET_KEY is not set")
        return self._seal.open(one.sealed, delivery.belongs_to(one.owner, one.id))

    async def reseal(self) -> int:
        """Seal with the first key of the settings what another of them has sealed, so that this one can be given up."""
        if self._seal is None or not self._seal.other_marks:
            return 0
        resealed = 0
        for one in await delivery.secrets_under(self._db, self._seal.other_marks, limit=RESEALED_AT_ONCE):
            try:
                plain = self._plain(one)
            except sealing.Unreadable as failed:
                log.error("secret %s can't be read: %s", one.id, failed)  # noqa: TRY400  # as above
                continue
            await delivery.reseal(self._db, one, self._seal.seal(plain, delivery.belongs_to(one.owner, one.id)))
            resealed += 1
        if resealed:
            log.info("%d webhook secrets are sealed with the first key of TASKQUEUE_SECRET_KEY now", resealed)
        return resealed

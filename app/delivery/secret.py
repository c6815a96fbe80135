"""The secrets that sign an owner's webhooks: made, rotated, revoked, and read by whoever signs.

They are stored sealed (`utils.sealing`), and nothing here can open them. Whoever
rotates gets a new one at once, and what signed before goes on beside it until
its grace ends, so that receivers can be told one by one. An owner who never made
one is signed with those of the settings; they too go on for the grace of
the rotation that takes over from them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from uuid import UUID

from app.core import errors
from app.db import Database, Record

SECRETS_AT_MOST = 5
"""Live secrets of one owner; the table has the same bound in a CHECK."""
_TRIES = 20
"""How often a place is looked for that nobody else takes at the same moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSecret:
    """A secret to be stored.

    Attributes:
        sealed: bound to owner and id by `belongs_to`.
        kind: `hmac` or `ed25519`.
        fingerprint: what its holder recognises it by.
        public_key: `whpk_…`, if it is the private half of a pair.
    """

    id: UUID
    owner: str
    sealed: bytes
    kind: str
    fingerprint: str
    public_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Secret:
    """What may be shown of a live secret.

    Attributes:
        default_until: until when the secrets of the settings sign beside it, if they do.
        expires_at: when its grace ends; None as long as nothing has taken its place.
    """

    id: UUID
    kind: str
    fingerprint: str
    public_key: str | None
    default_until: datetime | None
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What whoever signs needs of a live secret."""

    id: UUID
    owner: str
    sealed: bytes
    default_until: datetime | None
    expires_at: datetime | None


class Unplaced(Enum):
    """Why a secret was not stored."""

    FULL = auto()
    """The owner has as many as may be live."""
    KNOWN = auto()
    """It is one of them."""


def belongs_to(owner: str, secret_id: UUID) -> str:
    """What a sealed secret is bound to: in any other row it does not open."""
    return f"{secret_id} {owner}"


_SHOWN = "id, kind, fingerprint, public_key, default_until, created_at, expires_at"
_LIVE = "(w.expires_at IS NULL OR w.expires_at > now())"
_SECRETS = f"SELECT {_SHOWN} FROM webhook_secret w WHERE owner = $1 AND {_LIVE} ORDER BY created_at DESC, id DESC"


async def secrets(db: Database, owner: str) -> list[Secret]:
    """The live secrets of an owner, the newest first."""
    return [Secret(**dict(row)) for row in await db.fetch(_SECRETS, owner)]


# $7 is the grace of a rotation, NULL for a secret that is only added. Whoever else takes the same slot at the same
# moment breaks the unique index, and with it the whole statement: nothing is retired without a successor.
_KEPT = f"{_LIVE} AND $7::float8 IS DISTINCT FROM 0"
_PLACE = f"""
WITH known AS (
    SELECT EXISTS (SELECT 1 FROM webhook_secret w WHERE owner = $2 AND fingerprint = $5 AND {_LIVE}) AS is_known
), gone AS (
    DELETE FROM webhook_secret w WHERE owner = $2 AND NOT ({_KEPT}) AND NOT (SELECT is_known FROM known) RETURNING id
), free AS (
    SELECT min(number) AS slot
      FROM (SELECT count(*) FROM gone) AS first, generate_series(1, {SECRETS_AT_MOST}) AS number
     WHERE NOT EXISTS (SELECT 1 FROM webhook_secret w WHERE owner = $2 AND slot = number AND {_KEPT})
), placed AS (
    INSERT INTO webhook_secret (id, owner, slot, sealed, kind, fingerprint, public_key, default_until)
    SELECT $1, $2, slot, $3, $4, $5, $6,
           CASE WHEN $7 > 0 AND NOT EXISTS (SELECT 1 FROM webhook_secret w WHERE owner = $2 AND {_LIVE})
                THEN now() + make_interval(secs => $7) END
      FROM free WHERE slot IS NOT NULL AND NOT (SELECT is_known FROM known)
    RETURNING {_SHOWN}
), retired AS (
    UPDATE webhook_secret w
       SET expires_at = LEAST(w.expires_at, now() + make_interval(secs => $7)),
           default_until = CASE WHEN w.default_until IS NOT NULL
                                THEN LEAST(w.default_until, now() + make_interval(secs => $7)) END
     WHERE w.owner = $2 AND $7 > 0 AND {_LIVE} AND EXISTS (SELECT 1 FROM placed)
)
SELECT known.is_known, placed.* FROM known LEFT JOIN placed ON true
"""


async def place_secret(db: Database, new: NewSecret, *, grace_seconds: float | None = None) -> Secret | Unplaced:
    """Store a secret, which signs from now on.

    Args:
        db: where.
        new: the secret.
        grace_seconds: it takes over: what signed before goes on for so long, or not at all if it is 0.
            None: it signs beside the owner's others, and if there are none, in place of those of the settings.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            row = await _placed(db, new, grace_seconds)
        except errors.StatementRefused:
            if not tries_left:
                raise
            continue
        columns = dict(row)
        if columns.pop("is_known"):
            return Unplaced.KNOWN
        return Unplaced.FULL if columns["id"] is None else Secret(**columns)
    raise AssertionError  # pragma: no cover - the last try has returned or raised


async def _placed(db: Database, new: NewSecret, grace_seconds: float | None) -> Record:
    [row] = await db.fetch(
        _PLACE, new.id, new.owner, new.sealed, new.kind, new.fingerprint, new.public_key, grace_seconds
    )
    return row


async def revoke_secret(db: Database, owner: str, secret_id: UUID) -> bool:
    """Remove a secret at once.

    Returns:
        False if the owner has no such live secret.
    """
    sql = f"DELETE FROM webhook_secret w WHERE id = $1 AND owner = $2 RETURNING {_LIVE}"
    return bool(await db.fetchval(sql, secret_id, owner))


_SEALED = f"""
SELECT id, owner, sealed, default_until, expires_at FROM webhook_secret w
 WHERE owner = ANY ($1::text[]) AND {_LIVE} ORDER BY created_at DESC, id DESC
"""


async def sealed_secrets(db: Database, owners: Collection[str]) -> list[Sealed]:
    """The live secrets of these owners, each owner's newest first."""
    return [Sealed(**dict(row)) for row in await db.fetch(_SEALED, list(owners))]


async def secrets_under(db: Database, marks: Sequence[bytes], *, limit: int) -> list[Sealed]:
    """Secrets that were sealed by keys with these marks."""
    sql = """
    SELECT id, owner, sealed, default_until, expires_at FROM webhook_secret
     WHERE substring(sealed FROM 2 FOR 8) = ANY ($1::bytea[]) ORDER BY id LIMIT $2
    """
    return [Sealed(**dict(row)) for row in await db.fetch(sql, list(marks), limit)]


async def marks(db: Database) -> Mapping[bytes, int]:
    """How many secrets the key with each mark has sealed."""
    sql = "SELECT substring(sealed FROM 2 FOR 8) AS mark, count(*) AS secrets FROM webhook_secret GROUP BY 1"
    return {bytes(row["mark"]): row["secrets"] for row in await db.fetch(sql)}


async def reseal(db: Database, was: Sealed, sealed: bytes) -> None:
    """Store a secret as another key has sealed it, unless somebody was faster."""
    sql = "UPDATE webhook_secret SET sealed = $2 WHERE id = $1 AND sealed = $3"
    await db.execute(sql, was.id, sealed, was.sealed)


async def prune_secrets(db: Database, *, limit: int) -> int:
    """Remove secrets whose grace has ended."""
    sql = """
    DELETE FROM webhook_secret WHERE id IN (
        SELECT id FROM webhook_secret WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED)
    RETURNING id
    """
    return len(await db.fetch(sql, limit))

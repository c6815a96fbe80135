"""Every statement on `api_key`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from app.core.scopes import Scope
from app.db import Database, Record

_SCOPES = frozenset(str(scope) for scope in Scope)
LAST_USED_SECONDS = 60.0
"""A use is written down at most this often: to the minute is enough to see what nobody uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What has to be known of a key to let its holder in.

    Attributes:
        master: which of our secrets `digest` was made with.
        usable: neither revoked nor expired.
        seconds_left: until it expires; None if it never does.
    """

    id: str
    digest: bytes
    master: str
    owner: str
    scopes: frozenset[Scope]
    usable: bool
    seconds_left: float | None


_FIND = """
SELECT id, digest, master, owner, scopes, extract(epoch FROM expires_at - now())::float8 AS seconds_left,
       revoked_at IS NULL AND COALESCE(expires_at > now(), true) AS usable
  FROM api_key WHERE id = ANY($1::text[])
"""


async def find(db: Database, ids: Collection[str]) -> dict[str, Known]:
    """What is known of the keys with these ids, as far as there are such keys."""
    return {row["id"]: _known(row) for row in await db.fetch(_FIND, list(ids))}


def _known(row: Record) -> Known:
    columns = dict(row)
    words = columns.pop("scopes")
    # A scope of a later release is none of ours, and opens nothing here.
    return Known(scopes=frozenset(Scope(word) for word in words if word in _SCOPES), **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewKey:
    """A key to be kept.

    Attributes:
        digest: `Masters.digest` of it, made with `master`.
        expires_in_seconds: from now; None: never, unless `expires_at` says when.
    """

    id: str
    digest: bytes
    master: str
    owner: str
    scopes: frozenset[Scope]
    name: str
    expires_in_seconds: float | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A key as its keeper sees it.

    Attributes:
        state: `live`, `expired` or `revoked`.
        master: which of our secrets its digest was made with.
        last_used_at: to a minute or so.
    """

    id: str
    name: str
    owner: str
    scopes: tuple[str, ...]
    state: str
    master: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


_SHOWN = """id, name, owner, scopes, master, created_at, expires_at, revoked_at, last_used_at,
       CASE WHEN revoked_at IS NOT NULL THEN 'revoked' WHEN expires_at <= now() THEN 'expired' ELSE 'live' END AS state
"""
_ADD = f"""
INSERT INTO api_key (id, digest, master, owner, scopes, name, expires_at)
VALUES ($1, $2, $3, $4, $5::text[], $6, COALESCE($7::timestamptz, now() + make_interval(secs => $8::float8)))
ON CONFLICT (id) DO NOTHING
RETURNING {_SHOWN}
"""


async def add(db: Database, new: NewKey) -> Kept | None:
    """Keep a key; None if there is one of this id already, which stays as it is."""
    row = await db.fetchrow(
        _ADD,
        new.id,
        new.digest,
        new.master,
        new.owner,
        sorted(new.scopes),
        new.name,
        new.expires_at,
        new.expires_in_seconds,
    )
    return None if row is None else _kept(row)


_KEPT = f"SELECT {_SHOWN} FROM api_key WHERE $1::text IS NULL OR owner = $1 ORDER BY created_at, id"


async def kept(db: Database, *, owner: str | None = None) -> list[Kept]:
    """All keys there are, or those of one owner, the oldest first."""
    return [_kept(row) for row in await db.fetch(_KEPT, owner)]


_REVOKE = f"""
UPDATE api_key SET revoked_at = COALESCE(revoked_at, now()) WHERE id = $1 RETURNING {_SHOWN}
"""


async def revoke(db: Database, key_id: str) -> Kept | None:
    """Have a key open nothing any more; None if there is none of this id. Asking twice is asking once."""
    row = await db.fetchrow(_REVOKE, key_id)
    return None if row is None else _kept(row)


def _kept(row: Record) -> Kept:
    columns = dict(row)
    return Kept(scopes=tuple(columns.pop("scopes")), **columns)


_USED = """
UPDATE api_key k SET last_used_at = now()
  FROM (SELECT id FROM api_key
         WHERE id = ANY($1::text[]) AND COALESCE(last_used_at < now() - make_interval(secs => $2), true)
         ORDER BY id FOR UPDATE SKIP LOCKED) u
 WHERE k.id = u.id
"""


async def used(db: Database, ids: Collection[str]) -> None:
    """Note that these keys were used just now, unless that was noted within `LAST_USED_SECONDS`."""
    await db.execute(_USED, list(ids), LAST_USED_SECONDS)


_DIGEST_ANEW = """
UPDATE api_key k SET digest = fresh.digest, master = $2
  FROM unnest($1::text[], $3::bytea[]) AS fresh (id, digest)
 WHERE k.id = fresh.id
"""


async def digest_anew(db: Database, digests: Sequence[tuple[str, bytes]], *, master: str) -> None:
    """Keep these keys by another of our secrets, so that the one before can be given up.

    Args:
        db: where.
        digests: ids of keys, and what is kept of each from now on.
        master: the id of the secret that they were made with.
    """
    await db.execute(_DIGEST_ANEW, [one for one, _ in digests], master, [digest for _, digest in digests])


async def usable(db: Database) -> bool:
    """Whether there is any key that opens something."""
    sql = "SELECT EXISTS (SELECT FROM api_key WHERE revoked_at IS NULL AND COALESCE(expires_at > now(), true))"
    return await db.fetchval(sql) is True

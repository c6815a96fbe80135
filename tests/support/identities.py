"""Who may stand at the door: keys of all kinds, in a real database."""

from collections.abc import Mapping

import httpx
from pydantic import SecretStr

from app import keys
from app.core.config import Settings
from app.core.scopes import Scope
from app.db import Database

SECRET = SecretStr("a-secret-of-the-tests-that-is-long-enough")
EVERYTHING = frozenset(Scope) - {Scope.ADMIN}


def guarded(settings: Settings, **changes: object) -> Settings:
    """These settings, with a door."""
    return settings.model_copy(
        update={"auth_mode": "api-key", "secret_keys": (SECRET,), "metrics_port": 0, "sample_tasks": True, **changes}
    )


async def key_of(
    db: Database,
    owner: str,
    *scopes: Scope,
    expires_in_seconds: float | None = None,
    revoked: bool = False,
) -> str:
    """A key as `taskqueue keys create` makes it; with every scope but `admin` unless some are given."""
    key, masters = keys.made(), keys.Masters.of([SECRET])
    key_id = keys.id_of(key)
    assert key_id is not None
    new = keys.NewKey(
        id=key_id,
        digest=masters.digest(key),
        master=masters.newest,
        owner=owner,
        scopes=frozenset(scopes) or EVERYTHING,
        name="test",
        expires_in_seconds=expires_in_seconds,
    )
    assert await keys.add(db, new) is not None
    if revoked:
        await keys.revoke(db, key_id)
    return key


def shown(key: str) -> Mapping[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key}"}


def spent(answer: httpx.Response) -> tuple[str, int, int]:
    """What the answer says is left: of which budget, how many, and until when (seconds)."""
    name, remaining, until = answer.headers["ratelimit"].split(";")
    return name.strip('"'), int(remaining.removeprefix("r=")), int(until.removeprefix("t="))

"""`taskqueue keys`: make keys, show what there is, revoke. It goes straight to the database.

Whoever may do that may do everything anyway, so no key is needed to make the first one.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from app import keys, schedules
from app.core import derived, errors
from app.core.config import Settings
from app.core.scopes import Scope
from app.db import Database

USUAL_SCOPES = (Scope.TASKS_READ, Scope.TASKS_WRITE, Scope.WEBHOOKS)
OWNER = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9_.:@/-]{0,63})?")
NAME_CHARACTERS = 64
LONGEST = timedelta(days=36_500)
_DURATION = re.compile(r"([1-9][0-9]{0,9})([smhd])", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_COLUMNS = ("id", "state", "owner", "name", "scopes", "created_at", "expires_at", "last_used_at", "kept_by")

T = TypeVar("T")


class KeyRefused(errors.TaskQueueError):
    """A key can't be made, or taken in, as it was asked for. The message is one line, and holds no key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A key that somebody asks for.

    Attributes:
        scopes: words of `Scope`; None: the usual ones.
        expires: such as `90d`, or a date and time with a time zone; None: never.
        given: a key that was made elsewhere, to be taken in; None: make one.
    """

    owner: str = ""
    scopes: Sequence[str] | None = None
    name: str = ""
    expires: str | None = None
    given: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Created:
    """What came of it.

    Attributes:
        kept: what is known of the key now.
        key: the key itself, if it was made here: it is not shown again.
        new: false if the key that was given was there already, and stays as it is.
    """

    kept: keys.Kept
    key: str | None = field(repr=False)
    new: bool


def given(variable: str | None, path: str | None) -> str | None:
    """The key that is to be taken in, if one is; not from the command line, which others on the machine can see.

    Args:
        variable: of the environment.
        path: of a file; `-` is the standard input.

    Raises:
        KeyRefused: if there is nothing there.
    """
    if variable is not None:
        found = os.environ.get(variable, "").strip()
        if not found:
            raise KeyRefused(f"{variable} is not set: --key-from-env takes the key from it")
        return found
    if path is None:
        return None
    try:
        return (sys.stdin.read() if path == "-" else Path(path).read_text()).strip()
    except (OSError, ValueError):
        raise KeyRefused("--key-from-file names nothing that can be read") from None


def create(settings: Settings, wanted: Wanted) -> Created:
    """Make a key, or take in one that was made elsewhere: then asking twice is asking once.

    Raises:
        SettingsError: if there is no secret to know keys by.
        KeyRefused: if a field is wrong, the given key is none, or another one has its id.
        DatabaseUnavailable: if Postgres can't be reached, or has not the table.
    """
    masters = keys.Masters.of(settings.secret_keys)
    key = keys.made() if wanted.given is None else wanted.given
    new = _new(wanted, key, masters)

    async def add(db: Database) -> Created:
        added = await keys.add(db, new)
        if added is not None:
            return Created(added, key if wanted.given is None else None, new=True)
        known = (await keys.find(db, [new.id])).get(new.id)
        if known is None or not masters.know(key, known.digest):
            raise KeyRefused(
                "another key has the id of the given one, or it is kept by a TASKQUEUE_SECRET_KEY that is not set"
            )
        [there] = [one for one in await keys.kept(db, owner=known.owner) if one.id == new.id]
        return Created(there, None, new=False)

    return _with_database(settings, add)


def _new(wanted: Wanted, key: str, masters: keys.Masters) -> keys.NewKey:
    key_id = keys.id_of(key)
    if key_id is None:
        raise KeyRefused("what was given is no API key, or was mistyped: its checksum or its form is wrong")
    if not OWNER.fullmatch(wanted.owner):
        raise KeyRefused("--owner must be 1 to 64 letters, digits and _ . : @ / -, the first a letter or digit")
    if len(wanted.name) > NAME_CHARACTERS or not wanted.name.isprintable():
        raise KeyRefused(f"--name must be at most {NAME_CHARACTERS} printable characters")
    after, moment = expiry(wanted.expires)
    return keys.NewKey(
        id=key_id,
        digest=masters.digest(key),
        master=masters.newest,
        owner=wanted.owner,
        scopes=frozenset(Scope(word) for word in wanted.scopes or USUAL_SCOPES),
        name=wanted.name,
        expires_in_seconds=None if after is None else after.total_seconds(),
        expires_at=moment,
    )


def expiry(word: str | None) -> tuple[timedelta | None, datetime | None]:
    """When a key is to expire: after `90d`, `12h`, `30m` or `45s`, or at a date and time with a time zone.

    Raises:
        KeyRefused: if it is neither, or later than in a hundred years.
    """
    if word is None:
        return None, None
    found = _DURATION.fullmatch(word)
    after = timedelta(seconds=int(found[1]) * _SECONDS[found[2]]) if found is not None else None
    if after is not None and after <= LONGEST:
        return after, None
    try:
        moment = datetime.fromisoformat(word)
        if moment.tzinfo is not None and moment.astimezone(UTC) <= datetime.now(UTC) + LONGEST:
            return None, moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise KeyRefused("--expires must be such as 90d, 12h or 30m, or a date and time such as 2030-01-31T12:00:00Z")


def created_sentence(created: Created) -> str:
    """What is said to people, who see the key besides."""
    kept = created.kept
    whose = f"of {kept.owner}" if kept.owner else "of nobody in particular"
    until = "never expires" if kept.expires_at is None else f"expires at {_moment(kept.expires_at)}"
    if created.new:
        last = "; it is shown this once:" if created.key is not None else ""
        return f"key {kept.id}: {whose}, may {' '.join(kept.scopes)}, {until}{last}"
    return f"key {kept.id} was there already and stays as it is: {kept.state}, {whose}, may {' '.join(kept.scopes)}"


def created_json(created: Created) -> str:
    """The same for programs, with the key if it was made here."""
    key = {} if created.key is None else {"key": created.key}
    return json.dumps(_row(created.kept) | {"new": created.new} | key)


def listed(settings: Settings, *, owner: str | None, as_json: bool) -> Sequence[str]:
    """The lines of `taskqueue keys list`. Raises KeyRefused for an owner that is none, and DatabaseUnavailable."""
    if owner is not None and not OWNER.fullmatch(owner):
        raise KeyRefused("--owner is none that a key can have")
    found = _with_database(settings, lambda db: keys.kept(db, owner=owner))
    shown = [_row(one) | {"kept_by": kept_by(settings, one)} for one in found]
    if as_json:
        return [json.dumps(row) for row in shown]
    table = [list(_COLUMNS), *([_cell(row[column]) for column in _COLUMNS] for row in shown)]
    widths = [max(len(row[place]) for row in table) for place in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def revoked(settings: Settings, key_ids: Sequence[str]) -> tuple[Sequence[str], bool]:
    """Have keys open nothing any more: the lines of `taskqueue keys revoke`, and whether all of them were there.

    An owner that has no other is named, if schedules of theirs go on.

    Args:
        settings: where the database is.
        key_ids: their ids; what stands before and behind the id in a key is passed over.

    Raises:
        DatabaseUnavailable: if Postgres can't be reached.
    """
    ids = [one.removeprefix(keys.PREFIX).partition("_")[0] for one in key_ids]

    async def revoke_all(db: Database) -> tuple[list[keys.Kept | None], list[str]]:
        # What can't be an id is not asked for: the words of a command line may hold anything.
        became = [await keys.revoke(db, one) if keys.ID.fullmatch(one) else None for one in ids]
        owners = dict.fromkeys(one.owner for one in became if one is not None)
        return became, [line for owner in owners if (line := await _left_behind(db, owner)) is not None]

    became, left_behind = _with_database(settings, revoke_all)
    told = f"is revoked; every API process knows within {keys.STALE_SECONDS:g} s"
    lines = [f"{one.id} {told}" if one is not None else "there is no key with this id" for one in became]
    return [*lines, *left_behind], None not in became


async def _left_behind(db: Database, owner: str) -> str | None:
    """What is said of an owner without a live key whose schedules go on; None if there is nothing to say."""
    if any(one.state == "live" for one in await keys.kept(db, owner=owner)):
        return None
    count = await schedules.count_live(db, owner)
    if not count:
        return None
    go_on = "1 schedule of theirs goes on" if count == 1 else f"{count} schedules of theirs go on"
    return f"{owner or 'nobody in particular'} has no live key left, and {go_on}: see docs/keys.md"


def kept_by(settings: Settings, key: keys.Kept) -> str:
    """Which of our secrets a key is known by: the `newest`, an `older` one, or one that is `gone`."""
    known = [derived.key_id(one) for one in settings.secret_keys]
    if key.master not in known:
        return "gone"
    return "newest" if key.master == known[0] else "older"


def _row(key: keys.Kept) -> dict[str, Any]:
    """A key as it is shown: everything but what opens something."""
    return {
        "id": key.id,
        "state": key.state,
        "owner": key.owner,
        "name": key.name,
        "scopes": list(key.scopes),
        "created_at": _moment(key.created_at),
        "expires_at": _moment(key.expires_at),
        "revoked_at": _moment(key.revoked_at),
        "last_used_at": _moment(key.last_used_at),
    }


def _moment(value: datetime | None) -> str | None:
    return None if value is None else value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cell(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value or "-")


def _with_database(settings: Settings, ask: Callable[[Database], Awaitable[T]]) -> T:
    async def run() -> T:
        db = Database(settings.postgres_dsn, max_connections=1, application_name="taskqueue-keys")
        try:
            return await ask(db)
        finally:
            await db.close()

    return asyncio.run(run())

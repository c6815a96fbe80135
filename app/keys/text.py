"""What a key looks like, and how one is known again. Nothing here asks anybody.

    tq_live_ 7hY2kQ0sXe _ 3vF…(43)…Rk 5d41402a
    prefix   id           secret      checksum

The prefix lets a scanner find a key that was published by mistake, and the
checksum tells it that this is one. It also spares the database every question
about what was never a key. It is the beginning of a SHA-256, and not the usual
CRC, because the template of a Helm chart can compute that: a chart can make a
key, put it into a Secret, and have it taken in (`taskqueue keys create`).
"""

import hashlib
import hmac
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from pydantic import SecretStr

from app.core import derived, errors

PREFIX = "tq_live_"
ID_CHARACTERS = 10
SECRET_CHARACTERS = 43
"""Of base 62, which is 256 bits: too many to guess, so one fast hash is enough (no argon2)."""
CHECKSUM_CHARACTERS = 8
ID_PLACE = slice(len(PREFIX), len(PREFIX) + ID_CHARACTERS)
"""Where the id stands in a key."""

ID = re.compile(f"[0-9A-Za-z]{{{ID_CHARACTERS}}}")
"""What may be the id of a key."""
_ALPHABET = string.digits + string.ascii_letters
_KEY = re.compile(
    rf"{PREFIX}([0-9A-Za-z]{{{ID_CHARACTERS}}})_[0-9A-Za-z]{{{SECRET_CHARACTERS}}}[0-9a-f]{{{CHECKSUM_CHARACTERS}}}"
)
_PURPOSE = "taskqueue api key"


def made() -> str:
    """A new key, as its holder is shown it."""
    rest = f"{PREFIX}{_random(ID_CHARACTERS)}_{_random(SECRET_CHARACTERS)}"
    return rest + checksum(rest)


def _random(characters: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(characters))


def checksum(rest: str) -> str:
    """What ends a key: 8 hexadecimal digits of the SHA-256 of all that stands before."""
    return hashlib.sha256(rest.encode()).hexdigest()[:CHECKSUM_CHARACTERS]


def id_of(text: str) -> str | None:
    """The id in a key; None if it is no key, or was mistyped."""
    found = _KEY.fullmatch(text)
    if found is None or checksum(text[:-CHECKSUM_CHARACTERS]) != text[-CHECKSUM_CHARACTERS:]:
        return None
    return found[1]


@dataclass(frozen=True, slots=True)
class Masters:
    """What keys are known again by: something of each `TASKQUEUE_SECRET_KEY`, the one for new keys first.

    Attributes:
        named: the id of each, and the key of its HMAC.
    """

    named: tuple[tuple[str, bytes], ...] = field(repr=False)

    @classmethod
    def of(cls, secret_keys: Sequence[SecretStr]) -> Self:
        """Those of `Settings.secret_keys`.

        Raises:
            SettingsError: if there is none.
        """
        if not secret_keys:
            raise errors.SettingsError("TASKQUEUE_SECRET_KEY is not set: API keys are known again by it")
        return cls(tuple((derived.key_id(one), derived.key(one, _PURPOSE)) for one in secret_keys))

    @property
    def newest(self) -> str:
        """The id of the one that new digests are made with."""
        return self.named[0][0]

    def digest(self, text: str) -> bytes:
        """What is kept of a key: 32 bytes."""
        return hmac.digest(self.named[0][1], text.encode(), "sha256")

    def know(self, text: str, digest: bytes) -> bool:
        """Whether `digest` was made of this key. Takes as long for a wrong one as for a right one."""
        answers = [hmac.compare_digest(hmac.digest(one, text.encode(), "sha256"), digest) for _, one in self.named]
        return any(answers)

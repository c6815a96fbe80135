"""Secrets that are stored: sealed with a key that only the settings hold.

A sealed secret is AES-256-GCM under a key derived from TASKQUEUE_SECRET_KEY by
HKDF (RFC 5869), with a text that says what it is for, so that nothing else which
is derived from the same setting can open it. What it belongs to is bound to it:
moved to another row or owner, it does not open.

Which of several keys sealed it is written in front, as the key's own mark; a mark
says nothing of its key. The first of the setting seals, each of them opens.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from app.core import config, errors

if TYPE_CHECKING:
    # Importing it takes 50 ms, which only who has something sealed should pay.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PURPOSE = b"taskqueue webhook secrets 1"
_MARKING = b"taskqueue mark of a secret key 1"
_FORM = b"\x01"
MARK_BYTES = 8
NONCE_BYTES = 12
_HEAD_BYTES = len(_FORM) + MARK_BYTES + NONCE_BYTES


class Unreadable(errors.TaskQueueError):
    """What was sealed does not open: its key is not in TASKQUEUE_SECRET_KEY, or its bytes are not what was sealed."""


class Seal:
    """Seals and opens.

    Args:
        masters: texts of TASKQUEUE_SECRET_KEY, one at least; the first seals.
    """

    def __init__(self, masters: Sequence[str]) -> None:
        self._ciphers: Mapping[bytes, AESGCM] = dict(_cipher(master.encode()) for master in masters)
        self._first = next(iter(self._ciphers))

    @classmethod
    def from_settings(cls, settings: config.Settings) -> Self | None:
        """With the keys of the settings; None if they have none."""
        masters = [key.get_secret_value() for key in settings.secret_keys]
        return cls(masters) if masters else None

    @property
    def mark(self) -> bytes:
        """That of the key which seals."""
        return self._first

    @property
    def other_marks(self) -> Sequence[bytes]:
        """Those of the keys that only open."""
        return [mark for mark in self._ciphers if mark != self._first]

    def seal(self, secret: str, belongs_to: str) -> bytes:
        """The secret as it may be stored.

        Args:
            secret: what nobody else may read.
            belongs_to: what has to be said to open it again.
        """
        nonce = secrets.token_bytes(NONCE_BYTES)
        head = _FORM + self._first + nonce
        return head + self._ciphers[self._first].encrypt(nonce, secret.encode(), belongs_to.encode())

    def open(self, sealed: bytes, belongs_to: str) -> str:
        """What was sealed.

        Raises:
            Unreadable: if it does not open. The message says why, and nothing of the secret.
        """
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415  # see above

        if len(sealed) <= _HEAD_BYTES or not sealed.startswith(_FORM):
            raise Unreadable("it was not sealed by this release or an earlier one")
        cipher = self._ciphers.get(mark_of(sealed))
        if cipher is None:
            raise Unreadable("no key of TASKQUEUE_SECRET_KEY sealed it")
        nonce = sealed[_HEAD_BYTES - NONCE_BYTES : _HEAD_BYTES]
        try:
            return cipher.decrypt(nonce, sealed[_HEAD_BYTES:], belongs_to.encode()).decode()
        except (InvalidTag, UnicodeDecodeError):
            raise Unreadable("its bytes are not those that were sealed for it") from None


def mark_of(sealed: bytes) -> bytes:
    """The mark of the key that sealed it."""
    return sealed[len(_FORM) : len(_FORM) + MARK_BYTES]


def _cipher(master: bytes) -> "tuple[bytes, AESGCM]":
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415  # see above

    return _derived(master, _MARKING, MARK_BYTES), AESGCM(_derived(master, PURPOSE, 32))


def _derived(master: bytes, purpose: bytes, length: int) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415  # see above
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

    return HKDF(algorithm=SHA256(), length=length, salt=None, info=purpose).derive(master)

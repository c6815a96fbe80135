"""Signatures of webhooks (Standard Webhooks): made when one is sent, checked by `taskqueue webhooks`.

`v1` is HMAC-SHA256 with a secret that both sides know (`whsec_…`). `v1a` is
ed25519: the sender keeps `whsk_…`, and a receiver needs only the public `whpk_…`.
What is signed is the same: the id, the time of the attempt and the body.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets as random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from app.core import config, errors

if TYPE_CHECKING:
    # Importing it takes 50 ms, which only who has such a key should pay.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TOLERANCE_SECONDS = 300
"""How far the time of a webhook may be from the receiver's own; the published libraries allow as much."""
PUBLIC_KEY_BYTES = 32
_SECONDS = re.compile(r"[0-9]{1,12}")


class Ed25519Key:
    """A key pair. Only who holds it can sign, and whoever holds its public half can check."""

    def __init__(self, private: "Ed25519PrivateKey") -> None:
        self._private = private

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The pair that these 32 bytes make (RFC 8032 section 5.1.5)."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415  # see above

        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @property
    def public_bytes(self) -> bytes:
        """The half that receivers know, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, content: bytes) -> bytes:
        """The signature, 64 bytes."""
        return self._private.sign(content)


Key = bytes | Ed25519Key
"""What signs: the bytes of a `whsec_…` secret, or the pair of a `whsk_…` one."""
Kind = Literal["hmac", "ed25519"]


class NotVerified(errors.TaskQueueError):
    """A webhook is not what its sender signed, or not of now. The message says which check failed."""


def key(secret: str) -> Key:
    """The key inside a `whsec_…` or `whsk_…` secret.

    Raises:
        ValueError: if it is neither. The message does not repeat it.
    """
    raw = config.webhook_key(secret)
    return Ed25519Key.from_seed(raw[:32]) if secret.startswith("whsk_") else raw


def new_secret(kind: Kind) -> str:
    """A secret that nobody has seen: 32 random bytes."""
    raw = random.token_bytes(32)
    if kind == "hmac":
        return f"whsec_{base64.b64encode(raw).decode()}"
    return f"whsk_{base64.b64encode(raw + Ed25519Key.from_seed(raw).public_bytes).decode()}"


def kind_of(secret: str) -> Kind:
    """How a `whsec_…` or `whsk_…` secret signs."""
    return "ed25519" if secret.startswith("whsk_") else "hmac"


def public_key(secret: str) -> str | None:
    """The `whpk_…` that checks what a `whsk_…` signs; None for a `whsec_…`, which has none. Raises as `key`."""
    one = key(secret)
    return None if isinstance(one, bytes) else f"whpk_{base64.b64encode(one.public_bytes).decode()}"


def fingerprint(secret: str) -> str:
    """What shows which secret is meant, and not what it is: the first 12 digits of `sha256sum` of its text."""
    return hashlib.sha256(secret.encode()).hexdigest()[:12]


def check(secret: str) -> None:
    """Whether something can be verified with it.

    Raises:
        ValueError: if it is no `whsec_…`, `whsk_…` or `whpk_…`. The message does not repeat it.
    """
    if secret.startswith("whpk_"):
        _public_key(secret)
    else:
        key(secret)


def keys(settings: config.Settings) -> tuple[Key, ...]:
    """The keys inside the secrets of the settings, in their order."""
    return tuple(key(secret.get_secret_value()) for secret in settings.webhook_secrets)


def _content(webhook_id: str, timestamp: str, body: bytes) -> bytes:
    return f"{webhook_id}.{timestamp}.".encode("utf-8", "replace") + body


def _signature(one: Key, content: bytes) -> str:
    if isinstance(one, bytes):
        return "v1," + base64.b64encode(hmac.digest(one, content, hashlib.sha256)).decode()
    return "v1a," + base64.b64encode(one.sign(content)).decode()


def sign(keys: Sequence[Key], webhook_id: str, timestamp_seconds: int, body: bytes) -> str:
    """The `webhook-signature` header: a `v1,…` or `v1a,…` for each key, with spaces between them.

    Several keys sign while a secret is being rotated; a receiver accepts whichever it
    knows (Standard Webhooks, "Signature scheme" and "Rotation").

    Args:
        keys: from `key`; raw bytes are those of a shared secret.
        webhook_id: the `webhook-id` header.
        timestamp_seconds: the `webhook-timestamp` header, Unix time of this attempt.
        body: the very bytes that are sent.

    Raises:
        ValueError: if the id contains a full stop, which separates what is signed.
    """
    if "." in webhook_id:
        raise ValueError("a webhook id must not contain a full stop")
    content = _content(webhook_id, str(timestamp_seconds), body)
    return " ".join(_signature(one, content) for one in keys)


def verify(secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_seconds: float) -> None:
    """Check one webhook as its receiver does.

    Args:
        secrets: `whsec_…`, `whpk_…` or `whsk_…`; one of them must have signed.
        headers: of the request, in any case.
        body: the very bytes that came.
        now_seconds: Unix time to hold its time against.

    Raises:
        NotVerified: if a check fails; the message is one line that says which.
        ValueError: if a secret is none.
    """
    found = {name.lower(): value.strip() for name, value in headers.items()}
    for name in ("webhook-id", "webhook-timestamp", "webhook-signature"):
        if not found.get(name):
            raise NotVerified(f"the header {name} is missing")
    timestamp = found["webhook-timestamp"]
    if not _SECONDS.fullmatch(timestamp):
        raise NotVerified("the header webhook-timestamp is no number of seconds")
    signatures = found["webhook-signature"].split()
    content = _content(found["webhook-id"], timestamp, body)
    if not any([_matches(secret, signatures, content) for secret in secrets]):  # noqa: C419  # each is tried, in equal time
        raise NotVerified(_mismatch(secrets, signatures))
    away = now_seconds - int(timestamp)
    if abs(away) > TOLERANCE_SECONDS:
        when = "past" if away > 0 else "future"
        raise NotVerified(f"the signature is right, but webhook-timestamp is {abs(away):.0f} s in the {when}")


def _matches(secret: str, signatures: Sequence[str], content: bytes) -> bool:
    if secret.startswith("whpk_"):
        public = _public_key(secret)
        return any(_checks(public, one.partition(",")[2], content) for one in signatures if one.startswith("v1a,"))
    wanted = _signature(key(secret), content).encode()
    return any([hmac.compare_digest(wanted, one.encode("utf-8", "replace")) for one in signatures])  # noqa: C419  # as above


def _public_key(secret: str) -> bytes:
    try:
        public = base64.b64decode(secret.removeprefix("whpk_"), validate=True)
    except (binascii.Error, ValueError):
        public = b""
    if len(public) != PUBLIC_KEY_BYTES:
        raise ValueError("must be whpk_ followed by the base64 of 32 bytes")
    return public


def _checks(public: bytes, signature: str, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415  # see above
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(base64.b64decode(signature, validate=True), content)
    except (InvalidSignature, binascii.Error, ValueError):
        return False
    return True


def _mismatch(secrets: Sequence[str], signatures: Sequence[str]) -> str:
    wanted = {"v1" if secret.startswith("whsec_") else "v1a" for secret in secrets}
    if not wanted & {one.partition(",")[0] for one in signatures}:
        return f"webhook-signature has no {' or '.join(sorted(wanted))} signature, which is what this secret makes"
    return "no signature matches: another secret signed it, or the body or a header is not what was sent"

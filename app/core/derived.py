"""Keys made of `TASKQUEUE_SECRET_KEY`, one for each purpose, so that no two uses of it can be played off."""

import hmac

from pydantic import SecretStr

KEY_ID_CHARACTERS = 8


def key(secret: SecretStr, purpose: str) -> bytes:
    """32 bytes for one purpose (HKDF with SHA-256 and no salt, RFC 5869).

    Args:
        secret: one of `Settings.secret_keys`.
        purpose: what the key is for, a constant; another purpose is another key, and neither tells of the other.
    """
    extracted = hmac.digest(bytes(32), secret.get_secret_value().encode(), "sha256")
    return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


def key_id(secret: SecretStr) -> str:
    """What a secret is called beside what was made with it: 8 hexadecimal digits that don't tell it."""
    return key(secret, "taskqueue key id").hex()[:KEY_ID_CHARACTERS]

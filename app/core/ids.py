"""Ids are made in Python, so that nothing newer than PostgreSQL 15 is needed."""

import os
import time
from uuid import UUID

DRAWN = 256
"""Random numbers that are drawn at once: to ask the system for one takes nearly as long as for all of them."""

_drawn: list[bytes] = []
os.register_at_fork(after_in_child=_drawn.clear)  # Else parent and child would go on with the same ones.


def random_bytes() -> bytes:
    """Sixteen random bytes, which nobody else gets. They are no secret."""
    try:
        return _drawn.pop()
    except IndexError:
        fresh = os.urandom(16 * DRAWN)
        _drawn.extend([fresh[start : start + 16] for start in range(16, len(fresh), 16)])
        return fresh[:16]


def uuid7() -> UUID:
    """A UUIDv7: 48 bits of Unix milliseconds, then 74 random bits (RFC 9562, section 5.7).

    Ids made later sort later, which keeps the primary key's index compact. They
    reveal when they were made and are never a secret.
    """
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds & ((1 << 48) - 1)) << 80 | int.from_bytes(random_bytes()[:10], "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    return UUID(int=value & ~(0x3 << 62) | (0x2 << 62))

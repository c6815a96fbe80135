"""API keys: what they look like, what is kept of them, and who holds one.

A key is made at random and shown once. What is kept is a digest that only this
service can make (HMAC, keyed by `TASKQUEUE_SECRET_KEY`), so neither the table
nor a backup of it opens anything. `text` knows what a key looks like and how to
know one again, `store` has every statement on `api_key`, and `ring` answers an
API process who holds a key, mostly from memory.
"""

from app.keys.ring import FRESH_SECONDS, STALE_SECONDS, Holder, Keyring
from app.keys.store import Kept, NewKey, add, find, kept, revoke, usable
from app.keys.text import ID, PREFIX, Masters, id_of, made

__all__ = [
    "FRESH_SECONDS",
    "ID",
    "PREFIX",
    "STALE_SECONDS",
    "Holder",
    "Kept",
    "Keyring",
    "Masters",
    "NewKey",
    "add",
    "find",
    "id_of",
    "kept",
    "made",
    "revoke",
    "usable",
]

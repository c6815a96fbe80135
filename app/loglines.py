"""What a running attempt has logged, on its way through Redis to those who follow its task.

It is told as it would be kept if the attempt ended now, and all of it again with
each new line. So whoever missed something has it with the next message, and what
is kept in the end holds no line that a follower has passed over.

Anybody may write to Redis. What is told is sealed with the token of the attempt,
which nobody knows but the worker that claimed it and its row: a forged message is
none. One that is repeated, late or lost does no harm, because lines are numbered.
"""

import hashlib
import hmac
import json
from uuid import UUID

from app.lifecycle import Claim, Log, Logged, Snapshot, read_lines

MOST_BYTES = 32_768
"""Of a message: twice what is kept of an attempt, as in the row."""
_SEAL_BYTES = hashlib.sha256().digest_size


def encode(claim: Claim, log: Log) -> bytes:
    """A message with the last lines of a running attempt."""
    body = f'{{"attempt": {claim.attempt}, "dropped": {log.dropped}, "lines": {log.lines}}}'.encode()
    return _seal(claim.token, body) + body


def decode(raw: bytes, of: Snapshot) -> Logged | None:
    """The lines in a message, if they are of the attempt that this is a picture of; None for anything else."""
    seal, body = raw[:_SEAL_BYTES], raw[_SEAL_BYTES:]
    if of.token is None or of.started_at is None or len(raw) > MOST_BYTES:
        return None
    if not hmac.compare_digest(seal, _seal(of.token, body)):
        return None
    try:
        # Sealed, but perhaps by a worker of another release.
        found = json.loads(body)
        lines = read_lines(found["lines"], of.started_at, int(found["dropped"]))
        texts = [text for line in lines for text in (line.level, line.logger, line.message)]
        whole = found["attempt"] == of.attempt and all(isinstance(text, str) for text in texts)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None
    return Logged(of.attempt, lines) if whole else None


def _seal(token: UUID, body: bytes) -> bytes:
    return hmac.digest(token.bytes, body, "sha256")

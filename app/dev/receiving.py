"""The receiver's side of a webhook, for who writes one: `taskqueue webhooks verify` and `taskqueue webhooks secret`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from app.core import config, errors
from app.dev import environment
from app.utils import exchange, signing

VARIABLE = "TASKQUEUE_WEBHOOK_SECRET"
REMEMBERED = "webhook-secret"
"""The file of the data directory in which `make run` keeps the secret that it made up."""


class Unreadable(errors.TaskQueueError):
    """What was captured is no request. The message is one line."""


def known_secrets(env_file: str | Path = config.ENV_FILE) -> tuple[str, ...]:
    """What this machine can verify with: `whsec_…`, `whpk_…` or `whsk_…`; nothing else has to be set.

    They are those of TASKQUEUE_WEBHOOK_SECRET, in the environment or in `.env`; or
    else the one that `make run` keeps.

    Raises:
        SettingsError: if there is none, or one is wrong.
    """
    found = environment.chosen(env_file)
    text = found.get(VARIABLE) or _remembered(environment.data_dir(found) / REMEMBERED)
    if not text.split():
        raise errors.SettingsError(f"{VARIABLE} is not set: it is the secret that signs, or its whpk_… public key")
    for secret in text.split():
        try:
            signing.check(secret)
        except ValueError as wrong:
            raise errors.SettingsError(f"{VARIABLE} is wrong: {wrong}") from None
    return tuple(text.split())


def captured(path: str) -> bytes:
    """What is in a file, or in the standard input if the path is `-`.

    Raises:
        Unreadable: if it can't be read.
    """
    try:
        return sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as failed:
        raise Unreadable(f"{path}: {failed.strerror}") from None


def _remembered(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def new_secret(*, ed25519: bool) -> Sequence[str]:
    """Lines that show a new secret, and the public key behind it if there is one."""
    secret = signing.new_secret("ed25519" if ed25519 else "hmac")
    public = signing.public_key(secret)
    if public is None:
        return [secret]
    return [secret, f"{public}  (for receivers; the line above is for this service alone)"]


def headers_of(head: bytes) -> dict[str, str]:
    """The headers in a text: `name: value` lines, with or without a request line and curl's `> `; or a JSON object.

    Raises:
        Unreadable: if it is neither.
    """
    text = head.decode("utf-8", "replace").strip()
    if text.startswith("{"):
        return _headers_of_json(text)
    lines = [line.strip().removeprefix("> ") for line in text.splitlines()]
    pairs = [line.partition(":") for line in lines if line and " HTTP/" not in line]
    if not pairs or not all(colon and name.strip() for name, colon, _ in pairs):
        raise Unreadable("the headers are no lines of the form `name: value`")
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _headers_of_json(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Unreadable("the headers are no JSON object") from None
    return {str(name).lower(): str(value) for name, value in found.items()}


def split(request: bytes) -> tuple[dict[str, str], bytes]:
    """The headers and the body of one captured request, which an empty line separates.

    Raises:
        Unreadable: if there is no empty line, or no headers before it.
    """
    ends = [(request.find(end), end) for end in (b"\r\n\r\n", b"\n\n") if end in request]
    if not ends:
        raise Unreadable("there is no empty line between the headers and the body")
    place, end = min(ends)
    headers, body = headers_of(request[:place]), request[place + len(end) :]
    length = headers.get("content-length", "")
    if length.isascii() and length.isdigit() and not body[int(length[:9]) :].strip(b"\r\n"):
        body = body[: int(length[:9])]  # an editor or a shell ended the file with a newline
    return headers, body


def verified(secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_seconds: float | None) -> str:
    """One line on a webhook that is what its sender signed.

    Args:
        secrets: one of them must have signed.
        headers: of the request.
        body: the very bytes that came.
        now_seconds: Unix time to hold its time against; None does not look at its time.

    Raises:
        NotVerified: if it is not; the message says which check failed, and what was probably done to the body.
    """
    sent_at = headers.get("webhook-timestamp", "")
    moment = now_seconds if now_seconds is not None else float(sent_at) if sent_at.isdecimal() else 0.0
    try:
        signing.verify(secrets, headers, body, moment)
    except signing.NotVerified as failed:
        for changed, what in _repairs(body):
            if _verifies(secrets, headers, changed, moment):
                raise signing.NotVerified(f"no signature matches this body, but {what}") from None
        raise failed from None
    return told(headers, body)


def _verifies(secrets: Sequence[str], headers: Mapping[str, str], body: bytes, now_seconds: float) -> bool:
    try:
        signing.verify(secrets, headers, body, now_seconds)
    except signing.NotVerified:
        return False
    return True


def _repairs(body: bytes) -> list[tuple[bytes, str]]:
    """What the body may have been before somebody meant well."""
    repairs = [(body.rstrip(b"\r\n"), "it does without the newline at its end: only the bytes that came count")]
    try:
        event = json.loads(body)
        forms = [json.dumps(event), json.dumps(event, ensure_ascii=False)]
    except (ValueError, RecursionError):
        return repairs
    what = "it was parsed and written anew: only the bytes that came count"
    return repairs + [(form.encode("utf-8", "replace"), what) for form in forms]


def told(headers: Mapping[str, str], body: bytes) -> str:
    """What a webhook says, in a few words that a terminal bears."""
    line = ", ".join([*_said(body), f"webhook-id {headers.get('webhook-id', '')}"])
    return " ".join(exchange.readable(line.encode("utf-8", "replace")).split())[:500]


def _said(body: bytes) -> Sequence[str]:
    try:
        event = json.loads(body)
        kind, data = str(event["type"]), event["data"]
        if data.get("test") is True:
            return [f"{kind}, a test"]
        return [kind, f"task {data['task_id']}", str(data["status"]), f"sequence {data['sequence']}"]
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ["an event of another kind"]

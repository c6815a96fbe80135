"""`taskqueue webhooks listen`: a receiver on this machine that verifies, shows and hands on what comes."""

import contextlib
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn

from app.core import errors
from app.dev import receiving
from app.utils import signing, webhook

BODY_LIMIT = 16 * 1024 * 1024
"""Bytes of a webhook; ours are far smaller."""
FORWARD_SECONDS = webhook.DEADLINE_SECONDS - 1.0
"""So that whoever sent it hears of the timeout, rather than having one of its own."""
REMEMBERED_IDS = 10_000
HOP_BY_HOP = frozenset(
    {"connection", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
"""Headers that belong to one connection (RFC 9110 section 7.6.1), and the host of this receiver."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]


class NotListening(errors.TaskQueueError):
    """The port can't be had. The message is one line."""


class Listener:
    """An ASGI application that answers every webhook with what the program behind it answered.

    Args:
        secrets: one of them must have signed.
        forward: the URL of the program; without it, a verified webhook is answered with 204.
        show: is given a line for each webhook.
    """

    def __init__(self, secrets: Sequence[str], forward: str | None, show: Callable[[str], object]) -> None:
        self._secrets = tuple(secrets)
        self._forward = forward
        self._show = show
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._client = httpx.AsyncClient(timeout=FORWARD_SECONDS, trust_env=False, follow_redirects=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; or close the client when the server stops."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["method"] != "POST":
            await _answer(send, 405, b"webhooks are POSTs\n")
            return
        body = await _read(receive)
        if body is None:
            await _answer(send, 413, b"larger than 16 MiB\n")
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            verdict = self._judged(headers, body)
        except signing.NotVerified as failed:
            self._say(f"REFUSED: {failed}; {receiving.told(headers, body)}")
            await _answer(send, 400, f"{failed}\n".encode())
            return
        status, answer_headers, answer, came = await self._forwarded(scope["headers"], body)
        self._say(f"{verdict} -> {came}")
        await _answer(send, status, answer, answer_headers)

    def _say(self, text: str) -> None:
        self._show(f"{time.strftime('%H:%M:%S')} {text}")

    def _judged(self, headers: Mapping[str, str], body: bytes) -> str:
        line = receiving.verified(self._secrets, headers, body, time.time())
        webhook_id = headers.get("webhook-id", "")
        again = " again" if webhook_id in self._seen else ""
        self._seen[webhook_id] = None
        if len(self._seen) > REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return f"verified{again}: {line}"

    async def _forwarded(self, headers: Headers, body: bytes) -> tuple[int, Headers, bytes, str]:
        if self._forward is None:
            return 204, (), b"", "204"
        # Made by hand: the client would add headers of its own.
        request = httpx.Request("POST", self._forward, headers=_own(headers), content=body)
        started = time.monotonic()
        try:
            response = await self._client.send(request, stream=True)
            try:
                answer = b"".join([chunk async for chunk in response.aiter_raw()])
            finally:
                await response.aclose()
        except httpx.TimeoutException:
            return 504, (), b"the program behind did not answer in time\n", "504: the program did not answer in time"
        except httpx.HTTPError:
            return 502, (), b"the program behind can't be reached\n", f"502: {self._forward} can't be reached"
        took = round((time.monotonic() - started) * 1000)
        return response.status_code, _own(response.headers.raw), answer, f"{response.status_code} in {took} ms"

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._client.aclose()
        await send({"type": "lifespan.shutdown.complete"})


def _own(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Headers that go on: the bytes are the same, the connection is another."""
    return [(name, value) for name, value in headers if name.decode("latin-1").lower() not in HOP_BY_HOP]


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if it is larger than any webhook."""
    body = bytearray()
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_LIMIT:
            return None
    return bytes(body)


async def _answer(send: Send, status: int, body: bytes, headers: Headers = ()) -> None:
    named = headers or ([(b"content-type", b"text/plain")] if body else [])
    await send({"type": "http.response.start", "status": status, "headers": list(named)})
    await send({"type": "http.response.body", "body": body})


def checked(forward: str | None) -> str | None:
    """The URL to hand on to, if it is one.

    Raises:
        SettingsError: if it is not.
    """
    if forward is None:
        return None
    parts = urlsplit(forward)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise errors.SettingsError("--forward must be a URL such as http://localhost:3000/hook")
    return forward


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        NotListening: if the port is taken, or the address is not one of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError, UnicodeError) as refused:
        number = refused.errno if isinstance(refused, OSError) else None
        reason = os.strerror(number) if number and number > 0 else "there is no such address"
        raise NotListening(f"can't listen on {host}:{port}: {reason}; --port names another one") from None


def listen(secrets: Sequence[str], forward: str | None, host: str, port: int, show: Callable[[str], object]) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Args:
        secrets: as in `Listener`.
        forward: as in `Listener`.
        host: the address to listen on.
        port: the port; 0 takes a free one.
        show: is given each line for the user.

    Raises:
        SettingsError: if `forward` is no URL.
        NotListening: if the port can't be had.
    """
    listener = Listener(secrets, checked(forward), show)
    options = uvicorn.Config(
        listener, lifespan="on", access_log=False, log_level="error", server_header=False, date_header=False
    )
    # uvicorn raises the signal again after it has stopped.
    with bound(host, port) as listening, contextlib.suppress(KeyboardInterrupt):
        name = f"[{host}]" if ":" in host else host
        show(f"listening: use http://{name}:{listening.getsockname()[1]}/ as webhook_url (Ctrl-C ends it)")
        show(f"forwarding to {forward}" if forward else "forwarding nowhere: every webhook is answered with 204")
        uvicorn.Server(options).run(sockets=[listening])
    show("ended")

"""Real sockets on loopback: what a receiver can do to us, and what reaches it."""

import asyncio
import base64
import json
import ssl
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import pytest
from standardwebhooks import Webhook

from app.utils import guard, pinned, webhook
from app.utils.webhook import Outcome, Receipt
from tests.support.certificates import Certificate, self_signed
from tests.support.hostile import Hostile, dripped_success, head, huge_header, reset_mid_body, serving, silent
from tests.support.receiver import Answer, Receiver

OLD, NEW = b"o" * 32, b"n" * 32
PRIVATE = guard.EgressRules(allow_private=True)
DEADLINE_SECONDS = 0.5
SLACK_SECONDS = 0.5
"""For a busy machine; the deadline itself is kept to a few milliseconds."""
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def send(
    url: str,
    *,
    rules: guard.EgressRules = PRIVATE,
    resolver: pinned.Resolver | None = None,
    trusted: ssl.SSLContext | None = None,
    body: bytes = b"{}",
) -> Receipt:
    started = time.monotonic()
    async with webhook.Sender(
        rules, [NEW], deadline_seconds=DEADLINE_SECONDS, resolver=resolver, ssl_context=trusted
    ) as sender:
        receipt = await sender.post(url, webhook_id="id", body=body, traceparent=None, timestamp_seconds=1)
        elapsed = time.monotonic() - started
    assert elapsed <= DEADLINE_SECONDS + SLACK_SECONDS
    assert receipt.duration_seconds <= elapsed
    return receipt


async def test_a_receiver_gets_the_body_and_the_headers_of_the_standard() -> None:
    body = '{"type": "task.succeeded", "data": {"result": "ü"}}'.encode()
    seconds = int(time.time())
    with Receiver([204]) as receiver:
        async with webhook.Sender(PRIVATE, [NEW, OLD]) as sender:
            receipt = await sender.post(
                receiver.url + "/hook?a=b",
                webhook_id="9f6c",
                body=body,
                traceparent=TRACEPARENT,
                timestamp_seconds=seconds,
            )
    assert (receipt.outcome, receipt.status_code, receipt.excerpt) == (Outcome.SUCCESS, 204, "")
    [received] = receiver.requests
    assert (received.method, received.path, received.body) == ("POST", "/hook?a=b", body)
    assert set(received.headers) == {
        "accept", "accept-encoding", "connection", "content-length", "content-type", "host", "traceparent",
        "user-agent", "webhook-id", "webhook-signature", "webhook-timestamp",
    }  # fmt: skip
    assert received.headers["content-type"] == "application/json"
    assert received.headers["accept-encoding"] == "identity"
    assert received.headers["traceparent"] == TRACEPARENT
    for key in (OLD, NEW):
        secret = "whsec_" + base64.b64encode(key).decode()
        assert Webhook(secret).verify(received.body.decode(), dict(received.headers)) == json.loads(body)


async def test_without_keys_a_webhook_is_sent_unsigned() -> None:
    with Receiver() as receiver:
        async with webhook.Sender(PRIVATE) as sender:
            await sender.post(receiver.url, webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1)
    assert "webhook-signature" not in receiver.requests[0].headers
    assert "traceparent" not in receiver.requests[0].headers


@pytest.mark.parametrize(
    ("answer", "outcome", "retry_after_seconds"),
    [
        (Answer(status=410), Outcome.HTTP_4XX, None),
        (Answer(status=429, headers={"retry-after": "7"}), Outcome.HTTP_429, 7.0),
        (Answer(status=503, headers={"retry-after": "-7"}), Outcome.HTTP_5XX, None),
        (Answer(status=503, headers={"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"}), Outcome.HTTP_5XX, 86400.0),
        (Answer(status=304), Outcome.HTTP_3XX, None),
    ],
)
async def test_an_answer_becomes_a_receipt(answer: Answer, outcome: Outcome, retry_after_seconds: float | None) -> None:
    with Receiver([answer]) as receiver:
        receipt = await send(receiver.url)
    assert (receipt.outcome, receipt.status_code) == (outcome, answer.status)
    assert receipt.retry_after_seconds == retry_after_seconds


async def test_the_beginning_of_a_refusal_is_kept_without_nul() -> None:
    with Receiver([Answer(status=500, body=b"no\x00pe" + b"x" * 9000)]) as receiver:
        receipt = await send(receiver.url)
    assert receipt.excerpt == "nope" + "x" * (4096 - 5)


async def test_a_redirect_is_a_failure_and_is_not_followed() -> None:
    with Receiver() as inner, Receiver([Answer(status=302, headers={"location": inner.url})]) as receiver:
        receipt = await send(receiver.url)
    assert (receipt.outcome, receipt.status_code) == (Outcome.HTTP_3XX, 302)
    assert inner.requests == []


async def test_no_cookie_is_carried_over_to_the_next_post() -> None:
    with Receiver([Answer(headers={"set-cookie": "a=b; Path=/"})]) as receiver:
        async with webhook.Sender(PRIVATE) as sender:
            for _ in range(2):
                await sender.post(receiver.url, webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1)
    assert all("cookie" not in received.headers for received in receiver.requests)


async def test_nobody_listening_is_a_connect_error() -> None:
    async with serving(silent) as port:
        pass
    assert (await send(f"http://127.0.0.1:{port}/")).outcome is Outcome.CONNECT_ERROR


async def test_a_closed_sender_still_answers_with_a_receipt() -> None:
    sender = webhook.Sender(PRIVATE)
    await sender.aclose()
    receipt = await sender.post(
        "http://localhost:1/", webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1
    )
    assert receipt.outcome is Outcome.CONNECT_ERROR


@pytest.mark.parametrize(
    ("url", "webhook_id", "outcome"),
    [
        ("nonsense", "id", Outcome.INVALID_URL),
        ("http://127.0.0.1:0/", "id", Outcome.INVALID_URL),
        ("http://127.0.0.1:1/\ud800", "id", Outcome.INVALID_URL),
        ("http://127.0.0.1:1/", "an.id", Outcome.INVALID_URL),
    ],
)
async def test_what_can_not_be_sent_is_an_invalid_url(url: str, webhook_id: str, outcome: Outcome) -> None:
    async with webhook.Sender(PRIVATE, [NEW]) as sender:
        receipt = await sender.post(url, webhook_id=webhook_id, body=b"", traceparent=None, timestamp_seconds=1)
    assert receipt.outcome is outcome


async def test_cancellation_passes() -> None:
    async with serving(silent) as port, webhook.Sender(PRIVATE) as sender:
        task = asyncio.create_task(
            sender.post(f"http://127.0.0.1:{port}/", webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1)
        )
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@asynccontextmanager
async def names(lookup: pinned.Lookup) -> AsyncIterator[pinned.Resolver]:
    resolver = pinned.Resolver(lookup)
    try:
        yield resolver
    finally:
        resolver.close()


def loopback(host: str, port: int) -> list[str]:  # noqa: ARG001
    return ["127.0.0.1"]


def nowhere(host: str, port: int) -> list[str]:
    raise OSError(f"no such name: {host}:{port}")


@pytest.mark.parametrize("url", ["https://127.0.0.1:{}/", "https://hooks.example:{}/", "http://hooks.example:{}/"])
async def test_the_guard_lets_nothing_through_to_loopback(url: str) -> None:
    connections = 0

    async def sink(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1

    async with serving(sink) as port, names(loopback) as resolver:
        receipt = await send(url.format(port), rules=guard.EgressRules(), resolver=resolver)
    assert receipt.outcome is Outcome.BLOCKED
    assert connections == 0


async def test_a_name_that_leads_inside_is_blocked_and_one_that_leads_nowhere_is_a_dns_error() -> None:
    async with names(loopback) as resolver:
        assert (
            await send("https://hooks.example/", rules=guard.EgressRules(), resolver=resolver)
        ).outcome is Outcome.BLOCKED
    async with names(nowhere) as resolver:
        assert (
            await send("https://hooks.example/", rules=guard.EgressRules(), resolver=resolver)
        ).outcome is Outcome.DNS_ERROR


async def test_an_allowed_origin_is_reached_inside() -> None:
    with Receiver() as receiver:
        rules = guard.EgressRules(allowed_origins=frozenset({guard.Origin("http", "hooks.svc", receiver.port)}))
        async with names(loopback) as resolver:
            receipt = await send(f"http://hooks.svc:{receiver.port}/", rules=rules, resolver=resolver)
    assert receipt.outcome is Outcome.SUCCESS
    assert receiver.requests[0].headers["host"] == f"hooks.svc:{receiver.port}"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A self-signed certificate for hooks.example, and its key, made for this run."""
    return self_signed(tmp_path_factory.mktemp("tls"), "hooks.example")


def server_side(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


async def accepting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await head(reader)
    name = writer.get_extra_info("ssl_object").server_hostname
    writer.write(b"HTTP/1.1 404 Seen\r\nconnection: close\r\n\r\n%a" % name)
    await writer.drain()


async def test_tls_is_checked_against_the_name_though_the_connection_goes_to_the_address(
    certificate: Certificate,
) -> None:
    trusted = ssl.create_default_context(cafile=certificate[0])
    context = server_side(certificate)
    seen: list[str] = []
    context.sni_callback = lambda _, name, __: seen.append(name)
    async with serving(accepting, context) as port, names(loopback) as resolver:
        receipt = await send(f"https://hooks.example:{port}/", resolver=resolver, trusted=trusted)
    assert receipt.status_code == 404
    assert seen == ["hooks.example"]


async def test_one_handshake_carries_the_webhooks_of_one_owner(certificate: Certificate) -> None:
    handshakes: list[str] = []
    context = server_side(certificate)
    context.sni_callback = lambda _, name, __: handshakes.append(name)

    async def answering(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await head(reader)
            await reader.readexactly(2)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    trusted = ssl.create_default_context(cafile=certificate.crt)
    async with (
        serving(answering, context) as port,
        names(loopback) as resolver,
        webhook.Sender(PRIVATE, resolver=resolver, ssl_context=trusted) as sender,
    ):
        for owner in ("a", "a", "b", "a"):
            receipt = await sender.post(
                f"https://hooks.example:{port}/{owner}",
                webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1, owner=owner,
            )  # fmt: skip
            assert receipt.outcome is Outcome.SUCCESS
    assert handshakes == ["hooks.example"] * 2


async def test_plain_http_behind_https_is_a_tls_error() -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        await reader.read()

    async with serving(plain) as port:
        assert (await send(f"https://127.0.0.1:{port}/")).outcome is Outcome.TLS_ERROR


async def test_a_handshake_that_the_deadline_cuts_off_leaves_no_socket_behind() -> None:
    hung_up = asyncio.Event()

    async def stalling(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()
        hung_up.set()

    async with serving(stalling) as port, webhook.Sender(PRIVATE, deadline_seconds=0.1) as sender:
        receipt = await sender.post(
            f"https://127.0.0.1:{port}/", webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1
        )
        assert receipt.outcome is Outcome.TIMEOUT
        async with asyncio.timeout(5):
            await hung_up.wait()


async def test_a_receiver_that_swallows_everything_holds_up_nobody_else() -> None:
    with Receiver() as receiver:
        async with serving(silent) as port, webhook.Sender(PRIVATE, deadline_seconds=2.0) as sender:

            def post(url: str) -> Awaitable[Receipt]:
                return sender.post(url, webhook_id="id", body=b"{}", traceparent=None, timestamp_seconds=1)

            dead = asyncio.gather(*(post(f"http://127.0.0.1:{port}/") for _ in range(50)))
            healthy = await asyncio.gather(*(post(receiver.url) for _ in range(50)))
            assert not dead.done()
            assert {receipt.outcome for receipt in healthy} == {Outcome.SUCCESS}
            assert {receipt.outcome for receipt in await dead} == {Outcome.TIMEOUT}


async def test_request_sends_what_it_is_given_and_returns_what_came() -> None:
    answer = Answer(
        status=418,
        headers={"content-type": "text/plain", "set-cookie": "a=b", "x-secret": "s", "x-request-id": "7"},
        body="Tee\x00, ü".encode(),
    )
    with Receiver([answer]) as receiver:
        response = await webhook.request(
            "put", receiver.url + "/pot", {"Authorization": "Bearer t"}, b"leaves", 5.0, rules=PRIVATE
        )
    assert (response.status_code, response.body, response.truncated) == (418, "Tee, ü", False)
    assert response.headers["x-request-id"] == "7"
    assert not {"set-cookie", "x-secret"} & set(response.headers)
    [received] = receiver.requests
    assert (received.method, received.path, received.body) == ("PUT", "/pot", b"leaves")
    assert received.headers["authorization"] == "Bearer t"
    assert received.headers["user-agent"] == "taskqueue/1"


async def test_request_reads_256_kib_and_says_so() -> None:
    with Receiver([Answer(body=b"x" * 300_000)]) as receiver:
        response = await webhook.request("GET", receiver.url, rules=PRIVATE)
    assert (len(response.body), response.truncated) == (262_144, True)


async def test_request_returns_a_redirect_as_it_is() -> None:
    with Receiver([Answer(status=301, headers={"location": "/there"})]) as receiver:
        response = await webhook.request("GET", receiver.url, rules=PRIVATE)
    assert (response.status_code, response.headers["location"]) == (301, "/there")
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [
        (silent, Outcome.TIMEOUT),
        (dripped_success, Outcome.TIMEOUT),
        (reset_mid_body, Outcome.CONNECT_ERROR),
        (huge_header, Outcome.CONNECT_ERROR),
    ],
)
async def test_request_without_a_whole_answer_fails_in_time(behaviour: Hostile, outcome: Outcome) -> None:
    started = time.monotonic()
    async with serving(behaviour) as port:
        with pytest.raises(webhook.RequestFailed) as failed:
            await webhook.request("GET", f"http://127.0.0.1:{port}/", timeout_seconds=DEADLINE_SECONDS, rules=PRIVATE)
        assert time.monotonic() - started <= DEADLINE_SECONDS + SLACK_SECONDS
    assert failed.value.outcome is outcome


async def test_request_goes_through_the_guard() -> None:
    async with names(loopback) as resolver:
        with pytest.raises(webhook.RequestFailed) as failed:
            await webhook.request("GET", "https://hooks.example/", rules=guard.EgressRules(), resolver=resolver)
    assert failed.value.outcome is Outcome.BLOCKED

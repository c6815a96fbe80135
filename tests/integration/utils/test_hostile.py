"""What a receiver can cost the process that calls it: never more than the deadline and a few MiB."""

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Certificate, self_signed
from tests.support.hostile import BEHAVIOURS, Cost, Hostile, Poster, dripped_header, saying, serving, silent

DEADLINE_SECONDS = 0.5
SLACK_SECONDS = 0.2
MEMORY_BYTES = 8 << 20


@pytest.fixture(scope="module")
def poster() -> Iterator[Poster]:
    with Poster() as made:
        yield made


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


def assert_cheap(cost: Cost) -> None:
    assert cost.seconds <= DEADLINE_SECONDS + SLACK_SECONDS
    assert cost.grown_bytes <= MEMORY_BYTES
    assert len(cost.excerpt.encode()) <= 4096
    assert "\x00" not in cost.excerpt


@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_no_receiver_costs_more_than_the_deadline_and_8_mib(name: str, poster: Poster) -> None:
    behaviour, outcome, status_code = BEHAVIOURS[name]
    async with serving(behaviour) as port:
        cost = await poster.post(f"http://127.0.0.1:{port}/", DEADLINE_SECONDS)
    assert (cost.outcome, cost.status_code) == (outcome, status_code)
    assert_cheap(cost)


@pytest.mark.parametrize(
    ("status", "retry_after", "outcome", "seconds"),
    [
        (429, b"Sat, 31 Jan 2026 12:01:30 GMT", "http_429", 90.0),
        (429, b"Sat, 31 Jan 2026 11:59:30 GMT", "http_429", None),
        (429, b"Sat, 31 Jan 2099 12:00:00 GMT", "http_429", 86400.0),
        (503, b"7", "http_5xx", 7.0),
        (503, b"1e9", "http_5xx", None),
    ],
)
async def test_when_to_come_back_is_read_from_the_receivers_own_clock(
    status: int, retry_after: bytes, outcome: str, seconds: float | None, poster: Poster
) -> None:
    answer = (
        b"HTTP/1.1 %d No\r\ndate: Sat, 31 Jan 2026 12:00:00 GMT\r\nretry-after: %b\r\ncontent-length: 2\r\n\r\n\x00!"
    )
    async with serving(saying(answer % (status, retry_after))) as port:
        cost = await poster.post(f"http://127.0.0.1:{port}/", DEADLINE_SECONDS)
    assert (cost.outcome, cost.status_code, cost.retry_after_seconds, cost.excerpt) == (outcome, status, seconds, "!")
    assert_cheap(cost)


async def test_what_is_kept_of_an_answer_fits_4_kib_whatever_its_bytes_are(poster: Poster) -> None:
    async with serving(saying(b"HTTP/1.1 500 No\r\ncontent-length: 9000\r\n\r\n" + b"\xff\x00\xc3" * 3000)) as port:
        cost = await poster.post(f"http://127.0.0.1:{port}/", DEADLINE_SECONDS)
    assert_cheap(cost)
    assert set(cost.excerpt) == {"\ufffd"}


async def stalling_after_the_greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(5)
    writer.write(b"\x16\x03\x03\x40\x00")  # a record of 16 KiB, which never comes
    await asyncio.Event().wait()


@pytest.mark.parametrize("behaviour", [silent, stalling_after_the_greeting])
async def test_tls_that_stalls_costs_no_more_than_the_deadline(behaviour: Hostile, poster: Poster) -> None:
    async with serving(behaviour) as port:
        cost = await poster.post(f"https://hooks.example:{port}/", DEADLINE_SECONDS)
    assert (cost.outcome, cost.status_code) == ("timeout", None)
    assert_cheap(cost)


def server_side(certificate: Certificate) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@pytest.mark.parametrize(
    ("name", "days", "trusted", "outcome"),
    [
        ("hooks.example", 2, True, "success"),
        ("hooks.example", 2, False, "tls_error"),
        ("hooks.example", -2, True, "tls_error"),
        ("hooks.example", 20, True, "tls_error"),
        ("other.example", 2, True, "tls_error"),
        ("*.example.hooks.example", 2, True, "tls_error"),
    ],
    ids=["good", "self-signed", "expired", "not yet valid", "another name", "too wide a name"],
)
async def test_only_a_good_certificate_is_accepted(
    name: str, days: int, *, trusted: bool, outcome: str, poster: Poster, directory: Path
) -> None:
    certificate = self_signed(directory, name, days=days)
    answer = saying(b"HTTP/1.1 204 No Content\r\n\r\n")
    async with serving(answer, server_side(certificate)) as port:
        cost = await poster.post(
            f"https://hooks.example:{port}/", DEADLINE_SECONDS, certificate.crt if trusted else None
        )
    assert cost.outcome == outcome
    assert_cheap(cost)


async def test_a_header_that_drips_inside_tls_costs_no_more_than_the_deadline(poster: Poster, directory: Path) -> None:
    certificate = self_signed(directory, "hooks.example")
    async with serving(dripped_header, server_side(certificate)) as port:
        cost = await poster.post(f"https://hooks.example:{port}/", DEADLINE_SECONDS, certificate.crt)
    assert cost.outcome == "timeout"
    assert_cheap(cost)


async def test_a_redirect_is_asked_for_once(poster: Poster) -> None:
    asked = 0

    async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await BEHAVIOURS["redirects to itself"][0](reader, writer)

    async with serving(counting) as port:
        await poster.post(f"http://127.0.0.1:{port}/", DEADLINE_SECONDS)
    assert asked == 1

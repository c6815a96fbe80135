"""Which `webhook_url` a submit refuses, and which it takes, over HTTP."""

import json
from collections.abc import Iterable

import httpx
import pytest

from app.core.config import Settings
from app.db import Database
from tests.integration.routers.conftest import Serve
from tests.unit.utils.test_guard import DENIED, LOOPBACK_SPELLINGS, PUBLIC

SUBMIT = "/api/tasks/submit"
SECRET = "zq-hunter2-zq"


def literals(addresses: Iterable[str]) -> list[str]:
    return [
        f"https://[{address}]/{SECRET}" if ":" in address else f"https://{address}/{SECRET}" for address in addresses
    ]


REFUSED = {
    "scheme": [
        f"{scheme}example.com/{SECRET}"
        for scheme in (
            "http://", "HTTP://", "ftp://", "ftps://", "ws://", "wss://", "file://", "gopher://", "unix://", "data:",
            "javascript:", "mailto:", "//", "", "://", "https//", "https;//",
        )
    ],
    "user": [
        f"https://{user}example.com/hook"
        for user in (f"{SECRET}@", f"user:{SECRET}@", f":{SECRET}@", f"user:{SECRET}@@", "%75ser@")
    ] + [f"https://user:{SECRET}@[2606:4700:4700::1111]/"],
    "port": [
        f"https://example.com:{port}/{SECRET}"
        for port in (
            0, 1, 22, 25, 80, 444, 3000, 5432, 6379, 8080, 8442, 9443, 65535, 65536, 99999, -443, "443x",
            "\uff14\uff14\uff13",
        )
    ],
    "literal": literals(DENIED),
    "literal with another spelling": [
        *(f"https://{host}/{SECRET}" for host in LOOPBACK_SPELLINGS),
        *(f"https:\\\\{host}:8443\\{SECRET}" for host in LOOPBACK_SPELLINGS),
        f"https://169.254.169.254./{SECRET}",
        f"https://0xa9fea9fe/{SECRET}",
        f"https://2852039166/{SECRET}",
        f"https://0251.0376.0251.0376/{SECRET}",
        f"https://[::ffff:a9fe:a9fe]/{SECRET}",
        f"https://[fe80::1%25eth0]/{SECRET}",
    ],
    "name": [
        f"https://{host}/{SECRET}"
        for host in (
            "localhost", "LOCALHOST", "localhost.", "localhost\u3002", "intranet", "postgres", "kubernetes.default.svc",
            "redis.tasks.svc.cluster.local", "metadata.google.internal", "printer.local", "a.localhost", "x.home.arpa",
            "a..b", ".", "", "exa mple.com", "exam\tple", "xn--", "a" * 64 + ".example", "example.com..",
        )
    ],
    "length": [
        "https://example.com/" + "a" * (2049 - len("https://example.com/")),
        "https://example.com/" + "a" * 100_000,
        "https://example.com/" + "ü" * 1000,
        "https://" + "a." * 1030 + "example/",
    ],
    "without its query": [f"https://example.com/{SECRET}?…", f"https://example.com/?{SECRET}?…"],
    "no URL": ["", " ", SECRET, "https://", "https://example.com/#fragment", "https://example.com/\ud800", "\x00"],
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
async def test_a_webhook_that_leads_where_none_may_is_refused_at_submit(
    why: str, api: httpx.AsyncClient, db: Database
) -> None:
    for url in REFUSED[why]:
        # As ASCII: httpx can't spell a lone surrogate, but a client can.
        raw = json.dumps({"webhook_url": url}).encode()
        answer = await api.post(SUBMIT, content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 422, url
        [fault] = answer.json()["errors"]
        assert fault["pointer"] == "/webhook_url", url
        assert fault["detail"], url
        assert SECRET not in answer.text, url
        assert len(answer.text) < 500, url
    assert await db.fetchval("SELECT count(*) FROM task") == 0


@pytest.mark.parametrize(
    ("url", "stored"),
    [
        ("https://example.com", "https://example.com/"),
        ("HTTPS://EXAMPLE.com.:443/Hook?a=B", "https://example.com/Hook?a=B"),
        ("https://example.com:8443/x", "https://example.com:8443/x"),
        ("https://" + "a" * 63 + ".example/", "https://" + "a" * 63 + ".example/"),
        ("https://a.example\\@b.example/", "https://a.example/@b.example/"),
        (limit := "https://example.com/" + "a" * (2048 - len("https://example.com/")), limit),
    ],
)
async def test_a_public_one_is_taken_and_stored_in_its_normal_spelling(
    url: str, stored: str, api: httpx.AsyncClient, db: Database
) -> None:
    assert (await api.post(SUBMIT, json={"webhook_url": url})).status_code == 202
    assert await db.fetchval("SELECT webhook_url FROM task") == stored


async def test_public_addresses_are_taken_as_they_are(api: httpx.AsyncClient) -> None:
    for url in literals(PUBLIC):
        assert (await api.post(SUBMIT, json={"webhook_url": url})).status_code == 202, url


async def test_an_allowed_origin_is_taken_and_its_neighbours_are_not(api_settings: Settings, serve: Serve) -> None:
    settings = api_settings.model_copy(update={"webhook_allowed_origins": ("http://receiver.hooks.svc:8080",)})
    async with serve(settings) as api:
        for url, status in (
            ("http://receiver.hooks.svc:8080/hook", 202),
            ("http://receiver.hooks.svc:8081/hook", 422),
            ("https://receiver.hooks.svc:8080/hook", 422),
            ("http://other.hooks.svc:8080/hook", 422),
        ):
            assert (await api.post(SUBMIT, json={"webhook_url": url})).status_code == status, url


async def test_the_operators_own_ranges_are_refused_in_development_too(api_settings: Settings, serve: Serve) -> None:
    settings = api_settings.model_copy(
        update={"webhook_allow_private": True, "webhook_blocked_cidrs": ("10.1.0.0/16", "fd00:1::/32")}
    )
    async with serve(settings) as api:
        for url, status in (
            ("http://10.2.0.1:3000/", 202),
            ("http://10.1.0.1:3000/", 422),
            ("http://[::ffff:10.1.0.1]/", 422),
            ("http://0x0a010001/", 422),
            ("http://[fd00:1::5]/", 422),
        ):
            assert (await api.post(SUBMIT, json={"webhook_url": url})).status_code == status, url

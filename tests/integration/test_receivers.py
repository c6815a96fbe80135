"""docs/receivers.md tells the truth: its programs verify what this service signs, and its figures are the code's."""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import delivery
from app.core import config
from app.main import create_app
from app.utils import guard, signing, webhook
from tests.conftest import settings_for
from tests.support.network import closed_port

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "receivers.md").read_text()
KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
PAIR = signing.Ed25519Key.from_seed(KEY)
PUBLIC = "whpk_" + base64.b64encode(PAIR.public_bytes).decode()
BODY = '{"type": "task.succeeded", "data": {"task_id": "t-1", "result": "ü"}}'.encode()
GO_LIBRARY = "github.com/standard-webhooks/standard-webhooks/libraries"


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
    assert found is not None, f"no section {title}"
    return found[1]


def program(title: str, language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)
    return str(found)


def signed(
    keys: tuple[signing.Key, ...] = (KEY,), *, body: bytes = BODY, sent_seconds_ago: int = 0, webhook_id: str = "id-1"
) -> dict[str, str]:
    at = int(time.time()) - sent_seconds_ago
    return {
        "content-type": "application/json",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(at),
        "webhook-signature": signing.sign(keys, webhook_id, at, body),
    }


async def statuses(client: httpx.AsyncClient, path: str) -> dict[str, int]:
    """What a receiver of KEY's secret answers to webhooks good and bad."""
    cases: Mapping[str, dict[str, str]] = {
        "good": signed(),
        "again": signed(),
        "rotated": signed((b"x" * 32, PAIR, KEY)),
        "another secret": signed((b"x" * 32,)),
        "another body": signed(body=BODY + b" "),
        "too old": signed(sent_seconds_ago=3600),
        "unsigned": {"content-type": "application/json"},
        "garbage": signed() | {"webhook-signature": "garbage"},
    }
    return {
        name: (await client.post(path, content=BODY, headers=headers)).status_code for name, headers in cases.items()
    }


EXPECTED = {"good": 204, "again": 204, "rotated": 204} | dict.fromkeys(
    ["another secret", "another body", "too old", "unsigned", "garbage"], 400
)


async def test_the_python_receiver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TASKQUEUE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("INBOX", str(tmp_path / "inbox.db"))
    namespace: dict[str, Any] = {"__name__": "receiver"}
    exec(program("Verify in Python", "python"), namespace)  # noqa: S102  # our own guide
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=namespace["app"]), base_url="http://receiver.test"
    ) as client:
        assert await statuses(client, "/hook") == EXPECTED
    assert namespace["inbox"].execute("SELECT id, body FROM event").fetchall() == [("id-1", BODY.decode())]
    namespace["inbox"].close()


@contextmanager
def running(command: list[str], directory: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """A receiver as a process; yields its URL once it answers."""
    port = closed_port()
    log = directory / "receiver.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=directory, stdout=out, stderr=out,
            env={**os.environ, **(environment or {}), "TASKQUEUE_WEBHOOK_SECRET": SECRET, "PORT": str(port)},
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
        assert process.poll() is None, log.read_text()
    finally:
        process.kill()
        process.wait()


async def answers(url: str, path: str) -> dict[str, int]:
    deadline = time.monotonic() + 30
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        while True:
            try:
                await client.get("/")
            except httpx.ConnectError:
                assert time.monotonic() < deadline, "the receiver did not start"
                await asyncio.sleep(0.05)
            else:
                return await statuses(client, path)


def node_modules() -> Path:
    """Where `standardwebhooks` is installed for Node.js; skips if it is nowhere."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js is not installed")
    everywhere = subprocess.run(["npm", "root", "-g"], capture_output=True, text=True, check=True).stdout.strip()
    for place in (ROOT / "node_modules", Path(everywhere)):
        if (place / "standardwebhooks").is_dir():
            return place
    pytest.skip("the standardwebhooks package is not installed: npm install -g standardwebhooks")


async def test_the_javascript_receiver(tmp_path: Path) -> None:
    (tmp_path / "node_modules").symlink_to(node_modules())
    (tmp_path / "receiver.mjs").write_text(program("Verify in JavaScript", "js"))
    with running(["node", "receiver.mjs"], tmp_path) as url:
        assert await answers(url, "/hook") == EXPECTED


@pytest.fixture(scope="module")
def go_receiver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Go program, built; skipped where there is no Go, or the library is not in its cache."""
    if shutil.which("go") is None:
        pytest.skip("Go is not installed")
    directory = tmp_path_factory.mktemp("go")
    cached = subprocess.run(["go", "env", "GOMODCACHE"], capture_output=True, text=True, check=True).stdout.strip()
    if not list(Path(cached).glob(f"{GO_LIBRARY}@*")):
        pytest.skip(f"the Go library is not there: go mod download {GO_LIBRARY}@v0.0.1")
    (directory / "main.go").write_text(program("Verify in Go", "go"))
    (directory / "go.mod").write_text(f"module receiver\n\ngo 1.22\n\nrequire {GO_LIBRARY} v0.0.1\n")
    offline = {**os.environ, "GOFLAGS": "-mod=mod", "GOPROXY": "off", "GONOSUMDB": "*", "GONOSUMCHECK": "1"}
    subprocess.run(["go", "build", "-o", "receiver", "."], cwd=directory, env=offline, check=True, timeout=100)
    return directory


async def test_the_go_receiver(go_receiver: Path) -> None:
    with running(["./receiver"], go_receiver) as url:
        assert await answers(url, "/hook") == EXPECTED


@pytest.mark.parametrize(
    ("keys", "body", "ago", "verdict"),
    [
        ((PAIR,), BODY, 0, True),
        ((KEY, PAIR), BODY, 0, True),
        ((KEY,), BODY, 0, False),
        ((signing.Ed25519Key.from_seed(b"x" * 32),), BODY, 0, False),
        ((PAIR,), BODY + b" ", 0, False),
        ((PAIR,), BODY, 3600, False),
    ],
)
def test_the_receiver_that_holds_no_secret(
    keys: tuple[signing.Key, ...], body: bytes, ago: int, verdict: bool, tmp_path: Path
) -> None:
    if shutil.which("node") is None:
        pytest.skip("Node.js is not installed")
    (tmp_path / "verified.mjs").write_text(program("Verify without holding a secret", "js"))
    asked = json.dumps([PUBLIC, signed(keys, body=body, sent_seconds_ago=ago)])
    code = (
        "import { verified } from './verified.mjs'; const [key, headers] = JSON.parse(process.argv[1]);"
        "console.log(verified(key, headers, Buffer.from(process.argv[2])));"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code, asked, BODY.decode()],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{json.dumps(verdict)}\n"


def seconds(text: str) -> float:
    number, _, unit = text.partition(" ")
    return 0.0 if text == "none" else float(number) * {"s": 1, "min": 60, "h": 3600}[unit]


def test_the_schedule_is_the_one_of_the_settings() -> None:
    shown = re.findall(r"^\| (\d+) \| (.+?) \|$", section("When it is sent again"), re.MULTILINE)
    assert [int(attempt) for attempt, _ in shown] == list(range(1, 11))
    assert tuple(seconds(wait) for _, wait in shown) == config.STANDARD_WEBHOOKS_SCHEDULE
    assert sum(config.STANDARD_WEBHOOKS_SCHEDULE) // 60 == 75 * 60 + 35


def test_the_figures_are_those_of_the_code() -> None:
    assert webhook.DEADLINE_SECONDS == 15
    assert "There are 15\n   seconds in all" in GUIDE
    assert (webhook.EXCERPT_BYTES, webhook.RETRY_AFTER_LIMIT_SECONDS, delivery.REST_SECONDS) == (4096, 86400, 60)
    assert (guard.URL_LIMIT, sorted(guard.PORTS)) == (2048, [443, 8443])
    assert webhook.USER_AGENT in section("What comes")


def test_every_command_it_shows_exists() -> None:
    shown = re.findall(r"^taskqueue (webhooks \w+)", section("Trying it"), re.MULTILINE)
    assert shown
    for one in shown:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *one.split(), "--help"], capture_output=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, one


def test_every_anchor_is_a_heading() -> None:
    headings = re.findall(r"^## (.+)$", GUIDE, re.MULTILINE)
    assert re.findall(r"\]\(#([^)]+)\)", GUIDE) == [one.lower().replace(" ", "-") for one in headings]


def test_every_route_that_the_guide_calls_is_there() -> None:
    api = create_app(settings_for("postgresql://h/d", "redis://h/0"))
    calls = re.findall(r"curl -s (?:-X (\w+) )?\"?\$API(/[^\s\"?]+)", GUIDE)
    assert len(calls) > 8
    known = {
        (method.upper(), re.sub(r"{\w+}", "$", path))
        for path, operations in api.openapi()["paths"].items()
        for method in operations
    }
    assert {(method or "GET", re.sub(r"\$[A-Z]+", "$", path)) for method, path in calls} <= known

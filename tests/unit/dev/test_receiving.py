import base64
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from app import cli, delivery
from app.core import errors
from app.dev import receiving
from app.utils import signing

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
EVENT = {"type": "task.succeeded", "data": {"task_id": "t-1", "status": "SUCCESS", "sequence": 1, "result": "ü"}}
BODY = json.dumps(EVENT, ensure_ascii=False).encode()
SENT_AT = 1_800_000_000
HEADERS = {
    "webhook-id": "id-1",
    "webhook-timestamp": str(SENT_AT),
    "webhook-signature": signing.sign([KEY], "id-1", SENT_AT, BODY),
}
LINE = "task.succeeded, task t-1, SUCCESS, sequence 1, webhook-id id-1"
HEAD = "".join(f"{name.title()}: {value}\n" for name, value in HEADERS.items())


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TASKQUEUE_WEBHOOK_SECRET", SECRET)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["webhooks", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_webhook_that_is_what_was_signed_is_told_in_one_line() -> None:
    assert receiving.verified([SECRET], HEADERS, BODY, SENT_AT + 60) == LINE


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (BODY + b"\n", "newline at its end"),
        (BODY + b"\r\n", "newline at its end"),
        (json.dumps(EVENT).encode(), "parsed and written anew"),
        (json.dumps(EVENT, separators=(",", ":")).encode(), "parsed and written anew"),
        (json.dumps(EVENT, indent=2).encode(), "parsed and written anew"),
        (BODY.replace(b"t-1", b"t-2"), "no signature matches: another secret signed it, or"),
        (b"", "no signature matches: another secret signed it, or"),
        (b"\xff", "no signature matches: another secret signed it, or"),
        (b"[" * 100_000, "no signature matches: another secret signed it, or"),
    ],
)
def test_what_was_probably_done_to_the_body_is_said(body: bytes, sentence: str) -> None:
    with pytest.raises(signing.NotVerified, match=sentence):
        receiving.verified([SECRET], HEADERS, body, SENT_AT)


@pytest.mark.parametrize(
    "head",
    [
        HEAD,
        "POST /hook HTTP/1.1\nHost: x\n" + HEAD,
        "".join(f"> {line}\n" for line in ["POST / HTTP/1.1", *HEAD.splitlines()]),
        HEAD.replace("\n", "\r\n"),
        json.dumps({name.upper(): value for name, value in HEADERS.items()}),
    ],
)
@pytest.mark.parametrize("from_stdin", [True, False])
def test_headers_and_body_may_be_in_files_of_their_own(
    head: str, from_stdin: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("head").write_bytes(head.encode())
    Path("body").write_bytes(BODY)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BODY)))
    body = "-" if from_stdin else "body"
    told = run(capsys, "verify", "--headers", "head", "--body", body, "--any-time")
    assert told == (0, f"verified: {LINE}\n", "")


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (HEAD + "\n", ""),
        (HEAD.replace("\n", "\r\n") + "\r\n", ""),
        (f"POST / HTTP/1.1\ncontent-length: {len(BODY)}\n{HEAD}\n", "\n"),
    ],
)
def test_a_request_may_be_captured_whole(head: str, tail: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("request").write_bytes(head.encode() + BODY + tail.encode())
    assert run(capsys, "verify", "request", "--any-time") == (0, f"verified: {LINE}\n", "")
    code, out, err = run(capsys, "verify", "request")
    assert (code, out) == (1, "")
    assert err.startswith("taskqueue: the signature is right, but webhook-timestamp is ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nothing"], "nothing: No such file"),
        (["."], "Is a directory"),
        (["garbage"], "no empty line"),
        (["--headers", "garbage", "--body", "garbage"], "name: value"),
        (["--headers", "json", "--body", "garbage"], "no JSON object"),
        (["--headers", "list", "--body", "garbage"], "name: value"),
        (["--headers", "garbage"], "--headers and --body go together"),
        (["empty"], "no empty line"),
        (["blank"], "name: value"),
    ],
)
def test_what_is_no_request_is_one_line(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, raw in (
        ("garbage", b"\xff\x00 nothing"),
        ("json", b"{"),
        ("list", b"[]"),
        ("empty", b""),
        ("blank", b"\n\n"),
    ):
        Path(name).write_bytes(raw)
    code, out, err = run(capsys, "verify", *words)
    assert (code, out) == (1, "")
    [line] = err.splitlines()
    assert sentence in line


def test_the_secret_comes_from_the_environment_the_env_file_or_make_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def secret(number: int) -> str:
        return "whsec_" + base64.b64encode(bytes([number]) * 32).decode()

    Path("data").mkdir()
    Path("data/webhook-secret").write_text(secret(3) + "\n")
    monkeypatch.setenv("TASKQUEUE_DATA_DIR", "data")
    Path(".env").write_text(f"TASKQUEUE_WEBHOOK_SECRET={secret(2)}\n")
    monkeypatch.setenv("TASKQUEUE_WEBHOOK_SECRET", f"{secret(1)} {secret(4)}")
    assert receiving.known_secrets() == (secret(1), secret(4))
    monkeypatch.delenv("TASKQUEUE_WEBHOOK_SECRET")
    assert receiving.known_secrets() == (secret(2),)
    Path(".env").unlink()
    assert receiving.known_secrets() == (secret(3),)
    Path("data/webhook-secret").unlink()
    with pytest.raises(errors.SettingsError, match="TASKQUEUE_WEBHOOK_SECRET is not set"):
        receiving.known_secrets()


def test_a_wrong_secret_is_named_and_not_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASKQUEUE_WEBHOOK_SECRET", "whsec_hunter2")
    code, out, err = run(capsys, "verify", "request")
    assert (code, out) == (2, "")
    assert err.startswith("taskqueue: TASKQUEUE_WEBHOOK_SECRET is wrong: must be whsec_")
    assert "hunter2" not in err


def test_a_new_secret_signs_and_its_public_half_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    _, shared, _ = run(capsys, "secret")
    _, pair, _ = run(capsys, "secret", "--ed25519")
    private, public = pair.splitlines()
    for ours, theirs in ((shared.strip(), shared.strip()), (private, public.split()[0])):
        signed = HEADERS | {"webhook-signature": signing.sign([signing.key(ours)], "id-1", SENT_AT, BODY)}
        assert receiving.verified([theirs], signed, BODY, SENT_AT) == LINE
    assert run(capsys, "secret")[1] != shared


@pytest.mark.parametrize("event", ["webhook.test", "task.failed"])
def test_a_test_event_is_shown_as_one(event: str) -> None:
    moment = datetime(2030, 1, 31, tzinfo=UTC)
    trial = delivery.Trial(
        id=UUID(int=1),
        owner="",
        url="https://example.com/",
        event=event,
        traceparent=None,
        created_at=moment,
        claimed_at=moment,
        token=UUID(int=2),
    )
    body = delivery.trial_body(trial, "full")
    headers = HEADERS | {"webhook-signature": signing.sign([signing.key(SECRET)], "id-1", SENT_AT, body)}
    assert receiving.verified([SECRET], headers, body, SENT_AT) == f"{event}, a test, webhook-id id-1"


@pytest.mark.parametrize(
    "event",
    [{"type": "x\x1b[31m\n", "data": {"task_id": "a" * 9999, "status": "S", "sequence": 1}}, [], "x", {"type": 1}],
)
def test_what_a_stranger_sends_does_not_drive_the_terminal(event: Any) -> None:
    line = receiving.told({"webhook-id": "i\x07d"}, json.dumps(event).encode())
    assert line.isprintable()
    assert len(line) <= 500

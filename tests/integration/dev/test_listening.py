"""`taskqueue webhooks listen`, as a process, called by the real sender."""

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from app.utils import guard, signing, webhook
from tests.support.network import closed_port
from tests.support.receiver import Answer, Receiver
from tests.support.waiting import wait_until

KEY = bytes(range(32))
BODY = '{"type": "task.failed", "data": {"task_id": "t-1", "status": "FAILURE", "sequence": 1, "error": "ü"}}'.encode()
TOLD = "task.failed, task t-1, FAILURE, sequence 1, webhook-id id-1"


class Listening:
    """The process, its URL, and what it has printed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        first = wait_until(lambda: next(iter(self.lines), ""), 30, "the first line")
        found = re.search(r"http://\S+", first)
        assert found is not None, first
        self.url = found[0]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        code = self.process.wait(10)
        self._thread.join(10)
        return code


@contextmanager
def listening(*words: str) -> Iterator[Listening]:
    secret = "whsec_" + base64.b64encode(KEY).decode()
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "webhooks", "listen", "--port", "0", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TASKQUEUE_WEBHOOK_SECRET": secret},
    )  # fmt: skip
    try:
        yield Listening(process)
    finally:
        process.kill()
        process.communicate()


async def post(url: str, keys: tuple[signing.Key, ...] = (KEY,)) -> webhook.Receipt:
    async with webhook.Sender(guard.EgressRules(allow_private=True), keys) as sender:
        return await sender.post(
            url, webhook_id="id-1", body=BODY, traceparent="00-a-b-01", timestamp_seconds=int(time.time())
        )


async def test_the_program_behind_gets_the_same_bytes_and_headers_and_its_answer_goes_back() -> None:
    answer = Answer(status=503, headers={"retry-after": "7", "x-own": "yes"}, body=b"later")
    with Receiver() as direct, Receiver([answer]) as program:
        await post(direct.url)
        with listening("--forward", program.url + "/hook?a=b") as listener:
            receipt = await post(listener.url)
            wait_until(lambda: len(listener.lines) == 3, what="a line for the webhook")
    assert (receipt.status_code, receipt.retry_after_seconds, receipt.excerpt) == (503, 7.0, "later")
    [sent], [came] = direct.requests, program.requests
    assert (came.path, came.body) == ("/hook?a=b", BODY)
    own = {"host", "connection", "webhook-timestamp", "webhook-signature"}
    assert {name: value for name, value in came.headers.items() if name not in own} == {
        name: value for name, value in sent.headers.items() if name not in own
    }
    signing.verify(["whsec_" + base64.b64encode(KEY).decode()], came.headers, came.body, time.time())
    assert re.fullmatch(rf"\d\d:\d\d:\d\d verified: {TOLD} -> 503 in \d+ ms", listener.lines[2]), listener.lines


async def test_without_a_program_a_webhook_is_shown_and_answered_with_204() -> None:
    with listening() as listener:
        assert [(await post(listener.url)).status_code for _ in range(2)] == [204, 204]
        wait_until(lambda: len(listener.lines) == 4, what="a line for each webhook")
    assert [line[9:] for line in listener.lines[2:]] == [f"verified: {TOLD} -> 204", f"verified again: {TOLD} -> 204"]


async def test_what_is_not_signed_by_us_is_refused_and_not_handed_on() -> None:
    with Receiver() as program, listening("--forward", program.url) as listener:
        receipts = [await post(listener.url, keys) for keys in ((b"x" * 32,), ())]
        wait_until(lambda: len(listener.lines) == 4, what="a line for each webhook")
        async with httpx.AsyncClient(trust_env=False) as client:
            others = [(await client.get(listener.url)).status_code]
            others += [(await client.post(listener.url, content=bytes(17 << 20))).status_code]
    assert [receipt.status_code for receipt in receipts] == [400, 400]
    assert "no signature matches" in receipts[0].excerpt
    assert "webhook-signature is missing" in receipts[1].excerpt
    assert all("REFUSED" in line and TOLD in line for line in listener.lines[2:])
    assert others == [405, 413]
    assert program.requests == []


async def test_a_program_that_is_not_there_is_a_502() -> None:
    url = f"http://127.0.0.1:{closed_port()}/"
    with listening("--forward", url) as listener:
        receipt = await post(listener.url)
        wait_until(lambda: len(listener.lines) == 3, what="a line for the webhook")
    assert receipt.status_code == 502
    assert listener.lines[2].endswith(f"-> 502: {url} can't be reached")


async def test_ctrl_c_ends_it_at_once_and_in_order() -> None:
    with listening() as listener:
        await post(listener.url)
        assert listener.end(signal.SIGINT) == 0
    assert listener.lines[3:] == ["ended"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--forward", "localhost:3000"], "--forward must be a URL"),
        (["--forward", "ftp://x/"], "--forward must be a URL"),
        (["--host", "192.0.2.1", "--port", "0"], "can't listen on 192.0.2.1:0"),
        (["--host", "a..b"], "can't listen on a..b:9000"),
        (["--port", "99999"], "can't listen on 127.0.0.1:99999"),
    ],
)
def test_what_it_can_not_do_is_one_line(words: list[str], sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.cli", "webhooks", "listen", *words],
        capture_output=True, text=True, check=False, timeout=30,
        env={**os.environ, "TASKQUEUE_WEBHOOK_SECRET": "whsec_" + base64.b64encode(KEY).decode()},
    )  # fmt: skip
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert line.startswith("taskqueue: ")
    assert sentence in line


def test_a_port_that_is_taken_is_one_line() -> None:
    with Receiver() as program:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", "webhooks", "listen", "--port", str(program.port)],
            capture_output=True, text=True, check=False, timeout=30,
            env={**os.environ, "TASKQUEUE_WEBHOOK_SECRET": "whsec_" + base64.b64encode(KEY).decode()},
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"taskqueue: can't listen on 127.0.0.1:{program.port}: Address already in use; --port names another one\n"
    )

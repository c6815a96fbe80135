"""A collector that takes everything and answers nothing holds up nobody."""

import json
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support import otlp
from tests.support.otlp import Collector
from tests.support.receiver import Receiver
from tests.support.service import Service
from tests.support.waiting import wait_until

# Whoever waited for an answer would wait for so long.
ENVIRONMENT = {"OTEL_EXPORTER_OTLP_TIMEOUT": "60", "OTEL_BSP_SCHEDULE_DELAY": "50"}
PATIENCE_SECONDS = 30


@pytest.fixture(scope="module")
def module_collector() -> Iterator[Collector]:
    over = threading.Event()
    with otlp.collector(lambda: 200 if over.wait() else 503) as one:
        yield one
        over.set()


def test_submits_tasks_webhooks_and_exits_do_not_wait_for_it(running: Service, collector: Collector) -> None:
    began = time.monotonic()
    with Receiver() as receiver:
        tasks = [running.submit("sample.echo", number, webhook_url=receiver.url) for number in range(20)]
        wait_until(lambda: len(receiver.requests) == len(tasks), PATIENCE_SECONDS, "the webhooks")
    assert {running.status(one) for one in tasks} == {"SUCCESS"}
    wait_until(lambda: collector.requests >= 3, PATIENCE_SECONDS, "something for the collector")  # API, worker, relay
    for name in ("worker", "relay", "api"):
        running.process(name).signal(signal.SIGTERM)
    for name in ("worker", "relay", "api"):
        running.process(name).wait(PATIENCE_SECONDS)
        # To the last line, whoever says it.
        assert all(json.loads(line)["process"] == name for line in running.process(name).log.read_text().splitlines())
    assert time.monotonic() - began < 2 * PATIENCE_SECONDS - 5

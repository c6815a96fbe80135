"""The benchmark suite runs: it starts its servers, every side answers, and its figures are written."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.suite import load
from benchmarks.suite.figures import OURS, Report
from benchmarks.suite.submits import EMPTY, TUTORIAL

ROOT = Path(__file__).parents[2]
SPLIT = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"12", b"345"


@pytest_asyncio.fixture
async def sender() -> AsyncIterator[load.Load]:
    async with load.started() as one:
        yield one


async def _server(*parts: bytes) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            await reader.readuntil(b"\r\n\r\n")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.001)
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def test_an_answer_counts_once_it_is_whole(sender: load.Load) -> None:
    async with await _server(*SPLIT) as server:
        port = server.sockets[0].getsockname()[1]
        found = await sender(port, [load.request("GET", "/")], connections=2, seconds=0.3)

    assert found["sent"] >= found["rate"] * 0.3 > 0
    assert 1.0 <= found["p50"] <= found["p99"]


async def test_an_answer_that_was_not_expected_ends_a_load(sender: load.Load) -> None:
    async with await _server(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n") as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RuntimeError, match="503"):
            await sender(port, [load.request("GET", "/")], connections=2, seconds=0.3)


@pytest.mark.slow  # it starts a Postgres, a Redis and three servers, and loads them
@pytest.mark.timeout(300)
def test_the_smallest_run_measures_every_side(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks.suite", "--quick", "--only", "status", "--json", str(path)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode in {0, 1}, done.stderr  # 1: a target is over, which a busy machine is no proof of
    report = Report.of(json.loads(path.read_text()))
    assert not report.skipped
    for measure in report.measures:
        assert set(measure.figures) == {OURS, TUTORIAL, EMPTY}
        assert all(len(values) == 3 and min(values) > 0 for values in measure.figures.values())
    assert "status reads, 16 connections" in done.stdout
    assert str(tmp_path.anchor + "tmp") not in path.read_text()

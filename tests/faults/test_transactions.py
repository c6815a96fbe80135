"""Promise 6: no transaction is open across a network call or a task's code.

Every stack's Postgres ends a session that leaves a transaction open for a second, and `finish` reads its log.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from app.dev.embedded import EmbeddedPostgres
from app.dev.running import running as served
from tests.faults import audit
from tests.faults.audit import Figures
from tests.faults.stack import Pristine, Stack, complete
from tests.support.receiver import Answer
from tests.support.waiting import until

Report = Callable[[Figures], None]

SECONDS = 2.5
"""How long tasks and the receiver take: longer than any transaction may be open."""

pytestmark = pytest.mark.timeout(120)


def test_no_transaction_is_open_while_a_task_runs_or_a_receiver_thinks(running: Stack, report: Report) -> None:
    running.answer = Answer(status=200, delay_seconds=SECONDS)
    running.submit_many(8, "faults.work", SECONDS)
    figures = running.finish("slow tasks, and a slow receiver", recovery_seconds=0, allowed_seconds=0)
    report(figures)
    assert figures.run_twice == 0


def test_a_transaction_that_is_left_open_is_found(tmp_path: Path, pristine: Pristine) -> None:
    pristine.copy(tmp_path / "postgres")
    with served(EmbeddedPostgres(tmp_path / "postgres")) as postgres:
        log = postgres.server.directory / "log"
        assert not list(audit.idle_in_transaction(log.read_text()))

        async def leave_open() -> None:
            connection = await asyncpg.connect(postgres.url, timeout=10)
            try:
                await connection.execute("BEGIN")
                await until(lambda: list(audit.idle_in_transaction(log.read_text())), 10, "a line in the log")
            finally:
                with contextlib.suppress(asyncpg.PostgresError, OSError):
                    await connection.close(timeout=5)

        complete(leave_open())

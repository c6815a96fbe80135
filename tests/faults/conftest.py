"""A stack for each test, and the line that it prints."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.audit import Figures
from tests.faults.stack import Pristine, Stack, stack

SEED = os.environ.get("FAULTS_SEED") or str(int.from_bytes(os.urandom(3)))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Pristine:
    """What every stack's Postgres is copied from."""
    return Pristine(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def running(tmp_path: Path, pristine: Pristine) -> Iterator[Stack]:
    """The whole service; what its processes logged is shown if the test fails."""
    with stack(tmp_path, pristine, SEED) as started:
        yield started
        print(started.service.logs())  # noqa: T201  # pytest shows it with a failure only


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Figures], None]:
    """Have a line printed at the end of the run; it travels with the test's report, also from another process."""

    def keep(figures: Figures) -> None:
        request.node.user_properties.append(("fault", figures.line()))

    return keep

"""The chart on a real cluster: the one that KUBECONFIG names, with the image E2E_IMAGE on its nodes.

These are run by name alone (`make test-e2e`): `make test` needs no cluster.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import Release, a_namespace


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = any("e2e" in argument for argument in config.args)
    return None if named or not collection_path.name.startswith("test_") else True


@pytest.fixture(scope="module")
def release() -> Iterator[Release]:
    """The chart, installed in a namespace of this module alone that admits restricted pods only."""
    with a_namespace() as namespace:
        installed = Release(namespace)
        installed.install()
        yield installed

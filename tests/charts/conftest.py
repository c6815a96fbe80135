import shutil
import subprocess
from functools import cache

import pytest


@cache
def _has_helm() -> bool:
    if shutil.which("helm") is None:
        return False
    return subprocess.run(["helm", "version"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session", autouse=True)
def _needs_helm() -> None:
    if not _has_helm():
        pytest.skip("needs helm on PATH")

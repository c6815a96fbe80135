"""The code of an earlier commit, taken from git's history, to be run beside the present one."""

import os
import subprocess
from pathlib import Path

from tests.support.service import ROOT

ASKED = "UPGRADE_FROM"
"""Names a commit or a tag to upgrade from, instead of those that the history tells."""


class NoHistoryError(Exception):
    """There is no earlier commit to be had here."""


def commit(differing_in: str) -> str:
    """The newest commit that touched `app` and whose `differing_in` is not that of the working tree.

    Raises:
        NoHistoryError: if this is no clone, or one that does not reach so far back.
    """
    if ASKED in os.environ:
        return _git("rev-parse", os.environ[ASKED])
    for candidate in _git("rev-list", "HEAD", "--", "app").splitlines():
        if _git("diff", "--name-only", candidate, "--", differing_in):
            return candidate
    raise NoHistoryError(f"no commit in this clone has another {differing_in}")


def check_out(revision: str, directory: Path) -> Path:
    """Write the code of a commit into `directory`, and return where it is."""
    archive = directory / "app.tar"
    _git("archive", f"--output={archive}", revision, "app")
    code = directory / "code"
    code.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", code], check=True)
    return code


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as failed:
        said = getattr(failed, "stderr", None) or str(failed)
        raise NoHistoryError(f"git {words[0]}: {said.strip()}") from failed
    return done.stdout.strip()

import os
import subprocess
import sys
from pathlib import Path
from signal import SIGTERM

import pytest

from app.dev import linux

LOOK = """
import os, sys
print(os.getuid(), os.getgroups(), os.access(sys.argv[1], os.R_OK), open(sys.argv[1]).read(), end="")
"""


@pytest.mark.skipif(not linux.IS_LINUX or os.geteuid() != 0, reason="only root becomes somebody else")
def test_whoever_root_becomes_still_passes_closed_directories(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "file").write_text("seen")
    user = linux.unprivileged_user()
    assert user is not None
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(closed / "file")],
        preexec_fn=linux.before_exec(parent_death_signal=SIGTERM, user=user),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{user.uid} [] True seen"


@pytest.mark.skipif(not linux.IS_LINUX, reason="there is a /proc to look into")
def test_children_are_found() -> None:
    with subprocess.Popen(["sleep", "1000"]) as child:
        assert child.pid in linux.children()
        child.kill()

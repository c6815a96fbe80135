"""A real Prometheus on this machine that scrapes `make run`: `make observe`.

It has the chart's rules. Its data and its configuration are in the data
directory, so `make clean` removes them.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from app.dev import environment, ports

RULES = Path(__file__).parents[2] / "charts" / "taskqueue" / "rules"
PROGRAM = "prometheus"
PORT = 9090
WANTED = f"""{PROGRAM} is not on PATH. It is optional: everything else works without it.
On Debian and Ubuntu: apt-get install --no-install-recommends prometheus
"""


def configuration(targets: Path, rules: Sequence[Path], *, interval_seconds: int) -> str:
    """What Prometheus is to read: the targets that `make run` writes down, and rules.

    Args:
        targets: a file for its file_sd; it is read anew whenever it changes, and need not be there yet.
        rules: files of rules.
        interval_seconds: between two scrapes, and between two evaluations.
    """
    interval = f"{interval_seconds}s"
    written = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(path) for path in rules],
        # The targets name the job themselves, each process its own.
        "scrape_configs": [{"job_name": "taskqueue", "file_sd_configs": [{"files": [str(targets)]}]}],
    }
    return yaml.safe_dump(written, sort_keys=False)


def command(program: str, directory: Path, port: int) -> list[str]:
    """How Prometheus is started with the configuration in `directory`, on a port of the loopback.

    Args:
        program: its path.
        directory: it holds prometheus.yml, and will hold the data.
        port: TCP port of its own pages and its API.
    """
    return [
        program,
        f"--config.file={directory / 'prometheus.yml'}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={ports.ADDRESS}:{port}",
        "--enable-feature=exemplar-storage",
        "--log.level=warn",
    ]


def main() -> int:
    """Become a Prometheus that scrapes the service of this data directory. Returns only if there is none."""
    found = shutil.which(PROGRAM)
    if found is None:
        sys.stderr.write(f"make observe: {WANTED}")
        return 1
    wanted = os.environ.get("PROMETHEUS_PORT", str(PORT))
    if not wanted.isascii() or not wanted.isdigit() or not 0 < int(wanted[:6]) < 65536:  # noqa: PLR2004  # ports
        sys.stderr.write("make observe: PROMETHEUS_PORT is wrong: must be a TCP port\n")
        return 1
    port = int(wanted)
    home = environment.data_dir(environment.chosen())
    directory = home / PROGRAM
    directory.mkdir(parents=True, exist_ok=True)
    rules = sorted(RULES.glob("*.yaml"))
    text = configuration(home / environment.TARGETS_FILE, rules, interval_seconds=5)
    (directory / "prometheus.yml").write_text(text)
    sys.stdout.write(
        f"http://{ports.ADDRESS}:{port}/graph asks, /alerts shows who would be woken, /targets what is scraped.\n"
        "It finds the processes of `make run` whenever that starts. Ctrl-C ends it; the data stays.\n"
    )
    sys.stdout.flush()
    os.execv(found, command(found, directory, port))  # noqa: S606  # it is to be this process
    raise AssertionError("execv does not return")


if __name__ == "__main__":
    sys.exit(main())

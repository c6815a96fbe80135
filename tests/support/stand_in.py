"""A `taskqueue` command whose supervisor is the real one, and whose processes do next to nothing.

It shows what the supervisor does with processes, whatever those do: they listen,
beat, ignore SIGTERM or die on request. Their behaviour is chosen by the variable
STAND_IN: words separated by spaces.
"""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
from tests.support import stand_in
sys.exit(stand_in.main(sys.argv[1]))
"""


def install(directory: Path) -> Path:
    """Write the command into `directory` and return its path."""
    script = directory / "taskqueue"
    script.write_text(SCRIPT.format(python=sys.executable, root=str(Path(__file__).parents[2])))
    script.chmod(0o755)
    return script


def main(command: str) -> int:
    if command == "dev":
        from app import cli  # noqa: PLC0415

        return cli.main(["dev"])
    words = os.environ.get("STAND_IN", "").split()
    sys.stdout.write(f"this is {command} with metrics port {os.environ.get('TASKQUEUE_METRICS_PORT', 'unset')}\n")
    if command == "migrate":
        return 1 if "no-migration" in words else 0
    if command == "api":
        return _serve()
    return _beat(command, words)


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def _serve() -> int:
    server = http.server.ThreadingHTTPServer((os.environ.get("HOST", "127.0.0.1"), int(os.environ["PORT"])), _Ready)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()
    return 0


def _beat(command: str, words: list[str]) -> int:
    if f"{command}-refuses" in words:
        sys.stderr.write("taskqueue: TASKQUEUE_QUEUES is wrong\n")
        return 2
    if f"{command}-is-deaf" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if f"{command}-has-a-child" in words:
        subprocess.Popen(["sleep", "1000"])
    beat = Path(os.environ["TASKQUEUE_DATA_DIR"], "run", f"{command}.beat")
    if f"{command}-is-noisy" in words:
        sys.stdout.write("noise\n" * 100_000)
        sys.stdout.flush()
        beat.write_text("said it all")
    while True:
        beat.touch()
        time.sleep(0.05)

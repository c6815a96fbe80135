"""A namespace of a cluster, and the chart in it, by way of kubectl and helm as people use them."""

import base64
import contextlib
import json
import os
import re
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import httpx

from tests.charts.rendering import CHART, ROOT
from tests.support.waiting import wait_until

IMAGE = os.environ.get("E2E_IMAGE", "taskqueue:dev")
START_SECONDS = 180
RESTRICTED = ("pod-security.kubernetes.io/enforce=restricted", "pod-security.kubernetes.io/warn=restricted")
VALUES: Mapping[str, object] = {
    "config": {"sampleTasks": True},
    "webhooks": {"allowedOrigins": ["http://receiver:8080"]},
    "api": {"graceSeconds": 10},
    "relay": {"graceSeconds": 10},
    "workerDefaults": {"graceSeconds": 20, "resources": {"requests": {"cpu": "20m", "memory": "200Mi"}}},
}
RECEIVER = ROOT / "tests" / "e2e" / "receiver.yaml"


def run(*command: str, stdin: str | None = None) -> str:
    """What a program prints. It must succeed."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    assert "would violate PodSecurity" not in done.stderr, done.stderr
    return done.stdout


@contextlib.contextmanager
def a_namespace() -> Iterator[str]:
    """A namespace that enforces the restricted Pod Security Standard, and is deleted with the block."""
    name = f"e2e-{secrets.token_hex(3)}"
    run("kubectl", "create", "namespace", name)
    try:
        run("kubectl", "label", "namespace", name, *RESTRICTED)
        yield name
    finally:
        run("kubectl", "delete", "namespace", name, "--wait=false")


class Release:
    """The chart as the release `tq` of a namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def kubectl(self, *words: str, stdin: str | None = None) -> str:
        return run("kubectl", "--namespace", self.namespace, *words, stdin=stdin)

    def get(self, *words: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", *words, "--output=json"))["items"]
        return found

    def install(self, values: Mapping[str, object] = MappingProxyType({}), image: str = IMAGE) -> float:
        """Install or upgrade, and wait until everything is ready. Returns how many seconds that took.

        Args:
            values: win over `VALUES`, top by top.
            image: what all processes of ours run.
        """
        return self._helm({**VALUES, **values}, image)

    def install_plain(self) -> float:
        """As `install`, with every value as the chart has it."""
        return self._helm({}, IMAGE)

    def _helm(self, values: Mapping[str, object], image: str) -> float:
        repository, _, tag = image.rpartition(":")
        began = time.monotonic()
        run(
            *("helm", "upgrade", "--install", "tq", str(CHART), "--namespace", self.namespace),
            *("--wait", "--wait-for-jobs", "--timeout", f"{START_SECONDS}s", "--values", "-"),
            stdin=json.dumps({**values, "image": {"repository": repository, "tag": tag}}),
        )
        return time.monotonic() - began

    def uninstall(self) -> None:
        run("helm", "uninstall", "tq", "--namespace", self.namespace, "--wait")

    def pods(self, component: str = "") -> list[dict[str, Any]]:
        """The pods that are not about to end."""
        selector = f"app.kubernetes.io/component={component}" if component else ""
        return [
            pod
            for pod in self.get("pods", f"--selector={selector}")
            if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] == "Running"
        ]

    def ready(self, component: str) -> list[str]:
        """The names of the pods of a component that are ready."""
        return [
            pod["metadata"]["name"]
            for pod in self.pods(component)
            if any((one["type"], one["status"]) == ("Ready", "True") for one in pod["status"].get("conditions", []))
        ]

    def restarts(self) -> dict[str, int]:
        """How often containers were started again, by pod."""
        return {
            pod["metadata"]["name"]: sum(one["restartCount"] for one in pod["status"].get("containerStatuses", []))
            for pod in self.get("pods")
        }

    def ask_database(self, query: str) -> list[list[str]]:
        """The rows of a query, each the texts of its columns."""
        psql = ("psql", "--username=taskqueue", "--tuples-only", "--no-align", "--field-separator=\t", "--command")
        said = self.kubectl("exec", "tq-postgresql-0", "--", *psql, query)
        return [line.split("\t") for line in said.splitlines()]

    def verified(self) -> str:
        """What `taskqueue verify` says. It must find nothing."""
        return self.kubectl("exec", "deployment/tq-taskqueue-api", "--container=api", "--", "taskqueue", "verify")

    def secrets(self) -> dict[str, dict[str, str]]:
        """The data of every Secret but helm's own, by name."""
        return {
            one["metadata"]["name"]: one["data"] for one in self.get("secrets") if not one["type"].startswith("helm.sh")
        }

    def key(self) -> str:
        """The API key that the release came with."""
        return base64.b64decode(self.secrets()["tq-taskqueue"]["api-key"]).decode()

    @contextlib.contextmanager
    def api(self) -> Iterator[httpx.Client]:
        """A client of the API's Service, forwarded to a free port of this machine."""
        command = ["kubectl", "--namespace", self.namespace, "port-forward", "service/tq-taskqueue-api", ":80"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as forwarding:
            assert forwarding.stdout is not None
            try:
                line = forwarding.stdout.readline()
                found = re.search(r"127\.0\.0\.1:(\d+) ->", line)
                assert found is not None, line
                headers = {"authorization": f"Bearer {self.key()}"}
                with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", headers=headers, timeout=30) as client:
                    yield client
            finally:
                forwarding.terminate()

    @contextlib.contextmanager
    def receiver(self) -> Iterator["Receiver"]:
        """A pod of this namespace that remembers what is posted to `http://receiver:8080`."""
        manifest = RECEIVER.read_text().replace("IMAGE", IMAGE)
        self.kubectl("apply", "--filename=-", stdin=manifest)
        try:
            self.kubectl("wait", "pod/receiver", "--for=condition=Ready", "--timeout=60s")
            yield Receiver(self)
        finally:
            self.kubectl("delete", "--filename=-", "--grace-period=1", stdin=manifest)


class Receiver:
    """What the receiver's pod was sent."""

    def __init__(self, release: Release) -> None:
        self._release = release

    def received(self) -> list[dict[str, Any]]:
        """Each request with its `headers`, names in lower case, and its `body`."""
        return [json.loads(line) for line in self._release.kubectl("logs", "receiver").splitlines()]


def submit(api: httpx.Client, **fields: object) -> str:
    answer = api.post("/api/tasks/submit", json=fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def submit_many(api: httpx.Client, tasks: Sequence[Mapping[str, object]]) -> list[str]:
    answer = api.post("/api/tasks/batch", json={"tasks": tasks})
    assert answer.status_code == 202, answer.text
    return [str(one) for one in answer.json()["task_ids"]]


def status(api: httpx.Client, task_id: str) -> str:
    return str(api.get(f"/api/tasks/{task_id}/status").json()["status"])


def view(api: httpx.Client, task_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/api/tasks/{task_id}").json()
    return found


def reaches(api: httpx.Client, task_id: str, *statuses: str, seconds: float = 30) -> None:
    wait_until(lambda: status(api, task_id) in statuses, seconds, f"{'/'.join(statuses)} of {task_id}")

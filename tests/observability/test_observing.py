"""`make observe`: a Prometheus beside `make run`."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from app.dev import environment, ports
from k8s.observability import prometheus
from tests.support.prometheus import MISSING, promtool
from tests.support.waiting import wait_until

SECONDS = 60.0


def start(directory: Path, path: str = os.environ["PATH"], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "k8s.observability.prometheus"],
        env={"PATH": path, "TASKQUEUE_DATA_DIR": str(directory), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_at_its_end(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def test_make_run_says_where_its_metrics_are(tmp_path: Path) -> None:
    plan = environment.plan(
        {
            "DATABASE_URL": "postgresql://127.0.0.1:1/none",
            "REDIS_URL": "redis://127.0.0.1:1/0",
            "TASKQUEUE_DATA_DIR": str(tmp_path),
        }
    )
    told = json.loads((tmp_path / environment.TARGETS_FILE).read_text())
    assert told == [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"job": f"taskqueue-{process}", "namespace": "local"}}
        for process, port in plan.metrics_ports.items()
    ]


def test_processes_without_metrics_are_no_targets() -> None:
    assert json.loads(environment.targets({"api": 0, "worker": 0, "relay": 0})) == []


def test_the_configuration_is_one_and_has_all_rules(tmp_path: Path) -> None:
    rules = sorted(prometheus.RULES.glob("*.yaml"))
    assert len(rules) == 2
    text = prometheus.configuration(tmp_path / "targets.json", rules, interval_seconds=5)
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "targets.json").write_text(environment.targets({"api": 1}))
    assert yaml.safe_load(text)["rule_files"] == [str(path) for path in rules]
    assert "rules found" in promtool("check", "config", tmp_path / "prometheus.yml")


def test_without_the_program_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    code, said = said_at_its_end(start(tmp_path, path=str(tmp_path)))
    assert code == 1
    assert said.startswith("make observe: prometheus is not on PATH.")
    assert "apt-get install" in said


@pytest.mark.parametrize("wrong", ["", "0", "65536", "9090x", "٣", "1" * 5000])
def test_a_port_that_is_none_is_refused(tmp_path: Path, wrong: str) -> None:
    program = tmp_path / prometheus.PROGRAM
    program.touch(mode=0o755)
    code, said = said_at_its_end(start(tmp_path, path=str(tmp_path), PROMETHEUS_PORT=wrong))
    assert (code, said) == (1, "make observe: PROMETHEUS_PORT is wrong: must be a TCP port\n")


@pytest.mark.skipif(MISSING is not None, reason=MISSING or "")
def test_it_is_a_prometheus_that_finds_the_targets_and_ends_with_a_signal(tmp_path: Path) -> None:
    own, nobody = ports.free_ports(2)
    (tmp_path / environment.TARGETS_FILE).write_text(environment.targets({"api": nobody}))
    process = start(tmp_path, PROMETHEUS_PORT=str(own))
    try:

        def knows() -> bool:
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{own}/api/v1/targets", timeout=5) as answer:
                    known = json.load(answer)["data"]["activeTargets"]
            except OSError:
                return False
            return [one["labels"]["job"] for one in known] == ["taskqueue-api"]

        wait_until(knows, SECONDS, "the target")
        process.send_signal(signal.SIGINT)
        code, said = said_at_its_end(process)
        assert code == 0, said
        assert f"http://127.0.0.1:{own}/graph" in said
    finally:
        process.kill()
        process.wait()

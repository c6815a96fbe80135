"""Continuous integration elsewhere: what can be said of it here, where it can't run."""

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
SCRIPTS = sorted(file for file in (ROOT / ".ci").iterdir() if file.is_file())

by_workflow = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: str(file.stem))


def steps(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_workflows() -> None:
    assert WORKFLOWS


@by_workflow
def test_every_action_is_pinned_to_a_commit_whose_version_stands_beside_it(file: Path) -> None:
    used = [line.strip() for line in file.read_text().splitlines() if re.match(r"\s*(- )?uses:", line)]
    pinned = re.compile(r"(- )?uses: [\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert used
    assert [line for line in used if not pinned.fullmatch(line)] == []


def test_an_action_is_of_one_version_everywhere() -> None:
    used = {match for file in WORKFLOWS for match in re.findall(r"uses: ([\w./-]+)@(\w+)", file.read_text())}
    assert len(used) == len({name for name, _ in used})


@by_workflow
def test_nothing_is_permitted_that_a_job_does_not_ask_for(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {}
    for name, job in workflow["jobs"].items():
        assert job["permissions"]["contents"] == "read", name
        assert job["timeout-minutes"] <= 60, name
    for step in steps(workflow):
        if "checkout" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] is False


@by_workflow
def test_no_command_is_made_of_what_others_can_write(file: Path) -> None:
    assert [step["run"] for step in steps(yaml.safe_load(file.read_text())) if "${{" in step.get("run", "")] == []


def test_what_workflows_run_is_there() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in WORKFLOWS:
        for step in steps(yaml.safe_load(file.read_text())):
            for target in re.findall(r"^make ([\w-]+)", step.get("run", ""), re.MULTILINE):
                assert target in targets, target
            for script in re.findall(r"^(\.ci/[\w-]+)", step.get("run", ""), re.MULTILINE):
                assert (ROOT / script) in SCRIPTS, script


def test_the_chart_is_installed_by_values_files_that_are_there() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "chart.yaml").read_text())
    for name in workflow["jobs"]["install"]["strategy"]["matrix"]["values"]:
        assert (ROOT / "charts" / "taskqueue" / "ci" / f"{name}-values.yaml").is_file(), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.name))
def test_scripts_can_be_run_and_understood(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    text = script.read_text()
    if text.startswith("#!/usr/bin/env python3\n"):
        ast.parse(text, str(script))
        return
    parsed = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr


def test_skaffold_names_what_is_there() -> None:
    config = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
    [image] = config["build"]["artifacts"]
    assert (ROOT / image["docker"]["dockerfile"]).is_file()
    [release] = config["deploy"]["helm"]["releases"]
    assert (ROOT / release["chartPath"] / "Chart.yaml").is_file()
    values = yaml.safe_load((ROOT / release["chartPath"] / "values.yaml").read_text())
    patched = [one["value"] for profile in config["profiles"] for one in profile["patches"]]
    for name in [*release["setValueTemplates"], *(name for one in patched if isinstance(one, dict) for name in one)]:
        place = values
        for part in name.split("."):
            assert part in place, name
            place = place[part]
    assert all((ROOT / file).is_file() for one in patched if isinstance(one, list) for file in one)

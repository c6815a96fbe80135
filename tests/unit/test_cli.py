import pytest
from pydantic import SecretStr

import app
from app import cli

REQUIRED = {
    "DATABASE_URL": "postgresql://u:hidden@db.internal:5432/d",
    "REDIS_URL": "redis://:hidden@redis.internal:6379/0",
    "TASKQUEUE_AUTH_MODE": "none",
    "TASKQUEUE_SECRET_KEY": "hidden--" * 4,
}


@pytest.mark.parametrize("command", ["api", "worker", "relay", "migrate", "config"])
def test_a_command_without_its_urls_says_so_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert cli.main([command]) == 2
    assert capsys.readouterr() == ("", "taskqueue: DATABASE_URL is not set\n")


@pytest.mark.parametrize("patience", ["-1", "soon", "inf", "nan"])
def test_a_patience_that_is_no_number_of_seconds_is_refused(patience: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["migrate", "--patience", patience])
    assert ended.value.code == cli.EXIT_SETTINGS
    assert f"argument --patience: invalid number of seconds value: '{patience}'" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"taskqueue {app.__version__}\n"


def test_config_shows_every_setting_and_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in REQUIRED.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["config"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: (" ".join(row[1:-1]), row[-1]) for row in rows}
    assert shown["DATABASE_URL"] == ("postgresql://u:********@db.internal:5432/d", "set")
    assert shown["REDIS_URL"] == ("redis://:********@redis.internal:6379/0", "set")
    assert shown["TASKQUEUE_SECRET_KEY"] == ("********", "set")
    assert shown["PORT"] == ("8000", "default")
    assert "hidden" not in str(rows)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ((), "-"),
        (True, "true"),
        (30.0, "30"),
        ((SecretStr("whsec_a"), SecretStr("whsec_b")), "******** ********"),
        ("http://user:hidden@collector:4318/v1", "http://user:********@collector:4318/v1"),
        (SecretStr("redis://h/0?password=hidden"), "redis://h/0"),
    ],
)
def test_a_value_is_shown_as_it_is_written_without_its_secrets(value: object, text: str) -> None:
    assert cli.shown(value) == text


def test_the_api_does_not_start_when_keys_are_asked_for_and_there_is_nothing_to_know_them_by(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**REQUIRED, "TASKQUEUE_AUTH_MODE": "api-key", "TASKQUEUE_SECRET_KEY": ""}.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["api"]) == 2
    assert "TASKQUEUE_SECRET_KEY is not set" in capsys.readouterr().err


def test_a_scope_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys", "create", "--scope", "everything"])
    assert ended.value.code == cli.EXIT_SETTINGS
    assert "argument --scope: invalid choice: 'everything'" in capsys.readouterr().err


def test_a_task_module_that_is_not_there_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {**REQUIRED, "TASKQUEUE_TASK_MODULES": "no_such_module"}.items():
        monkeypatch.setenv(variable, value)
    assert cli.main(["api"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("taskqueue: TASKQUEUE_TASK_MODULES is wrong: no_such_module")

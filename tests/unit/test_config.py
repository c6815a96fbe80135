from pathlib import Path

import pytest
from dotenv import dotenv_values

from app import main
from app.core import config, errors

REQUIRED = {
    "DATABASE_URL": "postgresql://u:hidden-1@localhost/d",
    "REDIS_URL": "redis://:hidden-2@localhost/0",
    "TASKQUEUE_AUTH_MODE": "none",
}
SECRET = "whsec_" + "QUFB" * 11


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for variable, value in REQUIRED.items():
        monkeypatch.setenv(variable, value)
    return monkeypatch


@pytest.mark.parametrize("variable", REQUIRED)
def test_a_required_setting_that_is_missing_is_named(environment: pytest.MonkeyPatch, variable: str) -> None:
    environment.delenv(variable)
    with pytest.raises(errors.SettingsError, match=f"^{variable} is not set$"):
        config.load(None)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", "mysql://u:forbidden@h/d"),
        ("REDIS_URL", "http://forbidden"),
        ("PORT", "0"),
        ("PORT", "forbidden"),
        ("TASKQUEUE_AUTH_MODE", "forbidden"),
        ("TASKQUEUE_QUEUES", "a,a"),
        ("TASKQUEUE_QUEUES", "forbidden/name"),
        ("TASKQUEUE_QUEUES", ""),
        ("TASKQUEUE_CONCURRENCY", "0"),
        ("TASKQUEUE_TASK_MEMORY_MEBIBYTES", "63"),
        ("TASKQUEUE_TASK_MEMORY_MEBIBYTES", "forbidden"),
        ("TASKQUEUE_LEASE_SECONDS", "0.5"),
        ("TASKQUEUE_LEASE_SECONDS", "nan"),
        ("TASKQUEUE_RETENTION_DAYS", "0"),
        ("TASKQUEUE_WEBHOOK_SECRET", "forbidden"),
        ("TASKQUEUE_WEBHOOK_SECRET", f"{SECRET} whsec_forbidden"),
        ("TASKQUEUE_WEBHOOK_SCHEDULE", "-1"),
        ("TASKQUEUE_WEBHOOK_SCHEDULE", "forbidden"),
        ("TASKQUEUE_WEBHOOK_BLOCKED_CIDRS", "forbidden"),
        ("TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS", "https://forbidden"),
        ("TASKQUEUE_SECRET_KEY", "forbidden"),
        ("TASKQUEUE_SECRET_KEY", "k" * 32 + " forbidden"),
        ("TASKQUEUE_SAMPLE_TASKS", "forbidden"),
        ("TASKQUEUE_LOG_LEVEL", "forbidden"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it_and_hides_its_value(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    with pytest.raises(errors.SettingsError) as wrong:
        config.load(None)
    assert str(wrong.value).startswith(f"{variable} is wrong: ")
    assert "forbidden" not in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_only_who_knows_keys_needs_the_secret_they_are_known_by(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TASKQUEUE_AUTH_MODE", "api-key")
    settings = config.load(None)
    assert settings.secret_keys == (), "a worker, which runs other people's code, has it not"
    with pytest.raises(errors.SettingsError, match="TASKQUEUE_SECRET_KEY is not set"):
        main.check(settings)


def test_several_secret_keys_are_written_with_spaces(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TASKQUEUE_SECRET_KEY", "")
    assert config.load(None).secret_keys == ()
    environment.setenv("TASKQUEUE_SECRET_KEY", f"{'n' * 32}  {'o' * 40}\n")
    assert [key.get_secret_value() for key in config.load(None).secret_keys] == ["n" * 32, "o" * 40]


def test_the_environment_wins_over_the_file_and_the_file_over_defaults(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("PORT=9001\nHOST=0.0.0.0\n# a comment\nUNRELATED=1\n")
    environment.setenv("PORT", "9002")
    settings = config.load(env_file)
    assert (settings.port, settings.host, settings.lease_seconds) == (9002, "0.0.0.0", 30.0)  # noqa: S104


def test_secrets_are_not_in_the_representation(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TASKQUEUE_SECRET_KEY", "hidden-3" * 4)
    environment.setenv("TASKQUEUE_WEBHOOK_SECRET", SECRET)
    shown = repr(config.load(None)) + str(config.load(None))
    assert "hidden" not in shown
    assert SECRET not in shown


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_a_database_url_is_spelled_for_each_of_its_readers(environment: pytest.MonkeyPatch, scheme: str) -> None:
    environment.setenv("DATABASE_URL", f"{scheme}://u:p@h:1/d")
    settings = config.load(None)
    assert settings.postgres_dsn == "postgresql://u:p@h:1/d"
    assert settings.sqlalchemy_url == "postgresql+asyncpg://u:p@h:1/d"


def test_lists_are_written_with_commas_or_spaces(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TASKQUEUE_QUEUES", "default, reports  mail")
    environment.setenv("TASKQUEUE_WEBHOOK_SCHEDULE", "0,1.5 2")
    settings = config.load(None)
    assert settings.queues == ("default", "reports", "mail")
    assert settings.webhook_schedule == (0.0, 1.5, 2.0)


@pytest.mark.parametrize(("grace", "cold"), [(60.0, 50.0), (8.0, 4.0), (20.0, 10.0), (1.0, 0.5)])
def test_a_worker_turns_cold_ten_seconds_before_the_end_or_half_way(
    environment: pytest.MonkeyPatch, grace: float, cold: float
) -> None:
    environment.setenv("TASKQUEUE_GRACE_SECONDS", str(grace))
    assert config.load(None).cold_after_seconds == cold


def test_the_example_file_has_every_setting_with_a_comment_and_sets_none() -> None:
    example = Path(__file__).parents[2] / ".env.example"
    lines = example.read_text().splitlines()
    named = [line[1:].partition("=")[0] for line in lines if line.startswith("#") and line[1:2].isupper()]
    assert named == list(config.variables())
    assert not dotenv_values(example)
    for variable in named:
        place = next(number for number, line in enumerate(lines) if line.startswith(f"#{variable}="))
        assert lines[place - 1].startswith("# "), variable


def test_the_example_file_shows_the_defaults() -> None:
    example = Path(__file__).parents[2] / ".env.example"
    shown = dict(
        line[1:].split("=", 1)
        for line in example.read_text().splitlines()
        if line.startswith("#") and line[1:2].isupper()
    )
    for variable, field in config.variables().items():
        default = config.Settings.model_fields[field].default
        if isinstance(default, bool):
            assert shown[variable] == str(default).lower(), variable
        elif isinstance(default, int | float):
            assert float(shown[variable]) == default, variable

"""`taskqueue keys`, as an operator and as a chart use it."""

import asyncio
import hashlib
import io
import json
import re
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from app import cli, keys
from app.core.config import Settings

SECRET = "a-secret-of-the-tests-that-is-long-enough"
OLDER = "an-older-secret-of-the-tests-long-enough"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> Run:
    """Runs `taskqueue keys …` on this test's database; returns the exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", settings.postgres_dsn)
    monkeypatch.setenv("REDIS_URL", settings.redis_url.get_secret_value())
    monkeypatch.setenv("TASKQUEUE_AUTH_MODE", "api-key")
    monkeypatch.setenv("TASKQUEUE_SECRET_KEY", SECRET)

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.main(["keys", *words])
        return code, *capsys.readouterr()

    return run


def rows(settings: Settings) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]]:
        connection = await asyncpg.connect(settings.postgres_dsn)
        try:
            return [dict(row) for row in await connection.fetch("SELECT * FROM api_key ORDER BY created_at")]
        finally:
            await connection.close()

    return asyncio.run(ask())


def test_a_key_is_printed_once_and_alone_on_the_standard_output(run: Run, settings: Settings) -> None:
    code, out, err = run("create", "--owner", "ada", "--name", "laptop", "--expires", "90d")
    assert code == 0
    key = out.removesuffix("\n")
    key_id = keys.id_of(key)
    assert key_id is not None
    assert re.fullmatch(
        rf"key {key_id}: of ada, may tasks:read tasks:write webhooks, expires at \S+Z; it is shown this once:\n", err
    )
    [row] = rows(settings)
    assert (row["id"], row["owner"], row["name"]) == (key_id, "ada", "laptop")
    assert (row["expires_at"] - row["created_at"]).days == 90
    assert keys.Masters.of([settings_key(SECRET)]).know(key, row["digest"])
    for words in (("list",), ("list", "--json"), ("revoke", key_id)):
        _, out, err = run(*words)
        assert key_id in out
        assert key not in out + err
        assert key[20:60] not in out + err


def settings_key(text: str) -> Any:
    return Settings.model_validate(
        {"DATABASE_URL": "postgresql://h/d", "REDIS_URL": "redis://h", "TASKQUEUE_AUTH_MODE": "none",
         "TASKQUEUE_SECRET_KEY": text}
    ).secret_keys[0]  # fmt: skip


def test_programs_read_json(run: Run) -> None:
    _, out, err = run("create", "--scope", "tasks:read", "--scope", "admin", "--json")
    made = json.loads(out)
    assert err == ""
    assert (keys.id_of(made["key"]), made["new"], made["state"]) == (made["id"], True, "live")
    assert (made["owner"], made["scopes"], made["expires_at"]) == ("", ["admin", "tasks:read"], None)
    run("create", "--owner", "bob", "--expires", "2001-01-31T12:00:00+01:00")
    [first, second] = [json.loads(line) for line in run("list", "--json")[1].splitlines()]
    assert (first["id"], first["kept_by"], "key" in first) == (made["id"], "newest", False)
    assert (second["state"], second["expires_at"]) == ("expired", "2001-01-31T11:00:00Z")
    assert [json.loads(line)["owner"] for line in run("list", "--owner", "bob", "--json")[1].splitlines()] == ["bob"]
    assert run("list", "--owner", "eve", "--json")[1] == ""


def test_people_read_a_table(run: Run) -> None:
    run("create", "--owner", "ada", "--name", "the laptop")
    head, line = run("list")[1].splitlines()
    assert head.split() == [
        "id",
        "state",
        "owner",
        "name",
        "scopes",
        "created_at",
        "expires_at",
        "last_used_at",
        "kept_by",
    ]
    assert "live   ada    the laptop  tasks:read tasks:write webhooks" in line


def test_a_key_is_revoked_by_its_id_and_asking_twice_is_asking_once(run: Run, settings: Settings) -> None:
    ids = [json.loads(run("create", "--json")[1])["id"] for _ in range(2)]
    code, out, _ = run("revoke", ids[0])
    assert (code, out) == (0, f"{ids[0]} is revoked; every API process knows within 5 s\n")
    when = rows(settings)[0]["revoked_at"]
    assert run("revoke", f"tq_live_{ids[0]}")[0] == 0, "with what stands before it in a key, too"
    assert [row["revoked_at"] for row in rows(settings)] == [when, None]
    code, out, _ = run("revoke", "nothingxxx", "\udcff", ids[1])
    assert code == 1
    assert out.count("there is no key with this id\n") == 2
    assert rows(settings)[1]["revoked_at"] is not None, "the one that is there is revoked all the same"


def test_who_has_no_key_left_is_named_if_their_schedules_go_on(run: Run, settings: Settings) -> None:
    def schedule(*names: str, owner: str, next_run: str = "now() + interval '1 hour'") -> None:
        async def insert() -> None:
            connection = await asyncpg.connect(settings.postgres_dsn)
            for name in names:
                await connection.execute(
                    "INSERT INTO schedule (owner, name, task, submit, every_seconds, time_zone, anchor, jitter_seconds,"
                    " catch_up, overlap, paused, next_run, due_at)"
                    " VALUES ($1, $2, 'sample.echo', '{}', 60, 'UTC', now(), 0, 'one', 'allow', $3, "
                    f"{next_run}, {next_run})",
                    owner, name, next_run == "NULL",
                )  # fmt: skip
            await connection.close()

        asyncio.run(insert())

    def made(owner: str, *words: str) -> str:
        return str(json.loads(run("create", "--owner", owner, "--json", *words)[1])["id"])

    schedule("a", "b", owner="ada")
    schedule("paused", owner="ada", next_run="NULL")
    schedule("paused", owner="bob", next_run="NULL")
    schedule("c", owner="")
    first, second, expired = made("ada"), made("ada"), made("ada", "--expires", "2001-01-31T12:00:00Z")
    assert run("revoke", first)[1].count("\n") == 1, "another one is live"
    assert expired
    code, out, _ = run("revoke", second, made("bob"), first)
    assert code == 0
    assert out.splitlines()[3:] == ["ada has no live key left, and 2 schedules of theirs go on: see docs/keys.md"]
    anybody = json.loads(run("create", "--json")[1])["id"]
    assert run("revoke", anybody)[1].splitlines()[1:] == [
        "nobody in particular has no live key left, and 1 schedule of theirs goes on: see docs/keys.md"
    ]


def chart_s_key() -> str:
    rest = f"tq_live_{'Chart00001'}_{'k' * 43}"
    return rest + hashlib.sha256(rest.encode()).hexdigest()[:8]


def test_a_key_that_a_chart_made_is_taken_in_and_again_at_every_upgrade(
    run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOOTSTRAP_KEY", f"{chart_s_key()}\n")
    words = ("create", "--name", "bootstrap", "--scope", "admin", "--key-from-env", "BOOTSTRAP_KEY")
    code, out, err = run(*words)
    assert (code, out) == (0, ""), "who gave it has it"
    assert err == "key Chart00001: of nobody in particular, may admin, never expires\n"
    before = rows(settings)
    code, out, err = run(*words)
    assert (code, out, rows(settings)) == (0, "", before)
    assert "was there already and stays as it is: live" in err

    run("revoke", "Chart00001")
    code, _, err = run(*words)
    assert code == 0, "the upgrade goes on"
    assert "revoked" in err
    assert rows(settings)[0]["revoked_at"] is not None, "what was revoked stays so"


def test_a_key_is_taken_from_a_file_or_the_standard_input(
    run: Run, settings: Settings, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(chart_s_key())
    monkeypatch.setattr("sys.stdin", io.StringIO(chart_s_key()))
    assert run("create", "--key-from-file", "key")[0] == 0
    assert run("create", "--key-from-file", "-")[0] == 0
    assert len(rows(settings)) == 1


WRONG: list[tuple[tuple[str, ...], str]] = [
    (("--owner", "a b"), "--owner must be"),
    (("--owner", "x" * 65), "--owner must be"),
    (("--owner", "a\n"), "--owner must be"),
    (("--name", "x" * 65), "--name must be"),
    (("--name", "a\x00b"), "--name must be"),
    (("--name", "\udcff"), "--name must be"),
    (("--expires", "tomorrow"), "--expires must be"),
    (("--expires", "0d"), "--expires must be"),
    (("--expires", "99999d"), "--expires must be"),
    (("--expires", "2030-01-31T12:00:00"), "--expires must be"),
    (("--expires", "9999-12-31T23:59:59-23:00"), "--expires must be"),
    (("--key-from-env", "NOT_SET"), "NOT_SET is not set"),
    (("--key-from-env", "BAD_KEY"), "what was given is no API key"),
    (("--key-from-file", "nowhere"), "--key-from-file names nothing"),
]


def test_a_wrong_wish_is_one_line_that_names_it(run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BAD_KEY", chart_s_key()[:-1])
    for words, sentence in WRONG:
        code, out, err = run("create", *words)
        assert (code, out) == (1, ""), words
        assert err.startswith(f"taskqueue: {sentence}"), err
        assert err.count("\n") == 1
        assert "kkkk" not in err
    assert rows(settings) == []


def test_a_given_key_does_not_take_the_place_of_another(
    run: Run, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOOTSTRAP_KEY", chart_s_key())
    run("create", "--key-from-env", "BOOTSTRAP_KEY")
    rest = chart_s_key()[:19] + "z" * 43
    monkeypatch.setenv("BOOTSTRAP_KEY", rest + hashlib.sha256(rest.encode()).hexdigest()[:8])
    code, _, err = run("create", "--key-from-env", "BOOTSTRAP_KEY")
    assert code == 1
    assert "another key has the id" in err
    assert len(rows(settings)) == 1


def test_which_keys_still_need_an_older_secret_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKQUEUE_SECRET_KEY", OLDER)
    run("create")
    monkeypatch.setenv("TASKQUEUE_SECRET_KEY", f"{SECRET} {OLDER}")
    run("create")

    def kept_by() -> list[str]:
        return [json.loads(line)["kept_by"] for line in run("list", "--json")[1].splitlines()]

    assert kept_by() == ["older", "newest"]
    monkeypatch.setenv("TASKQUEUE_SECRET_KEY", SECRET)
    assert kept_by() == ["gone", "newest"]
    monkeypatch.delenv("TASKQUEUE_SECRET_KEY")
    assert kept_by() == ["gone", "gone"]
    code, _, err = run("create")
    assert (code, err.startswith("taskqueue: TASKQUEUE_SECRET_KEY is not set")) == (2, True)


def test_a_database_that_was_never_migrated_says_so(
    run: Run, empty_postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_postgres_url)
    code, _, err = run("create")
    assert code == 1
    assert "run taskqueue migrate" in err

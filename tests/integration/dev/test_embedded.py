import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis

from app.core import errors
from app.dev import linux
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer
from app.dev.running import running
from tests.support.waiting import wait_until

HOLDER = """
import sys, time
from pathlib import Path
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis
from app.dev.running import RunningServer
home = Path(sys.argv[1])
for server in (EmbeddedPostgres(home / "postgres"), EmbeddedRedis(home / "redis")):
    started = RunningServer(server)
    started.start()
    print(started.pid, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory that nobody else may pass, with a space in its name."""
    path = Path(tempfile.mkdtemp(prefix="taskqueue closed "))
    path.chmod(0o700)
    yield path
    shutil.rmtree(path)


def ask(url: str, query: str) -> object:
    async def run() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    return asyncio.run(run())


def test_postgres_keeps_its_promises_and_its_data_over_a_kill(home: Path) -> None:
    with running(EmbeddedPostgres(home / "deeper" / "postgres")) as postgres:
        assert [ask(postgres.url, f"SHOW {name}") for name in ("fsync", "synchronous_commit", "server_encoding")] == [
            "on",
            "on",
            "UTF8",
        ]
        assert [ask(postgres.url, f"SHOW {name}") for name in ("listen_addresses", "unix_socket_directories")] == [
            "127.0.0.1",
            "",
        ]
        url, pid = postgres.url, postgres.pid
        ask(url, "CREATE TABLE kept AS SELECT 42 AS answer")
        postgres.kill()
        postgres.start()
        assert (postgres.url, ask(url, "SELECT answer FROM kept")) == (url, 42)
        assert postgres.pid != pid
    with running(EmbeddedPostgres(home / "deeper" / "postgres")) as postgres:
        assert postgres.url == url
        assert ask(url, "SELECT answer FROM kept") == 42


def test_postgres_does_not_run_as_root(home: Path) -> None:
    with running(EmbeddedPostgres(home / "postgres", durable=False)) as postgres:
        assert Path(f"/proc/{postgres.pid}").stat().st_uid != 0
        assert str(home) in Path(f"/proc/{postgres.pid}/cmdline").read_text()
    assert home.stat().st_mode & 0o777 == 0o700
    assert home.stat().st_uid == os.geteuid()


def test_postgres_asks_for_its_password(home: Path) -> None:
    with running(EmbeddedPostgres(home / "postgres", durable=False)) as postgres:
        wrong = postgres.url.replace(postgres.server.password, "guessed")
        with pytest.raises(asyncpg.InvalidPasswordError):
            ask(wrong, "SELECT 1")


def test_a_start_that_was_cut_off_half_way_is_made_again(home: Path) -> None:
    server = EmbeddedPostgres(home / "postgres", durable=False)
    (server.directory / "data.new" / "base").mkdir(parents=True)
    with running(server) as postgres:
        assert ask(postgres.url, "SELECT current_database()") == "taskqueue"


def test_a_number_that_postgres_left_behind_and_another_process_has_now_does_not_stop_it(home: Path) -> None:
    with running(EmbeddedPostgres(home / "postgres", durable=False)) as postgres:
        postgres.kill()
        pid_file = postgres.server.directory / "data" / "postmaster.pid"
        pid_file.write_text(pid_file.read_text().replace(pid_file.read_text().split("\n")[0], str(os.getppid()), 1))
        postgres.start()
        assert ask(postgres.url, "SELECT 1") == 1


def test_redis_keeps_what_it_was_told_and_forgets_nothing_for_want_of_memory(home: Path) -> None:
    with running(EmbeddedRedis(home / "redis", databases=512)) as server, redis.Redis.from_url(server.url) as client:
        wanted = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "maxmemory-policy": "noeviction",
            "save": "",
            "bind": "127.0.0.1",
            "databases": "512",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        client.set("kept", "42")
        server.kill()
        server.start()
        assert client.get("kept") == b"42"
        assert str(home) in Path(f"/proc/{server.pid}/cmdline").read_text()
        guessed = server.url.replace(server.server.password, "guessed")
        with redis.Redis.from_url(guessed) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()


@pytest.mark.parametrize("server", [EmbeddedPostgres, EmbeddedRedis])
def test_a_directory_is_held_by_one_at_a_time(home: Path, server: type[EmbeddedServer]) -> None:
    in_use = pytest.raises(errors.SettingsError, match="TASKQUEUE_DATA_DIR is in use by another process")
    with running(server(home / "data")), in_use, running(server(home / "data")):
        pass


def test_a_port_that_was_taken_meanwhile_is_replaced(home: Path) -> None:
    first = EmbeddedRedis(home / "redis")
    with running(first), running(EmbeddedRedis(home / "other")) as other:
        (other.server.directory / "port").write_text(str(first.port))
        assert EmbeddedRedis(home / "other").port != first.port


@pytest.mark.skipif(not linux.IS_LINUX, reason="only Linux tells a process that its parent died")
def test_servers_end_with_a_parent_that_was_killed(home: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(home)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None
        servers = [int(holder.stdout.readline()) for _ in range(2)]
        holder.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(_runs(pid) for pid in servers), what="the end of both servers")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

"""Servers that follow those of a stack, each over a network of its own, and may take their place."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import redis

from app.dev import binaries, directory, ports
from app.dev.embedded import NAME, EmbeddedPostgres, EmbeddedRedis
from app.dev.running import RunningServer
from app.dev.running import running as started
from tests.faults.stack import Stack
from tests.support.proxy import Proxy, proxied
from tests.support.waiting import wait_until

STANDBY = "standby"
"""The name by which the primary knows its standby."""
FOLLOWS_SECONDS = 30.0
COPY_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Replica:
    """A server that follows, and the network over which it does."""

    server: RunningServer
    link: Proxy


@contextlib.contextmanager
def standby_of(running: Stack) -> Iterator[Replica]:
    """A Postgres that streams from the stack's, asynchronously; the test is skipped where there are no programs."""
    copying = binaries.postgres_directory() / "pg_basebackup"
    if not copying.is_file():
        pytest.skip(f"a standby is made by pg_basebackup, which is not beside {binaries.postgres_directory()}/postgres")
    home = running.home / STANDBY
    home.mkdir()
    password = running.postgres.server.password
    directory.keep(home / "password", password)
    with proxied(running.postgres.url) as link:
        target = f"host={ports.ADDRESS} port={link.port} user={NAME} application_name={STANDBY}"
        subprocess.run(
            [copying, "-D", home / "data", "-d", target, "-R", "-X", "stream", "-c", "fast"],
            check=True,
            timeout=COPY_SECONDS,
            env={"LC_ALL": "C", "PATH": os.defpath, "PGPASSWORD": password},
        )
        with started(EmbeddedPostgres(home, max_connections=120)) as server:
            streams = f"SELECT 1 FROM pg_stat_replication WHERE application_name = '{STANDBY}' AND state = 'streaming'"
            wait_until(lambda: running.fetch(streams), FOLLOWS_SECONDS, "a standby that streams")
            yield Replica(server, link)


def wait_for_it(running: Stack) -> None:
    """Have every commit of the stack's Postgres wait for its standby, from now on."""
    running.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
    running.execute("SELECT pg_reload_conf()")
    synchronous = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"
    wait_until(lambda: running.fetch(synchronous), FOLLOWS_SECONDS, "a synchronous standby")


@contextlib.contextmanager
def replica_of(running: Stack) -> Iterator[Replica]:
    """A Redis that follows the stack's, asynchronously as Redis does."""
    home = running.home / "replica"
    home.mkdir()
    password = running.redis.server.password
    directory.keep(home / "password", password)
    with proxied(running.redis.url) as link, started(EmbeddedRedis(home)) as server:
        with redis.Redis.from_url(server.url) as client:
            client.config_set("masterauth", password)
            client.replicaof(ports.ADDRESS, str(link.port))
            wait_until(
                lambda: client.info("replication")["master_link_status"] == "up", FOLLOWS_SECONDS, "a replica in step"
            )
        yield Replica(server, link)

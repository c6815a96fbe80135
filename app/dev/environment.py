"""What `taskqueue dev` sets for its processes where the user set nothing: servers, secrets, defaults."""

import base64
import json
import os
import secrets
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dotenv import dotenv_values

from app.core import config, errors
from app.dev import directory, ports
from app.dev.embedded import EmbeddedPostgres, EmbeddedRedis, EmbeddedServer

PROCESSES = ("api", "worker", "relay")

DEFAULTS: Mapping[str, str] = {
    "TASKQUEUE_SAMPLE_TASKS": "true",
    "TASKQUEUE_GRACE_SECONDS": "8",
    "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE": "true",
    "TASKQUEUE_AUTH_MODE": "none",
    "TASKQUEUE_LOG_FORMAT": "console",
}
"""Development's own defaults, each for a variable that the user has not set."""

ENVIRONMENT_FILE = "env"
"""Where the data directory holds the settings in force, for programs beside the service."""

METRICS_PORT = "TASKQUEUE_METRICS_PORT"

TARGETS_FILE = "prometheus-targets.json"
"""Where the data directory says whom a Prometheus on this machine would scrape, as its file_sd reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will run, and with which settings.

    Attributes:
        data_dir: absolute.
        servers: those embedded, because their URL was not set.
        environment: of every process.
        metrics_ports: TCP port by process; 0 serves no metrics.
    """

    data_dir: Path
    servers: tuple[EmbeddedServer, ...]
    environment: Mapping[str, str]
    metrics_ports: Mapping[str, int]

    def environment_of(self, process: str) -> dict[str, str]:
        """The environment of one process: everybody's, and its own metrics port."""
        own = {METRICS_PORT: str(self.metrics_ports[process])} if process in self.metrics_ports else {}
        return {**self.environment, **own, "PYTHONUNBUFFERED": "1"}


def chosen(env_file: str | Path = config.ENV_FILE) -> Mapping[str, str]:
    """What the user set, in the environment or else in `.env`."""
    written = {name: value for name, value in dotenv_values(env_file).items() if value is not None}
    return {**written, **os.environ}


def data_dir(user: Mapping[str, str]) -> Path:
    """The data directory, absolute, so that every process means the same one."""
    return Path(user.get("TASKQUEUE_DATA_DIR", ".taskqueue")).resolve()


def plan(user: Mapping[str, str]) -> Plan:
    """Decide what runs, making up what the user left open; the data directory remembers it.

    Raises:
        SettingsError: if a server must be embedded and can't be, or the metrics ports are no ports.
    """
    home = data_dir(user)
    servers: dict[str, EmbeddedServer] = {}
    if "DATABASE_URL" not in user:
        servers["DATABASE_URL"] = EmbeddedPostgres(home / "postgres")
    if "REDIS_URL" not in user:
        servers["REDIS_URL"] = EmbeddedRedis(home / "redis")
    generated = {
        **{variable: server.url for variable, server in servers.items()},
        "TASKQUEUE_WEBHOOK_SECRET": directory.remembered(home / "webhook-secret", _webhook_secret),
        "TASKQUEUE_SECRET_KEY": directory.remembered(home / "secret-key", lambda: secrets.token_urlsafe(48)),
    }
    environment = {**DEFAULTS, **generated, **user, "TASKQUEUE_DATA_DIR": str(home)}
    metrics_ports = _metrics_ports(user.get(METRICS_PORT))
    directory.keep(home / ENVIRONMENT_FILE, _as_shell(environment))
    directory.keep(home / TARGETS_FILE, targets(metrics_ports))
    return Plan(data_dir=home, servers=tuple(servers.values()), environment=environment, metrics_ports=metrics_ports)


def targets(metrics_ports: Mapping[str, int]) -> str:
    """The processes' metrics for Prometheus's file_sd, under the names that the chart gives to jobs.

    Args:
        metrics_ports: TCP port by process; 0 serves none.
    """
    named = [
        {"targets": [f"{ports.ADDRESS}:{port}"], "labels": {"job": f"taskqueue-{process}", "namespace": "local"}}
        for process, port in metrics_ports.items()
        if port
    ]
    return json.dumps(named, indent=2) + "\n"


def _as_shell(environment: Mapping[str, str]) -> str:
    """What a shell reads, so that a Python program beside the service can submit to it."""
    ours = config.variables()
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in sorted(environment.items()) if name in ours)


def _metrics_ports(wanted: str | None) -> Mapping[str, int]:
    """Free ones; or the one that the user wants and those after it; or none at all for 0."""
    if wanted is None:
        return dict(zip(PROCESSES, ports.free_ports(len(PROCESSES)), strict=True))
    if not wanted.isascii() or not wanted.isdigit() or int(wanted) + len(PROCESSES) > 65536:  # noqa: PLR2004
        raise errors.SettingsError(f"{METRICS_PORT} is wrong: must be a port, with free ones for three processes")
    first = int(wanted)
    return {process: first and first + place for place, process in enumerate(PROCESSES)}


def _webhook_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()

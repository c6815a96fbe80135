"""The `taskqueue` command: one entrance for every process of the service.

What a command needs is imported when it runs: `taskqueue config` must not wait
for Celery, nor the API load what only workers use.
"""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

import app
from app.core import config, errors

EXIT_SETTINGS = 2
"""The exit code when a setting is missing or wrong."""

MASK = "********"
KEEPALIVE_SECONDS = 75
"""How long the API keeps an idle connection: longer than load balancers do, so that they close first."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after `taskqueue`; those of the process unless given.

    Returns:
        The exit code: 0; after one line on stderr 2 when a setting is missing or wrong, 1 when something
        else that this service knows of went wrong.
    """
    options = vars(_parser().parse_args(argv))
    command: Callable[..., int | None] = options.pop("run")
    try:
        return command(**options) or 0
    except errors.SettingsError as wrong:
        sys.stderr.write(f"taskqueue: {wrong}\n")
        return EXIT_SETTINGS
    except errors.TaskQueueError as failed:
        sys.stderr.write(f"taskqueue: {failed}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="taskqueue",
        description=app.__doc__,
        epilog="Settings come from the environment, then from .env: see .env.example.",
    )
    parser.add_argument("--version", action="version", version=f"taskqueue {app.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="<command>", required=True)
    for name, (run, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if name == "migrate":
            command.add_argument(
                "--check", action="store_true", help="change nothing; succeed once somebody else has migrated"
            )
            command.add_argument(
                "--patience",
                type=_seconds,
                default=0.0,
                metavar="SECONDS",
                help="how long to wait for that, or Postgres",
            )
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return seconds


_seconds.__name__ = "number of seconds"  # as argparse calls it in its complaint


def _api() -> int | None:
    settings = config.load()
    from gunicorn.app.base import BaseApplication  # noqa: PLC0415
    from gunicorn.glogging import Logger  # noqa: PLC0415

    from app.core import telemetry  # noqa: PLC0415
    from app.main import check, create_app  # noqa: PLC0415

    telemetry.configure_logging(settings, "api")
    # Here a setting that does not do is one line; in gunicorn's worker it would be a traceback.
    check(settings)

    class OurLogger(Logger):  # type: ignore[misc]  # gunicorn ships no types
        """Gunicorn's lines, in the format of all others."""

        def setup(self, cfg: object) -> None:
            del cfg
            self.error_log.propagate = True

    class Application(BaseApplication):  # type: ignore[misc]  # gunicorn ships no types
        """Gunicorn without its own command line, files and environment: `Settings` alone decide."""

        def load_config(self) -> None:
            for name, value in gunicorn_options(settings).items():
                self.cfg.set(name, value)
            self.cfg.set("logger_class", OurLogger)

        def load(self) -> Any:
            api = create_app(settings)
            logging.getLogger("uvicorn.access").disabled = True  # metrics and traces say it better
            return api

    Application().run()
    return None


def gunicorn_options(settings: config.Settings) -> Mapping[str, Any]:
    """How gunicorn serves the API: one uvicorn worker, whose master starts it again when it dies."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return {
        "bind": f"{host}:{settings.port}",
        "workers": 1,  # more of them are more pods
        "worker_class": "uvicorn_worker.UvicornWorker",
        "graceful_timeout": max(1, int(settings.grace_seconds)),
        "keepalive": KEEPALIVE_SECONDS,
        "accesslog": None,
        "loglevel": settings.log_level.lower(),
        "control_socket_disable": True,
        "proc_name": "taskqueue api",
    }


def _worker() -> int | None:
    settings = config.load()
    from app.celery_app import run_worker  # noqa: PLC0415

    _wait_for_tables(settings, "worker")
    run_worker(settings)
    return None


def _relay() -> int | None:
    settings = config.load()
    from app import relay  # noqa: PLC0415

    _wait_for_tables(settings, "relay")
    relay.run(settings)
    return None


def _wait_for_tables(settings: config.Settings, process: str) -> None:
    """A worker or a relay does nothing before the migration of its release; the API says that it is not ready."""
    from app import db  # noqa: PLC0415
    from app.core import telemetry  # noqa: PLC0415

    telemetry.configure_logging(settings, process)
    asyncio.run(db.wait_for_tables(settings.postgres_dsn))


def _migrate(*, check: bool, patience: float) -> int | None:
    settings = config.load()
    from app import migrations  # noqa: PLC0415
    from app.core import telemetry  # noqa: PLC0415

    # The first process of a container ignores a SIGTERM that it has no handler for.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    telemetry.configure_logging(settings, "migrate")
    if check:
        migrations.check(settings, patience_seconds=patience)
    else:
        migrations.migrate(settings, patience_seconds=patience)
    return None


def _dev() -> int | None:
    from app.dev import supervisor  # noqa: PLC0415

    return supervisor.run()


def _doctor() -> int | None:
    from app import doctor  # noqa: PLC0415

    return _told(*doctor.report(config.load()))


def _verify() -> int | None:
    from app import doctor  # noqa: PLC0415

    return _told(*doctor.verification(config.load()))


def _told(lines: Sequence[str], well: bool) -> int:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return 0 if well else 1


def _config() -> int | None:
    """Print every setting: its variable, its value, and whether it was set."""
    settings = config.load()
    rows = [
        (
            variable,
            shown(getattr(settings, field)),
            "set" if field in settings.model_fields_set else "default",
        )
        for variable, field in config.variables().items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for variable, value, origin in rows:
        sys.stdout.write(f"{variable:<{widths[0]}}  {value:<{widths[1]}}  {origin}\n")
    return None


def shown(value: object) -> str:
    """A setting as people may see it: secrets masked, a URL's password too, a list as it is written."""
    if value is None:
        return "-"
    if isinstance(value, SecretStr):
        return _url_shown(value.get_secret_value())
    if isinstance(value, str) and "@" in value:
        return _url_shown(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(shown(item) for item in value) or "-"
    return str(value)


def _url_shown(secret: str) -> str:
    parts = urlsplit(secret)
    if not parts.scheme or not parts.hostname:
        return MASK
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username or ''}:{MASK}@" if parts.password else f"{parts.username}@" if parts.username else ""
    return f"{parts.scheme}://{user}{host}{parts.path}"


COMMANDS: Mapping[str, tuple[Callable[..., int | None], str]] = {
    "api": (_api, "serve the HTTP API"),
    "worker": (_worker, "run tasks"),
    "relay": (_relay, "publish what is due, reap what was lost, deliver webhooks"),
    "migrate": (_migrate, "bring the database's tables up to date"),
    "dev": (_dev, "run everything on this machine, with a Redis and a Postgres of its own"),
    "doctor": (_doctor, "say what in the surroundings would break a promise"),
    "verify": (_verify, "check the invariants of a live database"),
    "config": (_config, "print the settings in force, secrets masked"),
}


if __name__ == "__main__":
    sys.exit(main())

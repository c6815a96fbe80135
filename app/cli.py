"""The `taskqueue` command: one entrance for every process of the service.

What a command needs is imported when it runs: `taskqueue config` must not wait
for Celery, nor the API load what only workers use.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

import app
from app.core import config, errors
from app.core.scopes import Scope

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
    groups = {"": commands}
    for name, (run, text) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            about = GROUPS[group]
            within = commands.add_parser(group, help=about, description=about)
            groups[group] = within.add_subparsers(title="commands", metavar="<command>", required=True)
        one = groups[group].add_parser(last, help=text, description=text)
        one.set_defaults(run=run)
        if name in OPTIONS:
            OPTIONS[name](one)
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

    from app.core import metrics, telemetry  # noqa: PLC0415
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
            if settings.metrics_port == 0:
                metrics.silence()
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


def _migrate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; succeed once somebody else has migrated")
    parser.add_argument(
        "--patience", type=_seconds, default=0.0, metavar="SECONDS", help="how long to wait for that, or Postgres"
    )


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


def _webhooks_verify(request: str, headers: str | None, body: str | None, *, any_time: bool) -> int | None:
    from app.dev import receiving  # noqa: PLC0415

    secrets = receiving.known_secrets()
    if headers is None and body is None:
        found, raw = receiving.split(receiving.captured(request))
    elif headers is not None and body is not None:
        found, raw = receiving.headers_of(receiving.captured(headers)), receiving.captured(body)
    else:
        raise receiving.Unreadable("--headers and --body go together")
    line = receiving.verified(secrets, found, raw, None if any_time else time.time())
    sys.stdout.write(f"verified: {line}\n")
    return None


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "request", nargs="?", default="-", metavar="FILE",
        help="the request: headers, an empty line, the body; the standard input unless given",
    )  # fmt: skip
    parser.add_argument("--headers", metavar="FILE", help="the headers, if they are in a file of their own")
    parser.add_argument("--body", metavar="FILE", help="the body, byte for byte, if it is in a file of its own")
    parser.add_argument("--any-time", action="store_true", help="accept one that was sent long ago")


def _webhooks_listen(forward: str | None, host: str, port: int) -> int | None:
    from app.dev import listening, receiving  # noqa: PLC0415

    def show(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    listening.listen(receiving.known_secrets(), forward, host, port, show)
    return None


def _listen_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forward", metavar="URL", help="hand every verified one on, and answer what this URL answers")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=9000, help="port to listen on; 0 takes a free one (%(default)s)")


def _webhooks_secret(*, ed25519: bool) -> int | None:
    from app.dev import receiving  # noqa: PLC0415

    return _told(receiving.new_secret(ed25519=ed25519), well=True)


def _secret_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ed25519", action="store_true", help="a key pair: receivers need only its public half")


def _keys_create(*, key_from_env: str | None, key_from_file: str | None, as_json: bool, **wanted: Any) -> int | None:
    from app import keydesk  # noqa: PLC0415

    given = keydesk.given(key_from_env, key_from_file)
    created = keydesk.create(config.load(), keydesk.Wanted(**wanted, given=given))
    if as_json:
        return _told([keydesk.created_json(created)], well=True)
    sys.stderr.write(f"{keydesk.created_sentence(created)}\n")
    return _told([] if created.key is None else [created.key], well=True)


def _keys_create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner", default="", help="whose tasks it submits and sees; nobody's in particular if empty")
    parser.add_argument(
        "--scope", action="append", choices=[str(one) for one in Scope], dest="scopes",
        help="what it may do, once for each; all but admin unless given",
    )  # fmt: skip
    parser.add_argument("--expires", metavar="WHEN", help="such as 90d or 12h, or a date and time; never unless given")
    parser.add_argument("--name", default="", help="what people call it")
    _json_option(parser)
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--key-from-env", metavar="VARIABLE", help="take in the key that this variable holds")
    given.add_argument("--key-from-file", metavar="FILE", help="take in the key in this file; - is the standard input")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object a line")


def _keys_list(*, owner: str | None, as_json: bool) -> int | None:
    from app import keydesk  # noqa: PLC0415

    return _told(keydesk.listed(config.load(), owner=owner, as_json=as_json), well=True)


def _keys_list_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--owner", help="only this owner's")
    _json_option(parser)


def _keys_revoke(*, ids: Sequence[str]) -> int | None:
    from app import keydesk  # noqa: PLC0415

    return _told(*keydesk.revoked(config.load(), ids))


def _keys_revoke_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help="the id of a key, as keys list shows it")


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


def _openapi() -> int | None:
    # Nothing is opened, so what would be opened need not be set.
    for variable, unused in _UNOPENED.items():
        os.environ.setdefault(variable, unused)
    settings = config.load()
    from app.main import create_app  # noqa: PLC0415

    sys.stdout.write(json.dumps(create_app(settings).openapi(), indent=2, ensure_ascii=False) + "\n")
    return None


_UNOPENED: Mapping[str, str] = {
    "DATABASE_URL": "postgresql://localhost/nothing",
    "REDIS_URL": "redis://localhost/0",
    "TASKQUEUE_AUTH_MODE": "none",
}


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
    "keys create": (_keys_create, "make an API key, and print it this once"),
    "keys list": (_keys_list, "show the API keys there are, but not the keys themselves"),
    "keys revoke": (_keys_revoke, "have API keys open nothing any more"),
    "openapi": (_openapi, "print the OpenAPI description of the API, every registered task included"),
    "webhooks listen": (_webhooks_listen, "receive webhooks on this machine: verify, show, hand on"),
    "webhooks verify": (_webhooks_verify, "check a captured webhook, and say which check fails"),
    "webhooks secret": (_webhooks_secret, "print a new secret to sign with"),
}
GROUPS: Mapping[str, str] = {
    "keys": "API keys, straight in the database",
    "webhooks": "what who writes a receiver needs",
}
OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "migrate": _migrate_options,
    "keys create": _keys_create_options,
    "keys list": _keys_list_options,
    "keys revoke": _keys_revoke_options,
    "webhooks listen": _listen_options,
    "webhooks verify": _verify_options,
    "webhooks secret": _secret_options,
}


if __name__ == "__main__":
    sys.exit(main())

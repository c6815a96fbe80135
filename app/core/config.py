"""Settings: one frozen object, read once from the environment, then `.env`, then the defaults here.

Every process calls `load()` at its edge and passes the object down; nothing
below reads the environment. A wrong or missing value raises `SettingsError`
with one line that names the variable and never shows its value.
"""

import base64
import binascii
import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.core import errors

ENV_FILE = ".env"
DEFAULT_OBJECTIVE_SECONDS = 30.0
STANDARD_WEBHOOKS_SCHEDULE = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Seconds between attempts: ten over 75 h 35 min (Standard Webhooks, "Deliverability and reliability")."""

TASK_NAME = re.compile(r"(?!celery\.)[A-Za-z0-9_.:-]{1,255}")
"""Celery has tasks of its own, which nobody may submit and no message may name."""
QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")

_OBJECTIVE = re.compile(rf"(?:{QUEUE_NAME.pattern}=)?[0-9]{{1,9}}(?:\.[0-9]{{1,3}})?", flags=re.ASCII)

Words = Annotated[tuple[str, ...], NoDecode]
"""A tuple that the environment writes with commas or spaces between its words."""


def _variable(name: str) -> Any:
    return AliasChoices(name)


class Settings(BaseSettings):
    """Everything that can be set. The variable's name stands beside each field, its unit in the text."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", env_file_encoding="utf-8", case_sensitive=True, hide_input_in_errors=True
    )

    database_url: SecretStr = Field(
        validation_alias=_variable("DATABASE_URL"),
        description="Postgres, `postgresql+asyncpg://user:password@host:port/name`; plain `postgresql://` too.",
    )
    redis_url: SecretStr = Field(
        validation_alias=_variable("REDIS_URL"),
        description="Redis, `redis://[:password@]host:port/db` or `rediss://…`.",
    )
    host: str = Field("127.0.0.1", validation_alias=_variable("HOST"), description="Address the API listens on.")
    port: int = Field(
        8000, ge=1, le=65535, validation_alias=_variable("PORT"), description="TCP port the API listens on."
    )
    data_dir: Path = Field(
        Path(".taskqueue"),
        validation_alias=_variable("TASKQUEUE_DATA_DIR"),
        description="Where embedded servers and the processes' own files live.",
    )
    task_modules: Words = Field(
        (),
        validation_alias=_variable("TASKQUEUE_TASK_MODULES"),
        description="Modules that register more tasks, comma-separated.",
    )
    sample_tasks: bool = Field(
        default=False,
        validation_alias=_variable("TASKQUEUE_SAMPLE_TASKS"),
        description="Register the `sample.*` tasks.",
    )
    queues: Words = Field(
        ("default",),
        validation_alias=_variable("TASKQUEUE_QUEUES"),
        description="Queues that workers consume and submit accepts; each is a Redis key of that name.",
    )
    concurrency: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        le=512,
        validation_alias=_variable("TASKQUEUE_CONCURRENCY"),
        description="Pool children of a worker; the machine's cores unless set.",
    )
    task_memory_mebibytes: int | None = Field(
        None,
        ge=64,
        validation_alias=_variable("TASKQUEUE_TASK_MEMORY_MEBIBYTES"),
        description="MiB that one task may take in its pool child; beyond it, `MemoryError`. Unset: no limit.",
    )
    lease_seconds: float = Field(
        30.0,
        ge=1.0,
        le=3600.0,
        validation_alias=_variable("TASKQUEUE_LEASE_SECONDS"),
        description="Seconds that a claim lives; it is renewed every third of it.",
    )
    grace_seconds: float = Field(
        60.0,
        ge=1.0,
        le=86400.0,
        validation_alias=_variable("TASKQUEUE_GRACE_SECONDS"),
        description="Seconds from SIGTERM to exit.",
    )
    retention_days: float = Field(
        30.0,
        gt=0.0,
        le=36500.0,
        validation_alias=_variable("TASKQUEUE_RETENTION_DAYS"),
        description="Days that ended tasks are kept; decimals allowed.",
    )
    max_backlog: int = Field(
        5_000_000,
        ge=1,
        validation_alias=_variable("TASKQUEUE_MAX_BACKLOG"),
        description="Waiting tasks beyond which submits are answered 503.",
    )
    webhook_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        validation_alias=_variable("TASKQUEUE_WEBHOOK_SECRET"),
        description="`whsec_…` (HMAC) or `whsk_…` (ed25519) keys that sign webhooks; several, with spaces, to rotate.",
    )
    webhook_allow_private: bool = Field(
        default=False,
        validation_alias=_variable("TASKQUEUE_WEBHOOK_ALLOW_PRIVATE"),
        description="Development only: http, any port and private addresses are allowed.",
    )
    webhook_allowed_origins: Words = Field(
        (),
        validation_alias=_variable("TASKQUEUE_WEBHOOK_ALLOWED_ORIGINS"),
        description="Exact `scheme://host:port` origins that are exempt from the address rules.",
    )
    webhook_blocked_cidrs: Words = Field(
        (),
        validation_alias=_variable("TASKQUEUE_WEBHOOK_BLOCKED_CIDRS"),
        description="The operator's own address ranges, blocked besides the built-in ones.",
    )
    webhook_schedule: Annotated[tuple[float, ...], NoDecode] = Field(
        STANDARD_WEBHOOKS_SCHEDULE,
        validation_alias=_variable("TASKQUEUE_WEBHOOK_SCHEDULE"),
        description="Seconds before each delivery attempt, the first included.",
    )
    webhook_payload: Literal["full", "thin"] = Field(
        "full",
        validation_alias=_variable("TASKQUEUE_WEBHOOK_PAYLOAD"),
        description="`full` sends the result or error, `thin` the ids only.",
    )
    auth_mode: Literal["none", "api-key"] = Field(
        validation_alias=_variable("TASKQUEUE_AUTH_MODE"),
        description="`none` opens the API to whoever reaches it; `api-key` asks for keys.",
    )
    secret_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (),
        validation_alias=_variable("TASKQUEUE_SECRET_KEY"),
        description="Encrypts stored secrets and keys the HMAC of API keys; 32 characters or more. "
        "Several, with spaces, to rotate: the first is used for what is new.",
    )
    rate_limit_submit: int = Field(
        60_000,
        ge=0,
        le=100_000_000,
        validation_alias=_variable("TASKQUEUE_RATE_LIMIT_SUBMIT"),
        description="Submits, cancels and the like that a key may make a minute, of each API process; 0: any number.",
    )
    rate_limit_poll: int = Field(
        60_000,
        ge=0,
        le=100_000_000,
        validation_alias=_variable("TASKQUEUE_RATE_LIMIT_POLL"),
        description="Reads that a key may make a minute, of each API process; 0: any number.",
    )
    rate_limit_webhooks: int = Field(
        600,
        ge=0,
        le=100_000_000,
        validation_alias=_variable("TASKQUEUE_RATE_LIMIT_WEBHOOKS"),
        description="Redeliveries and the like that a key may ask for a minute, of each API process; 0: any number.",
    )
    public_docs: bool = Field(
        default=False,
        validation_alias=_variable("TASKQUEUE_PUBLIC_DOCS"),
        description="With API keys: serve `/docs` and `/openapi.json` to whoever asks. Else the latter needs a key.",
    )
    metrics_port: int = Field(
        9100,
        ge=0,
        le=65535,
        validation_alias=_variable("TASKQUEUE_METRICS_PORT"),
        description="TCP port of the Prometheus metrics; 0 serves none.",
    )
    latency_objectives: Words = Field(
        ("30",),
        validation_alias=_variable("TASKQUEUE_LATENCY_OBJECTIVES"),
        description="Seconds that a due task may wait, for the alerts: `30`, and `queue=600` for another queue.",
    )
    revision: str | None = Field(
        None,
        max_length=64,
        validation_alias=_variable("TASKQUEUE_REVISION"),
        description="Of the source that runs, for the metrics; the image has it set.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", validation_alias=_variable("TASKQUEUE_LOG_LEVEL"), description="Least level that is logged."
    )
    log_format: Literal["json", "console", "auto"] = Field(
        "auto",
        validation_alias=_variable("TASKQUEUE_LOG_FORMAT"),
        description="`json`, or `console` for people; `auto` is console on a terminal, else json.",
    )
    otlp_endpoint: str | None = Field(
        None,
        validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="OpenTelemetry collector; without it nothing is traced. The other OTEL_ variables hold too.",
    )

    @field_validator(
        "task_modules",
        "queues",
        "webhook_allowed_origins",
        "webhook_blocked_cidrs",
        "latency_objectives",
        mode="before",
    )
    @classmethod
    def _split_words(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("webhook_schedule", mode="before")
    @classmethod
    def _split_numbers(cls, value: object) -> object:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value

    @field_validator("webhook_secrets", "secret_keys", mode="before")
    @classmethod
    def _split_secrets(cls, value: object) -> object:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("webhook_secrets")
    @classmethod
    def _check_secrets(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        for secret in value:
            webhook_key(secret.get_secret_value())
        return value

    @field_validator("webhook_schedule")
    @classmethod
    def _check_schedule(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or len(value) > 100 or any(not 0 <= seconds <= 31_536_000 for seconds in value):  # noqa: PLR2004
            raise ValueError("must be 1 to 100 numbers of seconds, none negative or over a year")
        return value

    @field_validator("latency_objectives")
    @classmethod
    def _check_objectives(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        queues = [word.rpartition("=")[0] for word in value]
        if len(set(queues)) != len(queues) or not all(_OBJECTIVE.fullmatch(word) for word in value):
            raise ValueError("must be seconds such as 30, and queue=600 for another queue, none named twice")
        return value

    @field_validator("webhook_blocked_cidrs")
    @classmethod
    def _check_cidrs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for cidr in value:
            ipaddress.ip_network(cidr)
        return value

    @field_validator("webhook_allowed_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port is None or parts.path:
                raise ValueError("must be exact origins such as https://hooks.internal:8443")
        return value

    @field_validator("queues")
    @classmethod
    def _check_queues(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("must name at least one queue, and none twice")
        if not all(QUEUE_NAME.fullmatch(name) for name in value):
            raise ValueError("must be names of 1 to 64 letters, digits and _ . : - each")
        return value

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: SecretStr) -> SecretStr:
        if urlsplit(value.get_secret_value()).scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
            raise ValueError("must be a postgresql:// or postgresql+asyncpg:// URL")
        return value

    @field_validator("redis_url")
    @classmethod
    def _check_redis_url(cls, value: SecretStr) -> SecretStr:
        if urlsplit(value.get_secret_value()).scheme not in {"redis", "rediss"}:
            raise ValueError("must be a redis:// or rediss:// URL")
        return value

    @field_validator("secret_keys")
    @classmethod
    def _check_secret_keys(cls, value: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(len(key.get_secret_value()) < 32 for key in value):  # noqa: PLR2004
            raise ValueError("must have 32 characters or more; several are separated by spaces")
        return value

    def latency_objective_seconds(self, queue: str) -> float:
        """How long a due task of this queue may wait."""
        given = {name: float(seconds) for name, _, seconds in (one.rpartition("=") for one in self.latency_objectives)}
        return given.get(queue, given.get("", DEFAULT_OBJECTIVE_SECONDS))

    @property
    def postgres_dsn(self) -> str:
        """The database URL as asyncpg and libpq spell it."""
        return re.sub(r"^postgres(ql)?(\+asyncpg)?://", "postgresql://", self.database_url.get_secret_value())

    @property
    def sqlalchemy_url(self) -> str:
        """The database URL as SQLAlchemy spells it, with asyncpg as its driver."""
        return "postgresql+asyncpg://" + self.postgres_dsn.removeprefix("postgresql://")

    @property
    def cold_after_seconds(self) -> float:
        """Seconds from SIGTERM until a worker hands its running tasks back: 10 before the end, or half way."""
        return max(self.grace_seconds - 10.0, self.grace_seconds / 2.0)


def webhook_key(secret: str) -> bytes:
    """The key inside a secret that signs (Standard Webhooks, "Signature scheme").

    `whsec_…` holds 24 to 64 random bytes in base64. `whsk_…` holds an ed25519 key: its 32 bytes,
    or these and the 32 of its public key, as Svix writes them.

    Raises:
        ValueError: if it is anything else. The message does not repeat it.
    """
    prefix, _, text = secret.partition("_")
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if prefix == "whsec" and 24 <= len(raw) <= 64:  # noqa: PLR2004
        return raw
    if prefix == "whsk" and len(raw) in {32, 64} and _is_pair(raw):
        return raw
    raise ValueError(
        "must be whsec_ followed by the base64 of 24 to 64 random bytes, or whsk_ followed by that of an ed25519 key"
    )


def _is_pair(raw: bytes) -> bool:
    """Whether the public key behind the private one, if there is one, is its own."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415  # takes 50 ms

    return Ed25519PrivateKey.from_private_bytes(raw[:32]).public_key().public_bytes_raw().startswith(raw[32:])


def variables() -> Mapping[str, str]:
    """Which environment variable sets which field, in the order of the documentation."""
    return {_variable_of(name): name for name in Settings.model_fields}


def _variable_of(field: str) -> str:
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return str(alias.choices[0])
    return field


def load(env_file: str | Path | None = ENV_FILE) -> Settings:
    """Read the settings of this process.

    Raises:
        SettingsError: if one is missing or wrong; the message is one line that names the variable.
    """
    try:
        return Settings(_env_file=env_file)
    except ValidationError as invalid:
        raise errors.SettingsError(_one_line(invalid)) from None


def _one_line(invalid: ValidationError) -> str:
    first = invalid.errors(include_input=False, include_url=False)[0]
    place = str(first["loc"][0]) if first["loc"] else "settings"
    name = _variable_of(place) if place in Settings.model_fields else place
    if first["type"] == "missing":
        return f"{name} is not set"
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and " does not appear to be " in reason:
        reason = "must be address ranges such as 10.0.0.0/8"
    return f"{name} is wrong: {reason[:1].lower()}{reason[1:]}"

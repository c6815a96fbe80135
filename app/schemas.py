"""What travels over HTTP. Requests are strict: no field is unknown, no text is a number, no bool is one."""

import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, LiteralString
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from app.core import cron, limits
from app.core.statuses import (
    AttemptOutcome,
    CatchUp,
    HeldFor,
    JobKind,
    JobStatus,
    Overlap,
    Reason,
    TaskStatus,
    WebhookEvent,
)

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", flags=re.ASCII)


def _moment(value: object) -> datetime:
    if isinstance(value, str) and _RFC3339.fullmatch(value):
        try:
            # Moments that overflow in UTC are refused here, not by the database's driver.
            return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError):
            pass
    raise PydanticCustomError(
        "moment", "Input should be a date and time with a time zone (RFC 3339), such as 2030-01-31T12:00:00Z"
    )


def _within_a_year(value: object) -> datetime:
    moment = _moment(value)
    # A bound on what is stored, not a schedule: that goes by Postgres's clock.
    if not moment <= datetime.now(UTC) + timedelta(seconds=limits.AHEAD_SECONDS):
        raise PydanticCustomError("moment_far", "Input should be at most a year ahead")
    return moment


def _within_a_century(value: object) -> datetime:
    moment = _moment(value)
    if not abs(moment.year - datetime.now(UTC).year) <= limits.SCHEDULE_YEARS:
        raise PydanticCustomError("moment_far", "Input should be at most a hundred years away")
    return moment


_INSTANT = WithJsonSchema({"type": "string", "format": "date-time"})
Moment = Annotated[datetime, PlainValidator(_within_a_year), _INSTANT]
"""A date and time with a time zone, as UTC."""
AnyMoment = Annotated[datetime, PlainValidator(_moment), _INSTANT]
"""A `Moment` that is looked for, and not stored: it may be any time."""
FarMoment = Annotated[datetime, PlainValidator(_within_a_century), _INSTANT]
"""A `Moment` that may be further away."""

_TASK = "01a1fe4d-4e8a-73e7-9fae-b81ff55ba74f"
_WEBHOOK = "52381371-9375-479a-ba44-7207e645f7e5"


def _like(*examples: dict[str, Any]) -> ConfigDict:
    """What an answer looks like."""
    return ConfigDict(json_schema_extra={"examples": list(examples)})


Tag = Annotated[str, Field(min_length=1, max_length=limits.TAG_LENGTH)]


class SubmitRequest(BaseModel):
    """A task to run. Every field is optional: nothing at all runs `long_task()`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "examples": [
                {"webhook_url": "https://example.com/hooks/tasks"},
                {"task": "long_task", "kwargs": {"x": 2.5}, "max_retries": 5, "tags": ["nightly"]},
            ],
            "not": {
                "required": ["countdown", "eta"],
                "properties": {"countdown": {"type": "number"}, "eta": {"type": "string"}},
            },
        },
    )

    task: str = Field("long_task", min_length=1, max_length=255, description="Name of a registered task.")
    args: list[Any] = Field([], description="Positional arguments.")
    kwargs: dict[str, Any] = Field({}, description="Arguments by name.")
    queue: str | None = Field(
        None, min_length=1, max_length=64, description="Where it waits; the task's own queue unless given."
    )
    concurrency_key: str | None = Field(
        None,
        min_length=1,
        max_length=limits.CONCURRENCY_KEY_LENGTH,
        description="With which others of its queue it shares the limits for each key; with none unless given.",
    )
    countdown: float | None = Field(
        None, ge=0, le=limits.AHEAD_SECONDS, description="Seconds from now until it is due. Not with `eta`."
    )
    eta: Moment | None = Field(None, description="When it is due. Not with `countdown`.")
    expires: Annotated[float, Field(gt=0, le=limits.AHEAD_SECONDS)] | Moment | None = Field(
        None, description="Seconds from now, or the time, after which it is not worth starting."
    )
    max_retries: int | None = Field(
        None, ge=0, le=limits.MAX_RETRIES, description="Runs after a failed first one; the task's own unless given."
    )
    time_limit: float | None = Field(
        None,
        gt=0,
        le=limits.TIME_LIMIT_SECONDS,
        description="Seconds that one attempt may take; the task's own unless given.",
    )
    unique_for: float | None = Field(
        None,
        ge=1,
        le=limits.AHEAD_SECONDS,
        description="Seconds: an unfinished task with the same arguments, submitted so no longer ago, will do.",
    )
    tags: list[Tag] = Field([], max_length=limits.TAGS, description="Words to find it by.")
    webhook_url: str | None = Field(
        None, min_length=1, max_length=2048, description="Hears how the task ended, signed (Standard Webhooks)."
    )
    webhook_events: list[WebhookEvent] | None = Field(
        None,
        min_length=1,
        max_length=len(WebhookEvent),
        description="What it hears of instead; `task.started` and `task.retrying` are told only if named here.",
    )

    @field_validator("eta")
    @classmethod
    def _one_of_two(cls, value: datetime | None, info: ValidationInfo) -> datetime | None:
        if value is not None and info.data.get("countdown") is not None:
            raise PydanticCustomError("eta_and_countdown", "Only one of eta and countdown can be given")
        return value


def _lengths(name: str) -> tuple[int, int]:
    """The least and the most characters of a field."""
    bounds: dict[str, int] = {}
    for limit in SubmitRequest.model_fields[name].metadata:
        bounds |= asdict(limit)
    return bounds["min_length"], bounds["max_length"]


_PLAIN_TEXTS = {name: _lengths(name) for name in ("task", "queue", "webhook_url")}
_PLAIN_CONTAINERS: dict[str, type[object]] = {"args": list, "kwargs": dict}
_NOT_GIVEN = vars(SubmitRequest())


def plain_submit(value: dict[str, Any]) -> SubmitRequest | None:
    """What a JSON object submits, where a look at it is enough; None where the schema has to be asked.

    Most submits say what is to run, and who hears of it, and no more. The schema takes several times as long to find
    out that all else is not given, and says the same.
    """
    for name, one in value.items():
        lengths = _PLAIN_TEXTS.get(name)
        if lengths is None:
            if type(one) is not _PLAIN_CONTAINERS.get(name):
                return None
        elif type(one) is not str or not lengths[0] <= len(one) <= lengths[1]:
            return None
    made = SubmitRequest.__new__(SubmitRequest)
    # As pydantic makes one. What may be changed is nobody else's.
    object.__setattr__(made, "__dict__", {**_NOT_GIVEN, "args": [], "kwargs": {}, "tags": [], **value})
    object.__setattr__(made, "__pydantic_fields_set__", set(value))
    object.__setattr__(made, "__pydantic_extra__", None)
    object.__setattr__(made, "__pydantic_private__", None)
    return made


class TaskCreated(BaseModel):
    """The task is stored, and will run."""

    model_config = _like({"task_id": _TASK})

    task_id: UUID


class BatchRequest(BaseModel):
    """Tasks to run, all or none."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"examples": [{"tasks": [{"kwargs": {"x": 1.0}}, {"kwargs": {"x": 2.0}, "countdown": 60}]}]},
    )

    tasks: list[SubmitRequest] = Field(min_length=1, max_length=limits.BATCH)


class BatchCreated(BaseModel):
    """The tasks are stored, and will run."""

    model_config = _like({"task_ids": [_TASK, "01a1fe4d-4e97-7b24-8b08-581d9b235342"]})

    task_ids: list[UUID] = Field(description="In the order of the tasks.")


class RetryRead(BaseModel):
    """When a task runs again by itself."""

    exceptions: list[str] = Field(description="Those after which it does. All others end it.")
    backoff_seconds: float | None = Field(
        description="The wait before the first retry, doubled before each next one; null: each waits 180 seconds."
    )
    backoff_most_seconds: float = Field(description="The longest such wait.")
    jitter: bool = Field(description="Whether each wait is drawn from zero to its value.")


_LONG_TASK: dict[str, Any] = {
    "name": "long_task",
    "description": "Work for `x` seconds, reporting progress, and return a sentence.",
    "parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False},
    "queue": "default",
    "max_retries": 3,
    "retry": {"exceptions": ["OSError"], "backoff_seconds": 1.0, "backoff_most_seconds": 600.0, "jitter": True},
    "time_limit": None,
    "soft_time_limit": None,
}


class CatalogEntry(BaseModel):
    """A task that may be submitted."""

    model_config = _like(_LONG_TASK)

    name: str
    description: str
    parameters: dict[str, Any] = Field(description="JSON Schema (2020-12) of its arguments, as an object by name.")
    queue: str = Field(description="Where it waits unless a submit says otherwise.")
    max_retries: int
    retry: RetryRead
    time_limit: float | None = Field(description="Seconds that one attempt may take.")
    soft_time_limit: float | None = Field(description="Seconds after which it is told to come to an end.")


class CatalogPage(BaseModel):
    """Every task that may be submitted, by name."""

    model_config = _like({"data": [_LONG_TASK], "next_cursor": None})

    data: list[CatalogEntry]
    next_cursor: None = Field(description="There is no further page.")


class StatusRead(BaseModel):
    """Where a task is in its life."""

    model_config = _like({"status": "STARTED"})

    status: TaskStatus


class ErrorRead(BaseModel):
    """Why a task did not end well, or why its newest attempt did not."""

    type: str = Field(description="The exception's class name, or a word of this service such as `Cancelled`.")
    message: str


class ResultRead(BaseModel):
    """How a task ended. `error` is there only if it did not end well; then `result` is null."""

    model_config = _like(
        {"result": "Worked for 5 seconds"}, {"result": None, "error": {"type": "OSError", "message": "no such page"}}
    )

    result: Any
    error: ErrorRead | None = None


class NotReady(BaseModel):
    """The task has not ended yet."""

    model_config = _like({"detail": "Result not available yet"})

    detail: str = "Result not available yet"


class ProgressRead(BaseModel):
    """How far the running task says it is."""

    fraction: float = Field(ge=0, le=1)
    message: str | None


def shown_url(url: str) -> str:
    """A webhook's URL as it is shown: what follows the path often holds a token, and is left out."""
    path, asked, _ = url.partition("?")
    return f"{path}?…" if asked else path


class WebhookRead(BaseModel):
    """What became of the task's webhook."""

    url: str = Field(description="Without its query, which may hold a token.")
    status: str | None = Field(
        description="`pending`, `delivering`, `delivered` or `exhausted`; null until there is an event to tell."
    )
    attempt: int = Field(description="Requests made so far.")
    next_at: datetime | None = Field(description="When the next one is due, if one is.")


class WebhookState(BaseModel):
    """How far the newest webhook of a task has come. Until there is an event to tell, most of it is null."""

    model_config = _like(
        {
            "task_id": _TASK,
            "url": "https://example.com/hooks/tasks",
            "webhook_id": _WEBHOOK,
            "event": "task.succeeded",
            "sequence": 1,
            "status": "delivered",
            "attempt": 1,
            "next_at": None,
            "delivered_at": "2030-01-31T12:00:06Z",
            "last_status_code": 204,
            "last_error": None,
        }
    )

    task_id: UUID
    url: str = Field(description="Without its query, which may hold a token.")
    webhook_id: UUID | None = Field(None, description="The `webhook-id` of every attempt.")
    event: str | None = Field(None, description="Such as `task.succeeded`.")
    sequence: int | None = Field(None, description="Its place among the events of the task.")
    status: str | None = Field(None, description="`pending`, `delivering`, `delivered` or `exhausted`.")
    attempt: int = Field(0, description="Requests made so far, one under way included.")
    next_at: datetime | None = Field(None, description="When the next one is due, if one is.")
    delivered_at: datetime | None = None
    last_status_code: int | None = Field(None, description="What the receiver answered last, if it answered.")
    last_error: str | None = Field(
        None, description="Why the newest attempt failed; null if it did not. `circuit_open`: given up without one."
    )


class AttemptRead(BaseModel):
    """One POST to the receiver, and what came of it."""

    webhook_id: UUID
    event: str
    sequence: int
    number: int = Field(description="Which attempt of its webhook; a gap is one whose sender died in the middle.")
    started_at: datetime
    duration_seconds: float
    status_code: int | None = Field(description="What was answered, if anything was.")
    error: str | None = Field(description="Why it failed, such as `timeout` or `http_5xx`; null if it did not.")
    excerpt: str = Field(description="The first 4 KiB of an answer other than 2xx.")


class AttemptPage(BaseModel):
    """Some of the attempts, and where the next begin."""

    model_config = _like(
        {
            "data": [
                {
                    "webhook_id": _WEBHOOK,
                    "event": "task.succeeded",
                    "sequence": 1,
                    "number": 1,
                    "started_at": "2030-01-31T12:00:05.250Z",
                    "duration_seconds": 0.125,
                    "status_code": 503,
                    "error": "http_5xx",
                    "excerpt": "down",
                }
            ],
            "next_cursor": None,
        }
    )

    data: list[AttemptRead]
    next_cursor: str | None


class EventRead(BaseModel):
    """Something that happened to a task."""

    webhook_id: UUID = Field(description="The `webhook-id` of its webhook: the same event, heard and read, has one id.")
    body: dict[str, Any] = Field(description="The very JSON that its webhook carries.")


class EventPage(BaseModel):
    """Some events, in line."""

    model_config = _like(
        {
            "data": [
                {
                    "webhook_id": _WEBHOOK,
                    "body": {
                        "type": "task.succeeded",
                        "timestamp": "2030-01-31T12:00:05.000Z",
                        "data": {
                            "task_id": _TASK,
                            "task": "long_task",
                            "status": "SUCCESS",
                            "attempt": 1,
                            "sequence": 1,
                        },
                    },
                }
            ],
            "next_cursor": "17",
        }
    )

    data: list[EventRead]
    next_cursor: str = Field(description="Ask on `after` this one, now or later; without new events it stays.")


class RedeliverRequest(BaseModel):
    """Which webhooks to send again."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"examples": [{"since": "2030-01-31T12:00:00Z", "until": "2030-02-07T12:00:00Z"}]},
    )

    since: Moment = Field(description="Events of this time and later.")
    until: Moment | None = Field(None, description="And before this time.")
    state: Literal["undelivered", "exhausted", "delivered"] = Field(
        "undelivered",
        description="`exhausted`, `delivered`, or `undelivered`: exhausted, and those that wait for another attempt.",
    )
    cursor: str | None = Field(
        None, pattern=r"^[0-9]{1,16}\.[0-9a-f]{32}$", description="The `next_cursor` of the answer before."
    )


class Redelivered(BaseModel):
    """How many webhooks are due again, and where to go on."""

    model_config = _like({"redelivered": 12, "next_cursor": None})

    redelivered: int
    next_cursor: str | None = Field(description="Ask again with it; null if all were looked at.")


_BOTH_KIND_AND_SECRET: dict[str, Any] = {
    "required": ["kind", "secret"],
    "properties": {"kind": {"type": "string"}, "secret": {"type": "string"}},
}


class SecretRequest(BaseModel):
    """A secret to sign webhooks with. Nothing at all makes a new `whsec_…`."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"examples": [{}, {"kind": "ed25519"}], "not": _BOTH_KIND_AND_SECRET},
    )

    kind: Literal["hmac", "ed25519"] | None = Field(
        None, description="`hmac` (unless given) makes a `whsec_…`, `ed25519` a pair. Not with `secret`."
    )
    secret: str | None = Field(
        None, min_length=1, max_length=128, description="One of yours, `whsec_…` or `whsk_…`; made up unless given."
    )

    @field_validator("secret")
    @classmethod
    def _one_of_two(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("kind") is not None:
            raise PydanticCustomError("secret_and_kind", "Only one of secret and kind can be given")
        return value


class RotateRequest(SecretRequest):
    """A secret that takes over."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"grace_seconds": 604_800}], "not": _BOTH_KIND_AND_SECRET}
    )

    grace_seconds: int = Field(
        limits.DAY_SECONDS,
        ge=0,
        le=7 * limits.DAY_SECONDS,
        description="For how long what signed before goes on beside it; 0 ends it at once.",
    )


class SecretRead(BaseModel):
    """What may be known of a secret that signs webhooks: not the secret."""

    id: UUID
    kind: Literal["hmac", "ed25519"]
    fingerprint: str = Field(
        description='The first 12 digits of `printf %s "$SECRET" | sha256sum`, to tell which one it is.'
    )
    public_key: str | None = Field(description="`whpk_…`, which receivers verify with, if it is of the kind `ed25519`.")
    created_at: datetime
    expires_at: datetime | None = Field(description="When it signs no more; null until another takes over.")
    default_signs_until: datetime | None = Field(
        description="Until when the service's own secret signs beside it, if it took over from that one."
    )


class SecretMade(SecretRead):
    """A secret that signs from now on. This is the only answer that has it."""

    secret: str | None = Field(description="Null if it is one that you brought.")


class SecretList(BaseModel):
    """The secrets that sign your webhooks, the newest first. Without any, the service's own signs them."""

    data: list[SecretRead]
    next_cursor: None = Field(None, description="There are so few that they are never cut into pages.")


class TestRequest(BaseModel):
    """Where to send a test event."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={"examples": [{"url": "https://example.com/hooks/tasks"}]},
    )

    url: str = Field(min_length=1, max_length=2048, description="As a `webhook_url`.")
    event: Literal["webhook.test", "task.succeeded", "task.failed", "task.revoked", "task.started", "task.retrying"] = (
        Field("webhook.test", description="What it looks like; `data.test` is true in any case.")
    )


class TestSent(BaseModel):
    """The request of a test event."""

    headers: dict[str, str]
    body: str


class TestRead(BaseModel):
    """What came of a test event."""

    webhook_id: UUID
    outcome: str = Field(description="`success`, or why it is none.")
    status_code: int | None = Field(description="What was answered, if anything was.")
    retry_after_seconds: float | None = Field(description="The rest that the receiver asked for.")
    duration_seconds: float = Field(description="From the look-up of the name to the end of the answer.")
    excerpt: str = Field(description="The first 4 KiB of an answer other than 2xx.")
    advice: str = Field(description="What to do about it.")
    request: TestSent | None = Field(description="What was sent, or was about to be; null if there was no request.")


class TaskRead(BaseModel):
    """Everything known about a task but its arguments and its result."""

    model_config = _like(
        {
            "task_id": _TASK,
            "status": "STARTED",
            "held": None,
            "task": "long_task",
            "queue": "default",
            "concurrency_key": None,
            "attempt": 1,
            "failures": 0,
            "max_retries": 3,
            "time_limit": None,
            "tags": ["nightly"],
            "cancel_requested": False,
            "rerun_of": None,
            "schedule": None,
            "scheduled_for": None,
            "trace_id": "0a449c07b8228a0897b67dce14f077c0",
            "created_at": "2030-01-31T12:00:00Z",
            "run_at": "2030-01-31T12:00:00Z",
            "started_at": "2030-01-31T12:00:00.125Z",
            "finished_at": None,
            "expires_at": None,
            "progress": {"fraction": 0.4, "message": "2 of 5 seconds"},
            "error": None,
            "webhook": None,
        }
    )

    task_id: UUID
    status: TaskStatus
    task: str
    queue: str
    concurrency_key: str | None
    held: HeldFor | None = Field(description="What it waits for besides a worker: its queue is paused, or limited.")
    attempt: int = Field(description="Times it was started.")
    failures: int = Field(description="Runs that failed; they spend `max_retries`.")
    max_retries: int
    time_limit: float | None
    tags: list[str]
    cancel_requested: bool
    rerun_of: UUID | None
    schedule: str | None = Field(description="The schedule that submitted it.")
    scheduled_for: datetime | None = Field(description="For which of its times.")
    trace_id: str | None = Field(
        description="Its trace (W3C Trace Context), recorded or not: what names it in logs and to receivers."
    )
    created_at: datetime
    run_at: datetime = Field(description="When it was or is due.")
    started_at: datetime | None = Field(description="When its newest attempt began.")
    finished_at: datetime | None
    expires_at: datetime | None
    progress: ProgressRead | None
    error: ErrorRead | None
    webhook: WebhookRead | None


class ScheduleRequest(BaseModel):
    """When a task is to be submitted by itself: at the times of `cron`, or each so many seconds (`every`)."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "examples": [
                {"cron": "30 2 * * mon-fri", "time_zone": "Europe/Berlin", "submit": {"task": "long_task"}},
                {"every": 60, "overlap": "skip", "submit": {"task": "long_task", "kwargs": {"x": 2.5}}},
            ]
        },
    )

    cron: str | None = Field(
        None, max_length=cron.TEXT_LIMIT, description="Five fields as in crontab(5), or `@daily` and its like."
    )
    every: float | None = Field(
        None, ge=1, le=limits.YEAR_SECONDS, description="Seconds from each time to the next. Not with `cron`."
    )
    time_zone: str = Field("UTC", max_length=64, description="IANA name of the zone whose clocks `cron` means.")
    jitter: float = Field(
        0.0, ge=0, le=limits.DAY_SECONDS, description="Seconds by which each time is put off at most, drawn anew."
    )
    start: FarMoment | None = Field(None, description="No time is before it; the first one of an interval.")
    end: FarMoment | None = Field(None, description="No time is after it.")
    catch_up: CatchUp = Field(
        CatchUp.ONE,
        description="What is fired of times that were missed by more than a minute: `none`, the newest `one` unless a"
        " later time is fired anyway, or `all`, the newest hundred at most.",
    )
    overlap: Overlap = Field(
        Overlap.ALLOW, description="`skip` fires nothing while the last task of the schedule has not ended."
    )
    paused: bool = Field(False, description="Nothing is fired; times that come meanwhile are not caught up with.")
    submit: SubmitRequest = Field(
        description="What is submitted each time, as the body of a submit. It is due at once, so it has neither"
        " `countdown` nor `eta`, and `expires` is in seconds; nor `unique_for`, since there is `overlap`."
    )

    @field_validator("cron")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        return None if value is None else _sound("cron", value, cron.Cron.parse)

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str) -> str:
        return _sound("time_zone", value, cron.zone)

    @field_validator("every")
    @classmethod
    def _one_of_two(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("cron") is not None:
            raise PydanticCustomError("cron_and_every", "Only one of cron and every can be given")
        return value

    @field_validator("end")
    @classmethod
    def _after_start(cls, value: datetime | None, info: ValidationInfo) -> datetime | None:
        start = info.data.get("start")
        if value is not None and start is not None and value < start:
            raise PydanticCustomError("end_before_start", "Input should not be before start")
        return value

    @field_validator("submit")
    @classmethod
    def _relative(cls, value: SubmitRequest) -> SubmitRequest:
        if value.countdown is not None or value.eta is not None or isinstance(value.expires, datetime):
            raise PydanticCustomError("submit_times", "Can't have countdown, eta, or expires as a time")
        if value.unique_for is not None:
            raise PydanticCustomError("submit_unique", "Can't have unique_for: overlap says what it would")
        return value


def _sound(kind: LiteralString, value: str, read: Callable[[str], object]) -> str:
    try:
        read(value)
    except ValueError as wrong:
        raise PydanticCustomError(kind, "{sentence}", {"sentence": str(wrong)}) from None
    return value


class ScheduleRow(BaseModel):
    """A schedule, and how far it has come."""

    name: str
    task: str
    cron: str | None
    every: float | None
    time_zone: str
    jitter: float
    start: datetime | None
    end: datetime | None
    catch_up: CatchUp
    overlap: Overlap
    paused: bool
    next_run: datetime | None = Field(description="Null if it is paused, or no time is left.")
    last_run: datetime | None = Field(description="The newest time for which a task was submitted.")
    last_task_id: UUID | None
    fired: int = Field(description="Tasks that it has submitted.")
    skipped: int = Field(description="Times at which its last task had not ended.")
    last_error: str | None = Field(description="Why it can't be fired; it is tried again. Null since it was.")
    failing_since: datetime | None
    created_at: datetime
    updated_at: datetime


class ScheduleRead(ScheduleRow):
    """A schedule, what it submits, and when next."""

    next_runs: list[datetime] = Field(description="The next times, five at most.")
    submit: dict[str, Any] = Field(description="As it was given, but for the query of a webhook's URL.")


class SchedulePage(BaseModel):
    """Some schedules, by name."""

    data: list[ScheduleRow]
    next_cursor: str | None


def _storable(text: str) -> str:
    if "\x00" in text:
        raise PydanticCustomError("nul", "Input must not hold NUL")
    return text


Word = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_storable)]
"""A name to look for."""


class TaskFilter(BaseModel):
    """Which tasks are meant: all that is given must hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Annotated[list[TaskStatus], Field(max_length=len(TaskStatus))] = Field(
        [], description="One of these; repeat it to name several."
    )
    task: Word | None = Field(None, description="Name of the task.")
    queue: Word | None = Field(None, description="Where it waits, or waited.")
    tag: Word | None = Field(None, description="One of its tags.")
    error_type: Word | None = Field(None, description="Type of the error that it shows.")
    created_after: AnyMoment | None = Field(None, description="Submitted at this time or later.")
    created_before: AnyMoment | None = Field(None, description="Submitted before this time.")
    finished_after: AnyMoment | None = Field(None, description="Ended at this time or later.")
    finished_before: AnyMoment | None = Field(None, description="Ended before this time.")


class BulkFilter(TaskFilter):
    """Which tasks something is done to: one part of the filter at least."""

    model_config = ConfigDict(
        json_schema_extra={
            "minProperties": 1,
            "examples": [{"tag": "nightly", "created_before": "2030-01-31T12:00:00Z"}, {"error_type": "TimeoutError"}],
        }
    )

    status: Annotated[list[TaskStatus], Field(min_length=1, max_length=len(TaskStatus))] = Field(
        [], description="One of these; all to which it can be done, or for a rerun those that failed, unless given."
    )


class JobCreated(BaseModel):
    """It goes on in the background."""

    job_id: UUID


class JobRead(BaseModel):
    """How far a job has come."""

    job_id: UUID
    kind: JobKind
    status: JobStatus
    done: int = Field(description="Tasks that it was done to so far.")
    passed_over: int = Field(description="Tasks that had moved on before it could be done to them.")
    created_at: datetime
    finished_at: datetime | None


class TaskQuery(TaskFilter):
    """A page of tasks."""

    cursor: str | None = Field(
        None, pattern=r"^[cf][0-9]{1,17}\.[0-9a-f]{32}$", description="The `next_cursor` of the page before."
    )
    limit: int = Field(50, ge=1, le=100, description="Tasks of a page at most.")


class FactsRead(BaseModel):
    """What an explanation rests on. Times are in seconds; null is what does not matter now, or is not known."""

    due_in: float | None = Field(description="Until it is due.")
    expires_in: float | None = Field(description="Until it is not worth starting any more.")
    ahead: int | None = Field(description="Tasks of its queue that come before it; 10,001 stands for more than 10,000.")
    queue_depth: int | None = Field(description="Messages of its queue in Redis.")
    consumers: int | None = Field(description="Workers that consume its queue, and were seen in the last 30 s.")
    running_for: float | None
    lease_left: float | None = Field(description="Until its lease ends; negative if it has ended.")
    worker: str | None
    progress: ProgressRead | None
    ended_ago: float | None


class ExplanationRead(BaseModel):
    """Why a task is where it is."""

    status: TaskStatus
    reason: Reason = Field(description="For programs.")
    explanation: str = Field(description="For people.")
    facts: FactsRead


class LogLine(BaseModel):
    """A line that the code of a task has logged."""

    at: datetime
    level: str
    logger: str
    message: str = Field(description="Cut to 2,000 characters.")


class TraceRead(ErrorRead):
    """Why an attempt did not succeed."""

    traceback: str | None = Field(description="Null where no code of the task's raised.")


class RunRead(BaseModel):
    """One attempt of a task."""

    number: int = Field(description="1 for the first.")
    started_at: datetime | None
    ended_at: datetime | None = Field(description="Null while it runs.")
    worker: str | None = Field(description="Host and process that ran it.")
    outcome: AttemptOutcome | None = Field(description="Null while it runs.")
    error: TraceRead | None
    log: list[LogLine] = Field(description="The last lines that its code logged, 50 at most.")
    log_dropped: int = Field(description="How many lines came before those.")


class RunPage(BaseModel):
    """Some attempts of a task, the first one first."""

    data: list[RunRead]
    next_cursor: str | None


class TaskSummary(BaseModel):
    """A task in a list."""

    task_id: UUID
    status: TaskStatus
    task: str
    queue: str
    attempt: int = Field(description="Times it was started.")
    failures: int
    max_retries: int
    tags: list[str]
    cancel_requested: bool
    rerun_of: UUID | None
    created_at: datetime
    run_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    error: ErrorRead | None = Field(description="Its message is cut to 500 characters.")


class TaskPage(BaseModel):
    """Some tasks, newest first."""

    data: list[TaskSummary]
    next_cursor: str | None = Field(
        description="Where to go on. It may be there though `data` is short, or empty: a page looks at 1,000 tasks."
    )


class CountRead(BaseModel):
    """How many tasks have a status."""

    count: int
    at_least: bool = Field(description="There are more: no more than 10,000 are counted.")


class CountsRead(BaseModel):
    """How many tasks have each status."""

    data: dict[TaskStatus, CountRead]


class RateLimit(BaseModel):
    """So many starts in so many seconds, at even distances."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    count: int = Field(ge=1, le=limits.RATE_COUNT)
    seconds: float = Field(1.0, ge=1, le=limits.RATE_SECONDS)


class LimitsRequest(BaseModel):
    """What is limited of a queue. What is null or left out is not."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "examples": [
                {"concurrency_limit": 3},
                {"rate_limit": {"count": 100, "seconds": 60}, "key_concurrency_limit": 1},
            ]
        },
    )

    concurrency_limit: int | None = Field(
        None, ge=1, le=limits.CONCURRENCY, description="How many of its tasks may run at once."
    )
    rate_limit: RateLimit | None = Field(None, description="How many of its tasks may start.")
    key_concurrency_limit: int | None = Field(
        None, ge=1, le=limits.CONCURRENCY, description="How many with the same `concurrency_key` may run at once."
    )
    key_rate_limit: RateLimit | None = Field(None, description="How many with the same `concurrency_key` may start.")


class QueueRead(BaseModel):
    """A queue, as it is now."""

    name: str
    paused: bool
    concurrency_limit: int | None
    rate_limit: RateLimit | None
    key_concurrency_limit: int | None
    key_rate_limit: RateLimit | None
    depth: int | None = Field(description="Messages that wait in Redis; null while Redis can't be asked.")
    waiting: int = Field(description="Tasks that wait to be due, or for a worker. A count stops at a million.")
    held: int = Field(description="Tasks that are due and wait for the queue to be resumed, or for one of its limits.")
    running: int
    oldest_seconds: float | None = Field(
        description="Since when the oldest of those that are due has been; null if none is. "
        "What is held for its `concurrency_key` is not looked at."
    )
    ended_per_second: float = Field(description="Over the last minute, or as far back as the newest 5,000 ends go.")


class QueuePage(BaseModel):
    """The queues."""

    data: list[QueueRead]
    next_cursor: None = Field(None, description="There is one page.")


class Alive(BaseModel):
    """The process answers."""

    model_config = _like({"status": "ok"})

    status: str = "ok"


class Ready(BaseModel):
    """Whether the process can accept tasks, and what of its surroundings answers."""

    model_config = _like({"status": "ready", "checks": {"postgres": "ok", "migrations": "ok", "redis": "ok"}})

    status: str
    checks: dict[str, str]


class FieldProblem(BaseModel):
    """One field at fault."""

    pointer: str = Field(description="JSON Pointer (RFC 6901) into the request.")
    detail: str


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    model_config = _like(
        {
            "type": "/problems/validation-failed",
            "title": "Validation failed",
            "status": 422,
            "detail": "The request is not valid: see /kwargs/x",
            "errors": [{"pointer": "/kwargs/x", "detail": "Input should be a valid number"}],
        }
    )

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldProblem] | None = None

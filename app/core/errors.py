"""Every error that this service raises on purpose.

    TaskQueueError
    ├── SettingsError             a setting is missing or wrong; the process stops
    ├── DatabaseUnavailable       Postgres can't be reached, or can't serve now
    ├── StatementRefused          Postgres can't store what it was given
    ├── BrokerUnavailable         Redis can't be reached, or refuses to write
    ├── EnvelopeError             a message that is not one of ours
    ├── TaskDeclarationError      a task that can't be registered as it is written
    └── RequestError              the caller's fault, rendered as a problem (RFC 9457)
        ├── MalformedBody         400
        ├── MalformedHeader       400
        ├── Unauthenticated       401
        ├── Forbidden             403
        ├── TaskNotFound          404
        ├── QueueNotFound         404
        ├── NoWebhook             404
        ├── SecretNotFound        404
        ├── TaskNotRegistered     404
        ├── JobNotFound           404
        ├── ScheduleNotFound      404
        ├── ScheduleConflict      409
        ├── TaskEnded             409
        ├── TaskUnfinished        409
        ├── WebhookNotDue         409
        ├── SecretNotStored       409
        ├── ResultExpired         410
        ├── PayloadTooLarge       413
        ├── UnsupportedMediaType  415
        ├── ValidationFailed      422
        ├── IdempotencyKeyReused  422
        ├── QuotaExceeded         429, with Retry-After
        ├── TooManyAtOnce         429, with Retry-After
        └── ServiceUnavailable    503, with Retry-After

The message of each is a sentence for the person who reads it. It names fields
and settings, never values: a value may be a secret.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

FIELD_NAME_LIMIT = 64
"""Characters of a caller's field name that an error repeats."""


class TaskQueueError(Exception):
    """Anything that this service raises on purpose."""


class SettingsError(TaskQueueError):
    """A setting is missing or wrong. The message is one line that names the variable."""


class DatabaseUnavailable(TaskQueueError):
    """Postgres can't be reached, can't serve now, or did not answer in time."""


class Locked(DatabaseUnavailable):
    """A statement has waited for a lock for as long as it may. Others can be served."""


class StatementRefused(TaskQueueError):
    """Postgres refused a statement for what it says: a constraint, or data that it can't hold.

    `constraint` is the name of the constraint that was broken, if one was. `of_data`: other data would have been
    taken; otherwise it is the statement itself that Postgres does not take now, for want of a right, perhaps.
    """

    def __init__(self, detail: str, *, constraint: str | None = None, of_data: bool = True) -> None:
        super().__init__(detail)
        self.constraint = constraint
        self.of_data = of_data


class BrokerUnavailable(TaskQueueError):
    """Redis can't be reached, did not answer in time, or refuses to write."""


class EnvelopeError(TaskQueueError):
    """A message on a queue is not one that this service wrote, or is of a later release."""


class TaskDeclarationError(TaskQueueError):
    """A task function can't be registered: an untyped parameter, a name twice, an option unknown."""


@dataclass(frozen=True, slots=True)
class FieldError:
    """One field at fault.

    Attributes:
        pointer: JSON Pointer (RFC 6901) into the request body, such as `/kwargs/x`.
        detail: what is wrong with it, without repeating its value.
    """

    pointer: str
    detail: str


def pointer(*parts: str | int) -> str:
    """The JSON Pointer of a field (RFC 6901), each part cut to `FIELD_NAME_LIMIT` characters."""
    escaped = (str(part)[:FIELD_NAME_LIMIT].replace("~", "~0").replace("/", "~1") for part in parts)
    return "".join("/" + part for part in escaped)


class RequestError(TaskQueueError):
    """The caller's fault. `status`, `slug` and `title` are stable; `detail` is for people."""

    status: ClassVar[int] = 400
    slug: ClassVar[str] = "bad-request"
    title: ClassVar[str] = "Bad request"

    def __init__(
        self,
        detail: str,
        *,
        errors: Sequence[FieldError] = (),
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = tuple(errors)
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})


class MalformedBody(RequestError):
    """The body is not the JSON that this service reads."""

    slug, title = "malformed-body", "Malformed body"


class MalformedHeader(RequestError):
    """A header is not what this service reads; `errors` names it."""

    slug, title = "malformed-header", "Malformed header"

    def __init__(self, name: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}", errors=[FieldError(pointer(name), detail)])


class Unauthenticated(RequestError):
    """No key was shown, or one that opens nothing: unknown, expired or revoked, which is not told."""

    status, slug, title = 401, "unauthenticated", "Unauthenticated"

    def __init__(self, *, shown: bool) -> None:
        # RFC 6750, section 3: who showed no key hears only how to.
        challenge = 'Bearer realm="taskqueue"' + (', error="invalid_token"' if shown else "")
        detail = "The API key is not valid" if shown else "Show an API key: Authorization: Bearer tq_live_..."
        super().__init__(detail, headers={"WWW-Authenticate": challenge})


class Forbidden(RequestError):
    """The key is good, and has not the scope that the route needs."""

    status, slug, title = 403, "forbidden", "Forbidden"

    def __init__(self, scope: str) -> None:
        challenge = f'Bearer realm="taskqueue", error="insufficient_scope", scope="{scope}"'
        super().__init__(f"The API key has not the scope {scope}", headers={"WWW-Authenticate": challenge})


class TaskNotFound(RequestError):
    """No task has this id."""

    status, slug, title = 404, "task-not-found", "Task not found"

    def __init__(self) -> None:
        super().__init__("No task has this id")


class QueueNotFound(RequestError):
    """No queue has this name."""

    status, slug, title = 404, "queue-not-found", "Queue not found"

    def __init__(self) -> None:
        super().__init__("No queue has this name")


class NoWebhook(RequestError):
    """The task is there, and nobody is to hear of it."""

    status, slug, title = 404, "no-webhook", "No webhook"

    def __init__(self) -> None:
        super().__init__("The task was submitted without a webhook_url")


class JobNotFound(RequestError):
    """No job has this id."""

    status, slug, title = 404, "job-not-found", "Job not found"

    def __init__(self) -> None:
        super().__init__("No job has this id")


class SecretNotFound(RequestError):
    """The caller has no webhook secret with this id, or it has expired."""

    status, slug, title = 404, "secret-not-found", "Secret not found"

    def __init__(self) -> None:
        super().__init__("No secret of yours has this id")


class TaskNotRegistered(RequestError):
    """The catalogue has no task of this name."""

    status, slug, title = 404, "task-not-registered", "Task not registered"

    def __init__(self) -> None:
        super().__init__("No task of this name is registered")


class ScheduleNotFound(RequestError):
    """No schedule has this name."""

    status, slug, title = 404, "schedule-not-found", "Schedule not found"

    def __init__(self) -> None:
        super().__init__("No schedule has this name")


class ScheduleConflict(RequestError):
    """The schedule can't be written: there are too many, or somebody else writes it all the time."""

    status, slug, title = 409, "schedule-conflict", "Schedule conflict"


class TaskEnded(RequestError):
    """The task has ended, so nothing can be done about it any more."""

    status, slug, title = 409, "task-ended", "Task ended"

    def __init__(self) -> None:
        super().__init__("The task has ended")


class TaskUnfinished(RequestError):
    """The task has not ended, so it can't be run again."""

    status, slug, title = 409, "task-unfinished", "Task unfinished"

    def __init__(self) -> None:
        super().__init__("The task has not ended; cancel it, or wait")


class WebhookNotDue(RequestError):
    """The webhook can't be sent again now: it is being sent, or there is no event to tell yet."""

    status, slug, title = 409, "webhook-not-due", "Webhook not due"


class SecretNotStored(RequestError):
    """A webhook secret can't be stored: there is no key to seal it with, too many are live, or it is one of them."""

    status, slug, title = 409, "secret-not-stored", "Secret not stored"


class ResultExpired(RequestError):
    """The task ended so long ago that it was removed."""

    status, slug, title = 410, "result-expired", "Result expired"

    def __init__(self) -> None:
        super().__init__("The task ended so long ago that it was removed")


class PayloadTooLarge(RequestError):
    """The body is larger than this service reads."""

    status, slug, title = 413, "payload-too-large", "Payload too large"


class UnsupportedMediaType(RequestError):
    """The body says that it is something else than JSON."""

    status, slug, title = 415, "unsupported-media-type", "Unsupported media type"


class ValidationFailed(RequestError):
    """Fields are missing, unknown or wrong; `errors` names each."""

    status, slug, title = 422, "validation-failed", "Validation failed"

    def __init__(self, errors: Sequence[FieldError]) -> None:
        named = ", ".join(error.pointer or "the body" for error in errors[:5])
        super().__init__(f"The request is not valid: see {named}", errors=errors)


class TooManyAtOnce(RequestError):
    """As many requests of this kind as one caller may have are under way."""

    status, slug, title = 429, "too-many-at-once", "Too many at once"


class IdempotencyKeyReused(RequestError):
    """The key came before, with another request."""

    status, slug, title = 422, "idempotency-key-reused", "Idempotency key reused"

    def __init__(self) -> None:
        super().__init__("The Idempotency-Key was used before, with another request; use a new one")


class QuotaExceeded(RequestError):
    """Too many requests; the budget fills evenly."""

    status, slug, title = 429, "quota-exceeded", "Quota exceeded"


class ServiceUnavailable(RequestError):
    """Try again later: the database is away, or the backlog is full."""

    status, slug, title = 503, "service-unavailable", "Service unavailable"

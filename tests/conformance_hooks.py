"""What a right request needs beyond its schema, for schemathesis: queues that are there, URLs that lead somewhere.

Only requests that are meant to be right are touched, so every one of them must
be accepted; what is meant to be wrong stays as wrong as it was made up.
"""

import itertools
from typing import Any

import schemathesis

_numbers = itertools.count()
_WEBHOOK_URL = "https://example.com/hook"
_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
_MOMENT = "2026-01-31T12:00:00Z"


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    """Make a request that is meant to be right right in what its schema can't say."""
    del kwargs
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if case.path == "/api/catalog/{name}" and case.method == "POST":
        # What the arguments of this one are nobody can know; each task's own path says so.
        case.path_parameters, case.body = {"name": "sample.echo"}, {"value": 1}
    headers = case.headers if case.headers is not None else {}
    if "Idempotency-Key" in headers:
        headers["Idempotency-Key"] = f"{next(_numbers)}-{case.id}"
    if "Webhook-URL" in headers:
        headers["Webhook-URL"] = _WEBHOOK_URL
    if case.path.startswith("/api/catalog/") and case.query:
        _fit(case.query, has_webhook="Webhook-URL" in headers)
    if case.path == "/api/tasks" and case.query:
        # Only an answer can say what it is, and only with the same filter.
        case.query.pop("cursor", None)
    if isinstance(case.body, dict):
        _fit_body(case.path, case.body)
        case.body = _whole(case.body)


def _fit_body(path: str, body: dict[str, Any]) -> None:
    for one in _submits(path, body):
        _fit(one, has_webhook=one.get("webhook_url") is not None)
        _fit_call(one)
    if path == "/api/webhooks/redeliver":
        _fit_moments(body, "since", "until")
    if path in {"/api/tasks/cancel", "/api/tasks/rerun"} and not any(part is not None for part in body.values()):
        body["tag"] = "nightly"
    if path == "/api/schedules/{name}":
        _fit_schedule(body)
    if path == "/api/webhooks/test":
        body["url"] = _WEBHOOK_URL
    if path.startswith("/api/webhooks/secrets") and body.get("secret") is not None:
        body["secret"] = _SECRET
        body.pop("kind", None)


def _whole(value: Any) -> Any:
    """To JSON Schema 7.0 is an integer; here it is a number with a fraction, and no count of anything."""
    if isinstance(value, dict):
        return {name: _whole(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _submits(path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    if path == "/api/tasks/submit":
        return [body]
    return list(body["tasks"]) if path == "/api/tasks/batch" else []


def _fit(options: dict[str, Any], *, has_webhook: bool) -> None:
    if options.get("queue") is not None:
        options["queue"] = "default"
    if options.get("countdown") is not None:
        options.pop("eta", None)
    if options.get("webhook_url") is not None:
        options["webhook_url"] = _WEBHOOK_URL
    if not has_webhook:
        options.pop("webhook_events", None)
    _fit_moments(options, "eta", "expires")


def _fit_schedule(body: dict[str, Any]) -> None:
    """One of two ways to say when, in words that mean something."""
    for name in ("cron", "every", "start", "end"):
        if body.get(name) is None:
            body.pop(name, None)
    if "cron" in body:
        body["cron"] = "30 2 * * mon-fri"
        body.pop("every", None)
    else:
        body.setdefault("every", 60)
    if "time_zone" in body:
        body["time_zone"] = "Europe/Berlin"
    _fit_moments(body, "start", "end")
    submit = body.get("submit")
    if isinstance(submit, dict):
        for name in ("countdown", "eta", "expires", "unique_for"):
            submit.pop(name, None)
        _fit(submit, has_webhook=submit.get("webhook_url") is not None)
        _fit_call(submit)


def _fit_moments(options: dict[str, Any], *names: str) -> None:
    """No moment may be more than a year ahead."""
    for name in names:
        if isinstance(options.get(name), str) and "T" in options[name]:
            options[name] = _MOMENT


def _fit_call(one: dict[str, Any]) -> None:
    """The schema of a submit knows neither names nor signatures; each task's own path does."""
    if "task" in one or "args" in one or "kwargs" in one:
        one |= {"task": "sample.echo", "args": [], "kwargs": {"value": one.get("args")}}

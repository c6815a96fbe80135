"""The built-in tasks: one that works for a while, and one that calls a URL."""

import asyncio
import time
from typing import Annotated, Literal

from pydantic import Field

from app.catalog import task
from app.utils import guard, webhook
from app.utils.exchange import Outcome
from app.worker import bridge

STEP_SECONDS = 0.05
"""How long a sleep lasts at most: signals and progress are not kept waiting."""
REPORTS = 10
HOPELESS = frozenset({Outcome.BLOCKED, Outcome.INVALID_URL})
"""Failures that another try can't mend."""

Method = Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


@task("long_task", autoretry_for=(OSError,), retry_backoff=True)
def long_task(x: Annotated[float, Field(ge=0, le=86400)] = 5.0) -> str:
    """Work for `x` seconds, reporting progress, and return a sentence."""
    began = time.monotonic()
    every = max(x / REPORTS, 1.0)
    reported = 0.0
    while (passed := time.monotonic() - began) < x:
        if passed - reported >= every:
            reported = passed
            task.progress(passed / x, f"{passed:.0f} of {x:g} seconds")
        time.sleep(min(STEP_SECONDS, x - passed))
    task.progress(1.0, f"{x:g} of {x:g} seconds")
    return f"Worked for {x:g} second{'' if x == 1 else 's'}"


class Unreachable(OSError):
    """The request got no complete answer; it is tried again."""


class Refused(Exception):
    """The request can never be sent: the rules or the request itself forbid it."""


@task("http_request", autoretry_for=(Unreachable,), retry_backoff=True)
def http_request(
    url: Annotated[str, Field(min_length=1, max_length=guard.URL_LIMIT)],
    method: Method = "GET",
    headers: Annotated[dict[str, str], Field(max_length=64)] | None = None,
    body: str | None = None,
    timeout: Annotated[float, Field(gt=0, le=300)] = 30.0,
) -> dict[str, object]:
    """Call a URL through the same guard as webhooks, and return what it answered.

    Any answer is a success, whatever its status; network errors are tried again.
    """
    rules = guard.EgressRules.from_settings(bridge.current().settings)
    content = (body or "").encode()
    try:
        response = asyncio.run(webhook.request(method, url, headers, content, timeout_seconds=timeout, rules=rules))
    except webhook.RequestFailed as failed:
        if failed.outcome in HOPELESS:
            raise Refused(str(failed)) from failed
        raise Unreachable(str(failed)) from failed
    except ValueError as refused:
        raise Refused(str(refused)) from None
    return {
        "status_code": response.status_code,
        "headers": dict(response.headers),
        "body": response.body,
        "truncated": response.truncated,
    }

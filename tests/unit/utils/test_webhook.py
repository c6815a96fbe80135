import pickle
import ssl
from datetime import UTC, datetime, timedelta

import httpcore
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.utils import exchange, guard, pinned, webhook
from app.utils.webhook import Outcome

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 120 ", 120.0),
        ("86400", 86400.0),
        ("999999999", 86400.0),
        ("Sat, 31 Jan 2026 12:01:30 GMT", 90.0),
        ("Sat, 31 Jan 2026 12:01:30 -0000", 90.0),
        ("Saturday, 31-Jan-26 12:01:30 GMT", 90.0),
        ("Sat Jan 31 12:01:30 2026", 90.0),
        ("Sat, 31 Jan 2099 12:00:00 GMT", 86400.0),
        (None, None),
        ("", None),
        ("-1", None),
        ("+5", None),
        ("1.5", None),
        ("1e3", None),
        ("NaN", None),
        ("inf", None),
        ("٣", None),
        ("9" * 10, None),
        ("9" * 5000, None),
        ("soon", None),
        ("Sat, 31 Jan 2026 11:59:59 GMT", None),
        ("Sat, 31 Jan 99999 12:00:00 GMT", None),
        ("Sat, 99 Jan 2026 12:00:00 GMT", None),
        ("Sat, 31 Jan 2026 12:01:30 +9999", None),
    ],
)
def test_retry_after_is_read_as_seconds_or_a_date_and_nonsense_is_ignored(
    value: str | None, seconds: float | None
) -> None:
    assert webhook.retry_after(value, NOW) == seconds


@settings(deadline=None)
@given(st.text())
def test_no_retry_after_raises_or_goes_beyond_a_day(value: str) -> None:
    seconds = webhook.retry_after(value, NOW)
    assert seconds is None or 0 <= seconds <= timedelta(days=1).total_seconds()


def test_what_a_receiver_says_becomes_text_that_postgres_and_a_terminal_bear() -> None:
    raw = b"a\x00b\x1b[31m\xff\xc3\xbc\r\n\t\x7f"
    assert exchange.readable(raw) == "ab\ufffd[31m\ufffdü\r\n\t\ufffd"


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (200, "success"), (204, "success"), (299, "success"), (301, "http_3xx"), (399, "http_3xx"),
        (400, "http_4xx"), (410, "http_4xx"), (429, "http_429"), (500, "http_5xx"), (599, "http_5xx"),
        (101, "http_5xx"), (600, "http_5xx"), (999, "http_5xx"),
    ],
)  # fmt: skip
def test_each_status_has_a_word(status: int, outcome: str) -> None:
    assert exchange.outcome_of_status(status) == outcome


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def in_the_middle_of_tls(error: Exception) -> Exception:
    error.__context__ = ssl.SSLWantReadError()
    return error


@pytest.mark.parametrize(
    ("failure", "outcome"),
    [
        (caused(httpx.ConnectError(""), pinned.Blocked("")), Outcome.BLOCKED),
        (caused(httpx.ConnectError(""), pinned.Unresolvable("")), Outcome.DNS_ERROR),
        (caused(httpx.ConnectError(""), httpcore.ConnectError(ssl.SSLCertVerificationError())), Outcome.TLS_ERROR),
        (caused(httpx.ConnectError(""), httpcore.ConnectError(ConnectionRefusedError())), Outcome.CONNECT_ERROR),
        (httpx.ConnectTimeout(""), Outcome.TIMEOUT),
        (TimeoutError(), Outcome.TIMEOUT),
        (caused(TimeoutError(), in_the_middle_of_tls(RuntimeError())), Outcome.TIMEOUT),
        (httpx.RemoteProtocolError(""), Outcome.CONNECT_ERROR),
        (httpx.InvalidURL(""), Outcome.INVALID_URL),
        (guard.ForbiddenUrlError(), Outcome.BLOCKED),
        (UnicodeError(), Outcome.INVALID_URL),
        (RuntimeError(), Outcome.CONNECT_ERROR),
        (None, Outcome.CONNECT_ERROR),
    ],
)
def test_each_failure_has_a_word(failure: Exception | None, outcome: Outcome) -> None:
    assert exchange.outcome_of(failure) is outcome


@pytest.mark.parametrize("name", ["Host", "content-length", "Transfer-Encoding", "CONNECTION", "Webhook-Id", "proxy-x"])
async def test_a_header_of_ours_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"header {name} must not be set"):
        await webhook.request("GET", "https://example.com/", {name: "x"}, rules=guard.EgressRules())


@pytest.mark.parametrize(
    ("method", "url", "headers", "sentence"),
    [
        ("CONNECT", "https://example.com/", {}, "method must be one of"),
        ("G\r\nT", "https://example.com/", {}, "method must be one of"),
        ("GET", "https://127.1/", {}, "url must not lead to a private"),
        ("GET", "nonsense", {}, "url must be an http"),
        ("GET", "https://example.com/", {"a b": "x"}, "header's name"),
        ("GET", "https://example.com/", {"": "x"}, "header's name"),
        ("GET", "https://example.com/", {"a": "x\r\nb: y"}, "header a must have"),
        ("GET", "https://example.com/", {"a": "ü"}, "header a must have"),
    ],
)
async def test_a_request_that_can_not_be_sent_is_refused_with_a_sentence(
    method: str, url: str, headers: dict[str, str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        await webhook.request(method, url, headers, rules=guard.EgressRules())


def test_a_failed_request_keeps_its_outcome_through_pickle() -> None:
    failed = pickle.loads(pickle.dumps(webhook.RequestFailed("no answer", Outcome.TIMEOUT)))  # noqa: S301
    assert (str(failed), failed.outcome) == ("no answer", Outcome.TIMEOUT)

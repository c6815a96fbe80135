"""Requests as OpenTelemetry's instrumentation records them: which, with what names, and without what errors said."""

from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from starlette.types import ASGIApp, Receive, Scope, Send

from app.core import collector as collectors
from app.core import telemetry
from tests.support import otlp
from tests.support.otlp import Collector, Span

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

Requests = Callable[..., httpx.AsyncClient]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with otlp.collector() as one:
        yield one


@pytest.fixture
def instrumented(monkeypatch: pytest.MonkeyPatch, collector: Collector) -> Iterator[Requests]:
    """Makes a client of an API that is instrumented as the service's is, with this share of requests sampled."""
    made: list[tuple[FastAPI, collectors.Pipeline]] = []
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    def client(ratio: str = "1") -> httpx.AsyncClient:
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
        pipeline = collectors.pipeline("api", endpoint=collector.url)
        monkeypatch.setattr(telemetry, "_pipeline", pipeline)
        api = FastAPI(telemetry=telemetry.NOT_BY_FASTAPI)
        _routes(api)
        telemetry.instrument(api)
        made.append((api, pipeline))
        transport = httpx.ASGITransport(_with_any_query(api), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://here")

    yield client
    for api, pipeline in made:
        FastAPIInstrumentor.uninstrument_app(api)
        pipeline.shutdown(5.0)


def _with_any_query(api: FastAPI) -> ASGIApp:
    """Puts the bytes of a header, in hexadecimal digits, where the query is: httpx sends none that are wrong."""

    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        raw = dict(scope["headers"]).get(b"x-query")
        if raw is not None:
            scope["query_string"] = bytes.fromhex(raw.decode())
        await api(scope, receive, send)

    return called


def _routes(api: FastAPI) -> None:
    @api.get("/healthz")
    @api.get("/readyz")
    @api.get("/metrics")
    @api.get("/things/{name}")
    async def traced() -> str:
        return f"{trace.get_current_span().get_span_context().trace_id:032x}"

    @api.get("/fails")
    async def fails() -> None:
        raise ValueError("s3cret")

    @api.exception_handler(Exception)
    async def rendered(_: Request, __: Exception) -> Response:
        return JSONResponse({"detail": "sorry"}, 500)


async def _told(client: httpx.AsyncClient, collector: Collector) -> list[Span]:
    """All spans of before, once a request that is recorded has come after them."""
    last = (await client.get("/things/last")).json()
    collector.wait_for(last, bool)
    return [one for one in collector.spans if one.trace != last]


async def test_a_request_is_one_span_with_the_stable_names(instrumented: Requests, collector: Collector) -> None:
    async with instrumented() as client:
        answer = await client.get("/things/healthz", params={"a": "b"})
        [span] = await _told(client, collector)
    assert (span.name, span.kind, span.trace, span.error) == ("GET /things/{name}", "SERVER", answer.json(), False)
    assert span.scope == "opentelemetry.instrumentation.fastapi"
    assert {name: span.attributes[name] for name in ("http.request.method", "http.route", "url.path")} == {
        "http.request.method": "GET", "http.route": "/things/{name}", "url.path": "/things/healthz",
    }  # fmt: skip
    assert span.attributes["http.response.status_code"] == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_are_left_out(instrumented: Requests, collector: Collector, path: str) -> None:
    async with instrumented() as client:
        assert (await client.get(path)).json() == "0" * 32
        assert await _told(client, collector) == []


async def test_what_an_unexpected_error_said_is_not_told(instrumented: Requests, collector: Collector) -> None:
    async with instrumented() as client:
        answer = await client.get("/fails")
        [span] = await _told(client, collector)
    assert (answer.status_code, answer.json()) == (500, {"detail": "sorry"})
    assert (span.error, span.message, span.events, span.attributes["error.type"]) == (True, "", (), "ValueError")
    assert "s3cret" not in str(span)


@pytest.mark.parametrize("caller", [None, CALLER])
async def test_what_is_not_sampled_is_led_past(
    instrumented: Requests, collector: Collector, caller: str | None
) -> None:
    async with instrumented("0") as client:
        answer = await client.get("/things/x", headers={} if caller is None else {"traceparent": caller})
        otlp.settled_down(collector, 0.1)
    # Not even a span that is not recorded: nothing was made of it.
    assert (answer.json(), collector.spans) == ("0" * 32, [])


async def test_bytes_that_nobody_can_read_fail_no_request(instrumented: Requests, collector: Collector) -> None:
    async with instrumented() as client:
        for name in (b"user-agent", b"host", b"traceparent", b"x-other"):
            assert (await client.get("/things/x", headers=[(name, b"\xff\\x")])).status_code == 200
        assert (await client.get("/things/x", headers={"x-query": "ff"})).status_code == 200
        assert await _told(client, collector) == []

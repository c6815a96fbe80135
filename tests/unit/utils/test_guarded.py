"""Connections that are used again, and those that must not be."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpcore
import httpx
import pytest

from app.utils import guard, guarded, pinned
from tests.support.waiting import until

PRIVATE = guard.EgressRules(allow_private=True)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Network(httpcore.AsyncNetworkBackend):
    """Records where it was asked to connect to, and refuses; nothing leaves this process."""

    def __init__(self) -> None:
        self.tried: list[tuple[str, int]] = []

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109, ARG002
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        self.tried.append((host, port))
        raise httpcore.ConnectError("refused")


class Talker:
    """A server that answers each request with the next of its answers; None hangs up instead."""

    def __init__(self, *answers: bytes | None) -> None:
        self.connections = 0
        self.open = 0
        self.requests: list[int] = []
        """Which connection each request came on."""
        self._answers = list(answers)

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests.append(number)
                answer = self._answers.pop(0) if self._answers else OK
                if answer is None:
                    return
                writer.write(answer)
                if b"connection: close" in answer:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def talking(talker: Talker) -> AsyncIterator[str]:
    server = await asyncio.start_server(talker, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()


@asynccontextmanager
async def client(keep_seconds: float = 30.0) -> AsyncIterator[httpx.AsyncClient]:
    made = guarded.client(PRIVATE, keep_seconds=keep_seconds)
    try:
        yield made
    finally:
        await made.aclose()


async def get(made: httpx.AsyncClient, url: str, owner: str = "") -> str:
    async with asyncio.timeout(10):
        return (await made.get(url, extensions={guarded.OWNER: owner})).text


async def turns() -> None:
    """Let the server see what happened."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_next_request_of_the_same_owner_to_the_same_origin_takes_the_connection_that_is_there() -> None:
    talker = Talker()
    async with talking(talker) as url, client() as made:
        assert [await get(made, url + path, "a") for path in ("x", "y?z=1", "")] == ["ok"] * 3
    assert talker.requests == [1, 1, 1]


async def test_no_two_owners_and_no_two_origins_share_a_connection() -> None:
    talker = Talker()
    async with talking(talker) as url, client() as made:
        for owner, one in (("a", url), ("b", url), ("a", url), ("a", url.replace("127.0.0.1", "localhost"))):
            await get(made, one, owner)
    assert talker.requests == [1, 2, 1, 3]


async def test_requests_at_the_same_time_have_connections_of_their_own() -> None:
    talker = Talker()
    async with talking(talker) as url, client() as made:
        assert await asyncio.gather(*(get(made, url) for _ in range(20))) == ["ok"] * 20
        await get(made, url)
    assert len(set(talker.requests[:20])) > 1
    assert len(talker.requests) == 21
    assert talker.connections < 21


async def test_a_connection_that_is_too_old_is_closed_though_it_was_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    talker = Talker()
    async with talking(talker) as url, client(keep_seconds=30.0) as made:
        loop = asyncio.get_running_loop()
        real, passed = loop.time, [0.0]
        monkeypatch.setattr(loop, "time", lambda: real() + passed[0])
        for passed[0] in (0.0, 14.0, 29.0, 31.0):
            await get(made, url)
    assert talker.requests == [1, 1, 1, 2]


async def test_a_connection_that_nobody_uses_again_is_closed_by_itself() -> None:
    talker = Talker()
    async with talking(talker) as url, client(keep_seconds=0.05) as made:
        await get(made, url)
        assert talker.open == 1
        await until(lambda: not talker.open, 5, "the end of the connection")


async def test_without_keeping_every_request_has_a_connection_and_says_so() -> None:
    talker = Talker()
    async with talking(talker) as url, client(keep_seconds=0.0) as made:
        assert made.headers["connection"] == "close"
        for _ in range(3):
            await get(made, url)
        await turns()
    assert talker.requests == [1, 2, 3]


async def test_the_oldest_is_closed_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "KEPT_AT_MOST", 2)
    talker = Talker()
    async with talking(talker) as url, client() as made:
        for owner in ("a", "b", "c", "c", "b", "a"):
            await get(made, url, owner)
    assert talker.requests == [1, 2, 3, 3, 2, 4]


@pytest.mark.parametrize("hanging_up", [None, OK.replace(b"content", b"connection: close\r\ncontent")])
async def test_a_peer_that_hung_up_is_called_again(hanging_up: bytes | None) -> None:
    talker = Talker(OK, hanging_up, OK, OK)
    async with talking(talker) as url, client() as made:
        assert [await get(made, url) for _ in range(3)] == ["ok"] * 3
    assert talker.requests == ([1, 1, 2, 2] if hanging_up is None else [1, 1, 2])


async def test_a_peer_that_hangs_up_on_a_new_connection_has_failed() -> None:
    talker = Talker(None)
    async with talking(talker) as url, client() as made:
        with pytest.raises(httpcore.RemoteProtocolError):
            await get(made, url)
    assert talker.requests == [1]


async def test_what_was_said_before_it_was_asked_is_no_answer() -> None:
    talker = Talker(OK + b"HTTP/1.1 204 Forged\r\n\r\n")
    async with talking(talker) as url, client() as made:
        assert await get(made, url) == "ok"
        await turns()
        assert await get(made, url) == "ok"
    assert talker.requests == [1, 2]


async def test_what_was_said_later_before_it_was_asked_is_no_answer_either() -> None:
    asked, said = asyncio.Event(), asyncio.Event()
    connections = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        if connections == 1:
            await asked.wait()
            writer.write(OK.replace(b"ok", b"no"))
            await writer.drain()
            said.set()
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with client() as made:
        assert await get(made, url) == "ok"
        asked.set()
        await said.wait()
        assert await get(made, url) == "ok"
    assert connections == 2
    server.close()


async def test_an_answer_that_was_not_read_to_its_end_closes_the_connection() -> None:
    talker = Talker(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\nx")
    async with talking(talker) as url, client() as made:
        async with made.stream("GET", url):
            pass
        assert await get(made, url) == "ok"
    assert talker.requests == [1, 2]


async def test_a_closed_client_leaves_no_connection_and_makes_none() -> None:
    talker = Talker()
    async with talking(talker) as url, client() as made:
        await get(made, url, "a")
        await get(made, url, "b")
        transport = made._transport
        await transport.aclose()
        await until(lambda: not talker.open, 5, "the end of both connections")
        with pytest.raises(httpcore.ConnectError):
            await transport.handle_async_request(httpx.Request("GET", url))


@pytest.fixture
def resolver() -> Iterator[pinned.Resolver]:
    made = pinned.Resolver(lambda _host, _port: ["1.1.1.1"])
    yield made
    made.close()


async def test_connections_that_would_ignore_the_backend_are_refused(
    monkeypatch: pytest.MonkeyPatch, resolver: pinned.Resolver
) -> None:
    class Deaf(httpcore.AsyncHTTPConnection):
        def __init__(self, origin: httpcore.Origin, **options: Any) -> None:
            super().__init__(origin, **(options | {"network_backend": None}))

    monkeypatch.setattr(httpcore, "AsyncHTTPConnection", Deaf)
    with pytest.raises(RuntimeError, match="guarded"):
        guarded.client(guard.EgressRules(), resolver=resolver)


async def test_proxies_of_the_environment_are_ignored(
    monkeypatch: pytest.MonkeyPatch, resolver: pinned.Resolver
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    network = Network()
    made = guarded.client(guard.EgressRules(), resolver=resolver, network=network)
    with pytest.raises(httpcore.ConnectError):
        await made.get("https://hooks.example/")
    await made.aclose()
    assert network.tried == [("1.1.1.1", 443)]


async def test_the_socket_is_closed_when_the_answer_never_comes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        async with client() as made:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await made.get(f"http://127.0.0.1:{listening.getsockname()[1]}/")
            loop = asyncio.get_running_loop()
            connection, _ = await loop.sock_accept(listening)
            with connection:
                connection.setblocking(False)
                received = b""
                async with asyncio.timeout(5):
                    while part := await loop.sock_recv(connection, 4096):
                        received += part
                assert received.startswith(b"GET / HTTP/1.1")

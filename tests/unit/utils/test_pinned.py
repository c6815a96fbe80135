import asyncio
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from ipaddress import ip_address
from typing import Any

import httpcore
import pytest

from app.utils import guard, pinned
from tests.unit.utils.test_guard import DENIED, OPERATOR, PUBLIC

STRICT = guard.EgressRules()


class Stream(httpcore.AsyncNetworkStream):
    """A connection that leads to `peer`, and nowhere."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.closed = False
        self.heard: list[bytes] = []
        self.deaf = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109, ARG002
        return b"answer"[:max_bytes]

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109, ARG002
        if self.deaf:
            raise httpcore.WriteError
        self.heard.append(buffer)

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,  # noqa: ARG002
        server_hostname: str | None = None,  # noqa: ARG002
        timeout: float | None = None,  # noqa: ASYNC109, ARG002
    ) -> httpcore.AsyncNetworkStream:
        return self

    async def aclose(self) -> None:
        self.closed = True

    def get_extra_info(self, info: str) -> Any:
        return (self.peer, 443) if info == "server_addr" else None


class Network(httpcore.AsyncNetworkBackend):
    """Records where it was asked to connect to; nothing leaves this process."""

    def __init__(self, dead: Sequence[str] = (), peer: str | None = None) -> None:
        self.tried: list[tuple[str, int]] = []
        self.streams: list[Stream] = []
        self._dead = dead
        self._peer = peer

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109, ARG002
        local_address: str | None = None,  # noqa: ARG002
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        self.tried.append((host, port))
        if host in self._dead:
            raise httpcore.ConnectError("refused")
        self.streams.append(Stream(self._peer or host))
        return self.streams[-1]


class Names:
    """A name server: each look-up of a name takes its next answer, and the last one stays."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.asked: list[str] = []
        self._answers = answers.get("answers", [[]])

    def __call__(self, host: str, port: int) -> list[str]:  # noqa: ARG002
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


Connect = Callable[..., pinned.PinnedBackend]


@pytest.fixture
async def backend() -> AsyncIterator[Connect]:
    made: list[pinned.Resolver] = []

    def make(
        lookup: pinned.Lookup, network: Network, rules: guard.EgressRules = STRICT, timeout_seconds: float = 5.0
    ) -> pinned.PinnedBackend:
        made.append(pinned.Resolver(lookup, timeout_seconds=timeout_seconds, threads=2))
        return pinned.PinnedBackend(rules, made[-1], network)

    yield make
    for resolver in made:
        resolver.close()


@pytest.mark.parametrize("address", DENIED)
async def test_no_connection_is_tried_to_a_denied_address_however_it_is_found(address: str, backend: Connect) -> None:
    network = Network()
    literal = backend(Names(), network)
    record = backend(Names(answers=[[address]]), network)
    mixed = backend(Names(answers=[["93.184.216.34", address]]), network)
    for made, host in ((literal, address), (record, "hooks.example"), (mixed, "hooks.example")):
        with pytest.raises(pinned.Blocked):
            await made.connect_tcp(host, 443)
    assert network.tried == []
    rebound = backend(Names(answers=[["93.184.216.34"], [address]]), network)
    await rebound.connect_tcp("hooks.example", 443)
    with pytest.raises(pinned.Blocked):
        await rebound.connect_tcp("hooks.example", 443)
    assert network.tried == [("93.184.216.34", 443)]


@pytest.mark.parametrize("address", PUBLIC)
async def test_a_public_address_is_connected_to_as_a_literal_and_as_a_record(address: str, backend: Connect) -> None:
    network = Network()
    await backend(Names(), network).connect_tcp(address, 443)
    await backend(Names(answers=[[address]]), network).connect_tcp("hooks.example", 8443)
    assert [(ip_address(host), port) for host, port in network.tried] == [
        (ip_address(address), 443),
        (ip_address(address), 8443),
    ]


async def test_a_name_is_looked_up_once_so_rebinding_gains_nothing(backend: Connect) -> None:
    network, names = Network(), Names(answers=[["93.184.216.34"], ["127.0.0.1"]])
    made = backend(names, network)
    await made.connect_tcp("rebind.example", 443)
    assert network.tried == [("93.184.216.34", 443)]
    assert names.asked == ["rebind.example."]
    with pytest.raises(pinned.Blocked):
        await made.connect_tcp("rebind.example", 443)
    assert len(network.tried) == 1


@pytest.mark.parametrize(
    ("rules", "host", "port", "asked"),
    [
        (STRICT, "hooks.example", 443, "hooks.example."),
        (STRICT, "hooks.example.", 443, "hooks.example."),
        (guard.EgressRules(allow_private=True), "localhost", 3000, "localhost"),
        (guard.EgressRules(allow_private=True), "host.docker.internal", 3000, "host.docker.internal"),
        (OPERATOR, "receiver.hooks.svc", 8080, "receiver.hooks.svc"),
    ],
)
async def test_search_domains_are_tried_only_for_what_the_operator_named(
    rules: guard.EgressRules, host: str, port: int, asked: str, backend: Connect
) -> None:
    names = Names(answers=[["93.184.216.34"]])
    await backend(names, Network(), rules).connect_tcp(host, port)
    assert names.asked == [asked]


async def test_an_allowed_origin_may_be_anywhere_and_on_any_port(backend: Connect) -> None:
    network = Network()
    await backend(Names(answers=[["10.1.2.3"]]), network, OPERATOR).connect_tcp("receiver.hooks.svc", 8080)
    await backend(Names(), network, OPERATOR).connect_tcp("10.0.0.5", 8443)
    assert network.tried == [("10.1.2.3", 8080), ("10.0.0.5", 8443)]


@pytest.mark.parametrize(("host", "port"), [("hooks.example", 22), ("93.184.216.34", 80), ("receiver.hooks.svc", 8081)])
async def test_the_backend_itself_refuses_other_ports(host: str, port: int, backend: Connect) -> None:
    network, names = Network(), Names(answers=[["93.184.216.34"]])
    with pytest.raises(pinned.Blocked):
        await backend(names, network, OPERATOR).connect_tcp(host, port)
    assert (network.tried, names.asked) == ([], [])


async def test_the_next_address_is_tried_when_the_first_is_dead(backend: Connect) -> None:
    network = Network(dead=["2606:4700:4700::1111"])
    await backend(Names(answers=[["2606:4700:4700::1111", "1.1.1.1"]]), network).connect_tcp("hooks.example", 443)
    assert [host for host, _ in network.tried] == ["2606:4700:4700::1111", "1.1.1.1"]


async def test_the_last_failure_is_raised_when_all_are_dead(backend: Connect) -> None:
    network = Network(dead=["8.8.8.8", "1.1.1.1"])
    with pytest.raises(httpcore.ConnectError, match="refused"):
        await backend(Names(answers=[["8.8.8.8", "1.1.1.1"]]), network).connect_tcp("hooks.example", 443)


async def test_no_time_left_is_a_timeout(backend: Connect) -> None:
    network = Network()
    with pytest.raises(httpcore.ConnectTimeout):
        await backend(Names(answers=[["1.1.1.1"]]), network).connect_tcp("hooks.example", 443, timeout=0.0)
    assert network.tried == []


async def test_a_connection_that_leads_elsewhere_is_closed(backend: Connect) -> None:
    network = Network(peer="127.0.0.1")
    with pytest.raises(pinned.Blocked, match="judged"):
        await backend(Names(answers=[["1.1.1.1"]]), network).connect_tcp("hooks.example", 443)
    assert [stream.closed for stream in network.streams] == [True]


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_request_is_sent_in_one_piece_before_its_answer_is_read(backend: Connect, *, tls: bool) -> None:
    network = Network()
    stream = await backend(Names(answers=[["1.1.1.1"]]), network).connect_tcp("hooks.example", 443)
    if tls:
        stream = await stream.start_tls(ssl.create_default_context())
    [wire] = network.streams
    for number in range(1, 3):
        await stream.write(b"head")
        await stream.write(b"body")
        assert len(wire.heard) == number - 1
        assert await stream.read(100) == b"answer"
        assert await stream.read(100) == b"answer"
        assert wire.heard == [b"headbody"] * number


async def test_what_is_large_is_not_held_back(backend: Connect) -> None:
    network = Network()
    stream = await backend(Names(answers=[["1.1.1.1"]]), network).connect_tcp("hooks.example", 443)
    large = b"x" * pinned.HELD_BACK_BYTES
    await stream.write(b"head")
    await stream.write(large)
    assert network.streams[0].heard == [b"head" + large]


async def test_who_does_not_hear_the_end_of_a_request_may_have_answered_it(backend: Connect) -> None:
    network = Network()
    stream = await backend(Names(answers=[["1.1.1.1"]]), network).connect_tcp("hooks.example", 443)
    network.streams[0].deaf = True
    await stream.write(b"head")
    assert await stream.read(100) == b"answer"


async def test_unix_sockets_are_refused(backend: Connect) -> None:
    with pytest.raises(pinned.Blocked):
        await backend(Names(), Network()).connect_unix_socket("/var/run/docker.sock")


def _nobody(host: str, port: int) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, f"{host}:{port}")


@pytest.mark.parametrize("lookup", [Names(answers=[[]]), Names(answers=[["no address"]]), _nobody])
async def test_a_name_without_addresses_is_unresolvable(lookup: pinned.Lookup, backend: Connect) -> None:
    with pytest.raises(pinned.Unresolvable):
        await backend(lookup, Network()).connect_tcp("hooks.example", 443)


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "bü.example", "x" * 300])
async def test_a_name_that_can_not_be_looked_up_is_unresolvable(host: str, backend: Connect) -> None:
    # None of these reaches a name server: they are refused while they are spelled.
    def spelled(host: str, port: int) -> list[str]:
        host.encode("idna" if host.isascii() else "ascii")
        return list(pinned.system_lookup("localhost", port))

    with pytest.raises(pinned.Unresolvable):
        await backend(spelled, Network(), guard.EgressRules(allow_private=True)).connect_tcp(host, 443)


async def test_a_resolver_that_hangs_is_given_up_and_holds_up_nobody(backend: Connect) -> None:
    answer = threading.Event()

    def hang(host: str, port: int) -> list[str]:  # noqa: ARG001
        answer.wait(20)
        return ["1.1.1.1"]

    loop = asyncio.get_running_loop()
    started = loop.time()
    try:
        with pytest.raises(pinned.Unresolvable, match="in time"):
            await backend(hang, Network(), timeout_seconds=0.05).connect_tcp("hooks.example", 443)
        assert loop.time() - started < 2
    finally:
        answer.set()


async def test_hosts_whose_name_servers_are_dead_hold_one_thread_each_and_a_healthy_one_stays_quick() -> None:
    end = threading.Event()
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[str]:  # noqa: ARG001
        asked.append(host)
        if host.startswith("dead"):
            end.wait(60)
        return ["1.1.1.1"]

    resolver = pinned.Resolver(lookup, timeout_seconds=0.1, threads=3)
    made = pinned.PinnedBackend(STRICT, resolver, Network())
    try:
        for _ in range(3):
            dead = [made.connect_tcp(f"dead{number % 2}.example", 443) for number in range(20)]
            *failed, stream = await asyncio.gather(*dead, made.connect_tcp("ok.example", 443), return_exceptions=True)
            assert {type(one) for one in failed} == {pinned.Unanswered}
            assert isinstance(stream, httpcore.AsyncNetworkStream)
    finally:
        end.set()
        resolver.close()
    assert sorted(asked) == ["dead0.example.", "dead1.example.", *["ok.example."] * 3], "and each was asked for once"


async def test_a_name_that_could_not_be_asked_for_is_our_fault_and_is_not_asked_for_later(backend: Connect) -> None:
    end = threading.Event()
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[str]:  # noqa: ARG001
        asked.append(host)
        end.wait(60)
        return ["1.1.1.1"]

    made = backend(lookup, Network(), timeout_seconds=0.05)
    try:
        hosts = ("dead0.example", "dead1.example", "late.example", "late.example")
        failed = await asyncio.gather(*(made.connect_tcp(host, 443) for host in hosts), return_exceptions=True)
        assert [type(one) for one in failed] == [pinned.Unanswered] * 2 + [pinned.ResolverAway] * 2
        end.set()
        await made.connect_tcp("last.example", 443)
    finally:
        end.set()
    assert sorted(asked) == ["dead0.example.", "dead1.example.", "last.example."]


async def test_a_resolver_that_is_closed_fails_those_that_wait(backend: Connect) -> None:
    end, began = threading.Event(), threading.Event()

    def lookup(host: str, port: int) -> list[str]:  # noqa: ARG001
        began.set()
        end.wait(60)
        return ["1.1.1.1"]

    made = backend(lookup, Network())
    waiting = asyncio.create_task(made.connect_tcp("dead.example", 443))
    try:
        await asyncio.to_thread(began.wait, 10)
        made.resolver.close()
        with pytest.raises(pinned.ResolverAway):
            await waiting
    finally:
        end.set()


def test_a_resolver_may_be_closed_after_its_loop() -> None:
    end = threading.Event()

    def hang(host: str, port: int) -> list[str]:  # noqa: ARG001
        end.wait(60)
        return []

    resolver = pinned.Resolver(hang, timeout_seconds=0.05)
    with pytest.raises(pinned.Unanswered):
        asyncio.run(resolver.resolve("hooks.example", 443))
    resolver.close()
    end.set()


def test_localhost_is_resolved_by_the_system() -> None:
    assert set(pinned.system_lookup("localhost", 80)) <= {"127.0.0.1", "::1"}

"""Whose fault it was that no answer came."""

import errno
import socket
from collections.abc import Sequence
from typing import Any

import httpcore
import httpx
import pytest

from app.utils import exchange, guard, guarded, pinned
from app.utils.exchange import Outcome

RULES = guard.EgressRules()


class BrokenNetwork(httpcore.AsyncNetworkBackend):
    """A machine on which connecting fails in the kernel, told of as httpcore's own backend does."""

    def __init__(self, error: OSError) -> None:
        self._error = error

    async def connect_tcp(self, *_: Any, **__: Any) -> httpcore.AsyncNetworkStream:
        failed = OSError("All connection attempts failed")
        failed.__cause__ = self._error
        raise httpcore.ConnectError(failed) from failed


async def outcome(lookup: pinned.Lookup, error: OSError | None = None) -> Outcome:
    resolver = pinned.Resolver(lookup, timeout_seconds=0.05)
    network = None if error is None else BrokenNetwork(error)
    transport = guarded.GuardedTransport(pinned.PinnedBackend(RULES, resolver, network), httpx.create_ssl_context())
    async with httpx.AsyncClient(transport=transport) as client:
        with pytest.raises(httpcore.ConnectError) as raised:
            await client.post("https://receiver.example/")
    resolver.close()
    return exchange.outcome_of(raised.value)


def public(*_: Any) -> Sequence[str]:
    return ["93.184.216.34"]


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.ENETUNREACH, "local_fault"),
        (errno.ENETDOWN, "local_fault"),
        (errno.EMFILE, "local_fault"),
        (errno.ENFILE, "local_fault"),
        (errno.ENOBUFS, "local_fault"),
        (errno.EADDRNOTAVAIL, "local_fault"),
        (errno.ECONNREFUSED, "connect_error"),
        (errno.ECONNRESET, "connect_error"),
        (errno.EHOSTUNREACH, "connect_error"),
    ],
)
async def test_the_kernel_says_whose_fault_it_is(number: int, word: str) -> None:
    assert await outcome(public, OSError(number, "no")) == word


@pytest.mark.parametrize(
    ("code", "word"),
    [
        (socket.EAI_AGAIN, "dns_unanswered"),
        (socket.EAI_SYSTEM, "local_fault"),
        (socket.EAI_NONAME, "dns_error"),
        (socket.EAI_NODATA, "dns_error"),
        (socket.EAI_FAIL, "dns_error"),
    ],
)
async def test_a_name_server_that_is_away_is_not_a_name_that_is_wrong(code: int, word: str) -> None:
    def lookup(*_: Any) -> Sequence[str]:
        raise socket.gaierror(code, "no")

    assert await outcome(lookup) == word


async def test_a_name_server_that_is_silent_may_be_ours_or_theirs() -> None:
    def lookup(*_: Any) -> Sequence[str]:
        raise TimeoutError

    assert await outcome(lookup) == "dns_unanswered"

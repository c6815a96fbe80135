"""How much of a relay one receiver, and one owner, may have.

A receiver, which is an owner and an origin, has a cap and a circuit breaker:

    closed ──THRESHOLD failures in a row──▶ open ──its time is over──▶ half-open
       ▲                                      ▲                          │   │
       └──────────── any answer ──────────────┼──────────────────────────┘   │
                                              └── the probe fails, twice as long ┘

An owner has no more places than it leaves free, whoever else holds the others, so
that many receivers of one take all of them from nobody. Where nobody has to say who
they are, there is nobody to share with, and no such end.

An owner whose secret can't be read has no receiver that could be sent to.
What is not sent to a receiver waits in its rows and spends no attempt. Every relay
has its own view, in memory: it costs nothing to form a new one.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from app.delivery import Receiver
from app.utils.webhook import Outcome

CAP = 10
"""Requests that are on their way to one receiver at once."""
THRESHOLD = 10
"""Failures in a row after which nothing is sent to a receiver: so many that one that fails every other time goes on."""
OPEN_SECONDS = 5.0
LONGEST_OPEN_SECONDS = 120.0
FORGET_SECONDS = 3600.0
"""After that without a request, a receiver that failed is as unknown as any other."""
HOPELESS_SECONDS = 3600.0
"""How long a circuit must have been open for old webhooks to be given up: a receiver that is overwhelmed for some
minutes, as by all that waited while no relay ran, loses none."""
UNREADABLE_SECONDS = 60.0
"""How long nothing is sent for an owner of whom a secret can't be read. What the next claim takes is the probe."""

_FAILURES = frozenset(
    {
        Outcome.TIMEOUT, Outcome.CONNECT_ERROR, Outcome.TLS_ERROR, Outcome.DNS_ERROR,
        Outcome.DNS_UNANSWERED, Outcome.HTTP_5XX, Outcome.HTTP_429,
    }
)  # fmt: skip
_SILENT = frozenset({Outcome.BLOCKED, Outcome.INVALID_URL, Outcome.LOCAL_FAULT, Outcome.SECRET_UNREADABLE})
"""What says nothing of the receiver: it was not asked."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Circuit:
    """What is known of a receiver.

    Attributes:
        failures: in a row.
        open_until: monotonic time of the next probe; None while closed.
        open_seconds: how long it was opened for.
        changed_at: monotonic time of what was learnt last.
        open_since: monotonic time at which it opened, however often a probe has failed since; None while closed.
    """

    failures: int = 0
    open_until: float | None = None
    open_seconds: float = 0.0
    changed_at: float = 0.0
    open_since: float | None = None


CLOSED = Circuit()


def after(circuit: Circuit, outcome: Outcome, now: float) -> Circuit:
    """What is known after one more request has ended.

    Args:
        circuit: what was known.
        outcome: of the request. An answer of 4xx is one of a server that lives.
        now: monotonic, in seconds.
    """
    if outcome in _SILENT:
        return circuit
    if outcome not in _FAILURES:
        return CLOSED
    failed = replace(circuit, failures=circuit.failures + 1, changed_at=now)
    if circuit.open_until is None:
        if failed.failures < THRESHOLD:
            return failed
        return replace(failed, open_until=now + OPEN_SECONDS, open_seconds=OPEN_SECONDS, open_since=now)
    if now < circuit.open_until:
        return failed  # It was under way when the circuit opened.
    longer = min(circuit.open_seconds * 2, LONGEST_OPEN_SECONDS)
    return replace(failed, open_until=now + longer, open_seconds=longer)


def room(circuit: Circuit, on_their_way: int, now: float) -> int:
    """How many more requests may be sent to a receiver now.

    Args:
        circuit: what is known of it.
        on_their_way: requests to it that have not ended.
        now: monotonic, in seconds.
    """
    if circuit.open_until is None:
        return max(0, CAP - on_their_way)
    return 1 if now >= circuit.open_until and on_their_way == 0 else 0


class Circuits:
    """All receivers that a relay sends to, or has failed to."""

    def __init__(self) -> None:
        self._on_their_way: Counter[Receiver] = Counter()
        self._of_owner: Counter[str] = Counter()
        self._known: dict[Receiver, Circuit] = {}
        self._unreadable_until: dict[str, float] = {}

    def began(self, receiver: Receiver) -> None:
        """A request is on its way."""
        self._on_their_way[receiver] += 1
        self._of_owner[receiver.owner] += 1

    def ended(self, receiver: Receiver, outcome: Outcome | None, now: float) -> None:
        """A request has ended; `outcome` is None if it was given up from here."""
        self._on_their_way[receiver] -= 1
        if not self._on_their_way[receiver]:
            del self._on_their_way[receiver]
        self._of_owner[receiver.owner] -= 1
        if not self._of_owner[receiver.owner]:
            del self._of_owner[receiver.owner]
        if outcome is None:
            return
        before = self._known.get(receiver, CLOSED)
        known = after(before, outcome, now)
        _tell(receiver, before, known)
        if known == CLOSED:
            self._known.pop(receiver, None)
        else:
            self._known[receiver] = known

    def rooms(self, now: float) -> Mapping[Receiver, int]:
        """For each receiver that may not have the whole `CAP`: how many more requests it may have."""
        for receiver in [one for one, known in self._known.items() if now - known.changed_at > FORGET_SECONDS]:
            del self._known[receiver]
        concerned = self._on_their_way.keys() | self._known.keys()
        rooms = {one: room(self._known.get(one, CLOSED), self._on_their_way[one], now) for one in concerned}
        return {receiver: left for receiver, left in rooms.items() if left < CAP}

    def could_not_sign(self, owner: str, now: float) -> None:
        """A secret of this owner can't be read: each of its webhooks would only be claimed to find that out."""
        self._unreadable_until[owner] = now + UNREADABLE_SECONDS

    def passed_over(self, now: float, *, free: int) -> Collection[str]:
        """Owners of whom nothing is claimed now.

        Args:
            now: monotonic, in seconds.
            free: how many more requests the relay may have on their way.
        """
        self._unreadable_until = {owner: until for owner, until in self._unreadable_until.items() if now < until}
        return self._unreadable_until.keys() | {
            owner for owner, held in self._of_owner.items() if owner and held >= free
        }

    def opened(self) -> int:
        """How many receivers nothing is sent to but probes."""
        return sum(known.open_until is not None for known in self._known.values())

    def shut(self) -> list[Receiver]:
        """Receivers that nothing is sent to but probes."""
        return [one for one, known in self._known.items() if known.open_until is not None]

    def hopeless(self, now: float) -> list[Receiver]:
        """Receivers that have been sent nothing but probes for `HOPELESS_SECONDS`."""
        known = self._known.items()
        return [one for one, its in known if its.open_since is not None and now - its.open_since >= HOPELESS_SECONDS]


def _tell(receiver: Receiver, before: Circuit, now: Circuit) -> None:
    """Log what opens and what closes: the origin, and nothing of a URL that may be a secret."""
    if before.open_until is None and now.open_until is not None:
        log.warning("%s fails: after %d failures in a row it gets probes only", receiver.origin, now.failures)
    elif before.open_until is not None and now.open_until is None:
        log.info("%s answers again, and gets its webhooks", receiver.origin)

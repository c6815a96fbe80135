"""What a fault drill knows of its tasks: what was submitted, what was acknowledged, what the webhooks said.

`audit` lays that beside the rows of the service. It reads them with statements of its own: a witness
that asks the code under test would believe it.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Self

import httpx

from app.core import config
from app.db import Database, insist
from app.dev import ports

SUBMITTERS = 4
SUBMIT_TIMEOUT_SECONDS = 5.0
TRY_AGAIN_SECONDS = 0.2
ACCEPTED = 202
UNAVAILABLE = 503
ENDED = frozenset({"SUCCESS", "FAILURE", "REVOKED"})
EXAMPLES = 3
"""How many ids a complaint names."""


@dataclass(frozen=True, slots=True)
class Job:
    """A submit that is to be acknowledged, and what its task must return (None: anything)."""

    task: str
    kwargs: Mapping[str, Any]
    expected: Any = None


def jobs(count: int, portions: int, long_ones: int, chance: random.Random) -> list[list[Job]]:
    """A seeded mix in portions, each begun by tasks that are long enough to be met running."""
    sizes = [count // portions + (place < count % portions) for place in range(portions)]
    return [[_job(place < long_ones, chance) for place in range(size)] for size in sizes]


def _job(is_long: bool, chance: random.Random) -> Job:
    if is_long:
        return Job("long_task", {"x": round(chance.uniform(1.0, 1.5), 3)})
    seconds = round(chance.uniform(0.1, 0.8), 3)
    kind = chance.random()
    if kind < 0.55:  # noqa: PLR2004  # the mix
        return Job("long_task", {"x": seconds})
    if kind < 0.75:  # noqa: PLR2004  # as above
        return Job("sample.sleep", {"seconds": seconds})
    if kind < 0.85:  # noqa: PLR2004  # as above
        return Job("sample.flaky", {"failures": 1})
    value = f"{chance.getrandbits(64):016x}"
    return Job("sample.echo", {"value": value}, value)


@dataclass(frozen=True, slots=True)
class Posted:
    """A webhook that arrived."""

    webhook_id: str
    body: bytes
    signed: bool


class Receiver:
    """Takes webhooks on the loopback, remembers them, and answers after a moment, as receivers do."""

    def __init__(self, secret: str, *, answers_after_seconds: float) -> None:
        self._keys = [config.webhook_key(one) for one in secret.split()]
        self._wait_seconds = answers_after_seconds
        self._server: asyncio.Server | None = None
        self.posted: list[Posted] = []
        self.task_ids: set[str] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, ports.ADDRESS, backlog=512)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None  # noqa: S101  # it is entered first
        return f"http://{ports.ADDRESS}:{self._server.sockets[0].getsockname()[1]}/"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A relay that is killed hangs up in the middle of a request: then nothing has arrived.
        with contextlib.suppress(OSError, EOFError), contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[1:-2]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head)}
            self._take(headers, await reader.readexactly(int(headers["content-length"])))
            await asyncio.sleep(self._wait_seconds)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()

    def _take(self, headers: Mapping[str, str], body: bytes) -> None:
        webhook_id = headers.get("webhook-id", "")
        signed = f"{webhook_id}.{headers.get('webhook-timestamp', '')}.".encode() + body
        right = {b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in self._keys}
        given = set(headers.get("webhook-signature", "").encode().split())
        self.posted.append(Posted(webhook_id, body, bool(given) and given <= right))
        self.task_ids.add(str(json.loads(body)["data"]["task_id"]))


@dataclass(slots=True)
class Ledger:
    """Submits jobs until each is acknowledged.

    Attributes:
        acknowledged: the job of each task id that the service answered.
        refused: submits that got no acknowledgement; each was repeated as a new one.
        broken: those of them that were answered, but neither accepted nor told to come back.
    """

    url: str
    webhook_url: str
    chance: random.Random
    acknowledged: dict[str, Job] = field(default_factory=dict)
    refused: int = 0
    broken: int = 0

    async def submit(self, portion: Iterable[Job]) -> None:
        """Submit a portion, a few at a time, and return when all of it is acknowledged."""
        waiting = iter(list(portion))
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=SUBMIT_TIMEOUT_SECONDS, trust_env=False) as client,
            asyncio.TaskGroup() as submitters,
        ):
            for _ in range(SUBMITTERS):
                submitters.create_task(self._submit_each(client, waiting))

    async def _submit_each(self, client: httpx.AsyncClient, waiting: Iterable[Job]) -> None:
        for job in waiting:  # shared by all submitters: each takes the next
            while not await self._submit_once(client, job):
                self.refused += 1
                await asyncio.sleep(TRY_AGAIN_SECONDS)
            await asyncio.sleep(self.chance.uniform(0.0, 0.1))

    async def _submit_once(self, client: httpx.AsyncClient, job: Job) -> bool:
        wanted = {"task": job.task, "kwargs": job.kwargs, "webhook_url": self.webhook_url}
        try:
            response = await client.post("/api/tasks/submit", json=wanted)
        except httpx.TransportError:
            return False
        if response.status_code == ACCEPTED:
            self.acknowledged[str(response.json()["task_id"])] = job
        elif response.status_code != UNAVAILABLE:
            self.broken += 1
        return response.status_code == ACCEPTED


@dataclass(frozen=True, slots=True)
class Audit:
    """What was counted, in the order in which it is told, and what is wrong with it."""

    counts: Mapping[str, int]
    complaints: tuple[str, ...]


async def audit(db: Database, ledger: Ledger, receiver: Receiver) -> Audit:
    """Lay the rows, the acknowledgements and the webhooks beside each other."""
    rows = await insist(lambda: db.fetch(_ROWS), what="the audit")
    return compare({row["id"]: dict(row) for row in rows}, ledger, receiver.posted)


# One row for each task: its id is the primary key. Deliveries are counted, not joined.
_ROWS = """
SELECT t.id::text AS id, t.status, t.attempt, t.result::text AS result, t.error_type, t.finished_at,
       (SELECT count(*) FROM webhook_delivery d WHERE d.task_id = t.id) AS deliveries
  FROM task t
"""


def compare(rows: Mapping[str, Mapping[str, Any]], ledger: Ledger, posted: Iterable[Posted]) -> Audit:
    """Count, and find fault. Pure, so that its own faults can be found."""
    told = list(posted)
    known = ledger.acknowledged
    ended = {one for one, row in rows.items() if row["status"] in ENDED}
    first: dict[str, Any] = {}
    ids_of: dict[str, set[str]] = defaultdict(set)
    bodies_of: dict[str, set[bytes]] = defaultdict(set)
    for one in told:
        data = json.loads(one.body)["data"]
        first.setdefault(data["task_id"], data)
        ids_of[data["task_id"]].add(one.webhook_id)
        bodies_of[one.webhook_id].add(one.body)
    changed = {one for one, data in first.items() if one not in rows or _end(rows[one]) != _told_end(data)}
    several = {one for one, row in rows.items() if row["deliveries"] > 1 or len(ids_of[one]) > 1}
    lost = known.keys() - ended
    extras = rows.keys() - known.keys()
    wrong = {one for one, job in known.items() if one in ended and not _returned(rows[one], job)}
    complaints = {
        "acknowledged tasks have no row": known.keys() - rows.keys(),
        "acknowledged tasks have not ended": known.keys() & rows.keys() - ended,
        "unacknowledged extra tasks have not ended": extras - ended,
        "ended tasks have no webhook delivery, or several": {one for one in ended if rows[one]["deliveries"] != 1},
        "ended tasks were told to nobody": ended - first.keys(),
        "tasks were told of under several webhook ids": {one for one, ids in ids_of.items() if len(ids) > 1},
        "webhook ids were repeated with another body": {one for one, bodies in bodies_of.items() if len(bodies) > 1},
        "tasks are not as their first webhook told": changed,
        "tasks returned what they should not": wrong,
        "webhooks were not signed rightly": {one.webhook_id for one in told if not one.signed},
    }
    statuses = Counter(rows[one]["status"] for one in known.keys() & ended)
    runs = [row["attempt"] for row in rows.values()]
    counts = {
        "acknowledged": len(known),
        **{f"ended {status}": statuses[status] for status in ("SUCCESS", "FAILURE", "REVOKED")},
        "lost": len(lost),
        "ended twice": len(several | changed),
        "runs in all": sum(runs),
        "tasks run more than once": sum(run > 1 for run in runs),
        "distinct webhook ids": len({one for task in known for one in ids_of[task]}),
        "webhook POSTs in all": len(told),
        "submits not acknowledged": ledger.refused,
        "unacknowledged extras": len(extras),
    }
    said = [_complaint(what, found) for what, found in complaints.items() if found]
    if ledger.broken:
        said.append(f"{ledger.broken} submits were answered neither {ACCEPTED} nor {UNAVAILABLE}")
    return Audit(counts, tuple(said))


def _complaint(what: str, found: set[str]) -> str:
    examples = ", ".join(sorted(found)[:EXAMPLES])
    return f"{len(found)} {what}: {examples}{', …' if len(found) > EXAMPLES else ''}"


def _end(row: Mapping[str, Any]) -> tuple[object, ...]:
    """How a task ended, by its row."""
    finished: datetime | None = row["finished_at"]
    moment = finished and finished.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    error = None if row["status"] == "SUCCESS" else row["error_type"]
    return row["status"], row["attempt"], json.loads(row["result"] or "null"), error, moment


def _told_end(data: Mapping[str, Any]) -> tuple[object, ...]:
    """How a task ended, by its webhook."""
    error = data.get("error", {}).get("type")
    return data["status"], data["attempt"], data.get("result"), error, data["finished_at"]


def _returned(row: Mapping[str, Any], job: Job) -> bool:
    return row["status"] != "SUCCESS" or job.expected is None or json.loads(row["result"]) == job.expected

"""`taskqueue doctor`: what in the surroundings would break a promise, in plain words; and `taskqueue verify`.

Facts are read at the edge; what they mean is decided by pure functions. A
finding is *bad* if a promise does not hold with it, and a *risk* if one depends
on luck.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from app import db, delivery, keydesk, keys, lifecycle, migrations
from app.broker import Broker
from app.core import errors
from app.core.config import Settings
from app.utils.sealing import Seal

Level = Literal["ok", "risk", "bad"]
OLDEST_POSTGRES = 150_000
OLDEST_REDIS = (6, 2)
CONNECTIONS_OF_ONE = {"api": 10, "relay": 8, "keeper": 5}
"""Connections that one API, one relay and the keeper of one worker may open; a worker opens one more for each child."""
OVERDUE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at, and what it means."""

    level: Level
    about: str
    sentence: str


def judge_postgres(facts: Mapping[str, str], *, needed_revision: str, concurrency: int) -> list[Finding]:
    """What Postgres's version, tables and room mean. `facts` are those of `db.facts`."""
    found = []

    def say(level: Level, sentence: str) -> None:
        found.append(Finding(level, "Postgres", sentence))

    if int(facts["server_version_num"]) < OLDEST_POSTGRES:
        say("bad", f"it is {facts['server_version']}; 15 or newer is needed")
    else:
        say("ok", f"it is {facts['server_version']}")
    if facts["revision"] < needed_revision:
        have = facts["revision"] or "nothing"
        say("bad", f"its tables are at {have}, not at {needed_revision}: run taskqueue migrate")
    if facts["in_recovery"] == "on":
        say("bad", "it is a standby and can't be written to: DATABASE_URL must name the primary")
    needed = sum(CONNECTIONS_OF_ONE.values()) + concurrency
    if int(facts["max_connections"]) < needed:
        say("bad", f"max_connections is {facts['max_connections']}; one API, worker and relay need {needed}")
    return found + judge_durability(facts)


def judge_durability(facts: Mapping[str, str]) -> list[Finding]:
    """Whether a commit of this Postgres is one: the first promise rests on it."""
    found = []

    def say(level: Level, sentence: str) -> None:
        found.append(Finding(level, "Postgres", sentence))

    for name in ("fsync", "full_page_writes"):
        if facts[name] == "off":
            say("bad", f"{name} is off: a crash of its machine may lose or damage what was acknowledged")
    if facts["synchronous_commit"] == "off":
        say("bad", "synchronous_commit is off: a crash loses the last acknowledged tasks")
    elif not facts["synchronous_standby_names"]:
        if facts["followers"] != "0":
            say("risk", "its standbys follow asynchronously: a failover to one loses the last acknowledged tasks")
        else:
            say("risk", "no standby is synchronous: tasks survive a crash, but not the loss of its disk or a failover")
    elif facts["synchronous_commit"] == "local":
        say("risk", "synchronous_commit is local: a failover loses what the standby had not yet received")
    elif facts["followers"] == "0":
        say("bad", "synchronous_standby_names is set and no standby is connected: every commit waits for one")
    return found


def judge_redis(facts: Mapping[str, str]) -> list[Finding]:
    """What the settings of Redis mean. What it does not tell (`CONFIG` may be forbidden) is a risk."""
    found = []

    def say(level: Level, sentence: str) -> None:
        found.append(Finding(level, "Redis", sentence))

    version = tuple(int(part) for part in facts["redis_version"].split(".")[:2])
    if version < OLDEST_REDIS:
        say("bad", f"it is {facts['redis_version']}; 6.2 or newer is needed")
    else:
        say("ok", f"it is {facts['redis_version']}")
    policy = facts.get("maxmemory-policy")
    if policy is None:
        say("risk", "it does not tell its configuration: make sure that maxmemory-policy is noeviction")
    elif policy != "noeviction":
        say("risk", f"maxmemory-policy is {policy}: it may drop a queue; tasks are found again, but late")
    if facts.get("appendonly") == "no":
        say("risk", "appendonly is no: after its restart every queue is empty until the relay has filled it again")
    limit, used = int(facts.get("maxmemory", "0")), int(facts.get("used_memory", "0"))
    if limit and used > limit * 0.6:
        say("risk", f"{used * 100 // limit} % of maxmemory is used: beyond it messages wait in Postgres")
    return found


def judge_settings(settings: Settings) -> list[Finding]:
    """What our own settings mean together."""
    found = []

    def say(level: Level, sentence: str) -> None:
        found.append(Finding(level, "Settings", sentence))

    if settings.auth_mode == "none":
        say("risk", "TASKQUEUE_AUTH_MODE is none: whoever reaches the API may use it")
    if not settings.webhook_secrets:
        say("risk", "TASKQUEUE_WEBHOOK_SECRET is not set: receivers can't tell our webhooks from forged ones")
    if settings.webhook_allow_private:
        say("risk", "TASKQUEUE_WEBHOOK_ALLOW_PRIVATE is true: webhooks reach into your own network")
    elif not settings.webhook_blocked_cidrs:
        say("risk", "TASKQUEUE_WEBHOOK_BLOCKED_CIDRS is not set: name the ranges of your own network")
    if settings.sample_tasks:
        say("risk", "TASKQUEUE_SAMPLE_TASKS is true: anybody who may submit may kill and fill workers")
    return found


def judge_keys(settings: Settings, kept: Collection[keys.Kept]) -> list[Finding]:
    """What the API keys that there are mean under these settings."""
    if settings.auth_mode == "none":
        return []
    found = []

    def say(level: Level, sentence: str) -> None:
        found.append(Finding(level, "API keys", sentence))

    live = [key for key in kept if key.state == "live"]
    held_by = Counter(keydesk.kept_by(settings, key) for key in live)
    if not settings.secret_keys:
        say("bad", "TASKQUEUE_SECRET_KEY is not set: the API does not start without it")
    elif held_by["gone"]:
        say("bad", f"{held_by['gone']} live keys are kept by a TASKQUEUE_SECRET_KEY that is not set: they open nothing")
    if not live:
        say("bad", "there is none that opens anything: taskqueue keys create makes one")
    if held_by["older"]:
        say("ok", f"{held_by['older']} live keys are still kept by an older TASKQUEUE_SECRET_KEY: leave it there")
    return found


def judge_queues(unfinished: Collection[str], consumed: Collection[str]) -> list[Finding]:
    """What it means that these queues have tasks, and those are looked after."""
    strays = sorted(set(unfinished) - set(consumed))
    sentence = f"tasks are stuck in queues that TASKQUEUE_QUEUES does not name: {', '.join(strays)}"
    return [Finding("bad", "Queues", sentence)] if strays else []


def judge_secrets(marks: Mapping[bytes, int], seal: Seal | None) -> list[Finding]:
    """What it means that keys with these marks have sealed so many webhook secrets."""
    first, others = (None, ()) if seal is None else (seal.mark, seal.other_marks)
    unreadable = sum(number for mark, number in marks.items() if mark != first and mark not in others)
    older = sum(number for mark, number in marks.items() if mark in others)
    found = []
    if unreadable:
        sentence = f"no key of TASKQUEUE_SECRET_KEY opens {unreadable} webhook secrets: their owners' webhooks wait"
        found.append(Finding("bad", "Secrets", sentence))
    if older:
        sentence = (
            f"{older} webhook secrets need more than the first key of TASKQUEUE_SECRET_KEY, until a relay reseals"
        )
        found.append(Finding("risk", "Secrets", sentence))
    return found


async def examine(settings: Settings) -> list[Finding]:
    """Everything there is to find. A server that can't be reached is a finding, too."""
    found = judge_settings(settings)
    database = db.Database(settings.postgres_dsn, max_connections=1, application_name="taskqueue-doctor")
    broker = Broker(settings.redis_url.get_secret_value(), client_name="taskqueue-doctor")
    try:
        facts = await db.facts(database)
        found += judge_postgres(facts, needed_revision=migrations.head(), concurrency=settings.concurrency)
        if facts["revision"]:
            found += judge_queues(await lifecycle.unfinished_queues(database), settings.queues)
        if facts["revision"] >= migrations.head():
            found += judge_secrets(await delivery.marks(database), Seal.from_settings(settings))
            found += judge_keys(settings, await keys.kept(database))
    except errors.DatabaseUnavailable as away:
        found.append(Finding("bad", "Postgres", str(away)))
    try:
        found += judge_redis(await broker.facts())
    except errors.BrokerUnavailable as away:
        found.append(Finding("bad", "Redis", str(away)))
    await broker.close()
    await database.close()
    return found


async def verify(settings: Settings) -> list[lifecycle.Breach]:
    """Every invariant that the live database breaks. Raises DatabaseUnavailable."""
    database = db.Database(settings.postgres_dsn, max_connections=1, application_name="taskqueue-verify")
    try:
        return await lifecycle.breaches(database, overdue_seconds=settings.lease_seconds + OVERDUE_SECONDS)
    finally:
        await database.close()


def report(settings: Settings) -> tuple[Sequence[str], bool]:
    """The lines of `taskqueue doctor`, and whether nothing is bad."""
    found = asyncio.run(examine(settings))
    order = {"bad": 0, "risk": 1, "ok": 2}
    lines = [f"{one.level:<5} {one.about}: {one.sentence}" for one in sorted(found, key=lambda one: order[one.level])]
    return lines, all(one.level != "bad" for one in found)


def verification(settings: Settings) -> tuple[Sequence[str], bool]:
    """The lines of `taskqueue verify`, and whether every invariant holds."""
    broken = {breach.invariant: breach for breach in asyncio.run(verify(settings))}
    lines = []
    for invariant in lifecycle.invariants():
        breach = broken.get(invariant)
        lines.append(
            f"holds   {invariant}"
            if breach is None
            else f"BROKEN  {invariant}: {breach.rows} rows, such as {', '.join(breach.sample)}"
        )
    return lines, not broken

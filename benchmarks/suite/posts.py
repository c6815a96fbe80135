"""How many webhooks a second one relay process delivers, and its sender alone, beside a bare tuned httpx client.

The bare client knows its one URL beforehand, keeps its connections and neither
signs nor checks anything (`benchmarks.webhooks`). The relay does all that it
ever does: it claims what is due, signs, posts to twenty receivers, and settles.
"""

import asyncio
import json
from typing import Any

from benchmarks import fairness
from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.stage import Stage

SENDER, BARE, NAIVE = "ours, the sender alone", "bare tuned httpx", "an httpx client each"
RECEIVERS = 20
PATIENCE_SECONDS = 120.0

_DELIVERED = "SELECT count(*) FROM webhook_delivery WHERE status = 'delivered'"
_SECONDS = "SELECT extract(epoch FROM max(delivered_at) - min(delivered_at))::float8 FROM webhook_delivery"


async def measure(stage: Stage) -> list[Measure]:
    """Webhooks a second, on the clock and of the sending process's CPU time."""
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with fairness.receivers(RECEIVERS) as (origins, _):
        for number, _ in stage.plan.turns([]):
            for of_ours in (True, False) if number % 2 == 0 else (False, True):
                found = await (_relayed(stage, origins) if of_ours else _posted(stage))
                for name, (rate, by_cpu) in found.items():
                    rates.setdefault(name, []).append(rate)
                    cpu.setdefault(name, []).append(1e6 / by_cpu)
    comparisons = [
        Comparison(side=NAIVE, kind="peer"),
        Comparison(side=SENDER, kind="own"),
        Comparison(side=BARE, kind="limit", target=Target(at_least=0.85)),
    ]
    plain = [Comparison(side=one.side, kind=one.kind) for one in comparisons]
    return [
        Measure(name="webhooks, one relay process", unit="1/s", figures=rates, comparisons=comparisons),
        Measure(name="webhook, CPU of the sending process", unit="µs", figures=cpu, comparisons=plain),
    ]


async def _relayed(stage: Stage, origins: list[str]) -> dict[str, tuple[float, float]]:
    """The rates of a relay that finds so many webhooks due."""
    count = 1000 if stage.plan.quick else 3000
    await stage.cleared("ours", "task")
    async with stage.connection("ours") as database:
        await database.execute(fairness.DUE, origins, 0, count, 0.0)
        await database.execute("UPDATE webhook_delivery SET position = nextval('event_position')")
        await database.execute("VACUUM ANALYZE webhook_delivery")
        relay = await stage.relay()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not await database.fetchval(_DELIVERED):  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.01)
            before, cpu = await database.fetchval(_DELIVERED), relay.cpu_seconds()
            while await database.fetchval(_DELIVERED) < count:  # noqa: ASYNC110  # nothing tells of it
                await asyncio.sleep(0.02)
        cpu = relay.cpu_seconds() - cpu
        seconds: float = await database.fetchval(_SECONDS)
    await stage.ended(relay)
    return {OURS: (count / seconds, (count - before) / cpu)}


async def _posted(stage: Stage) -> dict[str, tuple[float, float]]:
    """The rates of the sender, of a bare client, and of one client each."""
    posts = 400 if stage.plan.quick else 1500
    path = stage.home / "webhooks.json"
    words = f"-m benchmarks.webhooks --rounds 1 --posts {posts} --naive --json".split()
    await stage.done([*words, str(path)], "ours", well=(0, 1))  # 1: the sender is slow, which is ours to say
    found: dict[str, Any] = json.loads(path.read_text())["rates"]
    names = {"sender": SENDER, "bare httpx": BARE, "a client each": NAIVE}
    return {names[name]: (rates[0][0], rates[0][1]) for name, rates in found.items()}

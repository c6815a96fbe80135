"""What a million waiting rows cost, beside a thousand: `benchmarks.backlog` and `benchmarks.listing`, in short.

Each call of ours is made on a short and on a long backlog in turns. They start
a Postgres of their own, whose databases take minutes to fill.
"""

import json

from benchmarks.suite.figures import OURS, Comparison, Measure, Target
from benchmarks.suite.stage import Stage

SHORT = "1,000 rows wait"
CALLS = {
    "submit": "submit",
    "claim": "claim",
    "settle": "settle",
    "take_lost, none": "sweep for lost messages",
    "take_due, none": "sweep for due tasks",
    "status": "status",
    "page of 10": "list, a page",
}
"""What is shown of all that is measured; the rest is in the tables of `make bench-backlog`."""


async def measure(stage: Stage) -> list[Measure]:
    """Microseconds of each call while a million tasks wait in each of three queues, and while a thousand do."""
    path = stage.home / "backlog.json"
    await stage.done(
        ["-m", "benchmarks.backlog", "--rounds", str(stage.plan.rounds), "--churn", "0", "--json", str(path)], "ours"
    )
    found = {line["operation"]: line for line in json.loads(path.read_text())["fresh"]}
    return [
        Measure(
            name=f"{name}, 1,000,000 rows wait",
            unit="µs",
            figures={OURS: [found[call]["1,000,000"]], SHORT: [found[call]["1,000"]]},
            comparisons=[Comparison(side=SHORT, kind="own", target=Target(at_most=1.2))],
        )
        for call, name in CALLS.items()
    ]

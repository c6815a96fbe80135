"""Writes the dashboards' JSON into the chart: `make dashboards`."""

from pathlib import Path

from k8s.observability import overview, queues, tasks, webhooks
from k8s.observability.rendering import render

PAGES = (overview.PAGE, queues.PAGE, tasks.PAGE, webhooks.PAGE)
DIRECTORY = Path(__file__).parents[2] / "charts" / "taskqueue" / "dashboards"


def main() -> None:
    """Write every page, and remove the files of pages that are gone."""
    DIRECTORY.mkdir(exist_ok=True)
    written = {f"{page.file}.json": render(page) for page in PAGES}
    for former in DIRECTORY.glob("*.json"):
        if former.name not in written:
            former.unlink()
    for name, text in written.items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()

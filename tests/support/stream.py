"""What a client that follows a task is sent."""

import asyncio
import json
from typing import Any
from uuid import UUID

import httpx

from app.core.stopping import stop
from tests.support.waiting import until

Event = tuple[str, str, dict[str, Any]]
"""Its name, its id and its data."""


class Stream:
    """What comes of a stream of events."""

    def __init__(self, client: httpx.AsyncClient, task_id: UUID, last_event_id: str | None = None) -> None:
        self.events: list[Event] = []
        self.status = 0
        self.content_type = ""
        headers = {"last-event-id": last_event_id} if last_event_id else {}
        self._reading = asyncio.create_task(self._read(client, f"/api/tasks/{task_id}/events", headers))

    async def _read(self, client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
        async with client.stream("GET", path, headers=headers) as answer:
            self.status, self.content_type = answer.status_code, answer.headers.get("content-type", "")
            fields: dict[str, str] = {}
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                elif "data" in fields:
                    self.events.append((fields["event"], fields["id"], json.loads(fields["data"])))
                    fields = {}

    async def got(self, count: int) -> list[Event]:
        await until(lambda: len(self.events) >= count, 10, f"{count} events")
        return self.events

    async def ended(self) -> list[Event]:
        async with asyncio.timeout(10):
            await self._reading
        return self.events

    async def leave(self) -> None:
        await stop(self._reading)

    def logged(self) -> list[tuple[int, int, str]]:
        """Attempt, number and message of each log line so far."""
        return [(data["attempt"], data["line"], data["message"]) for kind, _, data in self.events if kind == "log"]

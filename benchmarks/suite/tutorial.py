"""What the tutorials build: FastAPI, a SQLModel row, `delay()`, `AsyncResult`, and an httpx client for each webhook.

It is as good as they are: async SQLAlchemy with a pool, the row committed
before the task is sent, the results in Redis.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

import httpx
from celery import Celery
from fastapi import Depends, FastAPI
from pydantic import BaseModel
from sqlalchemy import Column, DateTime
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession

app = Celery("tutorial", broker=os.environ["REDIS_URL"], backend=os.environ["REDIS_URL"])
app.conf.task_default_queue = "tutorial"
engine = create_async_engine(os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:"))
sessions = async_sessionmaker(engine, class_=AsyncSession, expire_on_commit=False)


@contextlib.asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the table."""
    async with engine.begin() as connection:
        await connection.run_sync(SQLModel.metadata.create_all)
    yield


api = FastAPI(lifespan=lifespan)


class TutorialTask(SQLModel, table=True):
    """One row a task."""

    __tablename__ = "tutorial_task"

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    status: str = "PENDING"
    webhook_url: str | None = None
    created_at: datetime = Field(
        default_factory=lambda: datetime.now(UTC), sa_column=Column(DateTime(timezone=True), nullable=False)
    )


class Submit(BaseModel):
    """What is asked for."""

    task: str = "tutorial.echo"
    args: list[Any] = []
    webhook_url: str | None = None


@app.task(name="tutorial.echo")  # type: ignore[untyped-decorator]  # Celery ships no types
def echo(task_id: str, value: object, webhook_url: str | None) -> object:
    """Return the argument, and tell the webhook."""
    if webhook_url is not None:
        with httpx.Client() as client:
            client.post(webhook_url, json={"task_id": task_id, "status": "SUCCESS", "result": value})
    return value


async def session() -> AsyncIterator[AsyncSession]:
    """One a request."""
    async with sessions() as one:
        yield one


@api.post("/api/tasks/submit", status_code=202)
async def submit(wanted: Submit, rows: Annotated[AsyncSession, Depends(session)]) -> dict[str, str]:
    """Insert, commit, and block the loop for a `delay`."""
    row = TutorialTask(webhook_url=wanted.webhook_url)
    rows.add(row)
    await rows.commit()
    await rows.refresh(row)
    echo.apply_async((str(row.id), *wanted.args, wanted.webhook_url), task_id=str(row.id))
    return {"task_id": str(row.id)}


@api.get("/api/tasks/{task_id}/status")
def read_status(task_id: str) -> dict[str, str]:
    """What Celery's result backend says; in a thread, as it blocks."""
    return {"status": app.AsyncResult(task_id).status}


@api.get("/api/tasks/{task_id}/result")
def read_result(task_id: str) -> dict[str, Any]:
    """As the status."""
    found = app.AsyncResult(task_id)
    return {"status": found.status, "result": found.result if found.successful() else None}

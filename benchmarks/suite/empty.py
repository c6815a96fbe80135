"""The limit of an API in FastAPI: routes that read the same requests, answer the same, and do nothing."""

from typing import Annotated
from uuid import UUID

from fastapi import FastAPI, Path

from app import schemas
from app.core import ids
from app.core.statuses import TaskStatus

app = FastAPI()


@app.post("/api/tasks/submit", status_code=202)
async def submit(_: schemas.SubmitRequest) -> schemas.TaskCreated:
    """The body is parsed and validated, and that is all."""
    return schemas.TaskCreated(task_id=ids.uuid7())


@app.get("/api/tasks/{id}/status")
async def read_status(_: Annotated[UUID, Path(alias="id")]) -> schemas.StatusRead:
    """The id is validated, and that is all."""
    return schemas.StatusRead(status=TaskStatus.PENDING)

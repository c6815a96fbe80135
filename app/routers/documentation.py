"""The description of the API, for who has a key: it names the operator's own tasks."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from app.routers import door

router = APIRouter()


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, _: door.Reader) -> JSONResponse:
    """What FastAPI would serve to whoever asks."""
    described: dict[str, Any] = request.app.openapi()
    return JSONResponse(described)

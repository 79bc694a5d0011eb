"""GET /v1/models, /health, /ping, /version: what is served, and whether it answers."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from executor.serve.errors import ApiError
from executor.serve.service import Service

router = APIRouter()

VERSION = "1.0.0"  # of the HTTP interface


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": [card_of(request.app.state.service)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    service.check_model(name)
    return card_of(service)


def card_of(service: Service) -> dict[str, Any]:
    """`root` is what AutoTokenizer loads: benchmarks take their tokenizer from there."""
    folder = Path(service.recipe.model.model_path)
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "local",
        "root": str(folder.absolute()) if folder.is_dir() else service.recipe.model.model_path,
        "parent": None,
        "max_model_len": service.max_model_len,
    }


@router.get("/health")
@router.get("/ping", include_in_schema=False)
@router.post("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 while the next request would be answered at once."""
    service: Service = request.app.state.service
    reason = service.backend.fault
    if service.is_ready and not service.is_draining and reason is None:
        return Response(status_code=200)
    words = reason or ("the server is being stopped" if service.is_draining else "the model is being loaded")
    return ApiError(503, words).response()


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": VERSION}

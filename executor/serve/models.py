"""GET /v1/models, /health, /ping, /version: what is served, and whether it answers."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from executor.serve.service import Service

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    card = {
        "id": service.model_name,
        "object": "model",
        "created": service.created_s,
        "owned_by": "local",
        "root": service.recipe.model.model_path,
        "max_model_len": service.max_model_len,
    }
    return {"object": "list", "data": [card]}


@router.get("/health")
@router.get("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 while the next request would be answered at once."""
    service: Service = request.app.state.service
    reason = service.backend.fault
    if service.is_ready and not service.is_draining and reason is None:
        return Response(status_code=200)
    words = reason or ("the server is being stopped" if service.is_draining else "the model is being loaded")
    return JSONResponse({"error": {"message": words, "type": "service_unavailable_error"}}, 503)

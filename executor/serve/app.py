"""The HTTP application: its routes, and errors in one form."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from executor.serve import metrics, models
from executor.serve.errors import ApiError
from executor.serve.openai import chat
from executor.serve.page import route as page
from executor.serve.service import Service

ROUTERS = (models.router, metrics.router, chat.router, page.router)


def build_app(service: Service) -> FastAPI:
    app = FastAPI(title="Qwen-VL", docs_url=None, redoc_url=None)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return app


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:])
    return ApiError(400, f"{place or 'the body'}: {first['msg']}", param=place or None).response()


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

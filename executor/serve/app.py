"""The HTTP application: its routes, what stands before them, and errors in one form."""

from collections.abc import Iterator

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from executor.errors import UserError, nearest
from executor.recipe.schema import ServerSection
from executor.serve import metrics, models, tokens
from executor.serve.anthropic import messages
from executor.serve.bodies import of_validation
from executor.serve.errors import ApiError, ErrorReply, hung_up, in_words
from executor.serve.middleware import REQUEST_ID, AccessLog, BodyLimit, KeyGate, Net, OriginGate
from executor.serve.mindie import generate
from executor.serve.openai import chat, completions, responses
from executor.serve.openai.response_store import ResponseStore
from executor.serve.page import route as page
from executor.serve.service import Service

ROUTERS = (
    models.router,
    metrics.router,
    tokens.router,
    chat.router,
    completions.router,
    responses.router,
    messages.router,
    generate.router,
    page.router,
)
ERRORS = {
    "4XX": {"model": ErrorReply, "description": "The request is refused"},
    "5XX": {"model": ErrorReply, "description": "The request failed, or may come again later"},
}
ANTHROPIC_ERRORS = {name: {"description": words["description"]} for name, words in ERRORS.items()}
NEAR = 0.8  # how alike a path must be to one that is served, to be a slip of it: /chat is none of /health
PAGE_PATHS = "/page/"  # what the chat page asks for
OPEN_PATHS = ("/", "/health", "/ping")  # without the key: the page asks for it


def build_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="Qwen-VL", version=models.VERSION, docs_url=None, redoc_url=None,
        middleware=list(_middleware(service.recipe.server)),
    )  # fmt: skip
    app.state.service = service
    app.state.responses = ResponseStore()
    for router in ROUTERS:
        app.include_router(router, responses=ANTHROPIC_ERRORS if router is messages.router else ERRORS)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(ClientDisconnect, _hung_up)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    return app


def _middleware(settings: ServerSection) -> Iterator[Middleware]:
    """From the outermost in."""
    yield Middleware(AccessLog, log_prompts=settings.log_prompts)
    if settings.allowed_origins:
        yield Middleware(
            CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=("GET", "POST"), allow_headers=("*",),
            expose_headers=(REQUEST_ID, "Retry-After"),
        )  # fmt: skip
    yield Middleware(OriginGate, allowed=settings.allowed_origins)
    yield Middleware(Net)
    if settings.api_key:
        yield Middleware(KeyGate, key=settings.api_key, open_paths=OPEN_PATHS)
    yield Middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_held_bytes=settings.max_held_body_bytes)


async def _api_error(request: Request, error: ApiError) -> JSONResponse:
    return error.response(request.url.path)


async def _user_error(request: Request, error: UserError) -> JSONResponse:
    return in_words(400, str(error)).response(request.url.path)


async def _hung_up(request: Request, error: ClientDisconnect) -> JSONResponse:
    return hung_up().response(request.url.path)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    return of_validation(error.errors()).response(request.url.path)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    """Of the framework: a route that is not there, or another method."""
    path = request.scope["path"]
    asked = f"{request.method} {path}"
    if error.status_code == 404:
        served = _served()
        hint = nearest(path, [each for each, _ in served], NEAR)
        routes = ", ".join(f"{method} {each}" for each, method in served)
        words = f"{asked} is not served here{hint}; served: {routes}"
    elif error.status_code == 405:
        words = f"{asked} is not served here; allowed: {(error.headers or {}).get('Allow', 'another method')}"
    else:
        words = f"{asked}: {error.detail}"
    return ApiError(error.status_code, words, headers=error.headers).response(request.url.path)


def _served() -> list[tuple[str, str]]:
    """(path, method) of every route for clients."""
    routes = [route for router in ROUTERS for route in router.routes]
    for_clients = [each for each in routes if isinstance(each, APIRoute) and not each.path.startswith(PAGE_PATHS)]
    return [(route.path_format, method) for route in for_clients for method in sorted(route.methods)]

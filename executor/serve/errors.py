"""Errors as clients read them: `{"error": {"message", "type", "param", "code"}}` and an HTTP status.

Anthropic's clients read `{"type": "error", "error": {"type", "message"}}`: they get it where its protocol is spoken.
"""

import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from executor.errors import printable
from executor.serve.asks import Delta, Failure, FailureKind

STATUS: dict[FailureKind, int] = {
    "refused": 400, "unreachable": 422, "late": 504, "aborted": 499, "lost": 503, "fault": 500,
}  # fmt: skip
TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    503: "service_unavailable_error", 504: "timeout_error",
}  # fmt: skip
ANTHROPIC_PATH = "/v1/messages"
ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
CONTEXT = "maximum context length"  # clients look for these words
RETRY_AFTER_S = 1
EXCHANGE = "executor.exchange"  # of the ASGI scope: executor.serve.middleware.Exchange

_PLACE = re.compile(
    r"(text\.format|output_config|messages|tools|tool_choice|prompt|response_format|structured_outputs|guided_[a-z]+|"
    r"mm_processor_kwargs|media_io_kwargs|chat_template_kwargs)"
    r"(\[\d+\]|\.\w+)*(?=[ :])"
)


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What every refusal and fault looks like, as the API's description has it."""

    error: ErrorObject


class ApiError(Exception):
    """A request that gets `status` and the error's object instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = printable(message)  # requests hold halves of characters, which cannot be sent
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> JSONResponse:
        """The reply to a request for `path`, in the form of the protocol that is spoken there."""
        body = anthropic_body(self) if path.startswith(ANTHROPIC_PATH) else self.body
        return _ErrorResponse(self, body)


class _ErrorResponse(JSONResponse):
    """Tells the access log why."""

    def __init__(self, error: ApiError, body: Mapping[str, Any]) -> None:
        super().__init__(body, error.status, headers=error.headers)
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        note_error(scope, self._error)
        await super().__call__(scope, receive, send)


def note_error(scope: Scope, error: ApiError) -> None:
    """For the request's line in the access log."""
    if EXCHANGE in scope:
        scope[EXCHANGE].error = error


def anthropic_body(error: ApiError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def of_failure(failure: Failure) -> ApiError:
    message, param = failure.message, failure.param
    if param and CONTEXT in message:
        return ApiError(STATUS[failure.kind], message, param=param, code="context_length_exceeded")
    if param and not message.startswith(param):
        message = f"{param}: {message}"
    return in_words(STATUS[failure.kind], message)


def of_answer(delta: Delta) -> ApiError:
    """Of an answer that ends with an error."""
    return ApiError(400 if delta.is_own_fault else 500, delta.error)


def in_words(status: int, message: str) -> ApiError:
    """An error of a message that begins with the place it speaks of ("messages[0].content[1]: ..."), if it does."""
    place = _PLACE.match(message)
    code = "context_length_exceeded" if CONTEXT in message else None
    return ApiError(status, printable(message), param=place[0] if place else None, code=code)


def hung_up() -> ApiError:
    return ApiError(499, "the client has hung up")


def busy(message: str) -> ApiError:
    """Nothing is wrong with the request; it may come again."""
    return ApiError(503, message, code="server_busy", headers={"Retry-After": str(RETRY_AFTER_S)})

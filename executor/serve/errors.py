"""Errors as clients read them: `{"error": {"message", "type", "param", "code"}}` and an HTTP status."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from executor.errors import printable
from executor.serve.asks import Failure, FailureKind

STATUS: dict[FailureKind, int] = {"refused": 400, "unreachable": 422, "late": 504, "aborted": 499, "fault": 500}
TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error",
    422: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error",
}  # fmt: skip
RETRY_AFTER_S = 1


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

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def of_failure(failure: Failure) -> ApiError:
    message, param = failure.message, failure.param
    if param and not message.startswith(param):
        message = f"{param}: {message}"
    return ApiError(STATUS[failure.kind], message, param=param)


def busy(message: str) -> ApiError:
    """Nothing is wrong with the request; it may come again."""
    return ApiError(503, message, code="server_busy", headers={"Retry-After": str(RETRY_AFTER_S)})

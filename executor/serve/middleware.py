"""What every request passes before its route: log and ids, key, origin, size; and the net below all routes.

Plain ASGI, so that a stream's chunks go through without being looked at. Knows no route.
"""

import hmac
import logging
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from executor.serve.errors import EXCHANGE, ApiError
from executor.serve.jsontext import dumps
from executor.serve.room import Body, Room

logger = logging.getLogger(__name__)
access = logging.getLogger("executor.serve.access")

REQUEST_ID = "X-Request-ID"
POLLED = ("/health", "/ping", "/metrics")  # asked every few seconds: not worth a line
LOGGED_CHARACTERS = 2000  # of each text of a prompt
REASON_CHARACTERS = 300  # of an error's message

_ID = re.compile(r"[!-~]{1,128}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_DATA_URL = re.compile(r"data:[^\s'\",]*,[^\s'\"]*", re.IGNORECASE)


@dataclass
class Exchange:
    """One request and its reply, as the access log has them."""

    request_id: str
    keeps_prompts: bool
    started_s: float
    status: int | None = None  # once the reply has begun
    is_whole: bool = False  # the reply was sent to its end
    answer_id: str | None = None
    asked: Mapping[str, Any] | None = None  # the body's object, where prompts are logged
    error: ApiError | None = None  # that the client was told


class AccessLog:
    """One line for each request, when its reply ends; prompts only where the recipe says so.

    A client's X-Request-ID is kept, else one is made; the reply has it too.
    """

    def __init__(self, app: ASGIApp, *, log_prompts: bool) -> None:
        self.app = app
        self.log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        exchange = scope[EXCHANGE] = Exchange(request_id, self.log_prompts, time.monotonic())
        header = (REQUEST_ID.lower().encode(), request_id.encode())

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            elif not message.get("more_body"):
                exchange.is_whole = True
            await send(message)

        try:
            await self.app(scope, receive, send_noting)
        finally:
            _write_line(scope, exchange)


def _write_line(scope: Scope, exchange: Exchange) -> None:
    path = scope.get("raw_path", scope["path"].encode("ascii", "backslashreplace")).decode("ascii", "backslashreplace")
    level = logging.DEBUG if path in POLLED and exchange.status == 200 else logging.INFO
    if not access.isEnabledFor(level):
        return
    host, port = scope.get("client") or ("-", 0)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    took_ms = (time.monotonic() - exchange.started_s) * 1000
    line = f"{now} {scope['method']} {path} {exchange.status or '-'} {took_ms:.1f} ms"
    line += f" request={exchange.request_id} client={host}:{port}"
    if exchange.answer_id:
        line += f" answer={exchange.answer_id}"
    if not exchange.is_whole:
        line += " (cut off)"
    if exchange.error is not None:
        line += f" {_reason(exchange.error)}"
    if exchange.asked is not None:
        line += f" {dumps(shortened(exchange.asked))}"
    access.log(level, "%s", line)


def _reason(error: ApiError) -> str:
    """An error in one line, without what a picture holds."""
    words = _CONTROL.sub(" ", _DATA_URL.sub("data:...", error.message))
    words = words if len(words) <= REASON_CHARACTERS else f"{words[:REASON_CHARACTERS]}..."
    named = [f"{name}={value}" for name, value in (("code", error.code), ("param", error.param)) if value]
    return " ".join([*named, f"error={dumps(words)}"])


def shortened(tree: Any) -> Any:
    """JSON with its long texts cut: pictures are megabytes."""
    if isinstance(tree, str):
        return tree if len(tree) <= LOGGED_CHARACTERS else f"{tree[:40]}... ({len(tree)} characters)"
    if isinstance(tree, Mapping):
        return {key: shortened(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [shortened(value) for value in tree]
    return tree


class Net:
    """Below all routes: what none of them foresaw is logged, and answered with status 500 and the error's object."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except Exception as error:  # the HTTP boundary: one request's fault is its own
            exchange: Exchange | None = scope.get(EXCHANGE)
            if exchange is None:
                raise
            logger.exception("%s %s failed (request %s)", scope["method"], scope["path"], exchange.request_id)
            if exchange.status is None:
                words = f"the server failed with {type(error).__name__}; its log has the request {exchange.request_id}"
                await ApiError(500, words, code="internal_error").response(scope["path"])(scope, receive, send)


class KeyGate:
    """Refuses who has not the key: `Authorization: Bearer KEY`, or Anthropic's `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, *, key: str, open_paths: Sequence[str]) -> None:
        self.app = app
        self.key = key.encode()
        self.open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths and not self._is_known(scope):
            error = ApiError(
                401, "the API key is missing or wrong; send it as the header 'Authorization: Bearer KEY'",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
            await error.response(scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = (key.strip() if kind.lower() == b"bearer" else b"", headers.get(b"x-api-key", b""))
        return any([hmac.compare_digest(each, self.key) for each in given])


class OriginGate:
    """Refuses what other web pages make a browser send here unasked: bodies are read whatever their content type."""

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str]) -> None:
        self.app = app
        self.allowed = frozenset(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS") and "*" not in self.allowed:
            headers = Headers(scope=scope)
            origin, site = headers.get("origin", ""), headers.get("sec-fetch-site")
            is_foreign = site in ("cross-site", "same-site")
            if site is None and origin:  # http from another machine: browsers name the page alone
                is_foreign = urlsplit(origin).netloc != headers.get("host")
            if is_foreign and origin not in self.allowed:
                words = f"the web page {origin or 'of another address'} may not ask this server; its operator can allow"
                await ApiError(403, f"{words} it in server_config.allowed_origins").response(scope["path"])(
                    scope, receive, send
                )
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses a body of more than `max_bytes` before it is read, and one of unknown length when it has passed them.

    All bodies whose requests are not answered yet hold about `max_held_bytes` at most: further ones wait unread.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_held_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.room = Room(max_held_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self.max_bytes:
            await self._error(f"{length} bytes").response(scope["path"])(scope, receive, send)
            return
        body = Body()

        async def receive_counting() -> Message:
            await self.room.wait(body)
            message = await receive()
            is_last = not message.get("more_body")
            self.room.add(body, len(message.get("body", b"")), is_last=is_last)
            if body.num_bytes > self.max_bytes:
                raise self._error("more")
            return message

        async def send_noting(message: Message) -> None:
            if message["type"] == "http.response.start":  # what was asked is with the engine, or done
                self.room.leave(body)
            await send(message)

        try:
            await self.app(scope, receive_counting, send_noting)
        finally:
            self.room.leave(body)

    def _error(self, size: str) -> ApiError:
        words = f"the body has {size}; allowed: {self.max_bytes} bytes (server_config.max_body_bytes)"
        return ApiError(413, f"{words}; send smaller or fewer pictures", code="body_too_large")

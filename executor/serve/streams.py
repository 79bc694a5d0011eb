"""Replies that are streamed as server-sent events, and replies whose client may hang up.

Nothing is sent before the first event: what is refused until then has its own HTTP status. What fails later is an
`error` event, and the connection is cut without its closing chunk, so that no client takes the answer for whole.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from executor.serve.errors import ApiError, hung_up, note_error
from executor.serve.feed import Feed, Joined
from executor.serve.jsontext import dumps

logger = logging.getLogger(__name__)

T = TypeVar("T")
DONE = "data: [DONE]\n\n"
# A browser throws away what it has received and not yet handed to its page when the connection breaks.
READ_ERROR_S = 0.25


def event(tree: object, name: str | None = None) -> str:
    """One event of a JSON object; `name` where a protocol gives its events names."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {dumps(tree)}\n\n"


def error_event(error: ApiError) -> str:
    return event(error.body)


class EventStream(Response):
    """`lines` are whole events ("data: {...}\\n\\n"); what one of them raises before the first is the caller's.

    `write_error`: an error after the first event, in the endpoint's form.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        feed: Feed | Joined,
        first: str,
        lines: AsyncIterator[str],
        write_error: Callable[[ApiError], str] = error_event,
        media_type: str | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type=media_type)
        del self.headers["content-length"]
        self._feed = feed
        self._first = first
        self._lines = lines
        self._write_error = write_error

    @classmethod
    async def start(
        cls,
        request: Request,
        feed: Feed | Joined,
        lines: AsyncIterator[str],
        *,
        write_error: Callable[[ApiError], str] = error_event,
        media_type: str | None = None,
    ) -> "EventStream":
        """Waits for the first event. Raises ApiError for a request that is refused until then."""
        first = await answered(request, feed, anext(lines))
        return cls(feed, first, lines, write_error, media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(scope, send))
        leaver = asyncio.ensure_future(_hung_up(receive))
        try:
            await asyncio.wait((writer, leaver), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            self._feed.abort()
            for task in (writer, leaver):
                task.cancel()
            await asyncio.gather(writer, leaver, return_exceptions=True)

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first.encode(), "more_body": True})
        try:
            async for line in self._lines:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        except ApiError as error:
            note_error(scope, error)
            await send({"type": "http.response.body", "body": self._write_error(error).encode(), "more_body": True})
            await asyncio.sleep(READ_ERROR_S)
            return  # without the end of the body: the server closes the connection
        await send({"type": "http.response.body", "body": b""})


async def answered(request: Request, feed: Feed | Joined, work: Awaitable[T]) -> T:
    """The result of `work`; a client that hangs up meanwhile ends the request. Raises ApiError 499 then."""
    worker = asyncio.ensure_future(work)
    leaver = asyncio.ensure_future(_hung_up(request.receive))
    try:
        await asyncio.wait((worker, leaver), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise hung_up()
        return worker.result()
    finally:
        if not worker.done() or worker.cancelled() or worker.exception() is not None:
            feed.abort()
            worker.cancel()
        leaver.cancel()
        await asyncio.gather(worker, leaver, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

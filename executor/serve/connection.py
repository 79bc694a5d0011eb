"""A client's connection: HTTP as uvicorn speaks it, within bounds of size and time.

A client that sends without an end, sends nothing, or never reads what it is answered holds a connection, and memory,
for a bounded time. An offer to change the protocol is passed over, as RFC 9110 7.8 has it, and its request answered.
Knows no route; errors have their one form.
"""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from executor.serve.errors import ApiError
from executor.serve.jsontext import dumps

HEAD_BYTES = 64 * 1024
"""Of a request's first line and headers; also of what may stand between two pieces of a body."""
KEEP_ALIVE_S = 60
"""That a connection may be idle before the first request, and between two."""
HEAD_S = 15
"""That a request's head may take beyond that."""
STALL_S = 60.0
"""In which a client must send more of a body, and read some of its answer."""
BODY_BYTES_PER_S = 1024
"""That a body must come at, STALL_S aside."""
LOOK_TICKS = 10
"""How often the times are looked at, in uvicorn's ticks of 0.1 s."""


class Connection(HttpToolsProtocol):
    """One connection. Times are of time.monotonic."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._idle_since_s = self._head_end_s = self._received_s = self._read_s = time.monotonic()
        self._last_acknowledged_bytes = 0
        self._body_bytes = 0
        self._loose_bytes = 0  # since the last piece of a body, or the end of a head or body
        self._is_in_body = False
        self._is_resuming = False  # the parser is fed a head again

    # What is received

    def data_received(self, data: bytes) -> None:
        self._received_s = time.monotonic()
        self._has_progress = False
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._pass_over(data[offer.args[0] :])
            return
        except httptools.HttpParserError:
            self.send_400_response("this is no valid HTTP request")
            return
        self._loose_bytes = 0 if self._has_progress else self._loose_bytes + len(data)
        if self._loose_bytes > HEAD_BYTES:
            self._refuse(431, f"the request's headers have more than {HEAD_BYTES} bytes, which are allowed; send fewer")

    def _pass_over(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 although the client has offered another protocol, at which the parser has stopped.

        The parser takes the body for the other protocol's: a new one is fed what says how long it is.
        """
        if self.transport.is_closing():
            return
        self.cycle.more_body = True
        self.cycle.message_event.clear()
        self.parser = httptools.HttpRequestParser(self)
        framing = [
            name + b": " + value + b"\r\n"
            for name, value in self.headers
            if name in (b"content-length", b"transfer-encoding")
        ]
        self._is_resuming = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        finally:
            self._is_resuming = False
        if rest:
            self.data_received(rest)

    def on_message_begin(self) -> None:
        if not self._is_resuming:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_resuming:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_resuming and not self._is_in_body:  # what stands behind a body is not kept
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_progress = self._is_in_body = True
        if not self._is_resuming:
            super().on_headers_complete()
            self._head_end_s, self._body_bytes = time.monotonic(), 0

    def on_body(self, body: bytes) -> None:
        self._has_progress = True
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_progress, self._is_in_body = True, False
        if self.parser.should_upgrade():  # its body is still to come
            return
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._idle_since_s = time.monotonic()
        super().on_response_complete()

    # What ends a connection

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def check_times(self, now_s: float) -> None:
        """End it where its client has taken too long."""
        if not self.transport.get_write_buffer_size():
            self._read_s = now_s
        elif (acknowledged_bytes := self._acknowledged_bytes()) != self._last_acknowledged_bytes:
            self._read_s, self._last_acknowledged_bytes = now_s, acknowledged_bytes
        if now_s - self._read_s > STALL_S:
            self.transport.abort()  # a close would wait for the rest to be read
        elif self.transport.is_closing():
            return
        elif self.cycle is None or self.cycle.response_complete:
            if now_s - self._idle_since_s > KEEP_ALIVE_S + HEAD_S:
                self.transport.close()
        elif self.cycle.more_body and not self.flow.read_paused:
            is_slow = now_s - self._head_end_s > STALL_S + self._body_bytes / BODY_BYTES_PER_S
            if is_slow or now_s - self._received_s > STALL_S:
                self._refuse(408, "the request's body has not come in time; send it again")

    def _acknowledged_bytes(self) -> int:
        """What the client's side has taken so far: tcpi_bytes_acked of Linux (include/uapi/linux/tcp.h, since 4.1)."""
        info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        return int.from_bytes(info[120:128], sys.byteorder)

    def _refuse(self, status: int, message: str) -> None:
        """Answer with an error, unless an answer has begun, and close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            error = ApiError(status, message)
            body = dumps(error.body).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """A server of such connections. Signals are its caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % LOOK_TICKS == 0:
            now_s = time.monotonic()
            for connection in list(self.server_state.connections):
                connection.check_times(now_s)
        return await super().on_tick(counter)

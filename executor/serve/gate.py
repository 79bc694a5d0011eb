"""Where the leaders of replicas come to: a listening socket that lets in whoever shows the job's token.

Leaders call the front door, so that its address alone must be known to all. `Front` is what they are told.
Knows no asks and no engines: a `Peer` carries messages (executor.serve.wire).
"""

import asyncio
import errno
import hmac
import json
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from executor.serve import wire

logger = logging.getLogger(__name__)

HELLO_S = 10.0
"""How long someone who has connected may take to show the token."""
HELLO_BYTES = 1 << 20
BUFFER_BYTES = 1 << 20  # read ahead of a message's end
BACKLOG = 128


@dataclass(frozen=True)
class Front:
    """Where a front door listens for leaders, and the token that it wants to see."""

    address: str
    port: int
    token: str

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> "Front":
        return cls(**json.loads(text))


class Peer:
    """One side of a connection. `hello` is what the leader has said about itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hello: dict[str, Any]) -> None:
        self.hello = hello
        self._reader, self._writer = reader, writer

    def send(self, tree: Any, *, has_long: bool = False) -> None:
        """Nothing is sent on a connection that has ended; `receive` tells of that. `has_long`: as wire.pack."""
        if not self._writer.is_closing():
            self._writer.write(wire.pack(tree, has_long=has_long))

    async def receive(self) -> Any:
        """The next message; None when the other side has gone, or speaks another language."""
        try:
            return await wire.read(self._reader)
        except ValueError as error:
            logger.error("a replica's message cannot be read: %s", error)
            return None

    async def flush(self) -> None:
        """Wait until everything is with the operating system."""
        try:
            await self._writer.drain()
        except OSError:
            return  # the other side has gone, and needs nothing any more

    def close(self) -> None:
        self._writer.close()


class Gate:
    """Open until `close`. Every leader that is let in becomes a Peer, which `on_peer` serves for as long as it runs."""

    def __init__(self, server: asyncio.Server, front: Front, writers: set[asyncio.StreamWriter]) -> None:
        self.front = front
        self._server, self._writers = server, writers

    @classmethod
    async def open(cls, address: str, on_peer: Callable[[Peer], Awaitable[None]]) -> "Gate":
        """Listen on `address`, one of this machine's, at a free port. Raises OSError."""
        token = secrets.token_hex(32)
        writers: set[asyncio.StreamWriter] = set()

        async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.add(writer)
            try:
                async with asyncio.timeout(HELLO_S):  # wait_for may lose a cancellation
                    hello = await wire.read(reader, HELLO_BYTES)
            except (TimeoutError, ValueError):
                hello = None
            if not isinstance(hello, dict) or not hmac.compare_digest(str(hello.pop("token", "")), token):
                logger.warning("%s was not let in: it has not this job's token", writer.get_extra_info("peername"))
                writers.discard(writer)
                writer.close()
                return
            try:
                await on_peer(Peer(reader, writer, hello))
            finally:
                writers.discard(writer)
                writer.close()

        listener = _listen(address)
        server = await asyncio.start_server(let_in, sock=listener, backlog=BACKLOG, limit=BUFFER_BYTES)
        return cls(server, Front(address, listener.getsockname()[1], token), writers)

    def close(self) -> None:
        """Nobody comes in any more, and the connections that there are end."""
        self._server.close()
        for writer in self._writers:
            writer.close()


async def call(front: Front, hello: dict[str, Any]) -> Peer:
    """The leader's side: a connection that shows the token. Raises OSError."""
    reader, writer = await asyncio.open_connection(front.address, front.port, limit=BUFFER_BYTES)
    peer = Peer(reader, writer, hello)
    peer.send({**hello, "token": front.token})
    return peer


def call_blocking(front: Front, hello: dict[str, Any]) -> socket.socket:
    """The same for a thread that may wait."""
    connection = socket.create_connection((front.address, front.port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(wire.pack({**hello, "token": front.token}))
    return connection


def _listen(address: str) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.bind(where)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            listener.close()
            raise
        # A name that leads here by way of another machine (a service's), which torchrun or Slurm has given.
        logger.warning("%s is no address of this machine: the gate listens on all of its networks", address)
        listener.bind(("", 0))
    return listener

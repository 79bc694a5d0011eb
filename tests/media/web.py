"""A web server on loopback whose replies are given byte by byte, and the names that lead to it."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from executor.media.fetch import Fetcher
from executor.media.hosts import DOMAINS_KEY, PRIVATE_KEY, parse_rules

PUBLIC = "93.184.216.34"
Reply = bytes | Callable[[socket.socket], None]


def ok(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def found(url: str, status: str = "302 Found") -> bytes:
    return ok(b"", f"Location: {url}", status=status)


@dataclass
class Web:
    """`replies`: path to reply. `asked`: the heads of requests, `connected`: the addresses that were connected to."""

    replies: Mapping[str, Reply]
    port: int
    names: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    def fetcher(self, *hosts: str, private: tuple[str, ...] = (), timeout_s: float = 5.0, **more: object) -> Fetcher:
        """A fetcher for which every name is at a public address, and every address is this server."""

        def resolve(host: str) -> list[str]:
            self.resolved.append(host)
            return self.names.get(host, [PUBLIC])

        def connect(address: str, port: int, timeout_s: float) -> socket.socket:
            self.connected.append((address, port))
            return socket.create_connection(("127.0.0.1", self.port), timeout_s)

        rules = parse_rules(hosts, DOMAINS_KEY), parse_rules(private, PRIVATE_KEY)
        return Fetcher(*rules, timeout_s, resolve, connect, **more)


@contextmanager
def serving(replies: Mapping[str, Reply], certificate: Path | None = None) -> Iterator[Web]:
    """Each connection is answered in a thread of its own and closed. `certificate`: a PEM file with its key."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    web = Web(replies, listener.getsockname()[1])
    tls = None
    if certificate is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)

    def answer(connection: socket.socket) -> None:
        with suppress(OSError):
            if tls is not None:
                connection = tls.wrap_socket(connection, server_side=True)
            head = b""
            while b"\r\n\r\n" not in head and (piece := connection.recv(4096)):
                head += piece
            web.asked.append(head.decode("latin-1"))
            reply = replies.get(head.split(b" ")[1].decode("latin-1"), ok(b"", status="404 Not Found"))
            reply(connection) if callable(reply) else connection.sendall(reply)
        connection.close()

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection = listener.accept()[0]
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def make_certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for `name`, with its key in one file."""
    path = folder / f"{name}.pem"
    parts = [folder / "key.pem", folder / "cert.pem"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}", "-keyout", str(parts[0]),
         "-out", str(parts[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path

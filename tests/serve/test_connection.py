"""Connections of clients that send or read slowly, too much, or something else than HTTP/1.1."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from executor.serve import connection as module
from executor.serve.listener import listen
from executor.serve.server import config_of
from tests.serve.conftest import Running
from tests.serve.test_life import CHAT, asked, until

LIMIT_S = 0.4


@pytest.fixture
def impatient(server: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """The server, which waits for nobody longer than LIMIT_S."""
    monkeypatch.setattr(module, "LOOK_TICKS", 1)
    monkeypatch.setattr(module, "KEEP_ALIVE_S", LIMIT_S)
    monkeypatch.setattr(module, "HEAD_S", 0)
    monkeypatch.setattr(module, "STALL_S", LIMIT_S)
    return server


@contextmanager
def connected(server: Running, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.settimeout(20)
        client.connect((host, int(port)))
        yield client


def post(body: dict[str, object], *headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"POST {CHAT} HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


def rest_of(client: socket.socket) -> bytes:
    """What comes until the server ends the connection."""
    received = b""
    try:
        while data := client.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    return received


def reply_on(client: socket.socket) -> tuple[int, dict[str, object]]:
    """One reply of known length."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(1 << 16)
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length"))
    while len(body) < length:
        body += client.recv(1 << 16)
    return int(head.split()[1]), json.loads(body)


def send_slowly(client: socket.socket, piece: bytes, since_s: float) -> float:
    """Pieces until the server ends the connection; how long that took, in seconds.

    `since_s` (time.monotonic) is before the connection was made: the server's clock starts no earlier.
    """
    begun = time.monotonic()
    client.settimeout(0.05)
    while time.monotonic() < begun + 20:
        try:
            client.sendall(piece)
            if not client.recv(1, socket.MSG_PEEK):
                break
            break  # an answer has come
        except TimeoutError:
            continue
        except OSError:
            break
    client.settimeout(20)
    return time.monotonic() - since_s


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_request_that_does_not_come_ends_the_connection(impatient: Running, sent: bytes) -> None:
    with connected(impatient) as client:
        client.sendall(sent)
        assert rest_of(client) == b""


def test_headers_that_come_slowly_end_the_connection(impatient: Running) -> None:
    begun = time.monotonic()
    with connected(impatient) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert LIMIT_S <= send_slowly(client, b"a: b\r\n", begun) < 10


def test_a_request_after_another_has_its_time_too(impatient: Running) -> None:
    with connected(impatient) as client:
        client.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reply_on(client)[0] == 200
        client.sendall(b"G")  # which ends uvicorn's own time for idle connections
        assert rest_of(client) == b""


@pytest.mark.parametrize("slow", [False, True])
def test_a_body_that_does_not_come_is_a_408(impatient: Running, slow: bool) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode()
    begun = time.monotonic()
    with connected(impatient) as client:
        client.sendall(head + b"{")
        if slow:
            assert LIMIT_S <= send_slowly(client, b" ", begun) < 10
        status, body = reply_on(client)
        assert status == 408 and "body" in body["error"]["message"]
        assert rest_of(client) == b""


def test_a_body_that_nobody_wants_is_not_read_for_ever(impatient: Running) -> None:
    begun = time.monotonic()
    with connected(impatient) as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert reply_on(client)[0] == 404
        assert LIMIT_S <= send_slowly(client, b"x", begun) < 10


PIECE = b"x" * 65536


async def flood(scope, receive, send) -> None:
    """An application whose answers no operating system keeps for a client: without an end, or of 32 MiB at once."""
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/whole":
        await send({"type": "http.response.body", "body": PIECE * 512})
        return
    leaver = asyncio.ensure_future(receive())
    while not leaver.done():
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
        await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/endless", "/whole"])
@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_an_answer_that_is_not_read_ends_the_connection(impatient: Running, path: str, header: bytes) -> None:
    listener = listen(impatient.service.recipe.server)
    flooding = module.Server(config_of(flood, impatient.service.recipe.server))
    thread = threading.Thread(target=asyncio.run, args=(flooding.serve(sockets=[listener]),))
    thread.start()
    address = listener.getsockname()
    try:
        with socket.create_connection(address) as idle, socket.create_connection(address) as slow:
            for client in (idle, slow):
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n".encode() + header + b"\r\n")
            begun = time.monotonic()
            while time.monotonic() < begun + 4 * LIMIT_S:
                slow.recv(1 << 18)
                time.sleep(0.05)
            connections = flooding.server_state.connections
            assert [each.client for each in connections] == [slow.getsockname()]  # whoever reads goes on
        until(lambda: not connections and not flooding.server_state.tasks)
    finally:
        flooding.should_exit = True
        thread.join()


@pytest.mark.parametrize(
    "piece", [b"a: " + b"b" * 4093, b"a: b\r\n" * 700, b"GET /" + b"c" * 4096], ids=["value", "headers", "address"]
)
def test_a_head_without_an_end_is_refused(server: Running, piece: bytes) -> None:
    with connected(server) as client:
        client.sendall(b"" if piece.startswith(b"GET") else b"GET /health HTTP/1.1\r\nHost: x\r\n")
        client.sendall(piece)
        with pytest.raises(OSError):
            for _ in range(5000):  # far more than the operating system takes
                client.sendall(piece[5:])
    assert server.http.get("/health").status_code == 200


def test_what_stands_behind_a_body_is_bounded_and_not_taken_for_headers(server: Running) -> None:
    content = json.dumps({**asked(1), "stream": False}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{len(content):x}\r\n".encode()
    whole = head + content + b"\r\n0\r\n"
    with connected(server) as client:
        client.sendall(whole + b"x-request-id: behind\r\n\r\n")
        received = client.recv(1 << 16)
        assert received.startswith(b"HTTP/1.1 200") and b"behind" not in received
    with connected(server) as client:
        client.sendall(whole)
        with pytest.raises(OSError):
            for _ in range(1000):
                client.sendall(b"a: " + b"b" * 8192 + b"\r\n")
                time.sleep(0.002)
    until(lambda: not server.service.backend.num_unfinished)


def test_an_offer_of_another_protocol_is_passed_over(server: Running) -> None:
    """As Java's HttpClient makes it with every request; the body and the connection are as without."""
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAA")
    body = {**asked(2), "stream": False}
    with connected(server) as client:
        for _ in range(2):
            whole = post(body, *offer)
            client.sendall(whole[:-20])
            time.sleep(0.02)
            client.sendall(whole[-20:])
            status, answer = reply_on(client)
            assert status == 200 and answer["usage"]["completion_tokens"] == 2
        client.sendall(post(body, *offer) + post(body, *offer))  # without waiting for the first
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2 or not received.endswith(b"}"):
            received += client.recv(1 << 16)
        get = "\r\n".join(["GET /version HTTP/1.1", "Host: x", *offer, "", ""])
        client.sendall(get.encode())
        assert b"200 OK" in client.recv(1 << 16)

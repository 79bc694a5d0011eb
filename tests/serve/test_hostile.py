"""Malformed and hostile requests: never a 500, never a hang, and good clients get the same answers meanwhile."""

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import pytest

from executor.engine.engine import Engine
from tests.serve.conftest import Running, start
from tests.serve.hostile import CHAT, KINDS, MEDIA, Hostile, make_requests, media_body

MOST_S = 4.0
HALF = b'\\ud83d"'  # of a character, as the last of a text: no valid JSON
ALLOWED = (200, 307, 400, 404, 405, 411, 413, 415, 422, 501)
SEED = 12


@pytest.fixture(scope="module")
def guarded(tiny_engine: Engine) -> Iterator[Running]:
    """A server that fetches from some hosts and reads one folder: the rules are asked, and not only their absence."""
    data = {"allowed_media_domains": ["example.org", "localhost"], "fetch_timeout_s": 1.0}
    server = {"allowed_local_media_path": str(MEDIA), "max_body_bytes": 2_000_000}
    with start(tiny_engine, data=data, **server) as running:
        yield running


def exchange(server: Running, hostile: Hostile) -> bytes:
    """The answer's bytes; none where the client leaves."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), MOST_S) as connection:
        if hostile.leaves is not None and hostile.leaves < 1:
            connection.sendall(hostile.data[: int(len(hostile.data) * hostile.leaves)])
            return b""
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.sendall(hostile.data)
        if hostile.leaves is not None:
            time.sleep(hostile.leaves - 1)
            return b""
        answer = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def check(hostile: Hostile, answer: bytes) -> int:
    """The status, once the answer is one that a client can read."""
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), (hostile, answer[:200])
    status = int(head.split()[1])
    assert status in ALLOWED, (status, hostile, answer[:2000])
    if hostile.kind == "special text" and hostile.data.startswith(f"POST {CHAT} ".encode()):
        assert status == (400 if HALF in hostile.data else 200), (hostile, answer)
    lines = head.lower().split(b"\r\n")
    is_json = any(line.startswith(b"content-type: application/json") for line in lines)
    if status >= 400 and body and is_json:
        error = json.loads(body)["error"]
        assert error["message"] and error["type"]
    return status


def storm(server: Running, count: int) -> None:
    def good() -> str:
        reply = server.http.post("/v1/chat/completions", json=question)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    question = {**media_body(str(MEDIA / "objects.png")), "max_tokens": 12, "temperature": 0}
    said, seen = good(), Counter()
    for number, hostile in enumerate(make_requests(SEED, count, urlsplit(server.url).port)):
        started = time.monotonic()
        answer = exchange(server, hostile)
        assert time.monotonic() - started < MOST_S, hostile
        if hostile.leaves is None:
            seen[hostile.kind, check(hostile, answer)] += 1
        if number % 25 == 24:
            assert good() == said
    refused = {kind for kind, status in seen if status >= 400}
    assert refused >= set(KINDS) - {"leaving", "special text"}, seen
    limit_s = time.monotonic() + MOST_S
    while server.service.backend.num_unfinished and time.monotonic() < limit_s:
        time.sleep(0.01)
    assert server.service.backend.num_unfinished == 0
    assert good() == said


def test_hostile_requests(guarded: Running) -> None:
    storm(guarded, 100)


@pytest.mark.long
def test_many_hostile_requests(guarded: Running) -> None:
    storm(guarded, 500)

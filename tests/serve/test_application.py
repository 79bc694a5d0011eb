"""What the application does for every route: its log, a full queue, clients that leave, what is no HTTP."""

import asyncio
import json
import logging
import socket
from typing import Any

import pytest

from tests.serve.conftest import Running
from tests.serve.test_errors import CHAT, MESSAGES, error_of

ASK = {"messages": MESSAGES, "max_tokens": 1}


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "executor.serve.access"]


def test_prompts_are_not_logged_unless_asked_for(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "executor.serve.access")
    answer = server.http.post(CHAT, json=ASK).json()
    wait_for(lambda: lines_of(caplog))  # written when the reply has gone out
    (line,) = lines_of(caplog)
    assert "square" not in line and line.endswith(f"answer={answer['id']}") and " 200 " in line


def test_a_client_that_leaves_is_written_as_cut_off(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "executor.serve.access")
    body = {"messages": MESSAGES, "stream": True, "temperature": 1.5, "ignore_eos": True}
    with server.http.stream("POST", CHAT, json=body) as reply:
        next(reply.iter_lines())
    wait_for(lambda: lines_of(caplog))
    assert "(cut off)" in lines_of(caplog)[0]
    wait_for(lambda: not server.service.backend.num_unfinished)


def test_a_refusal_is_written_with_its_reason(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "executor.serve.access")
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,SECRETBYTES"}}
    for body in (
        {"messages": MESSAGES, "temperature": -1},
        {"messages": [{"role": "user", "content": [picture]}]},
        {"messages": MESSAGES, "tool_choice": "a\nb data:image/png;base64,SECRETBYTES"},
    ):
        error = server.http.post(CHAT, json=body).json()["error"]
        wait_for(lambda: lines_of(caplog))
        (line,) = lines_of(caplog)
        assert " 400 " in line and "\n" not in line and "SECRET" not in line
        assert f" param={error['param']} " in line and f'error="{error["message"][:15]}' in line
        caplog.clear()
    server.http.get("/nowhere")
    wait_for(lambda: lines_of(caplog))
    assert 'error="GET /nowhere is not served here' in lines_of(caplog)[0]


def wait_for(condition: Any) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(poll(), 10))


def test_a_full_queue_says_when_to_come_back(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.backend.loop, "_max_unfinished", 0)
    reply = server.http.post(CHAT, json=ASK)
    error = error_of(reply, 503)
    assert reply.headers["retry-after"] == "1" and reply.reason_phrase == "Service Unavailable"
    assert error["type"] == "service_unavailable_error" and error["code"] == "server_busy"


def test_what_is_no_http_gets_an_error_too(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"hello, who is there?\r\n\r\n")
        received = b""
        while data := connection.recv(65536):
            received += data
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request") and json.loads(body)["error"]["message"]

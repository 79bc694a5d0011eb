"""A server with a key, another page's origin, prompts in its log and a small bound on bodies."""

import json
import logging
import socket
from collections.abc import Iterator

import pytest

from executor.engine.engine import Engine
from tests.serve.conftest import Running, start
from tests.serve.test_application import lines_of, wait_for
from tests.serve.test_errors import CHAT, MESSAGES, error_of

KEY = "a key (of 1)"
PAGE = "https://page.example:8443"
ASK = {"messages": MESSAGES, "max_tokens": 1}
MAX_BODY_BYTES = 300_000


@pytest.fixture(scope="module")
def guarded(tiny_engine: Engine) -> Iterator[Running]:
    """With a key, another page's origin, prompts in the log and a small bound on bodies."""
    fields = {"api_key": KEY, "allowed_origins": [PAGE], "log_prompts": True, "max_body_bytes": MAX_BODY_BYTES}
    with start(tiny_engine, **fields) as running:
        yield running


def bearer(key: str = KEY) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("another"),
        {"Authorization": "Bearer"},
        bearer(KEY + "x"),
        {"Authorization": f"Basic {KEY}"},
        bearer("é"),
    ],
)
def test_without_the_key_nothing_is_told(guarded: Running, headers: dict[str, str]) -> None:
    headers = {name: value.encode("latin-1") for name, value in headers.items()}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nothing")):
        reply = guarded.http.request(method, path, headers=headers)
        assert error_of(reply, 401)["type"] == "authentication_error"
        assert reply.headers["www-authenticate"] == "Bearer" and reply.reason_phrase == "Unauthorized"


def test_with_the_key_all_is_open_and_without_it_what_shows_life(guarded: Running) -> None:
    for headers in (bearer(), {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}):
        assert guarded.http.get("/v1/models", headers=headers).status_code == 200
    for path in ("/health", "/ping", "/"):
        assert guarded.http.get(path).status_code == 200


def test_a_page_that_is_allowed_reads_answers_and_errors(guarded: Running) -> None:
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    reply = guarded.http.request("OPTIONS", CHAT, headers=asks)
    assert reply.status_code == 200 and reply.headers["access-control-allow-origin"] == PAGE
    browser = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
    for headers, status in ((bearer(), 200), ({}, 401)):
        reply = guarded.http.post(CHAT, json=ASK, headers={**browser, **headers})
        assert reply.status_code == status and reply.headers["access-control-allow-origin"] == PAGE


def test_another_page_is_refused_what_it_makes_a_browser_send(guarded: Running) -> None:
    headers = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}
    reply = guarded.http.post(CHAT, json=ASK, headers={**bearer(), **headers})
    assert "allowed_origins" in error_of(reply, 403)["message"]
    assert "access-control-allow-origin" not in reply.headers
    del headers["Sec-Fetch-Site"]  # browsers send it to https and to their own machine only
    assert error_of(guarded.http.post(CHAT, json=ASK, headers={**bearer(), **headers}), 403)
    for origin in (guarded.url, PAGE):
        assert guarded.http.post(CHAT, json=ASK, headers={**bearer(), "Origin": origin}).status_code == 200
    same = {"Origin": guarded.url, "Sec-Fetch-Site": "same-origin"}
    assert guarded.http.post(CHAT, json=ASK, headers={**bearer(), **same}).status_code == 200


def test_a_body_that_is_too_long_is_refused_before_it_is_read(guarded: Running) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        length = MAX_BODY_BYTES + 1
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode())  # and nothing of the body
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_unknown_length_is_refused_when_it_is_too_long(guarded: Running) -> None:
    pieces = (b" " * 1000 for _ in range(MAX_BODY_BYTES // 1000 + 1))
    error = error_of(guarded.http.post(CHAT, content=pieces, headers=bearer()), 413)
    assert "max_body_bytes" in error["message"]
    body = json.dumps(ASK).encode()
    fits = (body[place : place + 7] for place in range(0, len(body), 7))
    assert guarded.http.post(CHAT, content=fits, headers=bearer()).status_code == 200


def test_a_long_body_within_the_bound_is_read(guarded: Running) -> None:
    body = json.dumps({**ASK, "metadata": {"x": "y" * (MAX_BODY_BYTES - 1000)}})
    assert guarded.http.post(CHAT, content=body, headers=bearer()).status_code == 200


def test_the_log_has_a_line_for_each_request(guarded: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "executor.serve.access")
    long = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    body = {"messages": [{"role": "user", "content": ["What\nis it?", long]}]}
    reply = guarded.http.post(CHAT, json=body, headers={**bearer(), "X-Request-ID": "bench-7"})
    assert reply.status_code == 400 and reply.headers["x-request-id"] == "bench-7"
    guarded.http.get("/health")
    other = guarded.http.get("/%0Aforged 200", headers={"X-Request-ID": "two words"})
    assert other.headers["x-request-id"] != "two words"
    wait_for(lambda: len(lines_of(caplog)) == 2)
    first, second = lines_of(caplog)
    assert (
        f" POST {CHAT} 400 " in first and " request=bench-7 client=127.0.0.1:" in first and " answer=chatcmpl-" in first
    )
    assert "What\\nis it?" in first and "5022 characters" in first and "AAAAAAAAAAAAAAAAAAAAAAA" not in first
    assert " GET /%0Aforged%20200 401 " in second and other.headers["x-request-id"] in second


def test_what_no_route_foresaw_is_logged_and_is_an_error_like_others(
    guarded: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded.service, "check_model", lambda name: 1 / 0)
    headers = {**bearer(), "Origin": PAGE, "X-Request-ID": "r-1"}
    reply = guarded.http.post(CHAT, json=ASK, headers=headers)
    error = error_of(reply, 500)
    assert "ZeroDivisionError" in error["message"] and "r-1" in error["message"]
    assert reply.headers["access-control-allow-origin"] == PAGE
    assert any(record.exc_info and "r-1" in record.getMessage() for record in caplog.records)

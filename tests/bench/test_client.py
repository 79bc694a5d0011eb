"""The client against a server that answers by a script: times, connections, keys, and everything that goes wrong."""

import asyncio
import socket
import subprocess

import pytest

from executor.bench.client import CHAT, METRICS, MODELS, Client, Endpoint, Reply
from executor.errors import UserError
from tests.bench.scripted import Answer, Scripted, even

LIMIT_S = 20.0


def ask(server: Scripted, bodies: list[bytes], *, timeout_s: float = LIMIT_S, key: str | None = None) -> list[Reply]:
    """The replies to bodies that are sent one after the other by one client."""

    async def main() -> list[Reply]:
        async with server.listening():
            client = Client(Endpoint.at(server.url, key), timeout_s)
            replies = [await client.chat(body) for body in bodies]
            client.close()
            return replies

    return asyncio.run(main())


@pytest.mark.parametrize(
    "url, shown",
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000"),
        ("http://host:8000/v1", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("http://host/some/path/v1", "http://host:80/some/path"),
        ("https://host", "https://host:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_forms_of_an_address(url, shown):
    assert Endpoint.at(url).url == shown


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://host:port", "http://h/?a=b"])
def test_other_addresses_are_refused(url):
    with pytest.raises(UserError, match="write http://HOST:PORT"):
        Endpoint.at(url)


def test_a_head_has_host_and_key():
    head = Endpoint.at("http://[::1]:81/x", "secret").head("POST", CHAT, 12).decode()
    assert head.startswith("POST /x/v1/chat/completions HTTP/1.1\r\n") and head.endswith("\r\n\r\n")
    assert "Host: [::1]:81\r\n" in head and "Authorization: Bearer secret\r\n" in head
    assert "Content-Length: 12\r\n" in head
    assert "Authorization" not in Endpoint.at("http://h").head("GET", MODELS, 0).decode()


@pytest.mark.parametrize("cut", [1, 3])
def test_times_are_those_of_the_server(cut):
    """Sent and received in one event loop, so that no thread stands between the two clocks."""
    server = Scripted(lambda number, body: even(12, ttft_s=0.2, gap_s=0.02, cut=cut))
    (reply,) = ask(server, [b"{}"])
    assert reply.error is None and (reply.prompt_tokens, reply.output_tokens, reply.cached_tokens) == (7, 12, 2)
    sent_s = server.asked[0].sent_s
    assert len(reply.piece_times_s) == len(sent_s) == 12
    assert all(sent <= came for sent, came in zip(sent_s, reply.piece_times_s, strict=True))
    theirs, ours = sent_s[0] - reply.sent_s, reply.piece_times_s[0] - reply.sent_s
    assert 0.2 <= theirs <= ours < 1.2 * theirs
    theirs, ours = sent_s[-1] - sent_s[0], reply.piece_times_s[-1] - reply.piece_times_s[0]
    assert 0.8 * theirs < ours < 1.2 * theirs
    assert reply.ended_s == reply.piece_times_s[-1]


def test_connections_are_kept():
    server = Scripted(lambda number, body: even(2))
    assert all(reply.error is None for reply in ask(server, [b"{}"] * 5))
    assert server.num_connections == 1 and len(server.asked) == 5


def test_a_kept_connection_that_the_server_has_closed_is_opened_anew():
    server = Scripted(lambda number, body: even(2))
    server.closes_after_each = True

    async def main() -> list[Reply]:
        async with server.listening():
            client = Client(Endpoint.at(server.url), LIMIT_S)
            replies = []
            for _ in range(3):
                replies.append(await client.chat(b"{}"))
            client.close()
            return replies

    assert [reply.error for reply in asyncio.run(main())] == [None] * 3
    assert server.num_connections == 3


def test_requests_at_once_have_a_connection_each():
    server = Scripted(lambda number, body: even(2, ttft_s=0.1))

    async def main() -> list[Reply]:
        async with server.listening():
            client = Client(Endpoint.at(server.url), LIMIT_S)
            replies = await asyncio.gather(*(client.chat(b"{}") for _ in range(8)))
            client.close()
            return replies

    assert [reply.error for reply in asyncio.run(main())] == [None] * 8
    assert server.num_connections == server.most_under_way == 8


def test_a_server_that_counts_nothing():
    (reply,) = ask(Scripted(lambda number, body: even(5, has_usage=False)), [b"{}"])
    assert not reply.has_usage and (reply.prompt_tokens, reply.output_tokens) == (0, 5)


def test_several_tokens_in_a_piece():
    (reply,) = ask(Scripted(lambda number, body: even(5, tokens=12)), [b"{}"])
    assert reply.output_tokens == 12 and len(reply.piece_times_s) == 5


@pytest.mark.parametrize(
    "answer, words",
    [
        (Answer(status=429, content=b'{"error": {"message": "too many"}}'), "HTTP 429: too many"),
        (Answer(status=404, content=b'{"detail": "no such model"}'), "HTTP 404: no such model"),
        (Answer(status=500, content=b"<h1>oh</h1>"), "HTTP 500: <h1>oh</h1>"),
        (Answer(status=503), "HTTP 503: no words"),
        (Answer(status=400, content=b"x" * 100_000), "HTTP 400: xxxx"),
        (even(4, breaks_after=2), "the connection was lost in the middle of the answer"),
        (even(0), "the answer has nothing in it"),
        (Answer([(0.0, "a")], tail=b'data: {"error": {"message": "ended"}}\n\n'), "in the stream: ended"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_request_is_answered(answer, words):
    server = Scripted(lambda number, body: even(2) if number else answer)
    failed, good = ask(server, [b"{}", b"{}"])
    assert failed.error.startswith(words) and len(failed.error) < 500
    assert failed.ended_s >= failed.sent_s
    assert good.error is None


def test_the_key():
    server = Scripted(lambda number, body: even(2), key="secret")
    assert ask(server, [b"{}"], key="secret")[0].error is None
    for key in (None, "other"):
        assert ask(server, [b"{}"], key=key)[0].error == "HTTP 401: the API key is wrong"


def test_a_request_that_takes_too_long():
    server = Scripted(lambda number, body: even(2) if number else even(2, ttft_s=60))
    late, good = ask(server, [b"{}", b"{}"], timeout_s=0.5)
    assert late.error == "no whole answer within 0.5 s" and good.error is None


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reply = asyncio.run(Client(Endpoint.at(f"http://127.0.0.1:{port}"), LIMIT_S).chat(b"{}"))
    assert reply.error == "Connection refused"


def test_what_is_no_http():
    async def main() -> Reply:
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"hello there\r\n\r\n")

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Client(Endpoint.at(f"http://127.0.0.1:{port}"), LIMIT_S).chat(b"{}")

    assert asyncio.run(main()).error.startswith("the server's answer is no HTTP")


def test_an_answer_that_ends_with_its_connection():
    async def main() -> Reply:
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(
                b'HTTP/1.0 200 OK\r\n\r\ndata: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}'
            )
            writer.write(b"\n\ndata: [DONE]\n\n")
            await writer.drain()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Client(Endpoint.at(f"http://127.0.0.1:{port}"), LIMIT_S).chat(b"")

    assert asyncio.run(main()).error is None


def test_get():
    server = Scripted(lambda number, body: even(1))
    server.metrics = lambda: b"a 1\n"

    async def main():
        async with server.listening():
            client = Client(Endpoint.at(server.url), LIMIT_S)
            return await client.get(METRICS), await client.get("/nowhere")

    assert asyncio.run(main()) == ((200, b"a 1\n"), (404, b"not found"))


def test_a_certificate_of_ones_own(tmp_path):
    import ssl

    certificate = tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "key.pem"), "-out",
         str(certificate), "-days", "1", "-subj", "/CN=other.name"], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "key.pem")

    async def main():
        async def answer(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

        async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
            url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            trusted = await Client(Endpoint.at(url, certificate=str(certificate)), LIMIT_S).get("/")
            return trusted, await Client(Endpoint.at(url), LIMIT_S).chat(b"{}")

    trusted, refused = asyncio.run(main())
    assert trusted == (200, b"hi")
    assert refused.error.startswith("TLS: self")

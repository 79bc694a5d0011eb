"""http(s) media: which address is connected to, under which name, how much is read, and for how long."""

import gzip
import socket
import ssl
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.errors import UserError
from executor.media import fetch
from executor.media.fetch import Unreachable
from tests.media.web import PUBLIC, Web, found, make_certificate, ok, serving

DATA = bytes(range(256)) * 1000
HOST = "pictures.example"


def slowly(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.02)


def continues(connection: socket.socket) -> None:
    """Interim answers without end."""
    for _ in range(200):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.02)


def silent(connection: socket.socket) -> None:
    connection.recv(1)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
REPLIES = {
    "/a.png": ok(DATA),
    "/a%20b.png?sig=1%2F2": ok(b"signed"),
    "/until_closed": b"HTTP/1.0 200 OK\r\n\r\n" + DATA,
    "/chunked": CHUNKED + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
    "/gzip": ok(gzip.compress(DATA), "Content-Encoding: gzip"),
    "/deflate": ok(zlib.compress(DATA), "Content-Encoding: deflate"),
    "/wrong_type": ok(DATA, "Content-Type: text/html"),
    "/moved": found("/a.png", "301 Moved Permanently"),
    "/twice": found("//other.example/moved", "307 Temporary Redirect"),
    "/elsewhere": found("http://evil.example/a.png"),
    "/inside": found("http://inside.example/a.png", "308 Permanent Redirect"),
    "/home": found("http://localhost/a.png"),
    "/site": found("http://10.1.2.3:81/a.png"),
    "/public": found("http://9.9.9.9/a.png"),
    "/metadata": found("http://169.254.169.254/latest"),
    "/file": found("file:///etc/passwd"),
    "/circle": found("/circle"),
    "/nowhere": ok(b"", status="302 Found"),
    "/odd_place": found("http://[::1"),
    "/down": found("http://pictures.example/a.png"),
    "/gone": ok(b"", status="410 Gone"),
    "/locked": ok(b"", status="403 Forbidden"),
    "/broken": ok(b"", status="500 Internal Server Error"),
    "/partly": ok(DATA, status="206 Partial Content"),
    "/nothing": b"",
    "/no_http": b"SSH-2.0-OpenSSH_9.6\r\n",
    "/short": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc",
    "/short_chunk": CHUNKED + b"10\r\nabc",
    "/odd_chunk": CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n",
    "/negative": b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
    "/odd_status": b"HTTP/1.1 xyz OK\r\n\r\n",
    "/many_headers": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n",
    "/long_header": b"HTTP/1.1 200 OK\r\na: " + b"b" * 100_000 + b"\r\n\r\n",
    "/odd_header": b"HTTP/1.1 200 OK\r\n\xff\xfe\r\nno colon\r\nContent-Length: 2\r\n\r\nok",
    "/brotli": ok(DATA, "Content-Encoding: br"),
    "/no_gzip": ok(DATA, "Content-Encoding: gzip"),
    "/cut_gzip": ok(gzip.compress(DATA)[:-20], "Content-Encoding: gzip"),
    "/bomb": ok(gzip.compress(b"\0" * 50_000_000), "Content-Encoding: gzip"),
    "/large": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    "/endless": endless,
    "/slow": slowly,
    "/silent": silent,
    "/continues": continues,
}


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving(REPLIES) as web:
        web.names["inside.example"] = ["10.0.0.7"]
        yield web


def test_the_address_is_the_one_that_was_judged_and_the_name_is_asked_for(web: Web) -> None:
    web.names[HOST], web.resolved[:], web.connected[:], web.asked[:] = ["2606:2800::1", PUBLIC], [], [], []
    assert web.fetcher(HOST).fetch("http://PICTURES.example./a.png#top", 10**6) == DATA
    assert (web.resolved, web.connected) == ([HOST], [("2606:2800::1", 80)])
    head = web.asked[0].split("\r\n")
    assert head[0] == "GET /a.png HTTP/1.1" and head[1] == f"Host: {HOST}"
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in head)
    assert web.fetcher(f"{HOST}:8080").fetch(f"http://{HOST}:8080/a.png", 10**6) == DATA
    assert web.connected[-1][1] == 8080 and f"Host: {HOST}:8080" in web.asked[-1]


def test_the_next_address_is_tried_where_one_does_not_answer(web: Web) -> None:
    web.names["two.example"] = ["8.8.8.8", PUBLIC]
    fetcher = web.fetcher("two.example")
    reach = fetcher.connect

    def connect(address: str, port: int, timeout_s: float) -> socket.socket:
        if address == "8.8.8.8":
            raise ConnectionRefusedError(111, "Connection refused")
        return reach(address, port, timeout_s)

    both = fetch.Fetcher(fetcher.hosts, (), 5.0, fetcher.resolve, connect)
    assert both.fetch("http://two.example/a.png", 10**6) == DATA


@pytest.mark.parametrize(
    ("path", "data"),
    [("/a b.png?sig=1%2F2", b"signed"), ("/until_closed", DATA), ("/chunked", b"hello world"), ("/gzip", DATA),
     ("/deflate", DATA), ("/wrong_type", DATA), ("/moved", DATA), ("/twice", DATA), ("/odd_header", b"ok")],
)  # fmt: skip
def test_read(web: Web, path: str, data: bytes) -> None:
    assert web.fetcher(HOST, "other.example").fetch(f"http://{HOST}{path}", 10**6) == data


REFUSED = [  # what is the asker's: 400
    ("/elsewhere", "evil.example/a.png: evil.example is not among the hosts.*data_config.allowed_media_domains"),
    ("/inside", "inside.example is at a private or local network; name it in data_config.allowed_private_hosts"),
    ("/home", "localhost is not among the hosts.*data_config.allowed_private_hosts"),
    ("/site", "10.1.2.3:81 is not among the hosts.*data_config.allowed_private_hosts"),
    ("/public", "9.9.9.9 is not among the hosts.*data_config.allowed_media_domains"),
    ("/metadata", "169.254.169.254 is not among the hosts"),
    ("/file", "no valid http"),
    ("/large", "more than 1000000 bytes"),
    ("/endless", "more than 1000000 bytes"),
    ("/bomb", "more than 1000000 bytes"),
]
UNREACHABLE = [  # what is the address's: 422
    ("/circle", "more than 5 redirects"), ("/nowhere", "does not say where"), ("/odd_place", "redirects to what is no"),
    ("/gone", "answers 410 Gone$"), ("/lost", "answers 404 Not Found$"), ("/locked", "answers 403"),
    ("/broken", "answers 500 Internal"), ("/partly", "answers 206"), ("/nothing", "could not be fetched"),
    ("/no_http", "could not be fetched"), ("/short", "ended after 3 of its 1000 bytes"),
    ("/short_chunk", "could not be fetched"), ("/odd_chunk", "could not be fetched"),
    ("/odd_status", "could not be fetched"), ("/many_headers", "could not be fetched"),
    ("/long_header", "could not be fetched"), ("/brotli", "packed as 'br'"), ("/no_gzip", "gzip is damaged"),
    ("/cut_gzip", "gzip ends too early"), ("/slow", "did not come in time"), ("/silent", "did not come in time"),
    ("/continues", "did not come in time"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "says"), REFUSED + UNREACHABLE)
def test_not_read(web: Web, path: str, says: str) -> None:
    fetcher = web.fetcher(HOST, "inside.example", timeout_s=0.4)
    started = time.monotonic()
    with pytest.raises(UserError, match=says) as caught:
        fetcher.fetch(f"http://{HOST}{path}", 10**6)
    assert isinstance(caught.value, Unreachable) == ((path, says) in UNREACHABLE)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:192.168.0.1"], ["169.254.169.254"],
                                       ["0.0.0.0"], ["fe80::1%eth0"], ["fd00::1"], ["64:ff9b::a00:1"]])  # fmt: skip
def test_every_address_is_judged_before_any_is_connected_to(web: Web, addresses: list[str]) -> None:
    web.names["rebound.example"], web.connected[:] = addresses, []
    with pytest.raises(UserError, match="rebound.example is at (a private|an address that)") as caught:
        web.fetcher("*.example").fetch("http://rebound.example/a.png", 10**6)
    assert web.connected == [] and not any(address in str(caught.value) for address in addresses)


def test_private_hosts_are_those_that_are_named_so(web: Web) -> None:
    fetcher = web.fetcher("*.example", private=("inside.example", "127.0.0.1:9000"))
    assert fetcher.fetch("http://inside.example/a.png", 10**6) == DATA
    assert fetcher.fetch("http://127.0.0.1:9000/a.png", 10**6) == DATA
    assert web.connected[-2:] == [("10.0.0.7", 80), ("127.0.0.1", 9000)]
    web.names["inside.example"], before = ["169.254.169.254"], len(web.connected)
    for url in ("http://inside.example/a.png", "http://127.0.0.1/a.png", "http://10.0.0.7/a.png"):
        with pytest.raises(UserError, match="are never fetched from|is not among the hosts"):
            fetcher.fetch(url, 10**6)
    assert len(web.connected) == before
    web.names["inside.example"] = ["10.0.0.7"]


def test_a_name_without_address_and_a_resolver_that_hangs(web: Web) -> None:
    def unknown(host: str) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known")

    def hangs(host: str) -> list[str]:
        time.sleep(1)
        return [PUBLIC]

    hosts = web.fetcher(HOST).hosts
    for resolve, says in ((unknown, "the name pictures.example cannot be resolved"), (hangs, "did not come in time")):
        with pytest.raises(Unreachable, match=says):
            fetch.Fetcher(hosts, (), 0.2, resolve).fetch(f"http://{HOST}/a.png", 10)


def test_several_at_once_and_their_bytes_together(web: Web) -> None:
    fetcher = web.fetcher(HOST, timeout_s=0.3)
    urls = [f"http://{HOST}/{path}" for path in ("a.png", "gone", "slow", "silent", "chunked")]
    started = time.monotonic()
    files = fetcher.fetch_all(dict.fromkeys(urls, 10**6), 10**6)
    assert time.monotonic() - started < 0.6  # the two that hang do so side by side
    assert (files[urls[0]], files[urls[4]]) == (DATA, b"hello world")
    assert [type(files[url]) for url in urls[1:4]] == [Unreachable] * 3
    files = fetcher.fetch_all({urls[0]: 10**6, f"{urls[0]}?": 10**6, f"{urls[0]}#2": 10**6}, len(DATA) * 2)
    refused = [file for file in files.values() if isinstance(file, UserError)]
    assert refused and all("are more than 512000 bytes together" in str(error) for error in refused)


def test_proxies_of_the_environment_are_not_used(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert web.fetcher(HOST).fetch(f"http://{HOST}/a.png", 10**6) == DATA


@pytest.mark.parametrize(("name", "says"), [("secure.example", None), ("other.example", "certificate is not valid")])
def test_the_certificate_is_that_of_the_name(tmp_path: Path, name: str, says: str | None) -> None:
    certificate = make_certificate(tmp_path, "secure.example")
    with serving({"/a": ok(b"sealed"), "/open": found("http://secure.example/a")}, certificate) as web:
        context = ssl.create_default_context(cafile=certificate)
        fetcher = web.fetcher("*.example", certificates=lambda: context)
        if says is None:
            assert fetcher.fetch(f"https://{name}/a", 100) == b"sealed"
            assert web.connected == [(PUBLIC, 443)]
            with pytest.raises(Unreachable, match="redirects from https to an address without it"):
                fetcher.fetch(f"https://{name}/open", 100)
        else:
            with pytest.raises(Unreachable, match=says):
                fetcher.fetch(f"https://{name}/a", 100)
        with pytest.raises(Unreachable, match="certificate is not valid"):
            web.fetcher("*.example").fetch("https://secure.example/a", 100)

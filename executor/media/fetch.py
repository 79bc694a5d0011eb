"""Media over http(s), from the hosts that a recipe allows.

Invariants: a name is resolved once, every address it has is judged (hosts.py), and the connection goes to one of just
these; the name stands in the Host header, in TLS's server name and in the certificate. Redirects are judged as the
first address was. Nothing is read beyond the bytes and seconds allowed, however slowly it comes or however well it is
packed. Proxies of the environment are not used, cookies and passwords are neither sent nor kept.
Waits for a network: for threads that may.
"""

import functools
import http.client
import io
import ipaddress
import logging
import socket
import ssl
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from executor.errors import UserError
from executor.media.hosts import (
    PRIVATE_KEY,
    HostRule,
    IPAddress,
    Place,
    key_for,
    parse_place,
    reach_of,
    shown,
)

logger = logging.getLogger(__name__)

MOST_REDIRECTS = 5
CONNECT_S = 5.0
IDLE_S = 10.0  # between two pieces of an answer
MOST_CONNECTIONS = 8  # of one request at a time
_PIECE_BYTES = 2**16
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "User-Agent": "qwen-vl-recipe",
    "Accept": "image/*, video/*, */*;q=0.1",
    "Accept-Encoding": "identity",
    "Connection": "close",
}


class Unreachable(UserError):
    """An allowed address that does not give its file: it does not answer, or answers with an error."""


class _Budget:
    """Bytes that all media of one request may have together. Used by several threads."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._left_bytes = num_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        with self._lock:
            self._left_bytes -= num_bytes
            return self._left_bytes >= 0


def resolve(host: str) -> list[str]:
    """All addresses of a name, by the system's resolver. Raises OSError."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


def connect(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to an address, which is no name. Raises OSError."""
    return socket.create_connection((address, port), timeout_s)


@functools.cache
def _system_certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


@dataclass(frozen=True)
class Fetcher:
    """Fetches from `hosts` where they have public addresses, from `private_hosts` where they have a site's own, too."""

    hosts: tuple[HostRule, ...] = ()
    private_hosts: tuple[HostRule, ...] = ()
    timeout_s: float = 30.0  # of one file, redirects and all
    resolve: Callable[[str], Sequence[str]] = resolve
    connect: Callable[[str, int, float], socket.socket] = connect
    certificates: Callable[[], ssl.SSLContext] = _system_certificates

    def check(self, url: str) -> Place:
        """The address taken apart. Raises UserError, naming the key, where its host is not allowed. Asks nobody."""
        place = parse_place(url)
        if not any(rule.fits(place) for rule in (*self.hosts, *self.private_hosts)):
            key = key_for(place)
            advice = f"add it to {key}, or send" if key else "no list helps with such an address; send"
            raise UserError(
                f"{shown(url)}: {place.host_header} is not among the hosts that media may be fetched from; {advice} "
                "the media as a base64 data: URL"
            )
        return place

    def fetch(self, url: str, most_bytes: int, budget: _Budget | None = None) -> bytes:
        """The file at an address. Raises UserError for what is not allowed or too large, and Unreachable."""
        deadline_s = time.monotonic() + self.timeout_s
        asked, now = url, url
        for _ in range(MOST_REDIRECTS + 1):
            place = self.check(now)
            try:
                with self._connected(place, now, deadline_s) as connection:
                    reply = _ask(connection, place)
                    if reply.status not in _REDIRECTS:
                        return _body(reply, asked, most_bytes, budget or _Budget(most_bytes))
                    now = _next(reply, now)
            except TimeoutError as error:
                raise Unreachable(
                    f"{shown(asked)}: did not come in time ({self.timeout_s:g} s for all of it, {CONNECT_S:g} s to "
                    f"connect, {IDLE_S:g} s without a byte)"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                raise Unreachable(f"{shown(asked)}: could not be fetched ({_reason(error)})") from error
        raise Unreachable(f"{shown(asked)}: more than {MOST_REDIRECTS} redirects")

    def fetch_all(self, wanted: Mapping[str, int], together_bytes: int) -> dict[str, bytes | UserError]:
        """The files at several addresses, some at a time; of one that fails, why. `wanted`: each one's most bytes."""
        budget = _Budget(together_bytes)

        def one(url: str) -> bytes | UserError:
            try:
                return self.fetch(url, wanted[url], budget)
            except UserError as error:
                return error

        if len(wanted) < 2:
            return {url: one(url) for url in wanted}
        with ThreadPoolExecutor(min(MOST_CONNECTIONS, len(wanted)), "fetch") as pool:
            return dict(zip(wanted, pool.map(one, wanted), strict=True))

    def _connected(self, place: Place, url: str, deadline_s: float) -> "_Socket":
        """A connection to one of the addresses of a place, all of which are allowed."""
        fault: OSError = OSError("it has no address")
        for address in self._addresses(place, url, deadline_s):
            raw = None
            try:
                raw = self.connect(str(address), place.port, _left(deadline_s, CONNECT_S))
                if place.scheme == "https":
                    raw.settimeout(_left(deadline_s, CONNECT_S))
                    raw = self.certificates().wrap_socket(raw, server_hostname=place.host)
                return _Socket(raw, deadline_s)
            except OSError as error:
                if raw is not None:
                    raw.close()
                fault = error
        raise fault

    def _addresses(self, place: Place, url: str, deadline_s: float) -> list[IPAddress]:
        texts = [place.host] if place.address else _in_time(self.resolve, place.host, _left(deadline_s, CONNECT_S))
        addresses = [ipaddress.ip_address(text) for text in texts]
        may_be_private = any(rule.fits(place) for rule in self.private_hosts)
        for address in addresses:
            reach = reach_of(address)
            if reach == "never" or reach == "private" and not may_be_private:
                logger.debug("%s is at %s", place.host, address)
                where, advice = "a private or local network", f"name it in {PRIVATE_KEY} where this is meant"
                if reach == "never":
                    where, advice = "an address that media are never fetched from", "send the media as a data: URL"
                raise UserError(f"{shown(url)}: {place.host} is at {where}; {advice}")
        return addresses


def _in_time(resolve: Callable[[str], Sequence[str]], host: str, timeout_s: float) -> Sequence[str]:
    """The system's resolver knows no limit of its own. Raises OSError."""
    found: list[Sequence[str] | Exception] = []

    def run() -> None:
        try:
            found.append(resolve(host))
        except (OSError, UnicodeError) as error:
            found.append(error)

    thread = threading.Thread(target=run, name="resolve", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise TimeoutError
    if isinstance(found[0], Exception):
        raise OSError(f"the name {host} cannot be resolved") from found[0]
    return found[0]


def _left(deadline_s: float, most_s: float) -> float:
    """Seconds that one operation may take. Raises TimeoutError when none is left."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return min(left_s, most_s)


class _Socket:
    """A socket as http.client wants one, each of whose waits ends at the deadline."""

    def __init__(self, raw: socket.socket, deadline_s: float) -> None:
        self._raw = raw
        self._deadline_s = deadline_s

    def sendall(self, data: bytes) -> None:
        self._raw.settimeout(_left(self._deadline_s, IDLE_S))
        self._raw.sendall(data)

    def recv_into(self, buffer: memoryview) -> int:
        self._raw.settimeout(_left(self._deadline_s, IDLE_S))
        return self._raw.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        assert mode == "rb"
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """http.client closes what it has sent its request by, and goes on reading."""

    def __enter__(self) -> "_Socket":
        return self

    def __exit__(self, *error: object) -> None:
        self._raw.close()


class _Reader(io.RawIOBase):
    def __init__(self, source: _Socket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self._source.recv_into(buffer)


def _ask(connection: _Socket, place: Place) -> http.client.HTTPResponse:
    client = http.client.HTTPConnection(place.host)
    client.auto_open = 0  # it has its connection, and makes none of its own
    client.sock = connection
    client.putrequest("GET", place.target, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": place.host_header, **_HEADERS}.items():
        client.putheader(name, value)
    client.endheaders()
    return client.getresponse()


def _next(reply: http.client.HTTPResponse, url: str) -> str:
    """Where a redirect leads."""
    location = reply.headers.get("Location")
    if not location:
        raise Unreachable(f"{shown(url)}: answers {reply.status} and does not say where the file is")
    try:
        target = urllib.parse.urljoin(url, location)
    except ValueError as error:
        raise Unreachable(f"{shown(url)}: redirects to what is no address") from error
    if url[:6].lower() == "https:" and target[:6].lower() != "https:":
        raise Unreachable(f"{shown(url)}: redirects from https to an address without it")
    return target


def _body(reply: http.client.HTTPResponse, url: str, most_bytes: int, budget: _Budget) -> bytes:
    if reply.status not in (200, 203):
        raise Unreachable(f"{shown(url)}: answers {reply.status} {reply.reason[:40]}".rstrip())
    stated = reply.headers.get("Content-Length")
    if stated is not None and stated.isdecimal() and len(stated) < 20 and int(stated) > most_bytes:
        raise _too_large(url, most_bytes)
    data = bytearray()
    for piece in _unpacked(reply, url):
        data += piece
        if len(data) > most_bytes:
            raise _too_large(url, most_bytes)
        if not budget.take(len(piece)):
            raise UserError(
                f"{shown(url)}: the media of this request are more than {budget.num_bytes} bytes together; send fewer"
            )
    return bytes(data)


def _too_large(url: str, most_bytes: int) -> UserError:
    return UserError(f"{shown(url)}: more than {most_bytes} bytes, which is the most that is allowed; make it smaller")


def _pieces(reply: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    expected_bytes, num_bytes = reply.length, 0  # None: chunks, or until the connection's end
    while piece := reply.read(_PIECE_BYTES):
        num_bytes += len(piece)
        yield piece
    if expected_bytes is not None and num_bytes < expected_bytes:
        raise Unreachable(f"{shown(url)}: ended after {num_bytes} of its {expected_bytes} bytes")


def _unpacked(reply: http.client.HTTPResponse, url: str) -> Iterator[bytes]:
    """The body in small pieces. Some servers pack it though it was asked for as it stands."""
    coding = (reply.headers.get("Content-Encoding") or "identity").strip().lower()
    if coding == "identity":
        yield from _pieces(reply, url)
        return
    if coding not in ("gzip", "x-gzip", "deflate"):
        raise Unreachable(
            f"{shown(url)}: comes packed as {coding[:40]!r}, which was not asked for; read are gzip and deflate"
        )
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, by the header
    try:
        for piece in _pieces(reply, url):
            while piece and not unpacker.eof:
                if out := unpacker.decompress(piece, _PIECE_BYTES):
                    yield out
                piece = unpacker.unconsumed_tail
        while not unpacker.eof and (out := unpacker.decompress(b"", _PIECE_BYTES)):
            yield out
    except zlib.error as error:
        raise Unreachable(f"{shown(url)}: its {coding} is damaged ({error})") from error
    if not unpacker.eof:
        raise Unreachable(f"{shown(url)}: its {coding} ends too early")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__

"""Which hosts media may be fetched from, and which network addresses may be connected to for them.

Invariants: nothing is allowed that no rule names. Names are compared in their ASCII form, lower case, without a closing
dot; numbers are addresses only in their plain form (127.1, 0x7f000001 and 2130706433 are refused, not interpreted).
Resolves and connects nothing.
"""

import ipaddress
import re
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from executor.errors import UserError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
DEFAULT_PORTS = {"http": 80, "https": 443}
DOMAINS_KEY = "data_config.allowed_media_domains"
PRIVATE_KEY = "data_config.allowed_private_hosts"

_MOST_HOST_CHARACTERS = 253
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # as a name's last label it makes an IPv4 address of the whole
_BAD_IN_URL = re.compile(r"[\x00-\x1f\x7f\\]")
_SAFE_IN_URL = "/%:=&?~+!$,;'@()*[]|-._"  # what is written as it stands; other characters are percent-encoded

Reach = Literal["public", "private", "never"]


def _networks(*texts: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


# The IANA registries of special-purpose addresses. Private: of a site, or of this machine.
_PRIVATE = _networks(
    "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7",
)  # fmt: skip
_NEVER = _networks(
    *("0.0.0.0/8", "169.254.0.0/16", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("2001::/23", "2001:db8::/32", "3fff::/20"),
)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def reach_of(address: IPAddress) -> Reach:
    """public: anybody's. private: of a site or this machine. never: link-local, multicast, reserved and the like.

    An IPv6 address that carries an IPv4 address (mapped, 6to4, NAT64) is what the latter is.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inside = address.ipv4_mapped or address.sixtofour
        if inside is None and address in _NAT64:
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inside is not None:
            return reach_of(inside)
    if _is_in(address, _PRIVATE):
        return "private"
    if _is_in(address, _NEVER) or not address.is_global or address.is_multicast or address.is_reserved:
        return "never"
    return "public" if address.version == 4 or address in _GLOBAL_UNICAST else "never"


def _is_in(address: IPAddress, networks: Iterable) -> bool:
    return any(address.version == network.version and address in network for network in networks)


@dataclass(frozen=True)
class Place:
    """An http(s) address taken apart. `host` is a name in ASCII or an IP address in its plain form."""

    scheme: str
    host: str
    port: int
    target: str  # path and query, percent-encoded

    @property
    def address(self) -> IPAddress | None:
        """The host where it is an address."""
        try:
            return ipaddress.ip_address(self.host)
        except ValueError:
            return None

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class HostRule:
    """One entry of a list of hosts: `name`, or all hosts below it; on `port`, or the scheme's where it is None."""

    name: str
    below: bool
    port: int | None

    def fits(self, place: Place) -> bool:
        if place.port != (DEFAULT_PORTS[place.scheme] if self.port is None else self.port):
            return False
        return place.host.endswith(f".{self.name}") if self.below else place.host == self.name


def key_for(place: Place) -> str | None:
    """The list that a host would have to be on, None where none helps. Of names only localhost is seen to be private,
    as none is resolved."""
    if place.address is None:
        is_local = place.host == "localhost" or place.host.endswith(".localhost")
        return PRIVATE_KEY if is_local else DOMAINS_KEY
    return {"public": DOMAINS_KEY, "private": PRIVATE_KEY, "never": None}[reach_of(place.address)]


def parse_rules(entries: Sequence[str], key: str) -> tuple[HostRule, ...]:
    """Rules of a recipe's list: `example.org`, `*.example.org`, `10.0.0.5:9000`, `[fd00::5]:9000`.

    Raises UserError naming `key` for an entry that is none.
    """
    return tuple(_parse_rule(entry, key) for entry in entries)


def _parse_rule(entry: str, key: str) -> HostRule:
    below = entry.startswith("*.")
    try:
        parts = urllib.parse.urlsplit(f"//{entry[2:] if below else entry}")
        if parts.path or parts.query or parts.fragment or "@" in parts.netloc or parts.port == 0:
            raise ValueError
        name = plain_host(parts.hostname or "")
        port = parts.port
    except ValueError as error:
        raise UserError(
            f"{key}: {entry!r} is no host; write a name (example.org), all below it (*.example.org) or an address, "
            "with :port where it is not 80 or 443, and no https://"
        ) from error
    if below and (":" in name or name.rpartition(".")[2].isdecimal()):
        raise UserError(f"{key}: {entry!r}: an address has nothing below it; write it in full")
    return HostRule(name, below, port)


def parse_place(url: str) -> Place:
    """An http(s) URL taken apart. Raises UserError for what is no plain address of a file."""
    name = shown(url)
    if _BAD_IN_URL.search(url):
        raise UserError(f"{name}: the address holds control characters or backslashes; write them as %XX")
    try:
        parts = urllib.parse.urlsplit(url)
        if "@" in parts.netloc:
            raise UserError(f"{name}: no user name or password may stand in a media address; remove it")
        host, port = plain_host(parts.hostname or ""), parts.port
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: no valid http(s) address ({error or 'its host is no name'})") from error
    scheme = parts.scheme.lower()
    if scheme not in DEFAULT_PORTS or port == 0:
        raise UserError(f"{name}: no valid http(s) address")
    target = urllib.parse.quote(parts.path or "/", safe=_SAFE_IN_URL)
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe=_SAFE_IN_URL)
    return Place(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, target)


def plain_host(host: str) -> str:
    """A host's one form: an address as Python writes it, or a name in ASCII and lower case without its closing dot.

    Raises ValueError for what is neither, and for numbers that some programs take for an address.
    """
    if len(host) > _MOST_HOST_CHARACTERS:
        raise ValueError("its host is too long")
    if "%" in host:
        raise ValueError("its host is no name")  # also an interface behind an IPv6 address
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    name = host if host.isascii() else host.encode("idna").decode()
    name = name.lower().removesuffix(".")
    if not _NAME.fullmatch(name):
        raise ValueError("its host is no name")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(name))
    return name


def shown(url: str, length: int = 120) -> str:
    """An address for messages: without what signs it (user, query), and not endless."""
    text = re.split(r"[?#]", url, maxsplit=1)[0]
    text = re.sub(r"^([A-Za-z+.-]+://)[^/]*@", r"\1", text)
    return text if len(text) <= length else text[: length - 3] + "..."

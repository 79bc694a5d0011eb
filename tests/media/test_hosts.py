"""What is an allowed host, and which addresses are nobody's business."""

import ipaddress
import urllib.parse

import pytest

from executor.errors import UserError
from executor.media.hosts import DOMAINS_KEY, parse_place, parse_rules, reach_of, shown

# How far an address reaches: IANA's special-purpose registries, and IPv6 forms of the IPv4 ones.
REACH = {
    "public": ["93.184.216.34", "8.8.8.8", "172.32.0.1", "172.15.255.255", "192.169.0.1", "100.128.0.1", "11.0.0.1",
               "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "2002:808:808::1", "64:ff9b::808:808"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "127.0.0.1", "127.255.255.254", "::1",
                "100.64.0.1", "100.100.100.200", "fc00::1", "fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:10.1.2.3",
                "::ffff:7f00:1", "2002:7f00:1::", "2002:a00:1::1", "64:ff9b::7f00:1", "64:ff9b::192.168.0.1"],
    "never": ["0.0.0.0", "0.1.2.3", "169.254.169.254", "192.0.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1",
              "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1",
              "255.255.255.255", "::", "::127.0.0.1", "::8.8.8.8", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1",
              "2001::1", "2001:db8::1", "3fff::1", "100::1", "64:ff9b:1::1", "4000::1", "::ffff:169.254.169.254",
              "::ffff:0.0.0.0",
              "2002:a9fe:a9fe::", "64:ff9b::a9fe:a9fe", "5f00::1"],
}  # fmt: skip


@pytest.mark.parametrize(("reach", "address"), [(reach, one) for reach, all_ in REACH.items() for one in all_])
def test_reach(reach: str, address: str) -> None:
    assert reach_of(ipaddress.ip_address(address)) == reach


RULES = ["example.org", "*.Example.NET.", "münchen.example", "files.example:8443", "10.0.0.5:9000", "[fd00::5]:9000"]
ALLOWED = [
    "http://example.org/a.png", "https://EXAMPLE.org./a.png", "https://example.org:443/a", "http://example.org:80",
    "http://a.example.net", "https://a.b.EXAMPLE.net/", "http://xn--mnchen-3ya.example/", "http://MÜNCHEN.example/",
    "https://files.example:8443/x", "http://files.example:8443/x", "http://10.0.0.5:9000/", "http://[fd00::0:5]:9000/",
    "http://[FD00::5]:9000/", "http://example。org/", "http://ｅxample.org/", "http://example.org:/",
]  # fmt: skip
NOT_ALLOWED = [
    "http://example.org.evil.com/", "http://evilexample.org/", "http://sub.example.org/", "http://example.net/",
    "http://xexample.net/", "http://example.org:8080/", "https://example.org:80/", "https://files.example/",
    "http://10.0.0.5/", "http://10.0.0.6:9000/", "http://[fd00::6]:9000/", "http://evil.com/example.org",
    "http://evil.com?example.org", "http://evil.com#.example.net", "http://127.0.0.1/", "http://localhost/",
]  # fmt: skip
NO_ADDRESSES = [
    "http://", "http:///a", "http:/example.org/a", "http:example.org", "http://user@example.org/",
    "http://user:pass@example.org/", "http://example.org@evil.com/", "http://:@example.org/", "http://127.1/",
    "http://0x7f000001/", "http://2130706433/", "http://0177.0.0.1/", "http://0x7f.0.0.1/", "http://127.0.0.1.0x1/",
    "http://127.0.0.01/", "http://example.org\\@evil.com/", "http://exa\tmple.org/", "http://example.org/\r\nHost: x",
    "http://example.org:0/", "http://example.org:99999/", "http://example.org:http/", "http://exam ple.org/",
    "http://example..org/", "http://example.org../", "http://-a.example.org/", "http://[::1/", "http://[fe80::1%25eth0]/",
    "http://[::ffff:127.0.0.1", "http://" + "a" * 64 + ".example.net/", "http://" + "a." * 200 + "example.net/",
    "http://１２７．１/", "http://exa%6dple.org/", "http://*.example.net/", "http://\udc80.example.net/", "http://①/",
]  # fmt: skip


def fits(url: str) -> bool:
    place = parse_place(url)
    return any(rule.fits(place) for rule in parse_rules(RULES, DOMAINS_KEY))


@pytest.mark.parametrize("url", ALLOWED)
def test_allowed(url: str) -> None:
    assert fits(url)


@pytest.mark.parametrize("url", NOT_ALLOWED)
def test_not_allowed(url: str) -> None:
    assert not fits(url)


@pytest.mark.parametrize("url", NO_ADDRESSES)
def test_no_addresses(url: str) -> None:
    with pytest.raises(UserError, match="no valid|no user name|control characters"):
        parse_place(url)


@pytest.mark.parametrize(
    "rule", ["", "https://example.org", "example.org/a", "user@example.org", "*", "*.", "a.*.org", "*.10.0.0.1",
             "*.[::1]", "example.org:x", "example.org:0", "10.1", "exam ple.org", "*.1", "a?b", "."],
)  # fmt: skip
def test_no_rules(rule: str) -> None:
    with pytest.raises(UserError, match="^data_config.allowed_media_domains: "):
        parse_rules([rule], DOMAINS_KEY)


def test_what_is_asked_of_a_host() -> None:
    place = parse_place("HTTP://Example.org:8080/ä b/%20.png?q=ü&sig=a%2Fb#part")
    assert (place.scheme, place.host, place.port, place.host_header) == (
        "http",
        "example.org",
        8080,
        "example.org:8080",
    )
    assert place.target == "/%C3%A4%20b/%20.png?q=%C3%BC&sig=a%2Fb"
    assert urllib.parse.urlsplit(place.target).path == "/%C3%A4%20b/%20.png"
    assert parse_place("https://[FD00::5]/").host_header == "[fd00::5]"
    assert parse_place("https://example.org").target == "/"


def test_what_signs_an_address_is_not_shown() -> None:
    assert shown("https://user:secret@store.example/a.png?signature=secret#x") == "https://store.example/a.png"
    assert len(shown("http://a/" + "b" * 1000)) == 120

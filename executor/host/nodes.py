"""Reads what decides how ranks find each other: set_env.sh, addresses, device lists. Pure functions on text."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

PORTS = range(20000, 20051)
"""Where a job's master port is customarily taken from."""

# A quad with x in it, as templates have them, or words in angle brackets (which the shell may have split).
_PLACEHOLDER = re.compile(r"(?=.*x)(\d+|x+)(\.(\d+|x+)){3}|<.*|.*>", re.IGNORECASE)
_FIELD = re.compile(r"""^\s*(?:export\s+)?(\w+)=(?:"([^"]*)"|'([^']*)'|([^\s#;(]*))""")


@dataclass(frozen=True)
class NodeSetup:
    """The fields of executor/scripts/set_env.sh that a user fills in. Empty: not filled in."""

    ips: tuple[str, ...] = ()
    cann_path: str = ""
    driver_path: str = ""


@dataclass(frozen=True)
class VisibleDevices:
    """ASCEND_RT_VISIBLE_DEVICES as the runtime reads it. `problem` says what it silently does not read."""

    devices: tuple[int, ...]
    problem: str = ""


def parse_set_env(text: str) -> NodeSetup:
    """The user's fields of set_env.sh, the first assignment of each; comments and the script below are passed over."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        found = _FIELD.match(line)
        if found and not line.lstrip().startswith("#"):
            fields.setdefault(found[1], next((part for part in found.groups()[1:] if part is not None), ""))
    listed = re.search(r"^\s*IPs=\(([^)]*)\)", text, re.MULTILINE)
    body = re.sub(r"#.*", "", listed.group(1)) if listed else ""
    ips = [word.strip("\"',") for word in body.split()]
    return NodeSetup(tuple(ip for ip in ips if ip), fields.get("cann_path", ""), fields.get("driver_path", ""))


def is_address(text: str) -> bool:
    """Whether `text` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_placeholder(entry: str) -> bool:
    """Whether an entry of IPs is what a template has in it: xxx.xxx.xxx.xxx, 192.168.0.x or <master ip>.

    Nothing else is one: a mistyped address must be refused, never passed over.
    """
    return bool(_PLACEHOLDER.fullmatch(entry))


def parse_visible_devices(text: str, count: int) -> VisibleDevices:
    """Device numbers of a machine with `count` chips.

    As documented for CANN: numbers parted by commas, ascending, nothing else; reading stops at the first character or
    number that is none.
    """
    devices: list[int] = []
    for part in text.split(","):
        if not re.fullmatch(r"\d+", part):
            return VisibleDevices(tuple(devices), f"reading stops at '{part}': only numbers and commas, no spaces")
        if count and int(part) >= count:
            return VisibleDevices(tuple(devices), f"reading stops at {part}: there are devices 0 to {count - 1}")
        devices.append(int(part))
    if devices != sorted(set(devices)):
        return VisibleDevices(tuple(sorted(set(devices))), "the numbers must ascend, each once")
    return VisibleDevices(tuple(devices))


def parse_ip_addr(text: str) -> dict[str, list[str]]:
    """`ip -o addr show` as interface -> its addresses."""
    interfaces: dict[str, list[str]] = {}
    for name, address in re.findall(r"^\d+:\s+(\S+)\s+inet6?\s+([0-9a-fA-F.:]+)", text, re.MULTILINE):
        interfaces.setdefault(name.split("@")[0], []).append(address)
    return interfaces


def parse_hccn_conf(text: str) -> dict[int, str]:
    """/etc/hccn.conf as device -> address of the NPU's own network port."""
    return {int(device): address for device, address in re.findall(r"^\s*address_(\d+)=(\S+)", text, re.MULTILINE)}

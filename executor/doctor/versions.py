"""Versions of driver, firmware, CANN, NNAL, torch and torch_npu: what their files say, and which go together.

Pure functions on text. A pair that no table names is unknown, never wrong: users run CANN and torch_npu in many pairs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OLDEST_TORCH, NEWEST_TORCH = (2, 7, 1), (2, 14)
"""Releases of torch and torch_npu that this project supports, both ends included."""

# torch_npu release -> CANN releases it is documented or reported with. Sources: the "Version Matching" page of
# TorchNPU (Ascend's repository of torch_npu; also hiascend.com, Pytorch 7.2.0 release notes), and for 2.6.0 with
# 8.3.RC1 and 2.12.0 with 8.5.0 public recipes.
PAIRS = {
    "2.6.0": ("8.2.RC1", "8.3.RC1"),
    "2.6.0.post3": ("8.3.RC1",),
    "2.6.0.post5": ("8.5.0",),
    "2.7.1": ("8.3.RC1",),
    "2.7.1.post2": ("8.5.0",),
    "2.7.1.post4": ("9.0.0",),
    "2.7.1.post8": ("9.1.0",),
    "2.8.0": ("8.3.RC1",),
    "2.8.0.post2": ("8.5.0",),
    "2.8.0.post4": ("9.0.0",),
    "2.9.0": ("8.5.0",),
    "2.9.0.post2": ("9.0.0",),
    "2.9.0.post6": ("9.1.0",),
    "2.10.0": ("9.0.0",),
    "2.10.0.post4": ("9.1.0",),
    "2.11.0": ("9.1.0",),
    "2.12.0": ("8.5.0", "9.1.0"),
}


@dataclass(frozen=True)
class PackageInfo:
    """What a driver's or firmware's version.info says: its release, and the ranges of the other one it accepts."""

    version: str | None
    package: str | None
    accepts: tuple[tuple[str, str], ...]


def parse_pairs(text: str) -> dict[str, str]:
    """`key=value` lines (version.info, ascend_toolkit_install.info, ascend_install.info); keys in lower case."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.lstrip().startswith("#"):
            pairs.setdefault(key.strip().lower(), value.strip().strip('"'))
    return pairs


def parse_package_info(text: str) -> PackageInfo:
    """version.info of the driver or of the firmware."""
    pairs = parse_pairs(text)
    ranges = pairs.get("compatible_version_fw") or pairs.get("compatible_version_drv") or ""
    accepts = tuple((low.strip(), high.strip()) for low, high in re.findall(r"\[([^,\]]+),([^\]]+)\]", ranges))
    return PackageInfo(pairs.get("version"), pairs.get("package_version"), accepts)


def firmware_fits(driver: PackageInfo, firmware: str) -> bool | None:
    """Whether the driver's own list of firmware ranges names this firmware. None when either is not told."""
    number = numbers(firmware)
    ranges = [(numbers(low), numbers(high)) for low, high in driver.accepts]
    if not number or not ranges:
        return None
    return any(low <= number[: len(low)] and number[: len(high)] <= high for low, high in ranges)


def parse_install_info(text: str) -> str | None:
    """CANN's release from ascend_toolkit_install.info: `version=8.3.RC1`."""
    return parse_pairs(text).get("version")


def parse_version_cfg(text: str) -> str | None:
    """CANN's release in use from version.cfg: `toolkit_running_version=[7.6.0.1.220:8.0.0]`.

    Of several releases that were installed one after another the last is meant.
    """
    pairs = parse_pairs(text)
    for part in ("toolkit", "runtime", "compiler"):
        for state in ("running", "installed"):
            named = re.findall(r"\[[^:\]]*:([^\]]+)\]", pairs.get(f"{part}_{state}_version", ""))
            if named:
                return named[-1].strip()
    return None


def parse_toolkit_info(text: str) -> str | None:
    """CANN's release from a component's version.info: `version_dir=8.2.RC1`, else `Version=`."""
    pairs = parse_pairs(text)
    return pairs.get("version_dir") or pairs.get("version")


def parse_atb_info(text: str) -> str | None:
    """NNAL's release from atb's version.info: `Ascend-cann-atb : 8.2.RC1`."""
    found = re.search(r"^\s*Ascend-cann-atb\s*:\s*(\S+)", text, re.MULTILINE | re.IGNORECASE)
    return found.group(1) if found else None


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "7.5.0.1.129" -> (7, 5, 0, 1, 129), "8.3.RC1" -> (8, 3)."""
    found = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    return tuple(int(part) for part in found.group(1).split(".")) if found else ()


def release(version: str) -> str:
    """A Python package's version without its local part: "2.8.0+cpu" -> "2.8.0"."""
    return version.split("+", 1)[0].strip()


def is_supported_torch(version: str) -> bool:
    """Whether a release of torch or torch_npu lies within what this project supports."""
    number = numbers(version)[:3]
    return number >= OLDEST_TORCH and number[: len(NEWEST_TORCH)] <= NEWEST_TORCH


def torch_matches(torch: str, torch_npu: str) -> bool:
    """torch_npu is built for exactly one torch: the first three numbers must be equal."""
    return numbers(torch)[:3] == numbers(torch_npu)[:3]


def same_cann(one: str, other: str) -> bool:
    """Whether two names are the same CANN release: 8.3.RC1 and 8.3.rc1, not 8.3.RC1 and 8.3.RC2."""
    return one.strip().lower() == other.strip().lower()


def documented_cann(torch_npu: str) -> tuple[str, ...]:
    """CANN releases that this very torch_npu release is documented with; empty when no table names it."""
    return PAIRS.get(release(torch_npu), ())


def documented_near(torch_npu: str) -> str:
    """What the table says of releases with the same three numbers: "2.8.0 with 8.3.RC1, 2.8.0.post2 with 8.5.0"."""
    base = numbers(torch_npu)[:3]
    near = (f"{name} with {' or '.join(cann)}" for name, cann in PAIRS.items() if numbers(name)[:3] == base)
    return ", ".join(near)

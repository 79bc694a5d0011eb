"""Reads what `npu-smi` prints. Pure functions on text; knows nothing of machines and recipes.

Three layouts of the table of `npu-smi info` are in the field: HBM chips (a Memory and an HBM column), A3 dies (the same
with a Phy-ID beside the chip id) and 310P (one Memory column, a Device beside the chip id). In all of them a chip takes
two rows, and the last `used / total` of its second row is the memory that models live in.
Sources of the layouts: tests/doctor/outputs.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

A2, A3, DUO = "atlas_800i_a2", "atlas_800i_a3", "atlas_300i_duo"

NOMINAL_GB = (8, 16, 24, 32, 48, 64, 96, 128, 192)
"""Sizes chips are sold with. A chip shows somewhat less: 21527 MB of 24 GB, 43693 or 44280 MB of 48 GB."""

_PAIR = re.compile(r"(\d+)\s*/\s*(\d+)")
_MAPPING_ROW = re.compile(r"^\s*(\d+)\s+(\d+)\s+(\d+|-)\s+(?:(\d+|-)\s+)?(\S.*?)\s*$")


@dataclass(frozen=True)
class Chip:
    """One processor that a rank can use: an A2 chip, one die of an A3 module, one chip of a 300I card."""

    npu_id: int
    chip_id: int
    name: str
    health: str
    bus_id: str
    used_mb: int
    total_mb: int

    @property
    def nominal_gb(self) -> int | None:
        """The size the chip is sold with, or None when the driver shows no memory."""
        return nominal_gb(self.total_mb)


@dataclass(frozen=True)
class SmiTable:
    """`npu-smi info`: the driver's version as it prints it, and the chips in the order of their device numbers."""

    version: str | None
    chips: tuple[Chip, ...]


@dataclass(frozen=True)
class MappedChip:
    """A row of `npu-smi info -m` that is a processor (the card's controller, `Mcu`, is left out)."""

    npu_id: int
    chip_id: int
    logic_id: int
    name: str


def parse_info(text: str) -> SmiTable:
    """The table of `npu-smi info`. No chips when the text is something else, such as an error message."""
    version = re.search(r"\bVersion:\s*(\S+)", text)
    chips: list[Chip] = []
    first: tuple[int, str, str] | None = None
    for line in text.splitlines():
        if "Process id" in line:
            break  # the second table: who uses the chips
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3 or not cells[0][:1].isdigit():
            continue
        number, _, rest = cells[0].partition(" ")
        if first is None:
            if number.isdigit() and re.search("[A-Za-z0-9]", rest):
                first = (int(number), rest.strip(), cells[1])
            continue
        memory = _PAIR.findall(cells[2])
        used, total = memory[-1] if memory else (0, 0)
        npu_id, name, health = first
        chips.append(Chip(npu_id, int(number), name, health, cells[1], int(used), int(total)))
        first = None
    return SmiTable(version.group(1) if version else None, tuple(chips))


def parse_mapping(text: str) -> tuple[MappedChip, ...]:
    """`npu-smi info -m`, with or without its Phy-ID column: only rows that have a device number."""
    rows = (_MAPPING_ROW.match(line) for line in text.splitlines())
    return tuple(
        MappedChip(int(row[1]), int(row[2]), int(row[3]), row[5].replace(" ", ""))
        for row in rows
        if row and row[3] != "-"
    )


def parse_fields(text: str) -> dict[str, str]:
    """`key : value` lines, as `npu-smi info -t board -i N` prints them. The first of equal keys stays."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip():
            fields.setdefault(key.strip(), value.strip())
    return fields


def parse_chip_sections(text: str) -> dict[int, dict[str, str]]:
    """`npu-smi info -t usages -i N` by chip: each section ends with its `Chip ID`, or is the whole text without one."""
    sections: dict[int, dict[str, str]] = {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or key in ("NPU ID", "Chip Count"):
            continue
        if key == "Chip ID" and value.isdigit():
            sections[int(value)], fields = fields, {}
        else:
            fields.setdefault(key, value)
    return sections or ({0: fields} if fields else {})


def memory_mb(fields: dict[str, str]) -> int:
    """Memory of a chip by its usages: HBM where it has some, else DDR (310P). 0 when neither is told."""
    for key in ("HBM Capacity(MB)", "DDR Capacity(MB)"):
        value = fields.get(key, "")
        if value.isdigit() and int(value):
            return int(value)
    return 0


def soc_name(fields: dict[str, str]) -> str | None:
    """The chip's full name from `npu-smi info -t board -i N -c C`: Ascend910B4, Ascend910_9392, Ascend310P3."""
    name = fields.get("Chip Name", "")
    if not name or name.lower() in ("na", "mcu"):
        return None
    npu_name = fields.get("NPU Name", "")
    if npu_name and npu_name != "NA" and "_" not in name:
        return f"{name}_{npu_name}"
    return name if name.startswith("Ascend") else f"Ascend{name}"


def family(name: str) -> str | None:
    """The `soc` of a recipe for a chip's name in any of its spellings; None for chips this project has no backend for.

    A3 dies call themselves just `Ascend910`, or Ascend910_93xx in full. `910B` without a digit, 910A and 910ProB are
    the first generation, not A2.
    """
    plain = re.sub(r"^ascend[ _]*", "", name.strip(), flags=re.IGNORECASE).upper()
    if plain == "910" or re.match(r"910_93\d\d", plain):
        return A3
    if re.match(r"910B\d", plain):
        return A2
    if re.match(r"310P\d?", plain):
        return DUO
    return None


def nominal_gb(total_mb: int) -> int | None:
    """The size a chip of `total_mb` visible megabytes is sold with."""
    if total_mb <= 0:
        return None
    return next((size for size in NOMINAL_GB if total_mb / 1024 <= size), None)

"""The three chips that can be emulated, which one is emulated now, and what is documented to run on it.

Facts come from `data/`: `op_support.csv` (each op's documentation page or docstring) and the short `op_overrides.csv`
(ops whose documentation is silent, allowed for the reason that stands beside them). Knows no semantics of ops.
"""

import csv
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from executor.errors import UserError, nearest

DATA = Path(__file__).with_name("data")


@dataclass(frozen=True)
class Chip:
    """`soc` is the recipe's name, `acl_name` what the runtime answers, `column` its column in op_support.csv."""

    soc: str
    acl_name: str
    column: str
    title: str
    dtypes: tuple[torch.dtype, ...]

    def __str__(self) -> str:
        return f"{self.title} ({self.soc})"


_WIDE = (torch.float16, torch.bfloat16, torch.float32)
CHIPS = {
    chip.soc: chip
    for chip in (
        Chip("atlas_800i_a2", "Ascend910B4", "atlas_a2", "Atlas 800I A2", _WIDE),
        Chip("atlas_800i_a3", "Ascend910_9391", "atlas_a3", "Atlas 800I A3", _WIDE),
        Chip("atlas_300i_duo", "Ascend310P3", "atlas_300i_duo_310p", "Atlas 300I DUO", (torch.float16, torch.float32)),
    )
}
_current: Chip | None = None


@dataclass(frozen=True)
class Support:
    """What the documentation says of an op on a chip. `verdict`: yes, no, or undocumented."""

    op: str
    verdict: str
    allowed: bool
    source: str


def chip_of(soc: str) -> Chip:
    """The chip of a recipe's `soc`. UserError for a name that is none."""
    if soc not in CHIPS:
        raise UserError(
            f"model_config.soc: got {soc!r}, allowed {', '.join(CHIPS)}{nearest(soc, CHIPS)}. "
            "Name one of the chips that the emulator knows."
        )
    return CHIPS[soc]


def use(chip: Chip) -> None:
    """Make `chip` the emulated one."""
    global _current
    _current = chip


def current() -> Chip:
    """The chip that is emulated now."""
    assert _current is not None, "no chip is emulated: call emulator.activate.activate first"
    return _current


def support(op: str, chip: Chip) -> Support:
    """What is documented of `op` (its name without namespace) on `chip`."""
    name = op.partition("::")[2] or op
    verdict, source = _pages().get((name, chip.column), ("?", "none"))
    if verdict in ("yes", "no"):
        return Support(name, verdict, verdict == "yes", source)
    chips, reason = _overrides().get(name, ((), ""))
    if chip.soc in chips:
        return Support(name, "undocumented", True, reason)
    return Support(
        name, "undocumented", False, "its page does not list this chip" if verdict == "unlisted" else "no page"
    )


def report(ops: Iterable[str], chip: Chip) -> tuple[list[Support], list[Support]]:
    """Of the ops a program calls: those that cannot run on `chip`, and those that may though no page says so."""
    found = [support(op, chip) for op in sorted(set(ops))]
    return [s for s in found if not s.allowed], [s for s in found if s.allowed and s.verdict != "yes"]


@functools.cache
def _pages() -> dict[tuple[str, str], tuple[str, str]]:
    with (DATA / "op_support.csv").open(newline="") as file:
        return {
            (row["op"], chip.column): (row[chip.column], row["source"])
            for row in csv.DictReader(file)
            for chip in CHIPS.values()
        }


@functools.cache
def _overrides() -> dict[str, tuple[tuple[str, ...], str]]:
    with (DATA / "op_overrides.csv").open(newline="") as file:
        return {row["op"]: (tuple(row["chips"].split()), row["source"]) for row in csv.DictReader(file)}

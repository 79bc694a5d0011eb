"""Chips as the planner knows them: a file of config/device/ each, with a source for every figure.

A chip is what one rank computes on: a die of Atlas 800I A2 or A3, one of the two chips of an Atlas 300I DUO, or a CPU
(executor/bench/probe.py measures that one). Figures are those printed for the hardware, not reached by any
program. Knows no model and no recipe.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from executor.errors import UserError, nearest, printable
from executor.host.env import REPO_ROOT
from executor.recipe.file import read_yaml
from executor.recipe.schema import Soc

FOLDER = REPO_ROOT / "config" / "device"
DEFAULT_CHIPS = {"atlas_800i_a2": "910b4", "atlas_800i_a3": "a3_die", "atlas_300i_duo": "310p3"}
"""The chip that a soc stands for where a recipe names no other. Its usable memory is that of executor/device/table.py
(CHIP_BYTES), which a test holds."""

Rate = Annotated[float, Field(ge=1e6, le=1e21)]
"""Bytes or operations a second: a million to far beyond any chip, so that times are finite numbers."""
_FIGURES = (
    "memory_bytes", "usable_bytes", "bandwidth_bytes_per_s", "flops_per_s", "link_bytes_per_s", "link_latency_s",
    "dies_per_node",
)  # fmt: skip


class Chip(BaseModel):
    """One chip. `flops_per_s`: of matrix products by type of their operands, additions and multiplications counted.

    `usable_bytes`: what a program may have of the memory. `link_bytes_per_s`: to another chip of the node, in one
    direction. `link_latency_s`: of one step of a ring over such links, beside the bytes. `sources`: a word for every
    figure; `disputed`: figures about which sources disagree.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(min_length=1)]
    soc: Soc | None  # None: a CPU
    memory_bytes: Annotated[int, Field(gt=0)]
    usable_bytes: Annotated[int, Field(gt=0)]
    bandwidth_bytes_per_s: Rate
    flops_per_s: Annotated[dict[Literal["float32", "bfloat16", "float16", "int8"], Rate], Field(min_length=1)]
    link: Literal["hccs", "pcie", "memory"]
    link_bytes_per_s: Rate
    link_latency_s: Annotated[float, Field(gt=0, le=1)]
    dies_per_node: Annotated[int, Field(ge=1)]
    sources: dict[str, str]
    disputed: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> "Chip":
        missing = [figure for figure in _FIGURES if figure not in self.sources]
        if missing:
            raise ValueError(f"sources: no source for {', '.join(missing)}")
        unknown = [word for word in (*self.sources, *self.disputed) if word not in _FIGURES]
        if unknown:
            raise ValueError(f"sources and disputed name figures of the chip, got {', '.join(unknown)}")
        if self.usable_bytes > self.memory_bytes:
            raise ValueError(f"usable_bytes: {self.usable_bytes} is more than memory_bytes, {self.memory_bytes}")
        return self

    def rate(self, dtype: str) -> float:
        """Operations a second of products of `dtype`. Raises UserError for a type that the chip has no products of."""
        if dtype not in self.flops_per_s:
            raise UserError(f"model_config.dtype: {self.name} computes in {', '.join(self.flops_per_s)}; got {dtype}")
        return self.flops_per_s[dtype]


def chip_names() -> tuple[str, ...]:
    """The chips of config/device/, by their files' names."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_chip(name: str) -> Chip:
    """The chip of that name in config/device/, or of that file. Raises UserError, with what there is."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name.lower()}.yaml"
    if not _is_file(path):
        raise UserError(
            f"plan_config.chip: there is no chip {printable(name)}{nearest(name.lower(), chip_names())}; there are "
            f"{', '.join(chip_names())}, or name a YAML file of the same form"
        )
    try:
        return Chip.model_validate(read_yaml(path, "the chip", "config/device/910b4.yaml has the form"))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: {f'{key}: ' if key else ''}{first['msg']}; config/device/910b4.yaml has the form"
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def chip_of_soc(soc: str) -> Chip:
    """The chip that a recipe's soc stands for."""
    return read_chip(DEFAULT_CHIPS[soc])

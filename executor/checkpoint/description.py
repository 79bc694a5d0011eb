"""Which tensor has which scheme, as msmodelslim's quant_model_description*.json says it.

The types of the tensors count, never `model_quant_type`: a mixture of experts calls itself W8A8 and has dynamic
experts, W4A8 folders call themselves FLOAT.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from executor.checkpoint.files import DESCRIPTIONS
from executor.checkpoint.folder import read_json
from executor.checkpoint.names import canonical_name
from executor.checkpoint.parts import first_part
from executor.errors import UserError

FLOAT_TYPE = "FLOAT"
WEIGHTS = (".weight", ".experts.gate_up_proj", ".experts.down_proj")
"""How the names of weights end: those of all experts in one tensor may be the linear's own."""


@dataclass(frozen=True)
class Description:
    """Type by canonical tensor name, such as W8A8; tensors that are not named are float."""

    file: Path
    types: Mapping[str, str]
    said: str  # model_quant_type
    kv_cache: str | None = None  # kv_cache_type, such as C8; None: keys and values stay float

    def type_of(self, name: str) -> str:
        return self.types.get(name, FLOAT_TYPE)

    @property
    def kinds(self) -> Counter[str]:
        """How many weights there are of each type."""
        return Counter(kind for name, kind in self.types.items() if name.endswith(WEIGHTS))

    @cached_property
    def samples(self) -> Mapping[str, str]:
        """The types inside but float, in the recipe's words, each with the name of a weight that has it."""
        weights = ((kind, name) for name, kind in self.types.items() if name.endswith(WEIGHTS))
        return {kind.lower(): name for kind, name in weights if kind != FLOAT_TYPE}

    @property
    def label(self) -> str:
        """The recipe's word for the folder: what it says itself where it has such weights, else its most frequent."""
        kinds = self.kinds
        del kinds[FLOAT_TYPE]
        if not kinds:
            return "none"
        return (self.said if self.said in kinds else kinds.most_common(1)[0][0]).lower()


def read_description(folder: Path) -> Description | None:
    """The folder's description; None for float weights without one.

    Raises UserError for one that is damaged, and for several that say different things.
    """
    folder = first_part(folder)
    files = sorted(folder.glob(DESCRIPTIONS))
    if not files:
        return None
    contents = [read_json(folder, file.name) for file in files]
    if any(content != contents[0] for content in contents[1:]):
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{folder}: {len(files)} descriptions of quantized weights that differ: {names}; keep the one that was "
            "written with these weights, and move the others out of the folder"
        )
    return _parsed(files[0], contents[0])


def _parsed(file: Path, raw: Mapping[str, object]) -> Description:
    """Entries whose name has a dot are tensors; the others are about the whole model."""
    entries = {name: kind for name, kind in raw.items() if "." in name}
    odd = next((name for name, kind in entries.items() if not isinstance(kind, str)), None)
    if odd is not None or not entries:
        found = f"the type of '{odd}' is {entries[odd]!r}" if odd else "it names no tensor"
        raise UserError(
            f"{file}: damaged: {found}; it must give every tensor a type, such as "
            '"lm_head.weight": "FLOAT". Copy it again from where the weights came'
        )
    types: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for name, kind in entries.items():
        other = spelled.setdefault(canonical_name(name), name)
        if types.setdefault(canonical_name(name), kind) != kind:
            raise UserError(
                f"{file}: '{other}' is {entries[other]} and '{name}' is {kind}, and both are the same tensor; take the "
                "description that was written with these weights, or quantize the model again"
            )
    said = str(raw.get("model_quant_type", FLOAT_TYPE))
    return Description(file, types, said, _kv_cache(file, raw))


def _kv_cache(file: Path, raw: Mapping[str, object]) -> str | None:
    """Tools write both keys, or one of them. UserError where they differ."""
    said = {key: str(raw[key]).upper() for key in ("kv_cache_type", "kv_quant_type") if raw.get(key)}
    if len(set(said.values())) > 1:
        raise UserError(
            f"{file}: {' and '.join(f'{key} is {value}' for key, value in said.items())}, which must be the same; take "
            "the description that was written with these weights, or quantize the model again"
        )
    return next(iter(said.values()), None)

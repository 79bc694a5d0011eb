"""Which tensor has which scheme, as msmodelslim's quant_model_description*.json says it.

The types of the tensors count, never `model_quant_type`: a mixture of experts calls itself W8A8 and has dynamic
experts, W4A8 folders call themselves FLOAT.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from executor.checkpoint.folder import read_json
from executor.checkpoint.headers import canonical_name
from executor.checkpoint.parts import first_part

FLOAT_TYPE = "FLOAT"
PATTERN = "quant_model_description*.json"


@dataclass(frozen=True)
class Description:
    """Type by canonical tensor name, such as W8A8; tensors that are not named are float."""

    file: Path
    types: Mapping[str, str]
    said: str  # model_quant_type

    def type_of(self, name: str) -> str:
        return self.types.get(name, FLOAT_TYPE)

    @property
    def kinds(self) -> Counter[str]:
        """How many weights there are of each type."""
        return Counter(kind for name, kind in self.types.items() if name.endswith(".weight"))

    @property
    def label(self) -> str:
        """The recipe's word for the folder: what it says itself where it has such weights, else its most frequent."""
        kinds = self.kinds
        del kinds[FLOAT_TYPE]
        if not kinds:
            return "none"
        return (self.said if self.said in kinds else kinds.most_common(1)[0][0]).lower()


def read_description(folder: Path) -> Description | None:
    """The folder's description; None for float weights without one."""
    folder = first_part(folder)
    files = sorted(folder.glob(PATTERN))
    if not files:
        return None
    raw = read_json(folder, files[0].name)
    types = {canonical_name(name): kind for name, kind in raw.items() if isinstance(kind, str) and "." in name}
    return Description(files[0], types, str(raw.get("model_quant_type", FLOAT_TYPE)))

"""How many bytes a quantized folder's weights take in memory, from the headers of its files. Imports no torch.

A linear's type is its own (a folder that is called W8A8 has float and dynamic ones), so the files are asked rather
than the recipe's word. Float tensors count in numbers: they are kept in the recipe's type, whatever the files have.
"""

import json
import math
import re
import struct
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from executor.checkpoint.files import find_weights
from executor.checkpoint.names import canonical_name
from executor.checkpoint.parts import part_folders
from executor.errors import UserError

KV, ATTENTION, MLP, EXPERTS, VOCABULARY, VISION, WHOLE = (
    "kv", "attention", "mlp", "experts", "vocabulary", "vision", "whole",
)  # fmt: skip
_PLACES = (  # the first that fits; WHOLE: every rank has all of it
    (re.compile(r"^model\.visual\."), VISION),
    (re.compile(r"^(lm_head|model\.language_model\.embed_tokens)\."), VOCABULARY),
    (re.compile(r"\.mlp\.experts\."), EXPERTS),
    (re.compile(r"\.mlp\.(gate|up|down)_proj\."), MLP),
    (re.compile(r"\.self_attn\.[kv]_proj\."), KV),
    (re.compile(r"\.self_attn\.[qo]_proj\."), ATTENTION),
)
_FLOATS = ("F64", "F32", "BF16", "F16")
_NUMBER_BYTES = {"I8": 1, "U8": 1, "I32": 4, "I64": 4}  # I64: deq_scale, of which a float32 is kept
# Scales stay float32 whatever the model computes in.
_SCALES = re.compile(r"\.(weight|deq|input|kv_cache)_(scale|offset)$")


@dataclass(frozen=True)
class StoredSizes:
    """By where in the model: how many float numbers there are, and the bytes of all else.

    `is_part`: they are what one rank reads (of the vision encoder all), not the whole model's.
    """

    floats: Mapping[str, int]
    others: Mapping[str, int]
    is_part: bool = False

    def bytes(self, place: str, float_bytes: int) -> int:
        return self.floats.get(place, 0) * float_bytes + self.others.get(place, 0)


def read_sizes(folder: Path, tied: bool) -> StoredSizes | None:
    """Of the whole folder, or of the largest part of one in parts.

    `tied`: the head is the embedding, whatever the files have. None where the headers cannot be read: loading says
    what is wrong with them.
    """
    try:
        parts = part_folders(folder)
        found = [_sizes(each, tied, bool(parts)) for each in parts or (folder,)]
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
        return None
    return max(found, key=lambda sizes: sum(sizes.others.values()))


def _sizes(folder: Path, tied: bool, is_part: bool) -> StoredSizes:
    floats: dict[str, int] = defaultdict(int)
    others: dict[str, int] = defaultdict(int)
    headers = [_header(file) for file in find_weights(folder).files]
    for name, entry in (item for header in headers for item in header.items()):
        name, count = canonical_name(name), math.prod(entry["shape"])
        if tied and name == "lm_head.weight":
            continue
        place = next((place for pattern, place in _PLACES if pattern.search(name)), WHOLE)
        if entry["dtype"] in _FLOATS and not _SCALES.search(name):
            floats[place] += count
        else:
            others[place] += count * _NUMBER_BYTES.get(entry["dtype"], 4)
    return StoredSizes(floats, others, is_part)


def _header(file: Path) -> dict[str, dict]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(min(size, file.stat().st_size)))
    header.pop("__metadata__", None)
    return header

"""Whether the output head is the embedding, where config.json and the weights may differ: the weights decide.

Published models with tied embeddings have no head in their files. Fine-tuned ones may have a head of their own under a
config.json that still says tied, and merged ones an equal copy: one comparison, some megabytes at a time, tells which.
"""

import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from executor.checkpoint.files import find_weights
from executor.errors import UserError

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
CHUNK_BYTES = 16 << 20


def settle_head(folder: Path, config: Mapping[str, Any], tied: bool) -> Mapping[str, Any]:
    """`config` with a tie_word_embeddings that its weights bear out; `tied` is what it says as it stands.

    Reads headers of a folder that says tied, and weights only where such a folder holds a head as well.
    """
    if not tied or not _names_head(folder) or _is_copy(folder):
        return config
    logger.warning(
        "%s: config.json says tie_word_embeddings, but %s of the weights differs from the embedding and is taken",
        folder, HEAD,
    )  # fmt: skip
    return {**config, "tie_word_embeddings": False}


def _names_head(folder: Path) -> bool:
    """Whether a file of the folder names a head."""
    try:
        found = find_weights(folder)
        names = found.weight_map or set().union(*(_header_names(file) for file in found.files))
    except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError, struct.error):
        return False  # reading the checkpoint says what is wrong with it
    return any(name.endswith(HEAD) for name in names)


def _header_names(file: Path) -> set[str]:
    with file.open("rb") as stream:
        (size,) = struct.unpack("<Q", stream.read(8))
        return set(json.loads(stream.read(min(size, file.stat().st_size))))


def _is_copy(folder: Path) -> bool:
    """Whether head and embedding hold the same numbers. Streams both, and stops at the first difference."""
    import torch  # late, and what imports it: only where there is something to compare
    from safetensors import safe_open

    from executor.checkpoint.headers import Checkpoint

    catalog = Checkpoint(folder).catalog
    head, embedding = catalog.get(HEAD), catalog.get(EMBEDDING)
    if head is None or embedding is None or not head.shape or head.dtype is None or embedding.dtype is None:
        return True  # loading names what is missing, or of a type that cannot be read
    if head.shape != embedding.shape:
        return False
    rows = max(1, CHUNK_BYTES * head.shape[0] // max(head.num_bytes, 1))
    with safe_open(head.file, framework="pt") as first, safe_open(embedding.file, framework="pt") as second:
        ours, theirs = first.get_slice(head.original_name), second.get_slice(embedding.original_name)
        for start in range(0, head.shape[0], rows):
            part = slice(start, min(start + rows, head.shape[0]))
            # A type that is narrower than the other's holds each value that it holds exactly.
            if not torch.equal(ours[part].to(torch.float32), theirs[part].to(torch.float32)):
                return False
    return True

"""Folders of compressed weights: `part{rank}-of-{size}`, each with what one rank of a tensor parallel group reads.

Knows names of folders only; what is in a part: part_pulls.py.
"""

import re
from pathlib import Path

from executor.errors import UserError

_PART = re.compile(r"part(\d+)-of-(\d+)")
_OTHER_CONTAINER = "model-rank-*-part-*.safetensors"


def part_name(rank: int, size: int) -> str:
    return f"part{rank}-of-{size}"


def part_folders(folder: Path) -> tuple[Path, ...]:
    """The parts of a folder in the ranks' order; () for a folder of another kind.

    Raises UserError for parts of which some are missing, or of several sizes, and for a container that is not read.
    """
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        named = _PART.fullmatch(path.name)
        if named and path.is_dir():
            found.setdefault(int(named[2]), {})[int(named[1])] = path
    if not found:
        _refuse_other_container(folder)
        return ()
    if len(found) > 1:
        raise UserError(
            f"{folder}: it holds weights that were compressed for several numbers of ranks: "
            f"{', '.join(map(str, sorted(found)))}; keep one of them in a folder"
        )
    ((size, parts),) = found.items()
    missing = [part_name(rank, size) for rank in range(size) if rank not in parts]
    if missing or len(parts) != size:
        raise UserError(
            f"{folder}: {', '.join(missing) or 'a part beyond the last'} is missing or too much of the {size} parts; "
            "copy them again, or compress again (python -m executor.commands.compress)"
        )
    return tuple(parts[rank] for rank in range(size))


def first_part(folder: Path) -> Path:
    """Where a folder's description of quantized weights lies: all parts have the same."""
    return next(iter(part_folders(folder)), folder)


def size_finding(folder: Path, is_compressed: bool, size: int) -> str | None:
    """What keeps `size` ranks of a tensor parallel group from reading the folder: it was compressed for another number.

    `is_compressed`: whether its description has such weights; then a folder without parts is for one rank.
    """
    made_for = len(part_folders(folder)) or (1 if is_compressed else size)
    if made_for == size:
        return None
    return (
        f"parallel_config.attn_tp_size: the recipe has {size}, and the weights in {folder} were compressed for "
        f"{made_for}; set attn_tp_size: {made_for}, or compress the w8a8s weights again for {size} (torchrun "
        f"--nproc_per_node {size} -m executor.commands.compress)"
    )


def _refuse_other_container(folder: Path) -> None:
    found = sorted(folder.glob(_OTHER_CONTAINER)) if folder.is_dir() else []
    if found:
        raise UserError(
            f"{folder}: {found[0].name} is another tool's container of compressed weights, with fused tensors under "
            "names of its own, which is not read; compress the w8a8s weights with python -m executor.commands.compress"
        )

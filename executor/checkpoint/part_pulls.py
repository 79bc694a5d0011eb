"""Pulls of a model whose checkpoint lies in parts: what each part holds of a tensor, and where a slice stands in it.

A part holds of every text tensor what its rank takes, and the vision encoder whole: that may be split over the ranks
or not, as the recipe says. Who writes a part and who reads it go by the same pulls.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from executor.checkpoint.headers import Checkpoint
from executor.checkpoint.parts import part_folders, size_finding
from executor.checkpoint.pull import Pull, swap_last_two
from executor.errors import UserError

WHOLE = ("model.visual.",)
"""Canonical names of tensors that a part does not slice."""
Bounds = tuple[int, int]  # a slice's start and stop


def open_checkpoint(folder: Path, rank: int, size: int) -> Checkpoint:
    """What rank `rank` of a tensor parallel group of `size` reads: its part, or the folder. UserError: another size."""
    parts = part_folders(folder)
    if not parts:
        return Checkpoint(folder)
    if finding := size_finding(folder, True, size):
        raise UserError(finding)
    return Checkpoint(parts[rank], is_part=True)


def taken(pulls: Iterable[Pull]) -> dict[str, tuple[tuple[Bounds, ...], ...]]:
    """What a rank takes of every tensor it reads: for each dim of the file, the bounds in order."""
    found: dict[str, list[set[Bounds]]] = {}
    for pull in pulls:
        if not pull.into.numel():
            continue
        index = pull.file_index
        if pull.name.startswith(WHOLE):
            index = tuple(slice(0, size) for size in pull.file_shape)
        dims = found.setdefault(pull.name, [set() for _ in index])
        for seen, piece in zip(dims, index, strict=True):
            seen.add((piece.start, piece.stop))
    held = {name: tuple(tuple(sorted(seen)) for seen in dims) for name, dims in found.items()}
    for name, dims in held.items():
        for seen in dims:
            overlap = any(first[1] > second[0] for first, second in zip(seen, seen[1:], strict=False))
            assert not overlap, f"{name}: the rank takes rows twice: {seen}"
    return held


def of_part(pulls: Iterable[Pull]) -> Iterator[Pull]:
    """The same pulls where the file holds what `taken` says, side by side, and nothing else."""
    pulls = list(pulls)
    held: Mapping[str, tuple[tuple[Bounds, ...], ...]] = taken(pulls)
    for pull in pulls:
        if pull.name.startswith(WHOLE):
            yield pull
            continue
        if not pull.into.numel():  # another rank's part has it
            continue
        shape, index = [], []
        for piece, seen in zip(pull.file_index, held[pull.name], strict=True):
            before = sum(stop - start for start, stop in seen if stop <= piece.start)
            index.append(slice(before, before + piece.stop - piece.start))
            shape.append(sum(stop - start for start, stop in seen))
        turned = swap_last_two if pull.transpose else tuple
        yield replace(pull, shape=tuple(turned(tuple(shape))), index=tuple(turned(tuple(index))))

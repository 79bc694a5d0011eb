"""W8A8SC: W8A8S whose values stay compressed (300I DUO). A compressor has packed what one rank reads.

Fused linears are compressed one by one. How many bytes each has stands in the checkpoint's headers only, so a linear's
scheme is made for it. Legend: k inputs and n outputs of this rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, empty, whole
from executor.device.weights import CompressedInt8
from executor.errors import UserError
from executor.quant.fields import FieldScheme, one_of_all
from executor.quant.scheme import ExpertShare, LinearShare, Tensors
from executor.quant.w8a8 import STATIC_FIELDS, W8A8

INPUTS, OUTPUTS = 32, 16
"""The codec's fractals: a weight is padded to whole ones."""
TILE = 8  # fractals of a tile, either way
INDEX_BYTES = 8  # of a tile
AGAIN = "compress the w8a8s weights again (python -m executor.commands.compress)"


def index_bytes(k: int, n: int) -> int:
    """Of a weight's index: it has an entry for every tile of 256 inputs by 128 outputs."""
    return INDEX_BYTES * -(-k // (TILE * INPUTS)) * -(-n // (TILE * OUTPUTS))


def weight_info(k: int, n: int, tile: tuple[int, int] = (TILE, TILE)) -> tuple[int, ...]:
    """What `info` says of a compressed weight: fractals of a tile along k and n, the sizes without padding, 1."""
    return (*tile, k, n, 1)


@dataclass(frozen=True)
class W8A8SC(FieldScheme):
    """`sizes`: bytes of every fused linear's weight and of its index.

    quant_bias is each part's own: a rank that leaves it to another has zeros in its file.
    """

    sizes: tuple[tuple[int, int], ...]

    name = "w8a8sc"
    form = CompressedInt8
    fields = tuple(replace(field, added_once=False) for field in STATIC_FIELDS)
    takes_bias = False
    left = W8A8.left

    def linear_tensors(self, share: LinearShare) -> dict[str, nn.Parameter | None]:
        packed = {}
        for number, sizes in enumerate(self.sizes):
            for suffix, size in zip(("weight", "index"), sizes, strict=True):
                packed[f"{suffix}_{number}"] = empty(size, dtype=torch.int8)
            packed[f"info_{number}"] = empty(len(weight_info(0, 0)), dtype=torch.int64)
        return super().linear_tensors(share) | packed

    def pull_linear(self, share: LinearShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        yield from super().pull_linear(share, tensors, catalog, prefix)
        for number, (name, _, _) in enumerate(share.named(prefix)):
            for suffix in ("weight", "index", "info"):
                yield whole(f"{name}.{suffix}", tensors[f"{suffix}_{number}"])

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> CompressedInt8:
        """Raises UserError for parts that were compressed for other sizes, or calibrated apart."""
        count = range(len(self.sizes))
        for number, part in zip(count, share.parts, strict=True):
            if tensors[f"info_{number}"].is_meta:
                continue
            found = tuple(tensors[f"info_{number}"].tolist())
            wanted = weight_info(share.num_columns, part.num_local, found[:2])
            if found != wanted:
                raise UserError(
                    f"w8a8sc: a linear{f' ({part.name})' if part.name else ''} was compressed for k, n = "
                    f"{list(found[2:4])}, and this rank multiplies by {list(wanted[2:4])}; {AGAIN}"
                )
        return CompressedInt8(
            tuple(tensors[f"weight_{number}"] for number in count),
            tuple(tensors[f"index_{number}"] for number in count),
            share.num_columns,
            tuple(part.num_local for part in share.parts),
            tensors["deq_scale"],
            tensors["quant_bias"],
            one_of_all(tensors["input_scale"], share, "input_scale"),
            one_of_all(tensors["input_offset"], share, "input_offset"),
        )


def uncompressed_sizes(share: LinearShare) -> W8A8SC:
    """The scheme of a linear whose weights are not here: as many bytes as without compression."""
    k = share.num_columns
    return W8A8SC(tuple((part.num_local * k, index_bytes(k, part.num_local)) for part in share.parts))


def compressed_scheme(share: LinearShare, names: Sequence[str], catalog: Catalog) -> W8A8SC:
    """The scheme of the linear whose fused parts have these names in the checkpoint.

    Raises UserError for tensors that are missing or of another form, and in a vision encoder.
    """
    if names[0].startswith("model.visual."):
        raise UserError(
            f"'{names[0]}.weight' is W8A8SC: the vision encoder's heads are widened for the chip, which compressed "
            f"values cannot be; {AGAIN}, which leaves the vision encoder as it is"
        )
    sizes = []
    for name, part in zip(names, share.parts, strict=True):
        found = {suffix: catalog.get(f"{name}.{suffix}") for suffix in ("weight", "index", "info")}
        missing = [f"{name}.{suffix}" for suffix, info in found.items() if info is None]
        if missing:
            raise UserError(f"'{name}.weight' is W8A8SC, and {', '.join(missing)} is missing; {AGAIN}")
        wanted = index_bytes(share.num_columns, part.num_local)
        shapes = {suffix: tuple(info.shape) for suffix, info in found.items()}
        if len(shapes["weight"]) != 1 or shapes["index"] != (wanted,) or shapes["info"] != (5,):
            raise UserError(
                f"'{name}.weight' is W8A8SC with weight {list(shapes['weight'])}, index {list(shapes['index'])}, info "
                f"{list(shapes['info'])}; of {share.num_columns} inputs and {part.num_local} outputs it must have "
                f"weight [bytes], index [{wanted}], info [5]; {AGAIN}"
            )
        sizes.append((shapes["weight"][0], wanted))
    return W8A8SC(tuple(sizes))

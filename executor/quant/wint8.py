"""wint8: int8 weights by row, made of float ones while they are read; activations stay float.

`scale = max|W| / 127` of each row, `values = round(W / scale)`. A row is scaled whole, however many ranks share it, so
that the model is the same on any number of them. Of float weights no more than a piece stands in memory: a tensor is
read twice instead, once for its scales and once for its values.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from executor.checkpoint.pull import Catalog, Pull
from executor.device.weights import WeightInt8
from executor.quant.fields import OUT, WEIGHT, Field, FieldScheme
from executor.quant.float import FLOAT
from executor.quant.scheme import ExpertShare, LinearShare, Tensors

PIECE_NUMBERS = 4 << 20  # of a tensor that are in memory as float32 at a time
LEAST_SCALE = 2.0**-23  # of a row of zeros, as msmodelslim has it


class WInt8(FieldScheme):
    name = "wint8"
    fields = (WEIGHT, Field("weight_scale", torch.float32, (OUT,)))
    form = WeightInt8

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> WeightInt8:
        return WeightInt8(tensors["weight"], tensors["weight_scale"].unsqueeze(-1))

    def pull_linear(self, share: LinearShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        assert share.file_shape is None, f"{prefix}: a convolution stays float"
        for pull in FLOAT.pull_linear(share, tensors, catalog, prefix):
            yield pull if pull.name.endswith(".bias") else _values(pull)
        scales = {"weight": _by_row(tensors["weight_scale"], share.num_columns), "bias": None}
        for pull in FLOAT.pull_linear(replace(share, has_bias=False), scales, catalog, prefix):
            yield _scales(pull)

    def pull_experts(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        values = {half: tensors[f"{half}_weight"] for half in ("gate_up", "down")}
        scales = {half: _by_row(tensors[f"{half}_weight_scale"], x.shape[-1]) for half, x in values.items()}
        for pull in FLOAT.pull_experts(share, values, catalog, prefix):
            yield _values(pull)
        for pull in FLOAT.pull_experts(share, scales, catalog, prefix):
            yield _scales(pull)


def _by_row(scale: Tensor, num_columns: int) -> Tensor:
    """`[..., m]` in the shape of its weights `[..., m, n]`, of which the float pulls take their parts."""
    return scale.unsqueeze(-1).expand(*scale.shape, num_columns)


def _values(pull: Pull) -> Pull:
    columns = range(*pull.index[-1].indices(pull.shape[-1]))
    return _made(pull, pull.into, lambda x: _rounded(x, _row_scale(x))[..., columns.start : columns.stop])


def _scales(pull: Pull) -> Pull:
    return _made(pull, pull.into[..., 0], _row_scale)


def _made(pull: Pull, into: Tensor, make: Callable[[Tensor], Tensor]) -> Pull:
    """The pull of whole rows, of which `make` makes what goes `into`; `make` takes and gives rows `[r, n]`."""
    if not pull.into.numel():
        return pull  # another rank's
    rows = replace(pull, index=(*pull.index[:-1], slice(None)))

    def convert(x: Tensor) -> Tensor:
        x = x.transpose(-1, -2) if pull.transpose else x
        flat = [x] if x.dim() == 2 else list(x)  # experts one by one
        step = max(1, PIECE_NUMBERS // x.shape[-1])
        made = [torch.cat([make(piece.float()) for piece in each.split(step)]) for each in flat]
        return made[0] if x.dim() == 2 else torch.stack(made)

    return replace(pull, shape=rows.file_shape, index=rows.file_index, into=into, transpose=False, convert=convert)


def _row_scale(x: Tensor) -> Tensor:
    """Float32 `[r]` of rows `[r, n]`."""
    return (x.abs().amax(-1) / 127).clamp_min(LEAST_SCALE)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale.unsqueeze(-1)).round_().clamp_(-128, 127).to(torch.int8)

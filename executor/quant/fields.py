"""Schemes that are told by a table: which tensors a linear has in the checkpoint, and which dim of each is split how.

A `Field`'s dims are labels: "out" and "in" are the linear's outputs and inputs, of which a rank holds a part; "each" is
one number for the whole linear, and one a part where several are fused. Slicing, fusing and unstacked experts follow
from the labels.
Legend: E experts, I intermediate size of one expert, n hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, elsewhere, empty
from executor.device.ops import Ops
from executor.device.weights import QuantizedWeight
from executor.errors import UserError
from executor.quant.scheme import ExpertShare, LinearShare, Tensors

OUT, IN, EACH = "out", "in", "each"
Reader = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Field:
    """One tensor of a linear: `NAME.suffix` in the checkpoint.

    dtype: in memory; None: the model's own. added_once: zero on the ranks whose results are added to another's.
    reader: turns what the file has into values of `dtype`, with as many rows or a single one (see Pull.convert).
    extra_dim: a dim of size 1 that the file has behind these.
    """

    suffix: str
    dtype: torch.dtype | None
    dims: tuple[str, ...]
    added_once: bool = False
    reader: Reader | None = None
    extra_dim: bool = False


WEIGHT = Field("weight", torch.int8, (OUT, IN))
BIAS = Field("bias", None, (OUT,), added_once=True)


def as_float(x: Tensor) -> Tensor:
    """A scale or an offset, however wide its file has it."""
    return x.to(torch.float32)


def scale_of_bits(x: Tensor) -> Tensor:
    """deq_scale as float32: as it is, or from the low 32 bits of an int64, which are a float32's.

    Both encodings in the field hold it there: the plain bits, and npu_trans_quant_param's, which keeps 19 of them.
    """
    if x.dtype is torch.int64:
        # Little-endian: the first of the two halves of each number.
        return x.contiguous().view(torch.int32).view(*x.shape, 2)[..., 0].contiguous().view(torch.float32)
    return x.to(torch.float32)


class FieldScheme:
    """A scheme whose linears have `fields`, and a float bias where the checkpoint has one and `takes_bias`."""

    name: str
    fields: tuple[Field, ...]
    takes_bias = True
    left: tuple[str, ...] = ()  # suffixes that may stand beside these and say nothing more

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {field.suffix: field.dims for field in (*self.fields, BIAS)}

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The loaded tensors as a value for the backend; experts' have a dim more in front."""
        raise NotImplementedError

    # ---- linears

    def linear_fields(self, share: LinearShare) -> tuple[Field, ...]:
        return (*self.fields, BIAS) if share.has_bias and self.takes_bias else self.fields

    def linear_tensors(self, share: LinearShare) -> dict[str, nn.Parameter | None]:
        sizes = {OUT: share.num_rows, IN: share.num_columns, EACH: len(share.parts)}
        made = {
            field.suffix: empty(*(sizes[dim] for dim in field.dims), dtype=field.dtype)
            for field in self.linear_fields(share)
            if not (field.added_once and _leaves_to_another(share))
        }
        return {"bias": None, **made}

    def pull_linear(self, share: LinearShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        for number, (name, part, rows) in enumerate(share.named(prefix)):
            sizes = {OUT: part.num_rows, IN: share.num_in, EACH: 1}
            wanted = {OUT: part.rows, IN: share.columns, EACH: slice(0, 1)}
            places = {OUT: rows, IN: slice(0, share.num_columns), EACH: slice(number, number + 1)}
            for field in self.linear_fields(share):
                tensor = tensors.get(field.suffix)
                if tensor is None:
                    yield elsewhere(
                        f"{name}.{field.suffix}", _file_shape(field, sizes, catalog, f"{name}.{field.suffix}")
                    )
                    continue
                into = tensor[tuple(places[dim] for dim in field.dims)]
                yield _pull(field, f"{name}.{field.suffix}", sizes, wanted, into, catalog)

    def prepare_linear(
        self, device: Ops, share: LinearShare, tensors: Tensors, many_rows: bool
    ) -> Callable[[Tensor], Tensor]:
        present = {name: x.data for name, x in tensors.items() if x is not None}
        bias = present.pop("bias", None)
        if "quant_bias" not in present:
            present["quant_bias"] = present["weight"].new_zeros(share.num_rows, dtype=torch.int32)
        weight = self.weight(share, present)
        if share.is_summed:
            return device.prepare_summed_linear(weight, bias, share.group, many_rows)
        return device.prepare_linear(weight, bias, many_rows)

    # ---- experts: one linear each in the checkpoint, gate and up fused here

    def expert_tensors(self, share: ExpertShare) -> dict[str, nn.Parameter | None]:
        made = {}
        for half, shape in _halves(share).items():
            for field in self.fields:
                made[f"{half}_{field.suffix}"] = empty(
                    share.num_local, *(shape[dim] for dim in field.dims), dtype=field.dtype
                )
        return made

    def pull_experts(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        inner, hidden = share.intermediate_size, share.hidden_size
        local = share.num_columns
        linears = (  # name, fused half, sizes in the file, this rank's part, its place in the fused tensor
            ("gate_proj", "gate_up", (inner, hidden), (share.columns, slice(0, hidden)), slice(0, local), 0),
            ("up_proj", "gate_up", (inner, hidden), (share.columns, slice(0, hidden)), slice(local, 2 * local), 1),
            ("down_proj", "down", (hidden, inner), (slice(0, hidden), share.columns), slice(0, hidden), 0),
        )
        for expert in range(share.num_experts):
            place = expert - share.experts.start
            is_local = share.experts.start <= expert < share.experts.stop
            for linear, half, (rows, columns), (row_part, column_part), into_rows, number in linears:
                sizes = {OUT: rows, IN: columns, EACH: 1}
                wanted = {OUT: row_part, IN: column_part, EACH: slice(0, 1)}
                places = {OUT: into_rows, IN: slice(None), EACH: slice(number, number + 1)}
                for field in self.fields:
                    name = f"{prefix}.{expert}.{linear}.{field.suffix}"
                    if not is_local:
                        yield elsewhere(name, _file_shape(field, sizes, catalog, name))
                        continue
                    into = tensors[f"{half}_{field.suffix}"][place][tuple(places[dim] for dim in field.dims)]
                    yield _pull(field, name, sizes, wanted, into, catalog)

    def prepare_experts(
        self, device: Ops, share: ExpertShare, tensors: Tensors
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        weights = []
        for half in _halves(share):
            present = {
                name.removeprefix(f"{half}_"): x.data for name, x in tensors.items() if name.startswith(f"{half}_")
            }
            weights.append(self.weight(share, present))
        return device.prepare_experts(*weights, share.experts.start, share.num_experts)


def one_of_all(x: Tensor, share: LinearShare, what: str) -> Tensor:
    """The number `[1]` that all fused parts share. Raises UserError, naming the parts, where they differ."""
    if not x.is_meta and bool((x != x[0]).any()):
        named = ", ".join(f"{part.name} {value:g}" for part, value in zip(share.parts, x.tolist(), strict=True))
        raise UserError(
            f"quantized weights: {what} of linears that are multiplied together differ: {named}; they read the same "
            "activations and were calibrated apart. Quantize the model again, all of them in one run"
        )
    return x[:1]


def _leaves_to_another(share: LinearShare) -> bool:
    return share.shard == "in" and share.group.rank > 0


def _halves(share: ExpertShare) -> dict[str, dict[str, int]]:
    return {
        "gate_up": {OUT: 2 * share.num_columns, IN: share.hidden_size, EACH: 2},
        "down": {OUT: share.hidden_size, IN: share.num_columns, EACH: 1},
    }


def _file_shape(field: Field, sizes: Mapping[str, int], catalog: Catalog, name: str) -> tuple[int, ...]:
    """Of the whole tensor: by the labels; a single number for all rows where the checkpoint has that."""
    shape = tuple(sizes[dim] for dim in field.dims) + ((1,) if field.extra_dim else ())
    if field.reader is not None and name in catalog:
        found = tuple(catalog[name].shape)
        if found in ((1,), (1, 1)):
            return found
        if found[1:] in ((), (1,)):  # how many rows there are is the loader's to check: it may be a rank's part
            return (*shape[:1], *found[1:])
    return shape


def _pull(
    field: Field,
    name: str,
    sizes: Mapping[str, int],
    wanted: Mapping[str, slice],
    into: Tensor,
    catalog: Catalog,
) -> Pull:
    shape = _file_shape(field, sizes, catalog, name)
    if field.reader is None:
        return Pull(name, shape, tuple(wanted[dim] for dim in field.dims), into)
    # One number a row, or one for all: read flat, spread over the rows.
    single = shape[0] == 1
    index = (slice(0, 1),) if single else (wanted[field.dims[0]],)
    reader = field.reader
    return Pull(name, shape, index, into, convert=lambda x: reader(x).reshape(-1 if not single else 1))

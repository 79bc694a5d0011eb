"""Schemes that are told by a table: which tensors a linear has in the checkpoint, and which dim of each is split how.

A `Field`'s dims are labels: "out" and "in" are the linear's outputs and inputs, of which a rank holds a part; "each" is
one number for the whole linear, and one a part where several are fused. Slicing, fusing and experts, one tensor each
or stacked, follow from the labels.
Legend: E experts, I intermediate size of one expert, n hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, elsewhere, empty, zeros
from executor.device.ops import Ops
from executor.device.weights import QuantizedWeight, pack_int4
from executor.errors import UserError
from executor.quant.float import swapped
from executor.quant.scheme import ExpertShare, LinearShare, Tensors
from executor.quant.values import Values, shortest

OUT, IN, EACH = "out", "in", "each"
Reader = Callable[[Tensor], Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (*FLOATS, torch.int8, torch.int32, torch.int64)
SCALE_BITS = (torch.float32, torch.int64)


@dataclass(frozen=True)
class Field:
    """One tensor of a linear: `NAME.suffix` in the checkpoint.

    dtype: in memory; None: the model's own. added_once: zero on the ranks whose results are added to another's.
    reader: turns what the file has, of a type in `accepts`, into values of `dtype`, with as many rows or a single one
    (see Pull.convert). allowed: which values these may be.
    extra_dim: a dim of size 1 that the file has behind these. packed: so many outputs to one element; grouped: so many
    inputs.
    """

    suffix: str
    dtype: torch.dtype | None
    dims: tuple[str, ...]
    added_once: bool = False
    reader: Reader | None = None
    extra_dim: bool = False
    packed: int = 1
    grouped: int = 1
    accepts: tuple[torch.dtype, ...] = ()
    allowed: Values | None = None

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of a tensor with these sizes by label. Raises UserError where an element would be cut."""
        return tuple(self._elements(dim, sizes[dim]) for dim in self.dims)

    def index(self, parts: Mapping[str, slice]) -> tuple[slice, ...]:
        """The same of slices."""
        return tuple(
            slice(*(self._elements(dim, end) for end in (parts[dim].start, parts[dim].stop))) for dim in self.dims
        )

    def read(self, name: str, x: Tensor) -> Tensor:
        """What tensor `name` of a file means. Raises UserError for values that are not allowed."""
        read = self.reader(x)
        return read if self.allowed is None else self.allowed.check(name, x, read)

    def _elements(self, dim: str, count: int) -> int:
        at_once = {OUT: self.packed, IN: self.grouped}.get(dim, 1)
        if count % at_once == 0:
            return count // at_once
        name = "output" if dim == OUT else "input"
        raise UserError(
            f"quantized weights: one element holds {at_once} {name}s ({self.suffix}), and a rank's part would begin or "
            f"end inside of one, at {name} {count}; choose parallel_config.attn_tp_size and moe_ep_size with parts "
            f"that are multiples of {at_once}"
        )


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
    refused: Mapping[str, str] = {}  # suffixes that change what a linear computes in a way that is not read: why
    form: type  # of what `weight` gives

    @property
    def packed(self) -> tuple[str, ...]:
        return tuple(field.suffix for field in self.fields if field.packed > 1)

    @property
    def dims(self) -> dict[str, tuple[str, ...]]:
        return {field.suffix: field.dims for field in (*self.fields, BIAS)}

    @property
    def group_sizes(self) -> dict[str, int]:
        """Inputs to one element, of the tensors that have such groups."""
        return {field.suffix: field.grouped for field in self.fields if field.grouped > 1}

    def weight(self, share: LinearShare | ExpertShare, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The loaded tensors as a value for the backend; experts' have a dim more in front."""
        raise NotImplementedError

    # ---- linears

    def linear_fields(self, share: LinearShare) -> tuple[Field, ...]:
        return (*self.fields, BIAS) if share.has_bias and self.takes_bias else self.fields

    def linear_tensors(self, share: LinearShare) -> dict[str, nn.Parameter | None]:
        sizes = {OUT: share.num_rows, IN: share.num_columns, EACH: len(share.parts)}
        made = {
            field.suffix: empty(*field.shape(sizes), dtype=field.dtype)
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
                full, tensor = f"{name}.{field.suffix}", tensors.get(field.suffix)
                into = None if tensor is None else tensor[field.index(places)]
                if field is BIAS and share.gains_bias and full not in catalog:
                    if into is not None:
                        yield zeros(_pull(self.fields[0], f"{name}.weight", sizes, wanted, into, catalog), into)
                elif into is None:
                    yield elsewhere(
                        full, _file_shape(field, sizes, catalog, full), field.dtype, field.reader, field.accepts
                    )
                else:
                    yield _pull(field, full, sizes, wanted, into, catalog)

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

    # ---- experts: gate and up fused here

    def expert_tensors(self, share: ExpertShare) -> dict[str, nn.Parameter | None]:
        return {
            f"{half}_{field.suffix}": empty(share.num_local, *field.shape(sizes), dtype=field.dtype)
            for half, sizes in _halves(share).items()
            for field in self.fields
            if not (field.added_once and _comes_from_another(share, half))
        }

    def pull_experts(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        if is_stacked(catalog, prefix):
            yield from self._pull_stacked(share, tensors, catalog, prefix)
            return
        for expert in range(share.num_experts):
            place = expert - share.experts.start
            is_local = share.experts.start <= expert < share.experts.stop
            for linear in _linears(share):
                for field in self.fields:
                    name = f"{prefix}.{expert}.{linear.name}.{field.suffix}"
                    tensor = tensors.get(f"{linear.half}_{field.suffix}") if is_local else None
                    if tensor is None:
                        shape = _file_shape(field, linear.sizes, catalog, name)
                        yield elsewhere(name, shape, field.dtype, field.reader, field.accepts)
                        continue
                    into = tensor[place][field.index(linear.places)]
                    yield _pull(field, name, linear.sizes, linear.wanted, into, catalog)

    def _pull_stacked(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        for linear in _linears(share):
            whole = linear.in_half(share)
            for field in self.fields:
                name = stacked_name(catalog, prefix, linear.half, field.suffix)
                tensor = tensors.get(f"{linear.half}_{field.suffix}")
                if tensor is None:
                    whole_shape = (share.num_experts, *field.shape(whole.sizes))
                    yield elsewhere(name, whole_shape, field.dtype, field.reader, field.accepts)
                    continue
                into = tensor[(slice(None), *field.index(linear.places))]
                yield _pull_of_all(field, name, share, whole, into, catalog)

    def prepare_experts(
        self, device: Ops, share: ExpertShare, tensors: Tensors
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        weights = []
        for half, sizes in _halves(share).items():
            present = {
                name.removeprefix(f"{half}_"): x.data for name, x in tensors.items() if name.startswith(f"{half}_")
            }
            if "quant_bias" not in present:
                present["quant_bias"] = present["weight"].new_zeros(share.num_local, sizes[OUT], dtype=torch.int32)
            weights.append(self.weight(share, present))
        return device.prepare_experts(*weights, share.experts.start, share.num_experts)


def one_of_all(x: Tensor, share: LinearShare | ExpertShare, what: str) -> Tensor:
    """The number `[..., 1]` that all fused parts share. Raises UserError, naming the parts, where they differ."""
    if not x.is_meta and bool((differs := (x != x[..., :1]).any(-1)).any()):
        if isinstance(share, LinearShare):
            names, values, where = [part.name for part in share.parts], x.tolist(), ""
        else:
            first = int(differs.nonzero()[0])
            names, values = ["gate_proj", "up_proj"], x[first].tolist()
            where = f"expert {share.experts.start + first}: "
        named = ", ".join(f"{name} {shortest(value)}" for name, value in zip(names, values, strict=True))
        raise UserError(
            f"quantized weights: {what} of linears that are multiplied together differ: {where}{named}; they read the "
            "same activations and were calibrated apart. Quantize the model again, all of them in one run"
        )
    return x[..., :1]


def is_zero(x: Tensor) -> bool:
    """Whether all of `x` is 0; tensors without data are taken to be."""
    return x.is_meta or not bool(x.any())


def require_symmetric(offset: Tensor, scheme: str) -> None:
    """UserError for a weight_offset that is not zero, where the scheme has no place for one."""
    if not is_zero(offset):
        raise UserError(
            f"quantized weights: {scheme} weights are symmetric and their weight_offset is 0, got up to "
            f"{float(offset.abs().max()):g}; quantize the model again, symmetric"
        )


def _leaves_to_another(share: LinearShare) -> bool:
    return share.shard == "in" and share.group.rank > 0


def _comes_from_another(share: ExpertShare, half: str) -> bool:
    """Results of slices of the intermediate dim are summed: what is added once is the first slice's."""
    return half == "down" and share.columns.start > 0


def _halves(share: ExpertShare) -> dict[str, dict[str, int]]:
    return {
        "gate_up": {OUT: 2 * share.num_columns, IN: share.hidden_size, EACH: 2},
        "down": {OUT: share.hidden_size, IN: share.num_columns, EACH: 1},
    }


EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Linear:
    """One of an expert's three, by label: sizes in the checkpoint, this rank's part, and its place in the half."""

    name: str
    half: str
    sizes: Mapping[str, int]
    wanted: Mapping[str, slice]
    places: Mapping[str, slice]

    def in_half(self, share: ExpertShare) -> "_Linear":
        """As a part of the checkpoint's own fused tensor, in which up stands below gate."""
        if self.half == "down":
            return self
        start = share.intermediate_size if self.name == "up_proj" else 0
        rows = slice(start + self.wanted[OUT].start, start + self.wanted[OUT].stop)
        return replace(self, sizes={**self.sizes, OUT: 2 * share.intermediate_size}, wanted={**self.wanted, OUT: rows})


def _linears(share: ExpertShare) -> tuple[_Linear, ...]:
    inner, hidden, local = share.intermediate_size, share.hidden_size, share.num_columns
    every, one = slice(0, hidden), slice(0, 1)
    gate, up, down = EXPERT_LINEARS
    sizes = {OUT: inner, IN: hidden, EACH: 1}
    wanted = {OUT: share.columns, IN: every, EACH: one}
    return (
        _Linear(gate, "gate_up", sizes, wanted, {OUT: slice(0, local), IN: every, EACH: one}),
        _Linear(up, "gate_up", sizes, wanted, {OUT: slice(local, 2 * local), IN: every, EACH: slice(1, 2)}),
        _Linear(
            down,
            "down",
            {OUT: hidden, IN: inner, EACH: 1},
            {OUT: every, IN: share.columns, EACH: one},
            {OUT: every, IN: slice(0, local), EACH: one},
        ),
    )


def is_stacked(catalog: Catalog, prefix: str) -> bool:
    """Whether the checkpoint has all experts of a layer in one tensor, gate and up fused."""
    return stacked_name(catalog, prefix, "gate_up", "weight") in catalog


def stacked_name(catalog: Catalog, prefix: str, half: str, suffix: str) -> str:
    """What the checkpoint calls a field of all experts: `NAME_proj.weight_scale`, `NAME_proj_weight_scale`, or
    `NAME_proj_scale`; the weight may be `NAME_proj` itself, as in float checkpoints. The first, where it has none.
    """
    base = f"{prefix}.{half}_proj"
    short = suffix.removeprefix("weight_")
    names = [f"{base}.{suffix}", base if suffix == "weight" else f"{base}_{suffix}", f"{base}_{short}"]
    return next((name for name in names if name in catalog), names[0])


def _file_shape(field: Field, sizes: Mapping[str, int], catalog: Catalog, name: str) -> tuple[int, ...]:
    """Of the whole tensor: by the labels; a single number for all rows where the checkpoint has that."""
    shape = field.shape(sizes) + ((1,) if field.extra_dim else ())
    if field.packed > 1 and name in catalog and tuple(catalog[name].shape) == tuple(sizes[dim] for dim in field.dims):
        return tuple(catalog[name].shape)  # not packed: an older writer's
    if field.reader is not None and len(field.dims) == 1 and name in catalog:
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
        if field.packed > 1 and shape[0] == sizes[OUT]:
            index = tuple(wanted[dim] for dim in field.dims)
            reader = partial(_packed, name)
            return Pull(name, shape, index, into, convert=reader, accepts=(field.dtype,), judged=True)
        return Pull(name, shape, field.index(wanted), into)
    reader = partial(field.read, name)
    if len(field.dims) > 1:
        return Pull(name, shape, field.index(wanted), into, convert=reader, accepts=field.accepts, judged=True)
    # One number a row, or one for all: read flat, spread over the rows.
    single = shape[0] == 1
    index = (slice(0, 1),) if single else (wanted[field.dims[0]],)
    flat = 1 if single else -1
    return Pull(name, shape, index, into, convert=lambda x: reader(x).reshape(flat), accepts=field.accepts, judged=True)


def _packed(name: str, x: Tensor) -> Tensor:
    """Weights of four bits that stand one to a byte, two to a byte. Raises UserError for others."""
    if not bool(((x >= -8) & (x <= 7)).all()):
        raise UserError(
            f"tensor '{name}' has one weight to a byte and weights outside of -8 to 7, which four bits do not hold; "
            "its description says that they are four bits wide: quantize the model again"
        )
    return pack_int4(x)


def _pull_of_all(field: Field, name: str, share: ExpertShare, linear: _Linear, into: Tensor, catalog: Catalog) -> Pull:
    """The same of a tensor that has all experts in front."""
    shape, index = (share.num_experts, *field.shape(linear.sizes)), (share.experts, *field.index(linear.wanted))
    reader = partial(field.read, name)
    if len(field.dims) > 1:
        pull = Pull(name, shape, index, into, swapped(catalog, name, shape))
        return pull if field.reader is None else replace(pull, convert=reader, accepts=field.accepts, judged=True)
    if field.reader is None:
        return Pull(name, shape, index, into)
    (num, rows), (experts, part) = shape, index
    every = slice(0, 1)
    forms = {  # of the file: the slice of each
        (num, rows): (experts, part),
        (num, rows, 1): (experts, part, every),
        (num, 1, rows): (experts, every, part),
        (num,): (experts,),
        (num, 1): (experts, every),
        (num, 1, 1): (experts, every, every),
    }
    found = tuple(catalog[name].shape) if name in catalog else ()
    found = found if found in forms else (num, rows, 1)
    spread = len(into)
    return Pull(
        name,
        found,
        forms[found],
        into,
        convert=lambda x: reader(x).reshape(spread, -1),
        accepts=field.accepts,
        judged=True,
    )

"""Float weights, as the model was trained: `weight` and `bias`; experts `gate_up` and `down`.

Checkpoints hold experts stacked as [E, 2I, n] and [E, n, I], stacked with the last two dims swapped, or one tensor
per expert; they are told apart by name and shape.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull, elsewhere, empty, zeros
from executor.device.ops import Ops
from executor.errors import UserError
from executor.quant.scheme import ExpertShare, LinearShare, Scheme, Tensors

_EVERY = slice(None)


class Float:
    """Weights in the default dtype of the time when the layer is made."""

    name = "none"
    dims = {"weight": ("out", "in"), "bias": ("out",)}
    group_sizes = {}
    left = ()
    refused = {}
    packed = ()
    form = Tensor

    def linear_tensors(self, share: LinearShare) -> dict[str, nn.Parameter | None]:
        weight = empty(share.num_rows, share.num_columns)
        return {"weight": weight, "bias": empty(share.num_rows) if share.adds_bias else None}

    def pull_linear(self, share: LinearShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        weight, bias = tensors["weight"], tensors["bias"]
        for name, part, rows in share.named(prefix):
            if share.file_shape:
                index = (_EVERY,) * len(share.file_shape)
                values = Pull(f"{name}.weight", share.file_shape, index, weight.view(share.file_shape))
            else:
                shape = (part.num_rows, share.num_in)
                values = Pull(f"{name}.weight", shape, (part.rows, share.columns), weight[rows])
            yield values
            if share.gains_bias and f"{name}.bias" not in catalog:
                if bias is not None:
                    yield zeros(values, bias[rows])
            elif bias is not None:
                yield Pull(f"{name}.bias", (part.num_rows,), (part.rows,), bias[rows])
            elif share.has_bias:
                yield elsewhere(f"{name}.bias", (part.num_rows,))

    def prepare_linear(
        self, device: Ops, share: LinearShare, tensors: Tensors, many_rows: bool
    ) -> Callable[[Tensor], Tensor]:
        weight = tensors["weight"].data
        bias = None if tensors["bias"] is None else tensors["bias"].data
        if share.is_summed:
            return device.prepare_summed_linear(weight, bias, share.group, many_rows)
        return device.prepare_linear(weight, bias, many_rows)

    def expert_tensors(self, share: ExpertShare) -> dict[str, nn.Parameter | None]:
        gate_up = empty(share.num_local, 2 * share.num_columns, share.hidden_size)
        return {"gate_up": gate_up, "down": empty(share.num_local, share.hidden_size, share.num_columns)}

    def pull_experts(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        form = _stacked if f"{prefix}.gate_up_proj" in catalog else _unstacked
        yield from form(share, tensors, catalog, prefix)

    def prepare_experts(
        self, device: Ops, share: ExpertShare, tensors: Tensors
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        first = share.experts.start
        return device.prepare_experts(tensors["gate_up"].data, tensors["down"].data, first, share.num_experts)


FLOAT: Scheme = Float()


def _stacked(share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
    gate_up, down = tensors["gate_up"], tensors["down"]
    num_experts, inner, hidden = share.num_experts, share.intermediate_size, share.hidden_size
    up_name, down_name = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    up_shape, down_shape = (num_experts, 2 * inner, hidden), (num_experts, hidden, inner)
    up_swapped, down_swapped = swapped(catalog, up_name, up_shape), swapped(catalog, down_name, down_shape)
    for half in (0, 1):
        rows = slice(half * inner + share.columns.start, half * inner + share.columns.stop)
        into = gate_up[:, half * share.num_columns : (half + 1) * share.num_columns]
        yield Pull(up_name, up_shape, (share.experts, rows, _EVERY), into, up_swapped)
    yield Pull(down_name, down_shape, (share.experts, _EVERY, share.columns), down, down_swapped)


def _unstacked(share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
    gate_up, down = tensors["gate_up"], tensors["down"]
    up_shape, down_shape = (share.intermediate_size, share.hidden_size), (share.hidden_size, share.intermediate_size)
    for expert in range(share.num_experts):
        up_names = [f"{prefix}.{expert}.{name}.weight" for name in ("gate_proj", "up_proj")]
        down_name = f"{prefix}.{expert}.down_proj.weight"
        if not share.experts.start <= expert < share.experts.stop:
            yield from (elsewhere(name, up_shape) for name in up_names)
            yield elsewhere(down_name, down_shape)
            continue
        place = expert - share.experts.start
        for half, name in enumerate(up_names):
            into = gate_up[place, half * share.num_columns : (half + 1) * share.num_columns]
            yield Pull(name, up_shape, (share.columns, _EVERY), into)
        yield Pull(down_name, down_shape, (_EVERY, share.columns), down[place])


def swapped(catalog: Catalog, name: str, shape: tuple[int, int, int]) -> bool:
    """Whether the checkpoint stores `name` with its last two dims swapped. Raises UserError where neither form fits."""
    if name not in catalog:
        return False  # the loader reports it missing
    found = tuple(catalog[name].shape)
    if found == shape:
        return False
    if found == (shape[0], shape[2], shape[1]):
        return True
    raise UserError(
        f"tensor {name}: found shape {list(found)}, expected {list(shape)} or its last two dims swapped; "
        "config.json and the weights are not of the same model"
    )

"""Linear layers: replicated, split by outputs, split by inputs, and several in one multiplication.

One class: the split is a label on a dim ("out", "in" or None), collectives are the identity at degree 1, and how
weights are stored and multiplied is the scheme's (executor/quant).
Legend: T tokens, n inputs, m outputs of this rank.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull
from executor.device import ops
from executor.device.weights import pack_int4, unpack_int4
from executor.errors import UserError
from executor.parallel.groups import Group
from executor.parallel.partition import Part, part
from executor.quant.float import FLOAT
from executor.quant.scheme import LinearShare, Scheme

_ALONE = Group()


class Linear(nn.Module):
    """`y = x Wᵀ + b`, `x [T, n] -> [T, m]`.

    shard "out": this rank holds a part of the outputs. shard "in": it holds a part of the inputs, and the results
    are summed over the group; the bias is then added on rank 0 only. `parts` fuses tensors that share their input.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        bias: bool = False,
        shard: Literal["out", "in"] | None = None,
        group: Group = _ALONE,
        parts: tuple[Part, ...] = (),
        file_shape: tuple[int, ...] | None = None,
        scheme: Scheme = FLOAT,
    ) -> None:
        """`file_shape`: the checkpoint's shape of the same weight where it is not [num_out, num_in] (a convolution)."""
        super().__init__()
        columns = part(num_in, group, "linear inputs") if shard == "in" else slice(0, num_in)
        out = part(num_out, group, "linear outputs") if shard == "out" and not parts else slice(0, num_out)
        parts = parts or (Part(None, num_out, out),)
        self.share = LinearShare(num_in, columns, parts, shard, group if shard else _ALONE, bias, file_shape)
        self.prefix = ""  # its name in checkpoints, from the first `pulls` on
        self.scheme = scheme
        self.many_rows = False  # whether every call has hundreds of rows: set by who knows, before `prepare`
        self.names = keep(self, scheme.linear_tensors(self.share))
        self.product: Callable[[Any], Tensor] | None = None  # what the backend made of the weights

    def take(self, scheme: Scheme, has_bias: bool) -> None:
        """Another scheme, before anything is loaded; `has_bias`: whether the checkpoint has one beside the weight."""
        drop(self, self.names)
        gains = has_bias and (self.share.gains_bias or not self.share.has_bias)
        self.scheme, self.share = scheme, replace(self.share, has_bias=has_bias, gains_bias=gains)
        self.names = keep(self, scheme.linear_tensors(self.share))

    def pulls(self, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        self.prefix = prefix
        return self.scheme.pull_linear(self.share, self.tensors, catalog, prefix)

    @property
    def tensors(self) -> dict[str, nn.Parameter | None]:
        """The scheme's tensors by name, until `prepare`."""
        return kept(self, self.names)

    def map_dim(self, dim: Literal["out", "in"], change: Callable[[Tensor], Tensor]) -> None:
        """Change the outputs or inputs of all loaded tensors: `change` takes and gives them with that dim first.

        Raises UserError where groups of inputs have scales in common, which would then hold for others.
        """
        if dim == "in" and self.scheme.group_sizes:
            raise UserError(
                f"quantized weights: {self.prefix} has scales for groups of inputs, and this device rearranges its "
                "inputs; quantize the vision encoder by channel, or leave it float"
            )
        for name, tensor in self.tensors.items():
            places = self.scheme.dims.get(name, ())
            if tensor is not None and dim in places:
                place = places.index(dim)
                is_packed = name in self.scheme.packed
                values = unpack_int4(tensor.data) if is_packed else tensor.data
                changed = change(values.transpose(0, place)).transpose(0, place).contiguous()
                setattr(self, name, nn.Parameter(pack_int4(changed) if is_packed else changed, requires_grad=False))

    def prepare(self) -> None:
        """Hand the tensors to the backend in its own layout and drop the plain copies.

        Raises UserError, with the layer's name, for weights that the backend has no product by.
        """
        try:
            self.product = self.scheme.prepare_linear(ops.bound(), self.share, self.tensors, self.many_rows)
        except UserError as error:
            raise UserError(f"{error} (at {self.prefix})" if self.prefix else str(error)) from error
        drop(self, self.names)

    def forward(self, x: Any) -> Tensor:
        return self.product(x)


def keep(layer: nn.Module, tensors: Mapping[str, nn.Parameter | None]) -> tuple[str, ...]:
    """Register a scheme's tensors as the layer's parameters; their names."""
    for name, tensor in tensors.items():
        layer.register_parameter(name, tensor)
    return tuple(tensors)


def kept(layer: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter | None]:
    """The tensors that `keep` has registered, as they are now."""
    return {name: getattr(layer, name) for name in names}


def drop(layer: nn.Module, names: Iterable[str]) -> None:
    """Let go of them: what is computed with is the scheme's function."""
    for name in names:
        setattr(layer, name, None)


def expect_many_rows(module: nn.Module) -> None:
    """Tell every linear below `module` that all its calls have hundreds of rows, as a vision encoder's have."""
    for child in module.modules():
        if isinstance(child, Linear):
            child.many_rows = True


def fused(names: tuple[str, ...], num_out: int, group: Group) -> tuple[Part, ...]:
    """Equal tensors side by side, each split by its outputs: gate and up."""
    return tuple(Part(name, num_out, part(num_out, group, name)) for name in names)

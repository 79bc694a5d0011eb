"""What a scheme of weights must do: the one seam between a layer and how its weights are stored and multiplied.

A layer says which part of the whole weight its rank holds (`LinearShare`, `ExpertShare`). Its scheme says which
tensors that takes, pulls them, and turns them into a function. Schemes are stateless and shared by all layers: what
is chosen for a tensor is chosen by handing a layer another scheme.
Legend: n inputs, m outputs of this rank, E experts of this rank, I intermediate size of one expert on this rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from executor.checkpoint.pull import Catalog, Pull
from executor.device.ops import Ops
from executor.parallel.groups import Group
from executor.parallel.partition import Part

Tensors = Mapping[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class LinearShare:
    """What one rank holds of a linear `[outputs, num_in]`.

    parts: the checkpoint's tensors that stand one below the other in it, each with this rank's rows. columns: this
    rank's inputs. shard says which of the two is split: "out", "in" (results are summed over the group) or None.
    """

    num_in: int
    columns: slice
    parts: tuple[Part, ...]
    shard: Literal["out", "in"] | None
    group: Group
    has_bias: bool
    file_shape: tuple[int, ...] | None = None  # of the weight in the checkpoint, where it is not [outputs, inputs]
    gains_bias: bool = False  # the architecture has none: a quantizer gave some of the parts one, others have zeros

    @property
    def num_rows(self) -> int:
        return sum(part.num_local for part in self.parts)

    @property
    def num_columns(self) -> int:
        return self.columns.stop - self.columns.start

    @property
    def is_summed(self) -> bool:
        return self.shard == "in" and self.group.size > 1

    @property
    def adds_bias(self) -> bool:
        """Where results are summed, one rank adds what must be added once."""
        return self.has_bias and not (self.shard == "in" and self.group.rank)

    def named(self, prefix: str) -> Iterator[tuple[str, Part, slice]]:
        """Every part's prefix in the checkpoint, the part, and its rows in the layer. `prefix` is the layer's own."""
        start = 0
        for part in self.parts:
            name = f"{prefix.rsplit('.', 1)[0]}.{part.name}" if part.name else prefix
            yield name, part, slice(start, start + part.num_local)
            start += part.num_local


@dataclass(frozen=True, eq=False)
class ExpertShare:
    """What one rank holds of all experts: some of them, and of those a slice of the intermediate dim."""

    num_experts: int
    intermediate_size: int
    hidden_size: int
    experts: slice
    columns: slice

    @property
    def num_local(self) -> int:
        return self.experts.stop - self.experts.start

    @property
    def num_columns(self) -> int:
        return self.columns.stop - self.columns.start


class Scheme(Protocol):
    """One way to store and multiply weights. `name` is the word of descriptions and recipes."""

    name: str
    dims: Mapping[str, tuple[str, ...]]  # of a linear's tensors by name: "out" and "in" where they run over these
    form: type  # of the weights that a device is handed
    group_sizes: Mapping[str, int]  # of the tensors whose elements hold for so many inputs each
    left: tuple[str, ...]  # suffixes of tensors that may stand in the checkpoint and say nothing more
    refused: Mapping[str, str]  # suffixes of tensors that may not stand there, as nothing reads them: why
    packed: tuple[str, ...]  # of its tensors, those that hold two outputs to a byte (device/weights.py:unpack_int4)

    def linear_tensors(self, share: LinearShare) -> dict[str, nn.Parameter | None]:
        """Uninitialised tensors of a linear by name, None for one that this rank does not have.

        The layer keeps them under their names until `prepare_linear`.
        """

    def pull_linear(self, share: LinearShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]:
        """What goes into them. `catalog` tells what the checkpoint has beside what the architecture asks for."""

    def prepare_linear(
        self, device: Ops, share: LinearShare, tensors: Tensors, many_rows: bool
    ) -> Callable[[Tensor], Tensor]:
        """The loaded tensors as a function `[T, n] -> [T, m]`, summed over the group where the share says so.

        Raises UserError where fused parts do not fit together. `many_rows`: see Ops.prepare_linear.
        """

    def expert_tensors(self, share: ExpertShare) -> dict[str, nn.Parameter | None]: ...

    def pull_experts(self, share: ExpertShare, tensors: Tensors, catalog: Catalog, prefix: str) -> Iterator[Pull]: ...

    def prepare_experts(
        self, device: Ops, share: ExpertShare, tensors: Tensors
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """As a function of `(x [T, n], ids [T, k], weights [T, k])`; see Ops.prepare_experts."""

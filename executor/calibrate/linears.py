"""The linears of a layer as the checkpoint has them, and their weights read one at a time.

Legend: n outputs, k inputs of one linear, E experts, I intermediate size of one expert.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from executor.checkpoint.headers import TensorInfo
from executor.checkpoint.weights import Checkpoint
from executor.layers.linear import Linear
from executor.layers.moe import Experts


@dataclass(frozen=True)
class LinearSource:
    """One linear of the checkpoint.

    name: canonical, without `.weight`; of a stacked expert the one that it gets. tensor: the tensor that holds it.
    expert, rows: its place in a stack [E, ...]. module: the layer's linear that multiplies by it, whose input it reads.
    """

    name: str
    tensor: str
    module: str
    shape: tuple[int, int]
    is_summed: bool  # ranks hold parts of its inputs
    is_expert: bool = False
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False

    @property
    def bias(self) -> str:
        """The canonical name that its bias has, where there is one."""
        return f"{self.name}.bias"

    def original(self, catalog: Mapping[str, TensorInfo]) -> str:
        """Its name in the source's own spelling, without `.weight`."""
        spelled = catalog[self.tensor].original_name
        if self.expert is None:
            return spelled.removesuffix(".weight")
        stem = spelled.rpartition(".")[0]
        return f"{stem}.{self.name.rsplit('.', 2)[1]}.{self.name.rsplit('.', 1)[1]}"

    def read(self, checkpoint: Checkpoint) -> Tensor:
        """Its weight as the file has it, in the file's type, [n, k]."""
        info = checkpoint.catalog[self.tensor]
        if self.expert is None:
            return read_tensor(info)
        with safe_open(info.file, framework="pt") as file:
            stack = file.get_slice(info.original_name)
            if self.transposed:
                return stack[self.expert, :, self.rows].t().contiguous()
            return stack[self.expert, self.rows, :].contiguous()


def read_tensor(info: TensorInfo) -> Tensor:
    """A tensor of a checkpoint, as its file has it."""
    with safe_open(info.file, framework="pt") as file:
        return file.get_tensor(info.original_name)


def linears_of(module: nn.Module, catalog: Mapping[str, Any]) -> Iterator[LinearSource]:
    """The linears of a module that knows its names (its pulls have been asked for); no convolution is among them."""
    for layer in module.modules():
        if isinstance(layer, Linear) and not layer.share.file_shape:
            share = layer.share
            seen: set[str] = set()
            for name, part, _ in share.named(layer.prefix):
                if name not in seen:  # vision's q, k and v are three parts of one tensor
                    seen.add(name)
                    shape = (part.num_rows, share.num_in)
                    yield LinearSource(name, f"{name}.weight", layer.prefix, shape, share.shard == "in")
        elif isinstance(layer, Experts):
            yield from _experts(layer, catalog)


def _experts(layer: Experts, catalog: Mapping[str, Any]) -> Iterator[LinearSource]:
    share, prefix = layer.share, layer.prefix
    inner, hidden = share.intermediate_size, share.hidden_size
    up_name, down_name = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
    is_stacked = up_name in catalog
    for expert in range(share.num_experts):
        for name, tensor, shape, rows in (
            ("gate_proj", up_name, (inner, hidden), slice(0, inner)),
            ("up_proj", up_name, (inner, hidden), slice(inner, 2 * inner)),
            ("down_proj", down_name, (hidden, inner), slice(0, hidden)),
        ):
            full_name = f"{prefix}.{expert}.{name}"
            is_summed = name == "down_proj"
            if not is_stacked:
                yield LinearSource(full_name, f"{full_name}.weight", prefix, shape, is_summed, is_expert=True)
                continue
            whole = (2 * inner, hidden) if tensor == up_name else shape
            transposed = tuple(catalog[tensor].shape) != (share.num_experts, *whole)
            yield LinearSource(full_name, tensor, prefix, shape, is_summed, True, expert, rows, transposed)


def column_maximum(sources: list[LinearSource], checkpoint: Checkpoint) -> Tensor:
    """`max |W|` of each input over all of these linears, float32 [k]."""
    largest = torch.zeros(sources[0].shape[1])
    for source in sources:
        torch.maximum(largest, source.read(checkpoint).abs().amax(0).float(), out=largest)
    return largest

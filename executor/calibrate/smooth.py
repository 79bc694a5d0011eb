"""Smoothing: large inputs of a linear made smaller, and its weights larger by the same factor.

Factors are folded into what writes the inputs (a norm, or the linear before) and into all linears that read them, so
nothing is new at inference. They are powers of two: folding is exact in every float type, and no product changes.
Legend: n outputs, k inputs.
Source: SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): factor = max|x|^alpha / max|W|^(1 - alpha).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from executor.calibrate.linears import LinearSource, column_maximum
from executor.calibrate.observe import ChannelRange
from executor.calibrate.settings import QUANTIZED_ACTIVATIONS
from executor.checkpoint.weights import Checkpoint
from executor.layers.attention import Attention
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.vision import VisionAttention

MOST_STEPS = 6
"""A factor is 2^-6 to 2^6 beside the group's middle one: float16 still holds what it is folded into."""
READERS = {
    "input_layernorm": "self_attn",
    "post_attention_layernorm": "mlp",
    "norm1": "attn",
    "norm2": "mlp",
}
"""Norms of a layer, and the part that reads what each gives; in both families."""


@dataclass
class Folding:
    """What is folded where, by canonical name without `.weight`. Factors are powers of two, float32.

    divided: rows of a norm's or a linear's weight and bias. multiplied: columns of a linear's weight [k], which reads
    inputs that are divided by them.
    """

    divided: dict[str, Tensor] = field(default_factory=dict)
    multiplied: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, name: str, weight: Tensor) -> Tensor:
        """float32 [n, k] of a linear, folded."""
        if name in self.multiplied:
            weight = weight * self.multiplied[name]
        return weight / self.divided[name].unsqueeze(1) if name in self.divided else weight

    def vector(self, name: str, vector: Tensor) -> Tensor:
        """A bias of a linear, or a norm's weight or bias, folded."""
        return vector / self.divided[name] if name in self.divided else vector

    def touches(self, name: str) -> bool:
        return name in self.divided or name in self.multiplied


@dataclass(frozen=True)
class Group:
    """What writes some activations, and the linears that read them.

    channels: of the writer's rows, where it writes other things too. repeats, head_dim: where the readers' inputs are
    heads and each head of the writer serves `repeats` of them, one behind the other.
    """

    writer: str
    readers: list[LinearSource]
    channels: slice | None = None
    repeats: int = 1
    head_dim: int = 1


def smooth(
    groups: Iterable[Group],
    seen: Mapping[str, ChannelRange],
    kinds: Mapping[str, str],
    alpha: float,
    checkpoint: Checkpoint,
) -> Folding:
    """The factors of a layer. Groups are left whose readers all take float activations.

    seen: by the name of the linear in the layer (LinearSource.module).
    """
    folding = Folding()
    for group in groups:
        wanted = [source for source in group.readers if kinds[source.name] in QUANTIZED_ACTIVATIONS]
        float_experts = any(source.is_expert and kinds[source.name] == "FLOAT" for source in group.readers)
        module = next((source.module for source in group.readers if source.module in seen), None)
        if not wanted or float_experts or module is None:
            continue
        activations, weights = seen[module].largest, column_maximum(wanted, checkpoint)
        factors = _factors(_shared(activations, group), _shared(weights, group), alpha)
        spread = factors.view(-1, 1, group.head_dim).expand(-1, group.repeats, -1).flatten()
        for source in group.readers:
            folding.multiplied[source.name] = spread
        if group.channels is None:
            folding.divided[group.writer] = factors
        else:
            rows = torch.ones(group.channels.stop)
            rows[group.channels] = factors
            folding.divided[group.writer] = rows
    return folding


def _shared(largest: Tensor, group: Group) -> Tensor:
    """[k] of the readers' inputs -> the largest of those that one channel of the writer serves."""
    return largest.view(-1, group.repeats, group.head_dim).amax(1).flatten()


def _factors(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    used = (activations > 0) & (weights > 0)
    steps = torch.zeros_like(activations)
    steps[used] = alpha * activations[used].log2() - (1 - alpha) * weights[used].log2()
    if used.any():
        steps[used] -= steps[used].median()
    return torch.exp2(steps.round().clamp(-MOST_STEPS, MOST_STEPS))


def groups_of(layer: nn.Module, prefix: str, linears: list[LinearSource]) -> Iterator[Group]:
    """What can be smoothed in one layer of an encoder or text model; nothing in other modules."""
    by_name = {source.name: source for source in linears}

    def under(name: str) -> list[LinearSource]:
        return [source for source in linears if source.module == name]

    for norm, reader in READERS.items():
        part = getattr(layer, reader, None)
        if not hasattr(layer, norm) or part is None:
            continue
        path = f"{prefix}.{reader}"
        if isinstance(part, Attention):
            yield Group(f"{prefix}.{norm}", under(f"{path}.qkv_proj"))
            repeats = part.num_heads // part.num_kv_heads
            yield Group(f"{path}.v_proj", under(f"{path}.o_proj"), None, repeats, part.head_dim)
        elif isinstance(part, VisionAttention):
            (qkv,) = under(f"{path}.qkv")
            yield Group(f"{prefix}.{norm}", [qkv])
            width = qkv.shape[0] // 3
            yield Group(qkv.name, under(f"{path}.proj"), slice(2 * width, 3 * width))
        elif isinstance(part, GatedMLP):
            yield Group(f"{prefix}.{norm}", under(f"{path}.gate_up_proj"))
            yield Group(f"{path}.up_proj", [by_name[f"{path}.down_proj"]])
        elif isinstance(part, MoE):
            inner = [s for s in under(f"{path}.experts") if not s.is_summed]
            yield Group(f"{prefix}.{norm}", [*under(f"{path}.gate"), *inner])
        else:  # fc1 of a plain MLP; behind it stands a GELU, which does not scale
            yield Group(f"{prefix}.{norm}", under(f"{path}.linear_fc1"))

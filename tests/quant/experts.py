"""Made-up quantized experts: as checkpoints hold them, as values for a backend, and what they compute in float64.

The formula is written down once more here, from the format's description, and shares nothing with the backends.
Legend: E experts, n hidden size, I intermediate size, T tokens, k experts per token.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.device.weights import DynamicInt4, DynamicInt8, StaticInt8, Weight, WeightInt8

LINEARS = ("gate_proj", "up_proj", "down_proj")
KINDS = ("W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC", "W8A16")


def pack(values: Tensor) -> Tensor:
    """int8 `[m, n]` as `[m / 2, n]`: row 2i in the low four bits of a byte, row 2i + 1 in the high ones."""
    low, high = (values[place::2].to(torch.int16) % 16 for place in (0, 1))
    out = low + 16 * high
    return torch.where(out > 127, out - 256, out).to(torch.int8)


@dataclass(frozen=True)
class Made:
    """`linears[e][name]`: the tensors of one linear, the weight as `values [m, n]`."""

    kind: str
    hidden: int
    inner: int
    linears: list[dict[str, dict[str, Tensor]]]

    @property
    def every(self) -> slice:
        return slice(0, len(self.linears))

    @property
    def whole(self) -> slice:
        return slice(0, self.inner)

    def unstacked(self, prefix: str) -> dict[str, Tensor]:
        """The checkpoint's tensors, one linear each."""
        found = {}
        for expert, linears in enumerate(self.linears):
            for name, part in linears.items():
                found |= {f"{prefix}.{expert}.{name}.{k}": x for k, x in self._files(part, name).items()}
        return found

    def stacked(self, prefix: str, swapped: bool = False, spelling: str = ".weight_scale") -> dict[str, Tensor]:
        """All experts in one tensor, gate above up. `spelling`: of what stands beside weights."""
        found = {}
        for half, names in (("gate_up_proj", LINEARS[:2]), ("down_proj", LINEARS[2:])):
            files = [[self._files(linears[name], name) for name in names] for linears in self.linears]
            for key in files[0][0]:
                parts = [torch.cat([file[key] for file in expert]) for expert in files]
                if key.startswith("input_"):
                    parts = [part[:1] for part in parts]
                tensor = torch.stack(parts)
                if key == "weight":
                    name = f"{prefix}.{half}" + ("" if spelling == "_scale" else ".weight")
                    tensor = tensor.transpose(1, 2) if swapped else tensor
                else:
                    dot, short = spelling[0], spelling[1:] == "scale"
                    name = f"{prefix}.{half}{dot}{key.removeprefix('weight_') if short else key}"
                    if tensor.dim() == 3 and key != "scale_bias" and swapped:
                        tensor = tensor.transpose(1, 2)
                found[name] = tensor.contiguous()
        return found

    def _files(self, part: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        rest = {key: x for key, x in part.items() if key != "values"}
        rest |= {key: rest[key].unsqueeze(-1) for key in ("weight_scale", "weight_offset") if key in rest}
        if self.kind != "W4A8_DYNAMIC":
            return {"weight": part["values"], **rest}
        wide = part["values"].float() * part["weight_scale"].unsqueeze(-1)
        groups = 16 if name == "down_proj" and wide.shape[1] % 16 == 0 else 1
        return {"weight": pack(part["values"]), **rest, "scale_bias": 8 * wide.unflatten(1, (groups, -1)).sum(-1)}

    def weights(self, experts: slice | None = None, columns: slice | None = None) -> tuple[Weight, Weight]:
        """`(gate_up, down)` of some experts and a slice of the intermediate dim, as values for a backend."""
        experts, columns = experts or self.every, columns or self.whole
        held = self.linears[experts]
        halves = []
        for names in (LINEARS[:2], LINEARS[2:]):
            rows, inputs = (columns, slice(None)) if len(names) == 2 else (slice(None), columns)

            def all_of(key: str, names=names, rows=rows) -> Tensor:
                return torch.stack([torch.cat([linears[name][key][rows] for name in names]) for linears in held])

            values = torch.stack(
                [torch.cat([linears[name]["values"][rows, inputs] for name in names]) for linears in held]
            )
            halves.append(self._weight(values, all_of, held, names))
        return halves[0], halves[1]

    def _weight(self, values: Tensor, all_of, held, names) -> Weight:
        if self.kind == "W8A8_DYNAMIC":
            return DynamicInt8(values, all_of("weight_scale"))
        if self.kind == "W4A8_DYNAMIC":
            return DynamicInt4(torch.stack([pack(w) for w in values]), all_of("weight_scale"))
        if self.kind == "W8A16":
            return WeightInt8(values, all_of("weight_scale").unsqueeze(-1), all_of("weight_offset").unsqueeze(-1))
        one = [torch.stack([linears[names[0]][key] for linears in held]) for key in ("input_scale", "input_offset")]
        return StaticInt8(values, all_of("deq_scale"), all_of("quant_bias"), *one)

    def formula(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        experts: slice | None = None,
        columns: slice | None = None,
    ) -> Tensor:
        """`[T, n]` in float64: what a rank with these experts and columns gives."""
        experts, columns = experts or self.every, columns or self.whole
        every, out = slice(None), torch.zeros(len(x), self.hidden, dtype=torch.float64)
        for token in range(len(x)):
            for expert, share in zip(ids[token].tolist(), weights[token].double(), strict=True):
                if not experts.start <= expert < experts.stop:
                    continue
                gate, up, down = (self.linears[expert][name] for name in LINEARS)
                row = x[token].double()
                g, u = (self._product(part, row, columns, every) for part in (gate, up))
                inner = g * torch.sigmoid(g) * u
                out[token] += share * self._product(down, inner, every, columns, adds=columns.start == 0)
        return out

    def _product(self, part: dict[str, Tensor], x: Tensor, rows: slice, inputs: slice, adds: bool = True) -> Tensor:
        values = part["values"][rows, inputs].double()
        if self.kind == "W8A8":
            scale, offset = part["input_scale"].double(), part["input_offset"].double()
            total = values @ (x / scale + offset).round().clamp(-128, 127)
            return (total + (part["quant_bias"][rows].double() if adds else 0)) * part["deq_scale"][rows].double()
        scale = part["weight_scale"][rows].double()
        if self.kind == "W8A16":
            return ((values - part["weight_offset"][rows].double().unsqueeze(-1)) * scale.unsqueeze(-1)) @ x
        step = x.abs().max() / 127
        return values @ (x / (step if step else 1)).round() * step * scale


@functools.cache
def make(kind: str, num_experts: int, hidden: int, inner: int, seed: int = 0) -> Made:
    g = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g)

    def one(outputs: int, inputs: int, input_scale: float) -> dict[str, Tensor]:
        low = -8 if kind == "W4A8_DYNAMIC" else -128
        values = whole(low, -low, outputs, inputs).to(torch.int8)
        scale = (torch.rand(outputs, generator=g) + 0.5) / (-low * inputs**0.5) * 2
        if kind != "W8A8":
            offset = whole(-3, 4, outputs).float() if kind == "W8A16" else torch.zeros(outputs)
            return {"values": values, "weight_scale": scale, "weight_offset": offset}
        return {
            "values": values,
            "deq_scale": scale * input_scale,
            "quant_bias": whole(-20000, 20000, outputs).to(torch.int32),
            "input_scale": torch.tensor([input_scale]),
            "input_offset": torch.tensor([7.0]),
        }

    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    linears = [{name: one(*size, 0.04) for name, size in sizes.items()} for _ in range(num_experts)]
    return Made(kind, hidden, inner, linears)


def routed(num_tokens: int, num_experts: int, k: int, hidden: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`(x [T, n], ids [T, k], weights [T, k])`, float32 and int64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, hidden, generator=g)
    ids = torch.stack([torch.randperm(num_experts, generator=g)[:k] for _ in range(num_tokens)] or [torch.empty(0, k)])
    weights = torch.rand(num_tokens, k, generator=g) + 0.1
    return x, ids[:num_tokens].long(), weights


def error(got: Tensor, wanted: Tensor) -> float:
    """Of the whole, relative."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))

"""The op surface: what a model may ask of a device, and the one process global, the bound backend.

A backend implements `Ops`. `executor/device/cpu/ops.py` is the reference: it defines every op, others are tested
against it. Layers call `ops.bound()`; none asks which device it runs on.
Legend: T tokens, H query heads, K key/value heads, D head dim, S cache slots, E experts, I intermediate.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from executor.device.weights import Weight

Send = Callable[[np.ndarray], Tensor]
"""`Ops.send`, for those who need nothing else of a device."""


@dataclass(frozen=True)
class KVLayer:
    """One layer's paged cache. The layout of the tensors is the backend's own."""

    k: Tensor
    v: Tensor
    q_out: Tensor | None = None  # [T, H * D]: in a graph, where the layer's queries are left
    scales: Any = None  # of an int8 cache: what the backend made of its KVScales; None: a float cache


@dataclass(frozen=True, eq=False)
class KVScales:
    """Of one layer's int8 cache, a number for every channel of its K heads: float32 `[K, D]`, offsets whole numbers.

    `q = clamp(round(x / scale + offset), -128, 127)`, read as `(q - offset) * scale`; rounding to nearest, ties to
    even. `x` is what attention reads: keys behind their norm and rotation, values as projected.
    """

    k_scale: Tensor
    k_offset: Tensor
    v_scale: Tensor
    v_offset: Tensor


@dataclass(frozen=True)
class Heads:
    """How the rows of a fused q, k, v projection are cut: H query heads, then K key and K value heads of size D."""

    num_heads: int
    num_kv_heads: int
    dim: int


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of every query and key head, weights [D] (Qwen3)."""

    q: Tensor
    k: Tensor
    eps: float


class Ops(ABC):
    """One device's kernels. Stateless but for what `prepare_*` returns."""

    name: str
    device: torch.device
    slot_dtype: torch.dtype = torch.int64  # of the slots that kv_write is given
    collectives: str = "gloo"  # torch.distributed's backend for tensors of this device
    prepares_in_any_order: bool = False  # layers' weights, in a thread of its own while the rest is read
    computes_behind: bool = False  # behind the host's back: a call returns when its work is queued
    overlaps_steps: bool = False  # a decode step is queued before the host has read the tokens of the one before
    takes_cache_offsets: bool = True  # whether the scales of an int8 cache may have offsets other than zero

    def send(self, array: np.ndarray, into: Tensor | None = None) -> Tensor:
        """`array` as a tensor on the device, a new one or `into`. The copy is queued and not waited for; where the
        device is the host, a new tensor is the array's own memory, not to be changed before the step has ended."""
        tensor = torch.from_numpy(array)
        return tensor.to(self.device) if into is None else into.copy_(tensor)

    def read_back(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin to copy `x` to the host, behind what is queued by now; the result waits for no more than that and gives
        the copy."""
        return lambda: x

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x [..., n] * rsqrt(mean(x²) + eps) * weight`, the mean in fp32."""

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        bias: Tensor | None = None,
        reader: Callable[..., Tensor] | None = None,
    ) -> tuple[Any, Tensor]:
        """`(rms_norm(x + residual) + bias, x + residual)`; no residual before the first layer.

        `reader`: what `prepare_linear` gave of the one linear that reads the first result. A backend may give that in
        the form its linear takes, quantized already.
        """
        total = x if residual is None else x + residual
        y = self.rms_norm(total, weight, eps)
        return (y if bias is None else y + bias), total

    @abstractmethod
    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor: ...

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate halves: `x [T, H, D]`, `cos`, `sin [T, D]` (each half the same angles)."""

    def rope_pair(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at once; `q` and `k` may be overwritten."""
        return self.rope(q, cos, sin), self.rope(k, cos, sin)

    def vision_head_dim(self, head_dim: int) -> int:
        """The head dim that vision attention is computed in, `head_dim` or more: weights are padded to it once."""
        return head_dim

    @abstractmethod
    def swiglu(self, gate_up: Tensor) -> Tensor:
        """`[T, 2I] -> silu(first half) * second half [T, I]`."""

    def gated_mlp(self, x: Any, gate_up: Callable[..., Tensor], down: Callable[..., Tensor]) -> Tensor:
        """`down(swiglu(gate_up(x)))`, both as `prepare_linear` gave them; `x` as the norm before it gave it."""
        return down(self.swiglu(gate_up(x)))

    @abstractmethod
    def gelu(self, x: Tensor, tanh: bool) -> Tensor: ...

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of activations and of the KV cache of a model whose weights have `dtype`."""
        return dtype

    @abstractmethod
    def prepare_linear(
        self, weight: Weight, bias: Tensor | None, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """`weight [out, in]` in the layout this device multiplies fastest, as a function of `x [T, in]`.

        A quantized weight is quantized arithmetic, in the meaning of executor/device/weights.py.

        `many_rows`: T is hundreds and more whenever it is called, as in a vision encoder.
        """

    def prepare_tied_head(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        """The same for the weight of an embedding, which stays where it is and is looked up as well."""
        return self.prepare_linear(weight, None)

    def copies_tied_head(self, dtype: torch.dtype) -> bool:
        """Whether a tied head of `dtype` is a copy in host memory, which could stand alone: one that prepare_tied_head
        makes, or int8 weights made of the embedding's tensor.
        """
        return False

    def prepare_summed_linear(
        self, weight: Weight, bias: Tensor | None, group: Any, many_rows: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """prepare_linear where each rank of `group` (a parallel.groups.Group) has some inputs: results are summed."""
        multiply = self.prepare_linear(weight, bias, many_rows)
        return lambda x: group.all_reduce(multiply(x))

    @abstractmethod
    def prepare_experts(
        self, gate_up: Weight, down: Weight, first: int = 0, num_experts: int | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Expert weights `[E, 2I, n]`, `[E, n, I]` as a function of `(x [T, n], ids [T, k], weights [T, k])`.

        They are experts `first` to `first + E` of `num_experts` (None: all there are): the others add nothing.
        """

    def check_experts(self, form: type, hidden_size: int, intermediate_size: int) -> None:
        """UserError where this device has no experts of weights `form` (device/weights.py) with these sizes of a rank.

        Asked before anything is loaded.
        """
        return

    @abstractmethod
    def gate_topk(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax in fp32 over `[T, E]`, the k best: `(weights [T, k] in logits' dtype, ids [T, k])`.

        The ids' integer type is the backend's own: they go to its experts.
        """

    def most_blocks(self, block_size: int, heads: int, dim: int) -> int | None:
        """The most blocks that a cache may have on this device, whatever its memory; None: any number."""
        return None

    @abstractmethod
    def kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype,
        normed: bool = False, scales: Sequence[KVScales] = (),
    ) -> list[KVLayer]:  # fmt: skip
        """An empty paged cache. `normed`: keys come through a norm of every head; a device may lay it out for that.

        `scales`: one for each layer makes the cache int8; keys, values and queries come in `dtype` all the same.
        """

    @abstractmethod
    def kv_write(self, k: Tensor, v: Tensor, cache: KVLayer, slots: Tensor) -> None:
        """Write `k, v [T, K, D]` at `slots [T]`, of `slot_dtype` (block * block_size + offset)."""

    def qkv_norm_rope_write(
        self, qkv: Tensor, heads: Heads, norms: HeadNorms | None, cos: Tensor, sin: Tensor, cache: KVLayer,
        slots: Tensor,
    ) -> Tensor:  # fmt: skip
        """`qkv [T, (H + 2K) * D]`: norm and rotate queries and keys, write keys and values, give `q [T, H, D]`."""
        q, k, v = qkv.unflatten(-1, (-1, heads.dim)).split((heads.num_heads, heads.num_kv_heads, heads.num_kv_heads), 1)
        if norms is not None:
            q, k = self.rms_norm(q, norms.q, norms.eps), self.rms_norm(k, norms.k, norms.eps)
        q, k = self.rope_pair(q, k, cos, sin)
        self.kv_write(k, v, cache, slots)
        return q

    @abstractmethod
    def prepare_attention(
        self, q_lens: Sequence[int], kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
    ) -> Any:
        """Everything attention needs that is the same for all layers of a step, from host lists, once."""

    def advance_attention(
        self, prepared: Any, kv_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int,
        entered: Sequence[int],
    ) -> Any:  # fmt: skip
        """`prepare_attention` of a decode step whose rows are those of `prepared`, each a token further.

        `entered`: which of them have come into another block. `prepared` may be changed and is not used any more.
        """
        return self.prepare_attention([1] * len(kv_lens), kv_lens, block_tables, block_size)

    @abstractmethod
    def paged_attention(self, q: Tensor, cache: KVLayer, prepared: Any, scale: float) -> Tensor:
        """Causal attention of each row's last `q_len` tokens over its `kv_len` cached: `[T, H, D] -> [T, H * D]`."""

    @abstractmethod
    def varlen_attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        """Full attention inside each of the packed segments: `[T, H, D] x3 -> [T, H * D]`."""

    def static_attention(
        self, q_len: int, kv_lens: Tensor | Sequence[int], block_table: Tensor, block_size: int
    ) -> Any:
        """What `prepare_attention` gives for rows of `q_len` tokens each, over tensors that stay in place from step to
        step.

        `kv_lens` int64 [R] or numbers, `block_table` int32 [R, blocks].
        """
        raise NotImplementedError(f"{self.name} has no graphs")

    def capture(self, decode: Callable[..., Tensor], mode: str, folder: Path) -> Callable[..., Tensor]:
        """`decode`, a module's method of tensors and one sequence of lengths, as a graph of its static shapes.

        Takes the arguments of ModelStep.decode, then the lengths as a host list: some modes read the tensor, others the
        list.
        Compiles at its first call, which raises RuntimeError with the reason where that fails. What can be kept of the
        compilation is kept below `folder`.
        """
        raise NotImplementedError(f"{self.name} has no graphs")

    def versions(self) -> dict[str, str]:
        """The versions of everything that compiles for this device, by name: a change makes compiled graphs stale."""
        return {"torch": torch.__version__}

    def group_options(self, buffer_mb: int) -> Any:
        """Options of a communicator for messages of about `buffer_mb`, as torch.distributed.new_group takes them."""
        return None

    def free_bytes(self) -> int | None:
        """Memory of the device that may still be taken; None where it is the host's."""
        return None

    def restart_peak(self) -> None:  # noqa: B027 - a device that is the host has nothing of its own to count
        """Count `peak_bytes` from now on."""

    def peak_bytes(self) -> int | None:
        """The most memory of the device that this process has taken; None where it is the host's."""
        return None

    def profiler(self, folder: Path, name: str) -> Any:
        """What records the work of this process: `start()`, `stop()` and `write(file)`, once and in one thread.

        `write` puts a Chrome trace into `file` and returns whether there is one. `folder` is there for other things to
        be left, below `name`.
        """
        from executor.device.profiler import TorchProfiler

        return TorchProfiler()

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the device has done what was asked; for measuring only."""


_bound: Ops | None = None


def bind(backend: Ops) -> None:
    """Make `backend` the one that layers call in this process."""
    global _bound
    _bound = backend


def bound() -> Ops:
    """The bound backend."""
    assert _bound is not None, "no device backend is bound: call executor.device.ops.bind first"
    return _bound

"""Grouped-query attention over the paged cache, as both families' text models use it.

Legend: T tokens, H query heads of this rank, K key/value heads of this rank, D head dim, n hidden size.
"""

from torch import Tensor, nn

from executor.device import ops
from executor.device.ops import HeadNorms, Heads, KVLayer, KVScales
from executor.layers.kv_scales import CacheScales
from executor.layers.linear import Linear, Part
from executor.layers.norm import RMSNorm
from executor.parallel.groups import Group
from executor.parallel.partition import kv_heads_part, part


class Attention(nn.Module):
    """`[T, n] -> [T, n]`. `qkv_bias`: Qwen2.5; `qk_norm_eps`: Qwen3's norm of queries and keys over D."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        group: Group,
        *,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        queries = part(num_heads, group, "query heads")
        keys = kv_heads_part(num_kv_heads, group)
        self.num_heads = queries.stop - queries.start
        self.num_kv_heads = keys.stop - keys.start
        self.head_dim = head_dim
        self.scale = head_dim**-0.5

        def rows(heads: slice) -> slice:
            return slice(heads.start * head_dim, heads.stop * head_dim)

        self.qkv_proj = Linear(
            hidden_size,
            (num_heads + 2 * num_kv_heads) * head_dim,
            bias=qkv_bias,
            shard="out",
            group=group,
            parts=(
                Part("q_proj", num_heads * head_dim, rows(queries)),
                Part("k_proj", num_kv_heads * head_dim, rows(keys)),
                Part("v_proj", num_kv_heads * head_dim, rows(keys)),
            ),
        )
        self.o_proj = Linear(num_heads * head_dim, hidden_size, shard="in", group=group)
        self.q_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.k_norm = RMSNorm(head_dim, qk_norm_eps) if qk_norm_eps is not None else None
        self.cache: CacheScales | None = None

    @property
    def name(self) -> str:
        """In checkpoints, once its linears have been asked for their tensors."""
        return self.qkv_proj.prefix.rpartition(".")[0]

    def quantize_cache(self) -> None:
        """The checkpoint has scales for an int8 cache, and it is to be one; before anything is loaded."""
        self.cache = CacheScales(self.qkv_proj.share.parts[1:], self.head_dim)

    @property
    def cache_scales(self) -> KVScales | None:
        """Of this rank's heads, once loaded; None: the cache is float."""
        return None if self.cache is None else self.cache.values

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KVLayer,
        slots: Tensor,
        prepared: object,
        select: Tensor | None = None,
    ) -> Tensor:
        """`select` int64 [R]: the tokens whose result is wanted, `[R, n]`; keys and values are those of all."""
        device = ops.bound()
        norms = None if self.q_norm is None else HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        heads = Heads(self.num_heads, self.num_kv_heads, self.head_dim)
        q = device.qkv_norm_rope_write(self.qkv_proj(x), heads, norms, cos, sin, cache, slots)
        y = device.paged_attention(q, cache, prepared, self.scale)
        return self.o_proj(y if select is None else y[select])

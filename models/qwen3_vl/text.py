"""Qwen3-VL's text model: q/k norm, interleaved M-RoPE, DeepStack, dense or mixture-of-experts layers.

Legend: T tokens, R rows that want logits, n hidden size.
"""

from torch import Tensor, nn

from executor.device.ops import KVLayer
from executor.layers.attention import Attention
from executor.layers.embedding import Embedding
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.parallel import Group
from executor.runtime.forward import ForwardMeta
from models.qwen3_vl.config import TextConfig


class Text(nn.Module):
    def __init__(self, config: TextConfig, group: Group) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(Layer(config, index, group) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, meta: ForwardMeta) -> Tensor:
        """Embeddings `[T, n]` -> the normalised hidden states of the selected tokens `[R, n]`."""
        residual = None
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, meta, meta.kv[index])
            if meta.deepstack is not None and index < meta.deepstack.features.shape[1]:
                x = x.index_add(0, meta.deepstack.index, meta.deepstack.features[:, index])
        if meta.select is not None:
            x, residual = x[meta.select], residual[meta.select]
        return self.norm.add(x, residual)[0]


class Layer(nn.Module):
    def __init__(self, config: TextConfig, index: int, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            group,
            qk_norm_eps=config.rms_norm_eps,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.moe
        if moe is not None and moe.is_sparse(index):
            self.mlp = MoE(
                config.hidden_size, moe.intermediate_size, moe.num_experts, moe.top_k, moe.renormalize, group
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, group)

    def forward(self, x: Tensor, residual: Tensor | None, meta: ForwardMeta, kv: KVLayer) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, meta.cos, meta.sin, kv, meta.slots, meta.attention)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual

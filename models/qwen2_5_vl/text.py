"""Qwen2.5-VL's text model: Qwen2.5 with biases on q, k, v and contiguous M-RoPE sections.

Legend: T tokens, R rows that want logits, n hidden size.
"""

from torch import Tensor, nn

from executor.device.ops import KVLayer
from executor.engine.forward import ForwardMeta
from executor.layers.attention import Attention
from executor.layers.embedding import Embedding
from executor.layers.mlp import GatedMLP
from executor.layers.norm import RMSNorm
from executor.parallel.groups import Group
from models.qwen2_5_vl.config import TextConfig


class Text(nn.Module):
    def __init__(self, config: TextConfig, group: Group) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(Layer(config, group) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, meta: ForwardMeta) -> Tensor:
        """Embeddings `[T, n]` -> the normalised hidden states of the selected tokens `[R, n]`."""
        residual = None
        last = len(self.layers) - 1
        for index in range(len(self.layers)):
            # Behind its attention the last layer computes what is asked for, and no other token.
            x, residual = self.layer(index, x, residual, meta, meta.select if index == last else None)
        return self.norm.add(x, residual)[0]

    def layer(
        self, index: int, x: Tensor, residual: Tensor | None, meta: ForwardMeta, select: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer; `select`: the tokens that are computed to the end."""
        return self.layers[index](x, residual, meta, meta.kv[index], select)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, group: Group) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, group, qkv_bias=True
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, group)

    def forward(
        self, x: Tensor, residual: Tensor | None, meta: ForwardMeta, kv: KVLayer, select: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual, self.self_attn.qkv_proj)
        x = self.self_attn(x, meta.cos, meta.sin, kv, meta.slots, meta.attention, select)
        if select is not None:
            residual = residual[select]
        x, residual = self.post_attention_layernorm.add(x, residual, self.mlp.gate_up_proj)
        return self.mlp(x), residual

"""Qwen3-VL's text model: q/k norm, interleaved M-RoPE, DeepStack, dense or mixture-of-experts layers.

Legend: T tokens, R rows that want logits, n hidden size.
"""

from torch import Tensor, nn

from executor.device.ops import KVLayer
from executor.engine.forward import ForwardMeta
from executor.layers.attention import Attention
from executor.layers.embedding import Embedding
from executor.layers.mlp import GatedMLP
from executor.layers.moe import MoE
from executor.layers.norm import RMSNorm
from executor.parallel.groups import Parallel
from models.qwen3_vl.config import TextConfig


class Text(nn.Module):
    def __init__(self, config: TextConfig, parallel: Parallel) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, parallel.text)
        self.layers = nn.ModuleList(Layer(config, index, parallel) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, meta: ForwardMeta) -> Tensor:
        """Embeddings `[T, n]` -> the normalised hidden states of the selected tokens `[R, n]`."""
        residual, last = None, len(self.layers) - 1
        taps = 0 if meta.deepstack is None else meta.deepstack.features.shape[1]
        for index in range(len(self.layers)):
            # Behind its attention the last layer computes what is asked for, and no other token.
            select = meta.select if index == last and index >= taps else None
            x, residual = self.layer(index, x, residual, meta, select)
        if meta.select is not None and last < taps:
            x, residual = x[meta.select], residual[meta.select]
        return self.norm.add(x, residual)[0]

    def layer(
        self, index: int, x: Tensor, residual: Tensor | None, meta: ForwardMeta, select: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer, and the visual features that belong behind it; `select`: the tokens computed to the end."""
        x, residual = self.layers[index](x, residual, meta, meta.kv[index], select)
        if meta.deepstack is not None and index < meta.deepstack.features.shape[1]:
            x.index_add_(0, meta.deepstack.index, meta.deepstack.features[:, index])
        return x, residual

    def help(self, padded_tokens: int) -> None:
        """A step in which this replica has no tokens: its experts compute the tokens that other replicas send them."""
        weight = self.norm.weight
        nothing = weight.new_empty(0, len(weight))
        for layer in self.layers:
            if layer.is_sparse:
                layer.mlp(nothing, padded_tokens)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, index: int, parallel: Parallel) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            parallel.text,
            qk_norm_eps=config.rms_norm_eps,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.moe
        self.is_sparse = moe is not None and moe.is_sparse(index)
        if self.is_sparse:
            self.mlp = MoE(
                config.hidden_size, moe.intermediate_size, moe.num_experts, moe.top_k, moe.renormalize, parallel
            )
        else:
            self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, parallel.text)

    def forward(
        self, x: Tensor, residual: Tensor | None, meta: ForwardMeta, kv: KVLayer, select: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.input_layernorm.add(x, residual, self.self_attn.qkv_proj)
        x = self.self_attn(x, meta.cos, meta.sin, kv, meta.slots, meta.attention, select)
        if select is not None:
            residual = residual[select]
        reader = None if self.is_sparse else self.mlp.gate_up_proj
        x, residual = self.post_attention_layernorm.add(x, residual, reader)
        return self.mlp(x, meta.padded_tokens) if self.is_sparse else self.mlp(x), residual

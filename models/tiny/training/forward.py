"""A forward pass for training over the modules of transformers' own classes: same weights, fewer Python steps.

All pictures are 8x8 patches, so vision attention is one call over [N, heads, 64, dim] (or [4N, heads, 16, dim] in
Qwen2.5's windows) where transformers loops over the pictures. `python -m models.tiny.training.evaluate` compares them.
N temporal patches, T tokens, B sequences, H width.
"""

import torch
import torch.nn.functional as F
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from models.tiny.training.aids import LOOK_LAYER

# Patches come as 16 merged cells (row-major 4x4) of 4; Qwen2.5's windows are 2x2 cells each.
WINDOW_CELLS = (0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15)


def rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope(x, cos, sin):
    return (x * cos + rotate_half(x) * sin).to(x.dtype)


class Forward(torch.nn.Module):
    """Holds a transformers model (its parameters are the ones trained) and the constants of the fixed picture grid."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.merged = None  # vision tokens [16N, H] of the latest pass
        self.attended = None  # log attention [B, T, T] of head 0 of aids.LOOK_LAYER, of the latest pass in training
        self.expert_shares = []  # routing weights [tokens, E] of each MoE layer, of the latest pass
        visual, grid = model.model.visual, torch.tensor([[1, 8, 8]])
        self.is_windowed = hasattr(visual, "fullatt_block_indexes")
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, 2))
        self.order = torch.arange(64)
        if self.is_windowed:
            self.order = torch.tensor([4 * cell + i for cell in WINDOW_CELLS for i in range(4)])
            self.back = torch.argsort(torch.tensor(WINDOW_CELLS))
        else:
            self.grid_index, self.grid_weight = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=visual.num_grid_per_side,
                mode=visual.interpolation_mode,
                align_corners=visual.interpolation_align_corners,
                spatial_merge_size=2,
            )
        self.vision_cos, self.vision_sin = cos[self.order], sin[self.order]

    def vision(self, patches):
        """[N, 64, D] to ([16N, H], list of DeepStack features [16N, H])."""
        visual = self.model.model.visual
        proj = visual.patch_embed.proj
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        if self.is_windowed:
            x = x[:, self.order]
        else:
            x = x + (visual.pos_embed(self.grid_index) * self.grid_weight[:, :, None]).sum(1)
        deep = []
        for n, block in enumerate(visual.blocks):
            windowed = self.is_windowed and n not in visual.fullatt_block_indexes
            x = x + self._vision_attention(block.attn, block.norm1(x), windowed)
            x = x + block.mlp(block.norm2(x))
            if not self.is_windowed and n in visual.deepstack_visual_indexes:
                deep.append(visual.deepstack_merger_list[len(deep)](x.flatten(0, 1)))
        merged = visual.merger(x.flatten(0, 1))
        if self.is_windowed:
            merged = merged.view(len(x), 16, -1)[:, self.back].flatten(0, 1)
        return merged, deep

    def _vision_attention(self, attention, x, windowed):
        num, count, width = x.shape
        qkv = attention.qkv(x).view(num, count, 3, attention.num_heads, -1)
        cos, sin = self.vision_cos[:, None].to(qkv.dtype), self.vision_sin[:, None].to(qkv.dtype)
        q, k, v = rope(qkv[:, :, 0], cos, sin), rope(qkv[:, :, 1], cos, sin), qkv[:, :, 2]
        if windowed:
            q, k, v = (t.reshape(num * 4, 16, *t.shape[2:]) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return attention.proj(out.transpose(1, 2).reshape(num, count, width))

    def hidden(self, ids, positions, mask, vision_index, patches):
        """Final hidden states [B, T, H]."""
        text = self.model.model.language_model
        self.expert_shares = []
        merged, deep = self.vision(patches)
        self.merged = merged
        x = text.embed_tokens(ids)
        shape = x.shape
        x = x.flatten(0, 1).index_copy(0, vision_index, merged.to(x.dtype)).view(shape)
        cos, sin = text.rotary_emb(x, positions)
        cos, sin = cos[:, :, None], sin[:, :, None]
        for n, layer in enumerate(text.layers):
            x = x + self._text_attention(
                layer.self_attn, layer.input_layernorm(x), cos, sin, mask, watch=n == LOOK_LAYER
            )
            normed = layer.post_attention_layernorm(x)
            x = x + (self._experts(layer.mlp, normed) if hasattr(layer.mlp, "experts") else layer.mlp(normed))
            if n < len(deep):
                x = x.flatten(0, 1).index_add(0, vision_index, deep[n].to(x.dtype)).view(shape)
        return text.norm(x)

    def _text_attention(self, attention, x, cos, sin, mask, watch):
        heads = (*x.shape[:2], -1, 128)
        q, k, v = (proj(x).view(heads) for proj in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        cos, sin = cos.to(v.dtype), sin.to(v.dtype)
        q, k = rope(q.to(v.dtype), cos, sin), rope(k.to(v.dtype), cos, sin)
        if watch and self.training:
            scores = torch.einsum("bqd,bkd->bqk", q[:, :, 0].float(), k[:, :, 0].float()) * 128**-0.5
            self.attended = scores.masked_fill(~mask[:, 0], float("-inf")).log_softmax(-1)
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return attention.o_proj(out.transpose(1, 2).flatten(2))

    def _experts(self, block, x):
        """Every expert on every token, weighted by the router: four small experts are quicker dense than gathered."""
        flat = x.flatten(0, 1)
        probs = F.linear(flat, block.gate.weight).float().softmax(-1)
        top, index = probs.topk(block.gate.top_k, dim=-1)
        weight = torch.zeros_like(probs).scatter(1, index, top / top.sum(-1, keepdim=True))
        gate, up = torch.einsum("nh,eih->eni", flat, block.experts.gate_up_proj).chunk(2, dim=-1)
        out = torch.einsum("eni,ehi->enh", F.silu(gate) * up, block.experts.down_proj)
        self.expert_shares.append(weight)
        return (out * weight.t()[:, :, None]).sum(0).view(x.shape)

    def answer_logits(self, batch, hidden=None):
        """(logits [A, vocab], target [A]) at the positions that predict an answer token."""
        hidden = (hidden or self.hidden)(
            batch["ids"], batch["positions"], batch["mask"], batch["vision_index"], batch["patches"]
        )
        where = (batch["target"].flatten() >= 0).nonzero()[:, 0]
        return self.model.lm_head(hidden.flatten(0, 1)[where]), batch["target"].flatten()[where]

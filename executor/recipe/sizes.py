"""The sizes of a checkpoint that can be reasoned about before a weight is read: degrees, bytes, parameter counts.

A family's config.py makes them from its config.json (`models.registry.read_shapes`). Knows no module of the models; the
counts equal theirs, which a test holds.
"""

from dataclasses import dataclass
from typing import Literal

Family = Literal["qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"]


@dataclass(frozen=True)
class VisionShapes:
    """The vision encoder: `depth` blocks of `hidden_size`, merged `merge_size`² patches to a token of `out_size`."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_size: int
    num_positions: int  # learned position embeddings; 0 without
    num_taps: int  # DeepStack mergers
    window_size: int  # pixels of a window's side; 0: every block attends over whole frames
    num_full_blocks: int  # that attend over whole frames


@dataclass(frozen=True)
class ModelShapes:
    """The whole model. Sizes of the text decoder stand here, those of the encoder in `vision`."""

    name: str
    family: Family
    vision: VisionShapes
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied_embeddings: bool
    max_position_embeddings: int
    num_experts: int  # 0: dense
    expert_intermediate_size: int
    experts_per_token: int
    num_dense_layers: int  # of a mixture-of-experts model: layers with a plain MLP
    dtype: str  # of the checkpoint

    @property
    def attention_parameters(self) -> int:
        """Of one text layer, norms left out."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = q_size + 2 * kv_size if self.family == "qwen2_5_vl" else 2 * self.head_dim  # else q and k norms
        return self.hidden_size * (2 * q_size + 2 * kv_size) + biases

    @property
    def mlp_parameters(self) -> int:
        """Of the dense MLPs of all text layers."""
        layers = self.num_dense_layers if self.num_experts else self.num_layers
        return layers * 3 * self.hidden_size * self.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Of the experts of all text layers, routers left out."""
        layers = self.num_layers - self.num_dense_layers if self.num_experts else 0
        return layers * self.num_experts * 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def router_parameters(self) -> int:
        return (self.num_layers - self.num_dense_layers) * self.num_experts * self.hidden_size

    @property
    def norm_parameters(self) -> int:
        return self.hidden_size * (2 * self.num_layers + 1)

    @property
    def vocabulary_parameters(self) -> int:
        """Embedding and head; tied ones count once."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def vision_parameters(self) -> int:
        v = self.vision
        patch = 3 * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
        attention = 4 * v.hidden_size * (v.hidden_size + 1)
        merged = v.hidden_size * v.merge_size**2
        merger = merged * (merged + 1) + v.out_size * (merged + 1)
        if self.family == "qwen2_5_vl":  # RMSNorm, gated MLP with biases, patch embedding without
            mlp = v.intermediate_size * (3 * v.hidden_size + 2) + v.hidden_size
            return patch + v.depth * (attention + mlp + 2 * v.hidden_size) + merger + v.hidden_size
        mlp = v.intermediate_size * (2 * v.hidden_size + 1) + v.hidden_size
        blocks = v.depth * (attention + mlp + 4 * v.hidden_size)
        taps = v.num_taps * (merger + 2 * merged)
        return patch + v.hidden_size * (1 + v.num_positions) + blocks + merger + 2 * v.hidden_size + taps

    @property
    def replicated_vision_parameters(self) -> int:
        """Of the encoder, what every rank holds whole: patch and position embeddings, norms, biases after a sum."""
        v, is_qwen3 = self.vision, self.family != "qwen2_5_vl"
        norms = 2 * v.hidden_size * (2 if is_qwen3 else 1)  # LayerNorms have a bias, RMSNorms have none
        patch = v.hidden_size * (3 * v.temporal_patch_size * v.patch_size**2 + is_qwen3 + v.num_positions)
        merger = norms // 2 + v.out_size
        taps = v.num_taps * (2 * v.hidden_size * v.merge_size**2 + v.out_size)
        return patch + v.depth * (norms + 2 * v.hidden_size) + merger + taps

    @property
    def kv_parameters(self) -> int:
        """Of the key and value projections of one text layer."""
        return 2 * self.num_kv_heads * self.head_dim * (self.hidden_size + (self.family == "qwen2_5_vl"))

    @property
    def replicated_attention_parameters(self) -> int:
        """Of one text layer's attention, what every rank holds whole: the norms of queries and keys."""
        return 0 if self.family == "qwen2_5_vl" else 2 * self.head_dim

    @property
    def parameters(self) -> int:
        text = self.num_layers * self.attention_parameters + self.mlp_parameters + self.expert_parameters
        return (
            text + self.router_parameters + self.norm_parameters + self.vocabulary_parameters + self.vision_parameters
        )

"""Qwen3-VL's true dimensions, read from a published config.json (dense and MoE)."""

import math
from dataclasses import dataclass
from typing import Any

from executor.errors import UserError


@dataclass(frozen=True)
class MoEConfig:
    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    sparse_step: int  # every n-th layer is sparse
    dense_layers: tuple[int, ...]  # except these

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_sections: tuple[int, int, int]
    max_position_embeddings: int
    moe: MoEConfig | None


@dataclass(frozen=True)
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    out_hidden_size: int
    num_positions: int  # of the square learned grid
    deepstack_layers: tuple[int, ...]

    @property
    def positions_side(self) -> int:
        return math.isqrt(self.num_positions)


@dataclass(frozen=True)
class Config:
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int


def parse(raw: dict[str, Any]) -> Config:
    """From the JSON of config.json. Raises UserError naming a key that is missing or not what this code computes."""
    try:
        text, vision = raw["text_config"], raw["vision_config"]
        return Config(
            text=_text(text),
            vision=_vision(vision),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            image_token_id=raw["image_token_id"],
            video_token_id=raw["video_token_id"],
            vision_start_token_id=raw["vision_start_token_id"],
        )
    except KeyError as missing:
        raise UserError(f"config.json has no {missing}; it is needed to build Qwen3-VL") from missing


def _text(raw: dict[str, Any]) -> TextConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if raw.get("hidden_act", "silu") != "silu" or raw.get("attention_bias", False):
        raise UserError("config.json: text hidden_act other than silu, or attention_bias, is not Qwen3-VL as published")
    moe = None
    num_experts = raw.get("num_experts") or raw.get("num_local_experts")  # transformers 5 writes the latter
    if num_experts:
        moe = MoEConfig(
            num_experts=num_experts,
            top_k=raw["num_experts_per_tok"],
            intermediate_size=raw["moe_intermediate_size"],
            renormalize=raw.get("norm_topk_prob", True),
            sparse_step=raw.get("decoder_sparse_step", 1),
            dense_layers=tuple(raw.get("mlp_only_layers") or ()),
        )
    return TextConfig(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or raw["rope_theta"],
        mrope_sections=tuple(rope.get("mrope_section") or raw.get("mrope_section") or (24, 20, 20)),
        max_position_embeddings=raw["max_position_embeddings"],
        moe=moe,
    )


def _vision(raw: dict[str, Any]) -> VisionConfig:
    if raw.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UserError(f"config.json: vision hidden_act is {raw['hidden_act']!r}, expected 'gelu_pytorch_tanh'")
    return VisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_heads"],
        in_channels=raw.get("in_channels", 3),
        patch_size=raw["patch_size"],
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        merge_size=raw.get("spatial_merge_size", 2),
        out_hidden_size=raw["out_hidden_size"],
        num_positions=raw["num_position_embeddings"],
        deepstack_layers=tuple(raw["deepstack_visual_indexes"]),
    )

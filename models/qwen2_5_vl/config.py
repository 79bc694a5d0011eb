"""Qwen2.5-VL's true dimensions, read from a published config.json (flat, or with a text_config)."""

from dataclasses import dataclass
from typing import Any

from executor.errors import UserError


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_sections: tuple[int, int, int]
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


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
    window_size: int  # pixels
    full_attention_layers: tuple[int, ...]
    tokens_per_second: float  # M-RoPE: temporal positions per second of video


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
    text = raw.get("text_config") or raw  # published files keep the text model's keys at the top
    try:
        return Config(
            text=_text(text),
            vision=_vision(raw["vision_config"]),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)),
            image_token_id=raw["image_token_id"],
            video_token_id=raw["video_token_id"],
            vision_start_token_id=raw["vision_start_token_id"],
        )
    except KeyError as missing:
        raise UserError(f"config.json has no {missing}; it is needed to build Qwen2.5-VL") from missing


def _text(raw: dict[str, Any]) -> TextConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if raw.get("hidden_act", "silu") != "silu" or raw.get("use_sliding_window", False):
        raise UserError(
            "config.json: text hidden_act other than silu, or use_sliding_window, is not Qwen2.5-VL as published"
        )
    return TextConfig(
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or raw["rope_theta"],
        mrope_sections=tuple(rope.get("mrope_section") or raw.get("mrope_section") or (16, 24, 24)),
        max_position_embeddings=raw["max_position_embeddings"],
    )


def _vision(raw: dict[str, Any]) -> VisionConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: vision hidden_act is {raw['hidden_act']!r}, expected 'silu'")
    return VisionConfig(
        depth=raw["depth"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=raw["num_heads"],
        in_channels=raw.get("in_channels") or raw.get("in_chans", 3),
        patch_size=raw["patch_size"],
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        merge_size=raw.get("spatial_merge_size", 2),
        out_hidden_size=raw["out_hidden_size"],
        window_size=raw["window_size"],
        full_attention_layers=tuple(raw["fullatt_block_indexes"]),
        tokens_per_second=raw.get("tokens_per_second", 2),
    )

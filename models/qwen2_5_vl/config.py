"""Qwen2.5-VL's true dimensions, from a config.json: flat as published, or with a text_config. Its only parser.

A key that is absent has the default of transformers' own config class, which re-saved files rely on: some hold a
vision_config of hardly more than what differs from the class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from executor.checkpoint.fields import Fields
from executor.checkpoint.model_config import (
    check_full_attention,
    check_outer_keys,
    check_vision,
    read_dtype,
    read_heads,
    read_tied,
)
from executor.checkpoint.rope import Rope, read_rope
from executor.recipe.sizes import ModelShapes, VisionShapes

SECTIONS = (16, 24, 24)


@dataclass(frozen=True)
class TextConfig:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
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
    vision_end_token_id: int
    dtype: str  # of the checkpoint

    def shapes(self, name: str) -> ModelShapes:
        """What can be reasoned about before a weight is read."""
        text, vision = self.text, self.vision
        return ModelShapes(
            name=name,
            family="qwen2_5_vl",
            vision=VisionShapes(
                depth=vision.depth,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                num_heads=vision.num_heads,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.merge_size,
                out_size=vision.out_hidden_size,
                num_positions=0,
                num_taps=0,
                window_size=vision.window_size,
                num_full_blocks=len(vision.full_attention_layers),
            ),
            hidden_size=text.hidden_size,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            tied_embeddings=self.tie_word_embeddings,
            max_position_embeddings=text.max_position_embeddings,
            num_experts=0,
            expert_intermediate_size=0,
            experts_per_token=0,
            num_dense_layers=0,
            dtype=self.dtype,
        )


def parse(raw: Mapping[str, Any], file: str = "config.json") -> Config:
    """From the JSON of a config.json, which messages call `file`.

    Raises UserError naming a key that is missing, of a wrong kind, or not what this code computes.
    """
    whole = Fields(raw, file)
    nested = whole.section("text_config")
    vision = whole.section("vision_config")
    if vision is None:
        raise whole.fault("vision_config", "the sizes of the vision encoder")
    text = _text(nested or whole, nested=nested is not None)
    if nested is not None:
        check_outer_keys(whole, nested, lambda section: _text(section, nested=True))
    return Config(
        text=text,
        vision=_vision(vision, text),
        tie_word_embeddings=read_tied(whole, nested),
        image_token_id=whole.whole("image_token_id", 151655, least=0),
        video_token_id=whole.whole("video_token_id", 151656, least=0),
        vision_start_token_id=whole.whole("vision_start_token_id", 151652, least=0),
        vision_end_token_id=whole.whole("vision_end_token_id", 151653, least=0),
        dtype=read_dtype(whole, nested),
    )


def _text(text: Fields, *, nested: bool) -> TextConfig:
    text.only("hidden_act", ("silu",), "silu, as Qwen2.5-VL is published")
    text.only("use_sliding_window", (False,), "false, as Qwen2.5-VL is published: text attention is full here")
    check_full_attention(text, "Qwen2.5-VL")
    hidden_size = text.whole("hidden_size", 8192)
    num_heads, num_kv_heads = read_heads(text, heads=64, kv_heads=8)
    if hidden_size % num_heads or hidden_size // num_heads % 2:
        raise text.fault("num_attention_heads", f"a divisor of hidden_size {hidden_size} that leaves an even head dim")
    head_dim = hidden_size // num_heads
    text.only("head_dim", (head_dim,), f"hidden_size / num_attention_heads = {head_dim}, as Qwen2.5-VL computes it")
    rope, length = read_rope(
        text, head_dim, theta=1e6, sections=SECTIONS, length=32768, interleaved=False, nested=nested
    )
    return TextConfig(
        hidden_size=hidden_size,
        num_layers=text.whole("num_hidden_layers", 80),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=text.whole("intermediate_size", 29568),
        vocab_size=text.whole("vocab_size", 152064),
        rms_norm_eps=text.number("rms_norm_eps", 1e-5),
        rope=rope,
        max_position_embeddings=length,
    )


def _vision(vision: Fields, text: TextConfig) -> VisionConfig:
    vision.only("hidden_act", ("silu",), "silu, as Qwen2.5-VL is published")
    sizes = VisionConfig(
        depth=vision.whole("depth", 32),
        hidden_size=vision.whole("hidden_size"),  # the class's default, 3584, is no published encoder's
        intermediate_size=vision.whole("intermediate_size", 3420),
        num_heads=vision.whole("num_heads", 16),
        in_channels=3,
        patch_size=vision.whole("patch_size", vision.whole("spatial_patch_size", 14)),
        temporal_patch_size=vision.whole("temporal_patch_size", 2),
        merge_size=vision.whole("spatial_merge_size", 2),
        out_hidden_size=vision.whole("out_hidden_size", 3584),
        window_size=vision.whole("window_size", 112),
        full_attention_layers=vision.wholes("fullatt_block_indexes", (7, 15, 23, 31)),
        tokens_per_second=vision.number("tokens_per_second", 4.0),
    )
    check_vision(
        vision,
        hidden_size=sizes.hidden_size,
        num_heads=sizes.num_heads,
        out_hidden_size=sizes.out_hidden_size,
        text_size=text.hidden_size,
    )
    unit = sizes.patch_size * sizes.merge_size
    if sizes.window_size < unit:
        raise vision.fault("window_size", f"pixels of at least one merged patch, {unit}")
    return sizes

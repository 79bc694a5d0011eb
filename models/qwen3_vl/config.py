"""Qwen3-VL's true dimensions, dense and MoE, from a config.json. Its only parser.

A key that is absent has the default of transformers' own config class, as far as that is some published model's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from executor.checkpoint.fields import Fields
from executor.checkpoint.model_config import (
    check_full_attention,
    check_outer_keys,
    check_vision,
    named_architecture,
    read_dtype,
    read_heads,
    read_tied,
)
from executor.checkpoint.rope import Rope, read_rope
from executor.recipe.sizes import ModelShapes, VisionShapes

SECTIONS = (24, 20, 20)
MOE_ARCHITECTURE = "Qwen3VLMoeForConditionalGeneration"
MOE_TYPE = "qwen3_vl_moe"


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
    rope: Rope
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
    vision_end_token_id: int
    dtype: str  # of the checkpoint

    def shapes(self, name: str) -> ModelShapes:
        """What can be reasoned about before a weight is read."""
        text, vision, moe = self.text, self.vision, self.text.moe
        return ModelShapes(
            name=name,
            family="qwen3_vl_moe" if moe else "qwen3_vl",
            vision=VisionShapes(
                depth=vision.depth,
                hidden_size=vision.hidden_size,
                intermediate_size=vision.intermediate_size,
                num_heads=vision.num_heads,
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.merge_size,
                out_size=vision.out_hidden_size,
                num_positions=vision.num_positions,
                num_taps=len(vision.deepstack_layers),
                window_size=0,
                num_full_blocks=vision.depth,
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
            num_experts=moe.num_experts if moe else 0,
            expert_intermediate_size=moe.intermediate_size if moe else 0,
            experts_per_token=moe.top_k if moe else 0,
            num_dense_layers=sum(not moe.is_sparse(layer) for layer in range(text.num_layers)) if moe else 0,
            dtype=self.dtype,
        )


def parse(raw: Mapping[str, Any], file: str = "config.json") -> Config:
    """From the JSON of a config.json, which messages call `file`.

    Raises UserError naming a key that is missing, of a wrong kind, or not what this code computes.
    """
    whole = Fields(raw, file)
    nested, vision = whole.section("text_config"), whole.section("vision_config")
    if nested is None:
        raise whole.fault("text_config", "the sizes of the text model")
    if vision is None:
        raise whole.fault("vision_config", "the sizes of the vision encoder")
    architecture = named_architecture(raw)
    has_experts = architecture == MOE_ARCHITECTURE or (architecture is None and raw.get("model_type") == MOE_TYPE)
    text = _text(nested, has_experts=has_experts)
    check_outer_keys(whole, nested, lambda section: _text(section, has_experts=has_experts))
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


def _text(text: Fields, *, has_experts: bool) -> TextConfig:
    text.only("hidden_act", ("silu",), "silu, as Qwen3-VL is published")
    for key in ("attention_bias", "use_sliding_window"):
        text.only(key, (False,), "false, as Qwen3-VL is published")
    check_full_attention(text, "Qwen3-VL")
    # The two classes differ in their defaults; the mixture's own are no published model's, so its sizes must be there.
    hidden_size = text.whole("hidden_size") if has_experts else text.whole("hidden_size", 4096)
    num_heads, num_kv_heads = read_heads(text, heads=16 if has_experts else 32, kv_heads=16 if has_experts else 32)
    head_dim = _head_dim(text, hidden_size, num_heads, has_experts)
    rope, length = read_rope(text, head_dim, theta=5e5, sections=SECTIONS, length=128000, interleaved=True, nested=True)
    num_layers = text.whole("num_hidden_layers") if has_experts else text.whole("num_hidden_layers", 32)
    return TextConfig(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.whole("intermediate_size", 5632 if has_experts else 22016),
        vocab_size=text.whole("vocab_size", 151936),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        rope=rope,
        max_position_embeddings=length,
        moe=_experts(text, num_layers) if has_experts else None,
    )


def _head_dim(text: Fields, hidden_size: int, num_heads: int, has_experts: bool) -> int:
    """The dense class has 128 where the file says nothing; a null, and the mixture's class, mean an equal share."""
    is_null = "head_dim" in text.values and "head_dim" not in text
    if (has_experts or is_null) and "head_dim" not in text:
        head_dim = hidden_size // num_heads
        if hidden_size % num_heads:
            raise text.fault("head_dim", f"a size: hidden_size {hidden_size} does not divide by {num_heads} heads")
    else:
        head_dim = text.whole("head_dim", 128)
    if head_dim % 2:
        raise text.fault("head_dim", "an even number: heads turn in pairs")
    return head_dim


def _experts(text: Fields, num_layers: int) -> MoEConfig:
    key = "num_experts" if "num_experts" in text else "num_local_experts"  # transformers 5 writes the latter
    num_experts = text.whole(key if key in text else "num_experts")
    if text.whole("num_local_experts", num_experts, null=True) != num_experts:
        raise text.fault("num_local_experts", f"num_experts, {num_experts}: they are one key by two names")
    top_k = text.whole("num_experts_per_tok")
    if top_k > num_experts:
        raise text.fault("num_experts_per_tok", f"at most the number of experts, {num_experts}")
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=text.whole("moe_intermediate_size"),
        renormalize=text.flag("norm_topk_prob", True),
        sparse_step=text.whole("decoder_sparse_step", 1, null=True),
        dense_layers=text.wholes("mlp_only_layers", (), below=num_layers, null=True),
    )


def _vision(vision: Fields, text: TextConfig) -> VisionConfig:
    vision.only("hidden_act", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh, as Qwen3-VL is published")
    depth = vision.whole("depth", 27)
    sizes = VisionConfig(
        depth=depth,
        hidden_size=vision.whole("hidden_size", 1152),
        intermediate_size=vision.whole("intermediate_size", 4304),
        num_heads=vision.whole("num_heads", 16),
        in_channels=3,
        patch_size=vision.whole("patch_size", 16),
        temporal_patch_size=vision.whole("temporal_patch_size", 2),
        merge_size=vision.whole("spatial_merge_size", 2),
        out_hidden_size=vision.whole("out_hidden_size", 3584),
        num_positions=vision.whole("num_position_embeddings", 2304),
        deepstack_layers=vision.wholes("deepstack_visual_indexes", (8, 16, 24), below=depth),
    )
    check_vision(
        vision,
        hidden_size=sizes.hidden_size,
        num_heads=sizes.num_heads,
        out_hidden_size=sizes.out_hidden_size,
        text_size=text.hidden_size,
    )
    if sizes.positions_side**2 != sizes.num_positions:
        raise vision.fault("num_position_embeddings", "the number of places in a square")
    if list(sizes.deepstack_layers) != sorted(set(sizes.deepstack_layers)) or sizes.deepstack_layers[-1:] >= (depth,):
        raise vision.fault("deepstack_visual_indexes", f"rising numbers of layers, all below depth {depth}")
    return sizes

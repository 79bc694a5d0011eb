"""Random tiny checkpoints in transformers' own format, and transformers' own answers: the reference of many tests.

The dimensions are odd on purpose (grouped heads, several windows, taps, 2I != H), the weights random with a spread
that makes attention and routing matter.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from executor.media.patches import normalize_patchify
from executor.schedule.request import Prompt

REPO = Path(__file__).parent.parent
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

_CLASSES = {
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
}


def config_of(family: str, tokenizer: Any, **text_changes: Any) -> Any:
    """A small random model's config of one family, its token ids taken from `tokenizer`."""
    text = {
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 112,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
    }
    vision = {"depth": 3, "num_heads": 2, "out_hidden_size": text["hidden_size"], "spatial_merge_size": 2}
    if family == "qwen2_5_vl":
        # Here the head dim is hidden / heads.
        text |= {
            "hidden_size": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        }
        vision |= {"hidden_size": 160, "intermediate_size": 84, "patch_size": 14, "window_size": 56}
        vision |= {"fullatt_block_indexes": [1], "out_hidden_size": 512, "tokens_per_second": 2}
    else:
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        text |= {"head_dim": 128, "rope_parameters": rope}
        vision |= {"hidden_size": 144, "intermediate_size": 88, "patch_size": 16, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0, 2]}
    if family == "qwen3_vl_moe":
        text |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    text |= text_changes
    special = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in special.items()}
    config_class = getattr(transformers, _CLASSES[family][0])
    return config_class(text_config=text, vision_config=vision, tie_word_embeddings=family == "qwen3_vl", **ids)


def random_model(family: str, config: Any, seed: int = 0) -> Any:
    """transformers' model in fp32 with random weights."""
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[family][1])(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "bias" not in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.08)
    return model


def tokenizer_of(family: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(REPO / "models" / "tiny" / family)


def save_checkpoint(folder: Path, family: str, model: Any) -> Path:
    """A checkpoint folder as published: weights, config, tokenizer, templates and preprocessor configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny = REPO / "models" / "tiny" / family
    for file in tiny.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name not in ("config.json", "generation_config.json"):
            shutil.copy(file, folder / file.name)
    model.save_pretrained(folder)
    shutil.copy(tiny / "generation_config.json", folder / "generation_config.json")
    return folder


def random_checkpoint(folder: Path, family: str) -> Path:
    """A small random checkpoint of one family in `folder`."""
    return save_checkpoint(folder, family, random_model(family, config_of(family, tokenizer_of(family))))


def _media_inputs(prompt: Prompt, pixel_format: Any) -> dict[str, torch.Tensor]:
    """A prompt's pictures and videos as transformers' models take them."""
    inputs: dict[str, Any] = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        items = [item for item in prompt.media if item.kind == kind]
        if items:
            form = pixel_format
            inputs[pixels] = torch.cat(
                [
                    normalize_patchify(
                        item.pixels, form.mean, form.std, form.patch_size, form.temporal_patch_size, form.merge_size
                    )
                    for item in items
                ]
            )
            inputs[grid] = torch.tensor([item.grid_thw for item in items])
    return inputs


@torch.inference_mode()
def prompt_logits(model: Any, prompt: Prompt, pixel_format: Any) -> torch.Tensor:
    """transformers' logits of all of a prompt's tokens, [T, V], with our positions."""
    out = model(
        input_ids=torch.tensor([prompt.token_ids]),
        position_ids=torch.from_numpy(prompt.positions)[:, None],
        **_media_inputs(prompt, pixel_format),
    )
    return out.logits[0]


@torch.inference_mode()
def greedy(model: Any, prompt: Prompt, pixel_format: Any, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """transformers' own greedy tokens for our prompt, and their logits [num_tokens, V].

    With our positions: after a Qwen2.5 video they differ from transformers 5.23's, as the weights were trained
    (elsewhere a test holds them equal to transformers').
    """
    inputs = _media_inputs(prompt, pixel_format)
    tokens, logits, cache = prompt.token_ids, [], None
    positions = torch.from_numpy(prompt.positions)
    chosen: list[int] = []
    for _ in range(num_tokens):
        out = model(
            input_ids=torch.tensor([tokens]),
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **inputs,
        )
        cache, inputs = out.past_key_values, {}
        logits.append(out.logits[0, -1])
        tokens = [int(logits[-1].argmax())]
        positions = torch.full((3, 1), len(prompt.token_ids) + len(chosen) + prompt.position_delta)
        chosen += tokens
    return chosen, torch.stack(logits)

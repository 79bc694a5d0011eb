"""Architectures and processor settings of the tiny models: the real classes at toy sizes, head dims as published.

128 per text head and 80 (Qwen2.5) or 72 (Qwen3) per vision head; 4 query and 2 kv heads; Qwen2.5 alternates window and
full vision attention, Qwen3 taps two vision blocks for DeepStack; the MoE's 2I and I both differ from H.
"""

import json
from pathlib import Path

import transformers
from safetensors.torch import load_file, save_file

from models.tiny.training import tokenizer as tiny_tokenizer

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
FAMILY = {"qwen2_5_vl": "qwen2_5", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3"}
PATCH_PX = {"qwen2_5": 14, "qwen3": 16}
MODEL_CLASS = {
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
}
CONFIG_CLASS = {
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
    "qwen3_vl": transformers.Qwen3VLConfig,
    "qwen3_vl_moe": transformers.Qwen3VLMoeConfig,
}


def token_ids(tokenizer):
    """Special token ids as config.json names them."""
    return {
        f"{name}_token_id": tokenizer.token_to_id(f"<|{name if name.startswith('vision') else name + '_pad'}|>")
        for name in ("image", "video", "vision_start", "vision_end")
    }


def config(name, tokenizer):
    """The transformers config of tiny model `name`."""
    end = {"bos_token_id": tokenizer.token_to_id("<|endoftext|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>")}
    text = {
        "vocab_size": tiny_tokenizer.VOCAB_SIZE,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        **end,
    }
    if name == "qwen2_5_vl":
        text |= {
            "hidden_size": 512,
            "intermediate_size": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 24, 24]},
        }
        vision = {
            "depth": 4,
            "hidden_size": 160,
            "num_heads": 2,
            "intermediate_size": 208,
            "out_hidden_size": 512,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        }
    else:
        text |= {
            "hidden_size": 256,
            "head_dim": 128,
            "intermediate_size": 144,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        }
        vision = {
            "depth": 4,
            "hidden_size": 144,
            "num_heads": 2,
            "intermediate_size": 176,
            "out_hidden_size": 256,
            "patch_size": 16,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [1, 2],
        }
    if name == "qwen3_vl_moe":
        text |= {
            "moe_intermediate_size": 144,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return CONFIG_CLASS[name](
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"], **token_ids(tokenizer)
    )


def processor_configs(family):
    """(preprocessor_config, video_preprocessor_config) as published, with pixel bounds that keep 112x112 pictures."""
    patch_px = PATCH_PX[family]
    mean, std = (CLIP_MEAN, CLIP_STD) if family == "qwen2_5" else ([0.5] * 3, [0.5] * 3)
    least, most = (2 * patch_px) ** 2 * 4, (2 * patch_px) ** 2 * 256
    common = {"patch_size": patch_px, "temporal_patch_size": 2, "merge_size": 2, "image_mean": mean, "image_std": std}
    if family == "qwen2_5":
        picture = {
            "min_pixels": least,
            "max_pixels": most,
            **common,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen2_5_VLProcessor",
        }
        clip = {
            "min_pixels": least,
            "max_pixels": most,
            "size": {"shortest_edge": least, "longest_edge": most},
            **common,
            "do_sample_frames": True,
            "fps": 2,
            "min_frames": 4,
            "max_frames": 768,
            "video_processor_type": "Qwen2VLVideoProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        }
    else:
        picture = {
            "size": {"longest_edge": most, "shortest_edge": least},
            **common,
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
        clip = {
            "size": {"longest_edge": most * 16, "shortest_edge": least},
            **common,
            "processor_class": "Qwen3VLProcessor",
            "video_processor_type": "Qwen3VLVideoProcessor",
        }
    return picture, clip


def store_experts_as_published(file):
    """Rewrite stacked experts as the published files hold them, [E, H, 2I] and [E, I, H]: transformers 5 writes each
    matrix the other way round, which neither vLLM nor msmodelslim reads."""
    tensors = load_file(file)
    for key, value in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[key] = value.transpose(-1, -2).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def save_side_files(name, folder, tokenizer):
    """Everything of a checkpoint folder but config.json and the weights."""
    folder = Path(folder)
    tiny_tokenizer.save(tokenizer, folder, FAMILY[name])
    picture, clip = processor_configs(FAMILY[name])
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    generation = {"bos_token_id": stop[1], "pad_token_id": stop[1], "eos_token_id": stop, "do_sample": False}
    for file, content in (
        ("preprocessor_config.json", picture),
        ("video_preprocessor_config.json", clip),
        ("generation_config.json", generation),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")

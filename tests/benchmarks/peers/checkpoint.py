"""The checkpoint that all peers load, and what they are asked.

Qwen2.5-VL-3B's layer shapes (text and vision) with fewer text layers, random bfloat16 weights, the vocabulary's full
size, and the tokenizer of the tiny checkpoint in models/tiny/qwen2_5_vl, whose special tokens the config names. Files
are those of a published folder. `questions.json` beside them: prompts of an exact length, each drawn anew, as message,
as text behind the chat template and as tokens, so that whatever a peer takes, its model reads the same.
"""

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer

from executor.checkpoint.load import build_on_meta
from models.published import published_config
from models.qwen2_5_vl import runner as family
from tests.benchmarks.peers.timing import DECODES, PREFILLS, Question
from tests.reference import REPO

TINY = REPO / "models/tiny/qwen2_5_vl"
PICTURE_SIZE = 1008, 784  # pixels; 72 x 56 patches, 1008 tokens
PICTURE_TOKENS = 1008
DECODE_TOKENS = 32
TEXT_TOKENS = 1000
MOST_TURNS = 12
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
}


def make(folder: Path, num_layers: int) -> None:
    """Write the folder, unless it is there already."""
    if (folder / "questions.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            shutil.copy(path, folder)
    processing = json.loads((TINY / "preprocessor_config.json").read_text()) | {"max_pixels": 16384 * 28**2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processing))
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    raw = published_config("Qwen2.5-VL-3B-Instruct") | {"num_hidden_layers": num_layers, "model_type": "qwen2_5_vl"}
    raw |= {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    (folder / "config.json").write_text(json.dumps(raw, indent=1))
    save_file(random_tensors(raw), folder / "model.safetensors", metadata={"format": "pt"})
    write_questions(tokenizer, folder)


def write_questions(tokenizer, folder: Path) -> None:
    draw = random.Random(0)
    sizes = {part: (count * MOST_TURNS, DECODE_TOKENS) for part, count in DECODES.items()}
    sizes["text"] = MOST_TURNS, TEXT_TOKENS
    asked = {part: [question(tokenizer, draw, length) for _ in range(n)] for part, (n, length) in sizes.items()}
    asked["picture"] = [picture_question(tokenizer, draw, folder / f"picture_{n}.png") for n in range(MOST_TURNS)]
    assert asked.keys() == {*DECODES, *PREFILLS}
    (folder / "questions.json").write_text(json.dumps(asked, default=asdict))


def random_tensors(raw: dict) -> dict[str, torch.Tensor]:
    """By their names in a published folder: matrices with a spread of 0.02, norms 1, biases 0."""
    torch.manual_seed(0)
    model = build_on_meta(lambda: family.build_model(raw), torch.bfloat16)
    tensors = {}
    for pull in model.pulls({}):
        empty = torch.empty(pull.file_shape, dtype=torch.bfloat16)
        name = pull.name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        tensors[name] = empty.normal_(0, 0.02) if empty.dim() > 1 else empty.fill_(float("bias" not in name))
    return tensors


def question(tokenizer, draw: random.Random, num_tokens: int) -> Question:
    """A prompt of exactly `num_tokens` tokens, template included; it starts unlike every other one."""
    message = ""
    while True:
        prompt = rendered(tokenizer, message)
        ids = tokenizer(prompt)["input_ids"]
        missing = num_tokens - len(ids)
        if missing == 0:
            return Question(message, prompt, ids, num_tokens)
        message = message[:missing] if missing < 0 else message + "".join(draw.choices(LETTERS, k=missing))


def picture_question(tokenizer, draw: random.Random, path: Path) -> Question:
    width, height = PICTURE_SIZE
    pixels = np.random.default_rng(draw.randrange(2**32)).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(8, 0).repeat(8, 1)).save(path)
    message = "what is it"
    prompt = rendered(tokenizer, [{"type": "image", "image": str(path)}, {"type": "text", "text": message}])
    ids = tokenizer(prompt)["input_ids"]
    return Question(message, prompt, ids, len(ids) - 1 + PICTURE_TOKENS, str(path))


def rendered(tokenizer, content: str | list) -> str:
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

"""The tiny models' tokenizer: byte-level BPE on the little world's text, with Qwen's special tokens and templates.

Same construction as Qwen2's (NFC, its pre-tokenizer pattern with single digits, byte-level), only far fewer merges.
Writes tokenizer.json, vocab.json, merges.txt, tokenizer_config.json and chat_template.jinja. Deterministic: no sampling
but the seeded world's. Ids: bytes and merges first, special tokens after them, the rest of config.vocab_size unused.
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from models.tiny.training import world as shapes

VOCAB_SIZE = 512
SYSTEM_PROMPT = "You are a helpful assistant."
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# (token, special): Qwen marks the tool, fill-in-the-middle and thinking tokens as not special.
SPECIAL_TOKENS = [
    (f"<|{name}|>", True)
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
] + [
    ("<tool_call>", False),
    ("</tool_call>", False),
    ("<|fim_prefix|>", False),
    ("<|fim_middle|>", False),
    ("<|fim_suffix|>", False),
    ("<|fim_pad|>", False),
    ("<|repo_name|>", False),
    ("<|file_sep|>", False),
    ("<tool_response>", False),
    ("</tool_response>", False),
    ("<think>", False),
    ("</think>", False),
]
TEMPLATES = {"qwen2_5": "chat_template_qwen2_5.jinja", "qwen3": "chat_template_qwen3.jinja"}


def corpus(seed=0, num_scenes=4000):
    """Lines of questions and answers in the proportions of the world, and the frame around them."""
    rng = random.Random(seed)
    yield from ["system", SYSTEM_PROMPT, "user", "assistant", "<0.3 seconds>"] * 400
    yield from list(shapes.WORDS) * 200
    for _ in range(num_scenes):
        for question in shapes.make_scene(rng, rng.choice(("objects", "objects", "word", "number", "clip"))).questions(
            rng
        ):
            yield question.text
            yield question.answer_for("qwen3")


def build():
    """The trained `tokenizers.Tokenizer`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in SPECIAL_TOKENS])
    return tokenizer


def save(tokenizer, folder, family):
    """Write a checkpoint folder's tokenizer files; family: "qwen2_5" or "qwen3" (they differ in the template)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    added = {
        str(tokenizer.token_to_id(text)): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }
        for text, special in SPECIAL_TOKENS
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [text for text, special in SPECIAL_TOKENS if special][1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text((Path(__file__).parent / TEMPLATES[family]).read_text())

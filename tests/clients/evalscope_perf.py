# /// script
# requires-python = ">=3.11"
# dependencies = ["evalscope[perf]==1.14.1", "torch", "transformers", "pillow"]
# ///
"""evalscope perf: random pictures, random text, token ids, with its probe; every request answered, tokens counted."""

import json
import sqlite3
import sys
import tempfile
from pathlib import Path

from commands import assert_plausible, run

url, folder = sys.argv[1:3]
NUM_REQUESTS, NUM_TOKENS = 12, 8
COMMON = (
    "--model", "qwen3_vl", "--api", "openai", "--tokenizer-path", folder, "--parallel", 4, "--number", NUM_REQUESTS,
    "--min-tokens", NUM_TOKENS, "--max-tokens", NUM_TOKENS, "--min-prompt-length", 20, "--max-prompt-length", 40,
)  # fmt: skip
PICTURES = ("--image-width", 160, "--image-height", 128, "--image-format", "RGB", "--image-num", 1)
RUNS = {
    "pictures": ("/v1/chat/completions", "--dataset", "random_vl", *PICTURES),
    "pictures, not streamed": ("/v1/chat/completions", "--dataset", "random_vl", *PICTURES, "--no-stream"),
    "text, address without a path": ("", "--dataset", "random"),
    "text, at a rate": ("/v1", "--dataset", "random", "--rate", 20, "--seed", 3, "--repetition-penalty", 1.0),
    "token ids": ("/v1/completions", "--dataset", "random", "--tokenize-prompt"),
}  # fmt: skip


def summary_of(output: Path) -> tuple[dict, list[tuple]]:
    """Its summary, and (request, success, latency s, TTFT s, TPOT s, prompt tokens, tokens) of each request."""
    found = next(output.rglob("benchmark_summary.json"))
    query = (
        "select request, success, latency, first_chunk_latency, time_per_output_token, prompt_tokens, completion_tokens"
    )
    with sqlite3.connect(found.with_name("benchmark_data.db")) as rows:
        return json.loads(found.read_text()), list(rows.execute(f"{query} from result"))


for name, (path, *words) in RUNS.items():
    with tempfile.TemporaryDirectory() as home:
        run("evalscope", "perf", "--url", url + path, *COMMON, *words, "--outputs-dir", home, folder=Path(home))
        summary, rows = summary_of(Path(home))
    assert summary["Success Requests"] == summary["Total Requests"] == NUM_REQUESTS == len(rows), (name, summary)
    assert summary["Failed Requests"] == 0 and summary["Avg Output Tokens"] == NUM_TOKENS, (name, summary)
    is_streamed = "--no-stream" not in words
    for request, success, latency_s, ttft_s, tpot_s, num_prompt_tokens, num_tokens in rows:
        assert success and num_tokens == NUM_TOKENS, (name, request[:200])
        assert num_prompt_tokens >= 20, (name, num_prompt_tokens)
        assert ("data:image/png;base64," in request) == ("random_vl" in words), request[:200]
        if is_streamed:
            assert_plausible(ttft_s, latency_s, tpot_s, num_tokens)
    print(f"{name}: {len(rows)} of {NUM_REQUESTS}, {summary['Avg Input Tokens']} tokens in on average")

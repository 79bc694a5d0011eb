# /// script
# requires-python = ">=3.11"
# dependencies = ["aiperf==0.13.0"]
# ///
"""aiperf: streamed chat with text and a picture; every request answered with the tokens asked for."""

import json
import sys
import tempfile
from pathlib import Path

from commands import run

url, folder = sys.argv[1:3]
NUM_REQUESTS, NUM_TOKENS = 12, 8
COMMON = (
    "--model", "qwen3_vl", "--url", url, "--endpoint-type", "chat", "--streaming", "--tokenizer", folder,
    "--use-server-token-count", "--concurrency", 4, "--request-count", NUM_REQUESTS, "--ui", "none",
    "--synthetic-input-tokens-mean", 24, "--synthetic-input-tokens-stddev", 0, "--output-tokens-mean", NUM_TOKENS,
    "--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{NUM_TOKENS}", "--artifact-dir", "out",
)  # fmt: skip
RUNS = {"text": (), "text and a picture": ("--image-width-mean", 160, "--image-height-mean", 128)}

for name, words in RUNS.items():
    with tempfile.TemporaryDirectory() as home:
        # A tokenizer in a folder is loaded by it only where HF_HUB_OFFLINE is not set.
        run("aiperf", "profile", *COMMON, *words, folder=Path(home), environment={"HF_HUB_OFFLINE": "0"})
        found = next((Path(home) / "out").rglob("profile_export.jsonl"))
        records = [json.loads(line)["metrics"] for line in found.read_text().splitlines()]
    assert len(records) == NUM_REQUESTS, (name, len(records))
    for record in records:
        values = {key: record[key]["value"] for key in ("time_to_first_token", "request_latency")}
        assert record["output_sequence_length"]["value"] == NUM_TOKENS, (name, record)
        assert record["input_sequence_length"]["value"] >= 24 + 20 * bool(words), (name, record)
        ttft_s, latency_s = values["time_to_first_token"] / 1e3, values["request_latency"] / 1e3
        assert 0 < ttft_s <= latency_s, (name, values)
    print(f"{name}: {len(records)} of {NUM_REQUESTS}")
